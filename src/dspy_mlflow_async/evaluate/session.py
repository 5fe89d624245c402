"""One ``evaluate_all`` from its parent run to its comparison."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
import dspy
import mlflow

from dspy_mlflow_async import hooks
from dspy_mlflow_async.callback import TracingCallback
from dspy_mlflow_async.evaluate import stored_runs, summary
from dspy_mlflow_async.evaluate.budget import Budget, Limits
from dspy_mlflow_async.evaluate.case import Case
from dspy_mlflow_async.evaluate.comparison import FAILED, FINISHED, STOPPED, CaseResult, Comparison
from dspy_mlflow_async.evaluate.evaluator import AsyncEvaluate
from dspy_mlflow_async.evaluate.example_result import Outcome
from dspy_mlflow_async.evaluate.examples import Conditions, is_cancelled_from_outside
from dspy_mlflow_async.evaluate.journal import Journal, Stored
from dspy_mlflow_async.evaluate.limits import Slots
from dspy_mlflow_async.evaluate.progress import BOARD, Line
from dspy_mlflow_async.evaluate.remote_examples import Crew
from dspy_mlflow_async.evaluate.results import NothingRun
from dspy_mlflow_async.evaluate.stored_runs import Plan, StoredCase
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.reachability import look
from dspy_mlflow_async.runs.artifacts import look_for_fonts
from dspy_mlflow_async.runs.datasets import EVALUATION, is_at_hand
from dspy_mlflow_async.runs.evaluation import ALWAYS_LOGGED
from dspy_mlflow_async.runs.handle import FAILED as RUN_FAILED
from dspy_mlflow_async.runs.handle import FINISHED as RUN_FINISHED
from dspy_mlflow_async.runs.handle import KILLED as RUN_KILLED
from dspy_mlflow_async.runs.handle import RunHandle, run_status
from dspy_mlflow_async.seams.installed import needs_whole
from dspy_mlflow_async.workers import call_or_discard, run_uninterrupted

logger = logging.getLogger("dspy_mlflow_async")


class StoreMissingError(ConnectionError):
    """Error of an ``evaluate_all`` that was told to spend nothing without a store."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of ``aevaluate_all``, checked; its docstring tells of each."""

    max_concurrency: int
    timeout: float | None = None
    max_errors: int | None = None
    provide_traceback: bool | None = None
    failure_score: float = 0.0
    raise_on_error: bool = False
    limits: Limits = field(default_factory=Limits)
    run_name: str = "evaluate_all"
    seed: int = 0
    display_progress: bool = True
    require_store: bool = False


class _CaseEvaluate(AsyncEvaluate):
    """Evaluator of one case, under the conditions of all."""

    def __init__(self, case: Case, options: Options, conditions: Conditions) -> None:
        super().__init__(
            devset=case.devset or (),
            metric=case.metric,
            max_concurrency=options.max_concurrency,
            timeout=options.timeout,
            max_errors=options.max_errors,
            provide_traceback=options.provide_traceback,
            failure_score=options.failure_score,
        )
        self._shared = conditions

    def _conditions(self, limit: int) -> Conditions:  # noqa: ARG002 - one limit for all
        return self._shared


class Session:
    """Evaluation of some cases at once. It belongs to one event loop, so it needs no lock.

    Args:
        cases: The cases, checked.
        baseline: The name of the case that the others are compared with.
        options: What holds for all.
        crew: Who evaluates the examples in other processes; None where this one does.
    """

    def __init__(self, cases: Sequence[Case], baseline: str, options: Options, crew: Crew | None = None) -> None:
        self._cases = cases
        self._baseline = baseline
        self._options = options
        self._crew = crew
        self._slots = Slots(options.max_concurrency)
        self._budget = Budget(options.limits, self._slots)
        self._results: dict[str, CaseResult] = {}
        self._failure: BaseException | None = None
        self._plan: Plan | None = None
        self._parent: RunHandle | None = None
        self._stored: Mapping[str, StoredCase] | None = None  # by a run that is resumed

    async def run(self, resume: str | None) -> Comparison:
        """Evaluate all cases.

        Args:
            resume: The parent run of an earlier process, or None.
        """
        self._plan = await anyio.to_thread.run_sync(Plan.of, self._cases)
        problem = await anyio.to_thread.run_sync(self._why_no_store)
        if problem is not None and (resume is not None or self._options.require_store):
            raise ConnectionError(problem)
        self._parent = await _opened(functools.partial(self._open_parent, self._plan, resume, problem))
        status = RUN_FAILED
        try:
            self._announce(problem)
            await anyio.to_thread.run_sync(look_for_fonts)
            with stored_runs.entered(self._parent), _traced():
                await self._evaluate()
            comparison = await anyio.to_thread.run_sync(self._compare)
            if any(case.status != FAILED for case in comparison.cases):
                status = RUN_FINISHED
        except BaseException as error:
            status = run_status(error)
            if self._parent is not None and not isinstance(error, StoreMissingError):
                self._say(f'Stopped. Go on with evaluate_all(..., resume="{self._parent.run_id}").')
            raise
        else:
            return comparison
        finally:
            await _end(self._parent, status)

    def _why_no_store(self) -> str | None:
        """Say why the store's server takes nothing now, at once, in place of the silence of MLflow's retries."""
        problem = look(mlflow.get_tracking_uri()).problem
        if problem is not None and not self._options.require_store:
            logger.warning("%s. The evaluations go on; what they find waits on this machine until then.", problem)
        return problem

    def _announce(self, problem: str | None) -> None:
        """Name the run, so that whatever happens it can be looked at, or resumed."""
        parent = self._parent
        if self._options.require_store and (parent is None or parent.is_pending):
            raise StoreMissingError(
                "the store has not created the run of evaluate_all, and require_store=True wants it"
            )
        if parent is not None:
            where = "" if problem or parent.is_pending else stored_runs.page_of(parent)
            self._say(f"{self._options.run_name}: run {parent.run_id}{where and f' ({where})'}")

    def _say(self, text: str) -> None:
        if self._options.display_progress:
            BOARD.say(text)
        else:
            logger.info("%s", text)

    def _open_parent(self, plan: Plan, resume: str | None, problem: str | None) -> RunHandle | None:
        if resume is None:
            parent = stored_runs.open_parent(self._options.run_name, plan, may_wait=problem is None)
            if parent is not None:
                self._note_devsets(parent)
            return parent
        parent, self._stored = stored_runs.reopen_parent(resume, plan)
        return parent

    @guarded
    def _note_devsets(self, parent: RunHandle) -> None:
        devsets = {id(case.devset): case.devset or () for case in self._cases}  # cases share devsets as a rule
        for devset in devsets.values():
            if is_at_hand(devset):
                parent.dataset("devset", EVALUATION, devset)

    async def _evaluate(self) -> None:
        async with anyio.create_task_group() as group:
            if self._options.limits.seconds is not None:
                group.start_soon(self._watch_clock, self._options.limits.seconds, name="max_seconds")
            async with anyio.create_task_group() as cases:
                for case in self._cases:
                    cases.start_soon(self._case, case, cases.cancel_scope, name=case.name)
            group.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _watch_clock(self, seconds: float) -> None:
        await anyio.sleep(seconds)
        self._budget.out_of_time()

    async def _case(self, case: Case, scope: anyio.CancelScope) -> None:
        """Evaluate one case, in its task."""
        stored = (self._stored or {}).get(case.name)
        if stored is None and self._slots.is_closed:
            self._results[case.name] = summary.case_result(case, {}, STOPPED)
            return
        handle = await _opened(functools.partial(stored_runs.open_case, self._parent, case.name, stored))
        outcomes = {} if stored is None else _kept(stored)
        status, result, failure = RUN_FAILED, None, None
        try:
            with stored_runs.entered(handle), contextlib.suppress(NothingRun):
                result = await self._evaluate_case(
                    case, handle, outcomes, Stored() if stored is None else stored.journal
                )
            if handle is not None:
                await anyio.to_thread.run_sync(self._note_stop, handle, case, len(outcomes), stored is not None)
            status = RUN_FINISHED if outcomes else RUN_KILLED
        except BaseException as error:
            status = run_status(error)
            is_cancellation = isinstance(error, anyio.get_cancelled_exc_class())
            if is_cancelled_from_outside() and (is_cancellation or self._failure is None):
                raise
            failure = error  # a case that fails is reported, and the others go on
        finally:
            await _end(handle, status)
        is_whole = len(outcomes) == len(case.devset or ())
        self._results[case.name] = summary.case_result(
            case,
            outcomes,
            FAILED if failure else FINISHED if is_whole else STOPPED,
            run_id=None if handle is None else handle.run_id,
            result=result,
            error=failure,
            failure_score=self._options.failure_score,
        )
        if failure is not None and (
            self._options.raise_on_error or isinstance(failure, (KeyboardInterrupt, SystemExit))
        ):
            self._failure = self._failure or failure
            scope.cancel()

    async def _evaluate_case(
        self, case: Case, handle: RunHandle | None, outcomes: dict[int, Outcome], stored: Stored
    ) -> Any:
        """Evaluate what is left of a case; ``outcomes`` is filled as it goes."""
        devset = case.devset or ()
        journal = None
        if handle is not None and self._plan is not None:
            journal = Journal(handle, self._plan.keys[case.name], stored, handle.door)
        options = self._options
        line_of = BOARD.line(case.name, len(devset), options.failure_score, is_shown=options.display_progress)
        if self._crew is not None and options.display_progress:
            self._crew.board = BOARD
        with line_of as line, case.context():
            for outcome in outcomes.values():
                line.advance(outcome)
            notes = self._noting(outcomes, line, journal), self._noting_late(outcomes, journal)
            conditions = Conditions(self._slots, dict(outcomes), *notes, self._crew, case.name)
            evaluator = _CaseEvaluate(case, self._options, conditions)
            async with _kept_by(journal):
                metadata = {"metric_key": case.name, ALWAYS_LOGGED: True}
                return await evaluator.acall(case.program, callback_metadata=metadata)

    def _note_stop(self, handle: RunHandle, case: Case, count: int, is_resumed: bool) -> None:
        """Say in the run of a case what has stopped it, or that nothing has stopped it any more."""
        left_out = len(case.devset or ()) - count
        if left_out or is_resumed:
            stopped_by = self._budget.reached if left_out else None
            stopped_tag = stored_runs.stopped_tag(stopped_by, is_resumed=is_resumed)
            handle.tags({stored_runs.STOPPED_TAG: stopped_tag, stored_runs.NOT_RUN_TAG: left_out})
        if not count:
            handle.metrics({"examples": 0})

    def _noting(self, outcomes: dict[int, Outcome], line: Line, journal: Journal | None) -> Callable[[Outcome], None]:
        @guarded
        def note(outcome: Outcome) -> None:
            outcomes[outcome.index] = outcome
            self._budget.spend(outcome)
            line.advance(outcome)
            if journal is not None:
                journal.add(outcome)

        return note

    def _noting_late(self, outcomes: dict[int, Outcome], journal: Journal | None) -> Callable[[Outcome, Outcome], None]:
        @guarded
        def note(whole: Outcome, late: Outcome) -> None:
            outcomes[whole.index] = whole
            self._budget.spend(late)
            if journal is not None:
                journal.add(whole)

        return note

    def _compare(self) -> Comparison:
        """Compare the cases; what fails in that must not lose what has been evaluated."""
        assert self._plan is not None  # noqa: S101 - run has made it
        devsets = {name: texts["devset"] for name, texts in self._plan.texts.items()}
        cases = [self._results[case.name] for case in self._cases]
        try:
            cases = summary.with_differences(self._cases, self._results, self._baseline, self._options.seed, devsets)
        except ImportError:  # mlflow-skinny brings no numpy
            logger.warning("Each case has its result. %s", needs_whole("The difference between cases"))
        except Exception:
            logger.exception("The cases could not be compared; each has its result.")
        parent = self._parent
        comparison = Comparison(
            tuple(cases),
            self._baseline,
            None if parent is None else parent.run_id,
            self._budget.reached,
            tuple(self._budget.unpriced),
            () if self._crew is None else self._crew.report(),
        )
        if parent is not None:
            try:
                summary.log(parent, comparison, is_resumed=self._stored is not None)
            except Exception:
                logger.exception("The comparison could not be logged into the run %s.", parent.run_id)
        return comparison


def _kept(stored: StoredCase) -> dict[int, Outcome]:
    """Return the outcomes that a resume goes on from.

    Where too many failed examples have ended the case, they are run again: it could only end the same way.
    """
    outcomes = dict(stored.journal.outcomes)
    if stored.run.info.status != RUN_FAILED:
        return outcomes
    return {place: outcome for place, outcome in outcomes.items() if not outcome.has_failed}


@contextlib.asynccontextmanager
async def _kept_by(journal: Journal | None) -> AsyncIterator[None]:
    """Let a journal write in the background of a block, to its end; the block's exception comes out as it is."""
    if journal is None:
        yield
        return
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(journal.keep)
            try:
                yield
            except BaseException as error:
                if is_cancelled_from_outside():
                    raise
                failure = error  # the task group would wrap it
            finally:
                journal.close()
    finally:
        await journal.end()
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _traced() -> Iterator[None]:
    """Count tokens and log evaluations in this block, also where no tracer is on; then there are no traces."""
    callbacks = dspy.settings.callbacks
    if any(isinstance(each, TracingCallback) and each.settings is not None for each in callbacks):
        yield
        return
    tracer = TracingCallback(log_traces=False)
    try:
        with dspy.context(callbacks=[*callbacks, tracer]):
            yield
    finally:
        hooks.dismiss(tracer)  # others may keep this context, such as LiteLLM's logging worker


async def _opened(open_run: Callable[[], RunHandle | None]) -> RunHandle | None:
    """Open a run. Should this be cancelled, it ends KILLED: now, or as soon as it is there."""
    return await call_or_discard(open_run, lambda handle, error: stored_runs.end(handle, run_status(error)))


async def _end(handle: RunHandle | None, status: str) -> None:
    """End a run, also while this task is being cancelled; KILLED if that happens meanwhile."""
    try:
        await run_uninterrupted(stored_runs.end, handle, status)
    except anyio.get_cancelled_exc_class():
        await run_uninterrupted(stored_runs.end, handle, RUN_KILLED)
        raise
