"""Examples in other processes: the side of the evaluation, and below it that of the worker.

An outcome that comes back is noted as a resume notes one.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import traceback
import uuid
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import anyio.to_thread
import dspy

from dspy_mlflow_async.composition import current_settings
from dspy_mlflow_async.context import frame as frames
from dspy_mlflow_async.evaluate.calling import METRIC_THREADS, Caller
from dspy_mlflow_async.evaluate.case import Case
from dspy_mlflow_async.evaluate.example_result import Outcome
from dspy_mlflow_async.evaluate.examples import Conditions, Examples, Rules
from dspy_mlflow_async.evaluate.limits import Slots
from dspy_mlflow_async.evaluate.lost_attempts import (
    ATTEMPT_TAG,
    EVALUATION_TAG,
    EXAMPLE_TAG,
    mark_losses,
    mark_unfinished,
)
from dspy_mlflow_async.evaluate.progress import NO_BOARD, Board
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.remote import pickling
from dspy_mlflow_async.remote.carried import Carried, attached_as, carry
from dspy_mlflow_async.remote.plan import Plan, WorkerBooks, process_name, run_in_loop
from dspy_mlflow_async.remote.processes import Processes
from dspy_mlflow_async.remote.workers import Loss, WorkerLostError, WorkerReport, Workers
from dspy_mlflow_async.runs.evaluation import ELSEWHERE, Evaluation
from dspy_mlflow_async.runs.usage import restore
from dspy_mlflow_async.seams.dspy import settings_here
from dspy_mlflow_async.seams.dspy_evaluate import isolate_settings
from dspy_mlflow_async.seams.mlflow_spans import TRACE_CONTEXT, extended_context
from dspy_mlflow_async.spans.door import Door
from dspy_mlflow_async.spans.scopes import Region
from dspy_mlflow_async.spans.usage import Ledger
from dspy_mlflow_async.workers import Threads

logger = logging.getLogger("dspy_mlflow_async")

_MARKING_SECONDS = 30.0


def workers_of(workers: int | Workers | None) -> Workers | None:
    """Return the workers that ``workers=`` of an evaluation means, or None for none.

    Raises:
        TypeError: For anything else.
        ValueError: For a number below 1.
    """
    if workers is None or isinstance(workers, Workers):
        return workers
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise TypeError(
            f"workers must be a number of processes, or Processes, Ray or Executor of "
            f"dspy_mlflow_async.remote, not {workers!r}"
        )
    return Processes.shared(workers) if workers >= 1 else Processes(workers)


def check(cases: Sequence[Case]) -> None:
    """Refuse cases that cannot be sent to other processes.

    Raises:
        NotCarriedError: Says which part of which case it is.
    """
    for case in cases:
        with case.context():
            _parts(case.program, case.metric, f" of case {case.name!r}")


def check_parts(program: Any, metric: Any) -> None:
    """Refuse a program and a metric that cannot be sent to other processes.

    Raises:
        NotCarriedError: Says which of them it is, or which setting.
    """
    _parts(program, metric)


def _parts(program: Any, metric: Any, whose: str = "") -> tuple[bytes, bytes, bytes, Carried]:
    return (
        pickling.dumps(f"the program{whose}", program),
        pickling.dumps(f"the metric{whose}", metric),
        pickling.dump_settings(settings_here()),
        carry(settings=False),
    )


class Crew:
    """Workers of one evaluation, or of several that belong together, and what each of them has done.

    Args:
        workers: The workers.

    Attributes:
        losses: Attempts at examples that were lost with their process, by the example's place.
        board: Where each worker has a line, if anybody looks.
    """

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.board: Board = NO_BOARD
        self.losses: list[tuple[int, Loss]] = []
        self._examples: Counter[str] = Counter()
        self._books: dict[str, WorkerBooks] = {}

    @contextlib.asynccontextmanager
    async def opened(self, job: Callable[[], ExampleJob]) -> AsyncIterator[Plan]:
        """Give out the plan of one evaluation; at the end its traces are stored, and the plan is forgotten."""
        plan = await anyio.to_thread.run_sync(lambda: Plan.of(job()))
        await anyio.to_thread.run_sync(self.workers.start)
        try:
            yield plan
        finally:
            with anyio.CancelScope(shield=True):
                for books in await self.workers.settled(plan):
                    self._books[books.process] = books
            self.workers.close(plan)

    async def run(self, plan: Plan, index: int, item: Any, note_loss: Callable[[tuple[int, Loss]], None]) -> Reply:
        """Have one example evaluated.

        Args:
            plan: The plan of its evaluation.
            index: Its place in the devset.
            item: The example.
            note_loss: Called with the place and the loss of each attempt that is lost.

        Raises:
            NotCarriedError: Where the example cannot be pickled.
            WorkerLostError: Where its third attempt is lost.
        """
        data = pickling.dumps(f"example {index}", item)

        def lost(loss: Loss) -> None:
            if not any(loss.process == each.process and loss.reason == each.reason for _, each in self.losses):
                self.board.say(f"a worker is lost, and what it had in hand is tried again: {loss.reason}")
                self.board.worker(loss.process, self._examples[loss.process], is_gone=True)
            self.losses.append((index, loss))
            note_loss((index, loss))

        reply: Reply = pickling.loads(
            await self.workers.call(
                plan,
                lambda attempt: pickling.dumps("an example", (index, attempt, data)),
                lost,
            )
        )
        self._examples[reply.process] += 1
        self.board.worker(reply.process, self._examples[reply.process])
        return reply

    def report(self) -> tuple[WorkerReport, ...]:
        """Return what each process has done."""
        lost: dict[str, list[int]] = {}
        for index, loss in self.losses:
            lost.setdefault(loss.process, []).append(index)
        return tuple(
            WorkerReport(name, self._examples[name], tuple(lost.get(name, ())), self._books.get(name))
            for name in sorted({*self._examples, *self._books, *lost})
        )


# --- dspy.Evaluate, and what evaluates through it ---------------------------------------------------------------------


@contextlib.contextmanager
def on(workers: int | Workers) -> Iterator[None]:
    """Let each ``dspy.Evaluate`` that begins in the block evaluate its examples in other processes, optimizers' too::

        with on(4):
            optimizer.compile(program, trainset=trainset)

    Everything else stays with DSPy, in this process: order, ``max_errors``, progress, and ``num_threads``, which is how
    many examples are in flight. A program or a metric that cannot be pickled is evaluated here, with a warning. The
    tracer must be on.

    Args:
        workers: A number of processes on this machine, or ``Processes``, ``Ray`` or ``Executor``.

    Raises:
        TypeError: For anything else.
        ValueError: For a number below 1.
    """
    found = workers_of(workers)
    if found is None:
        raise TypeError("on takes workers, not None")
    block, before = _Block(found), ELSEWHERE.get()
    ELSEWHERE.set(block.evaluate)
    try:
        yield
    finally:
        ELSEWHERE.set(before)
        block.settle()


class _Block:
    """One block of ``on``.

    Args:
        workers: The workers.
    """

    def __init__(self, workers: Workers) -> None:
        self._crew = Crew(workers)
        self._last: Plan | None = None

    def evaluate(self, evaluation: Evaluation, program: Any, metric: Any) -> Callable[[Any], Any] | None:
        """Return the function that evaluates one example, for DSPy's worker threads; None to do it here."""
        limit = max(1, dspy.settings.async_max_workers)
        try:
            parts = _parts(program, metric)
            plan = Plan.of(ExampleJob(*parts, evaluation.key, uuid.uuid4().hex, None, limit))
        except pickling.NotCarriedError as error:
            logger.warning("%s: this evaluation runs here.", error)
            return None
        self._crew.workers.start()
        self._last = plan
        numbers = itertools.count()

        def evaluate_example(item: Any) -> Any:
            call = self._crew.run(plan, next(numbers), item, lambda _: None)
            reply = run_in_loop(call)
            outcome = reply.outcome
            example = evaluation.recall(None, outcome.trace_id, outcome.error, outcome.duration)
            example.item, example.prediction = item, outcome.prediction
            reply.count(example.program_usage, example.metric_usage)
            _count_in_compile(reply)
            if outcome.error is not None:
                raise RemoteError(outcome.error, reply.traceback)
            return outcome.prediction, outcome.score

        weakref.finalize(evaluate_example, self._crew.workers.close, plan)
        return evaluate_example

    def settle(self) -> None:
        """Bring to the store what the workers have traced."""
        if self._last is not None:
            run_in_loop(self._crew.workers.settled(self._last))


@guarded
def _count_in_compile(reply: Reply) -> None:
    """Count the LM calls of an example by their roles in the optimizer's compile around it."""
    frame = frames.current()
    if frame is not None and frame.compile is not None and frame.compile.run is not None:
        nobodys = object()  # the LM is elsewhere; in an example its role does not depend on it
        reply.count(*(frame.compile.ledger(nobodys, in_example=True, is_judging=judging) for judging in (False, True)))


class RemoteError(Exception):
    """Error of an example in another process, as text: what was raised there may mean nothing here.

    Attributes:
        traceback: Its traceback there.
    """

    def __init__(self, text: str, trace: str = "") -> None:
        super().__init__(text)
        self.traceback = trace


class RemoteExamples(Examples):
    """Pass over a devset in other processes, by the same rules."""

    async def run(self, devset: Sequence[Any]) -> list[Outcome]:
        """Evaluate the examples, and bring to the store what the workers have traced of them."""
        self._name, self._losses = uuid.uuid4().hex, list[tuple[int, Loss]]()
        try:
            async with self._crew.opened(self._job) as self._plan:
                return await super().run(devset)
        finally:
            if self._losses or self._conditions.finished:
                with anyio.move_on_after(_MARKING_SECONDS, shield=True):
                    await anyio.to_thread.run_sync(self._mark, abandon_on_cancel=True)

    @guarded
    def _mark(self) -> None:
        """Mark the traces of lost attempts, as far as they have arrived, so that each example counts once."""
        mark_losses(self._name, self._losses)
        run = None if self._evaluation is None else self._evaluation.run
        if self._conditions.finished and run is not None and not run.is_pending:
            mark_unfinished(run, {index: outcome.trace_id for index, outcome in self._outcomes.items()})

    @property
    def _crew(self) -> Crew:
        crew: Crew = self._conditions.crew
        return crew

    def _job(self) -> ExampleJob:
        program, metric, settings, carried = _parts(self._program.function, self._metric.function)
        key = "eval" if self._evaluation is None else self._evaluation.key
        limits = self._rules.timeout, self._conditions.slots.limit
        return ExampleJob(program, metric, settings, carried, key, self._name, *limits)

    async def _outcome(self, index: int, item: Any, threads: Threads) -> tuple[Outcome, Any, Exception | None]:  # noqa: ARG002 - they are elsewhere
        try:
            reply = await self._crew.run(self._plan, index, item, self._losses.append)
        except WorkerLostError as error:
            reply = Reply(Outcome(index, error=f"WorkerLostError: {error}"))
        outcome, noted = reply.outcome, None
        if self._evaluation is not None:
            noted = self._evaluation.recall(index, outcome.trace_id, outcome.error, outcome.duration)
            reply.count(noted.program_usage, noted.metric_usage)
        return outcome, noted, None if outcome.error is None else RemoteError(outcome.error, reply.traceback)


@dataclass(frozen=True, slots=True)
class Reply:
    """Facts of an example that come home.

    Attributes:
        outcome: Its outcome.
        program_calls: How many LM calls the program has made.
        metric_calls: The same of the metric.
        traceback: That of what it has raised.
        process: Who has evaluated it.
    """

    outcome: Outcome
    program_calls: int = 0
    metric_calls: int = 0
    traceback: str = ""
    process: str = ""

    def count(self, program: Ledger, metric: Ledger) -> None:
        """Count the LM calls in the ledgers of this side."""
        restore(program, self.outcome.program_tokens)
        restore(metric, self.outcome.metric_tokens)
        for ledger, calls in ((program, self.program_calls), (metric, self.metric_calls)):
            for _ in range(calls):
                ledger.begin()
                ledger.end()


# --- the worker -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExampleJob:
    """One evaluation as bytes; unpickled in a worker it becomes a ``Bench``.

    Attributes:
        program: The program, pickled.
        metric: The metric, pickled.
        settings: DSPy's settings, pickled.
        carried: The tracing context of the evaluation.
        key: The metric key of the evaluation.
        name: What its traces are tagged with.
        timeout: Seconds that an example may take, or None.
        threads: How many threads may be in the program at once, if it is sync.
    """

    program: bytes = field(repr=False)  # these have the keys of LMs
    metric: bytes = field(repr=False)
    settings: bytes = field(repr=False)
    carried: Carried
    key: str
    name: str
    timeout: float | None
    threads: int

    def __reduce__(self) -> tuple[Any, ...]:
        return Bench, tuple(getattr(self, name) for name in self.__slots__)

    async def run(self, item: bytes) -> bytes:
        """Do nothing: it works where it is unpickled."""
        raise NotImplementedError


class Bench:
    """One evaluation in a worker process. Belongs to one event loop."""

    def __init__(
        self,
        program: bytes,
        metric: bytes,
        settings: bytes,
        carried: Carried,
        key: str,
        name: str,
        timeout: float | None,
        threads: int,
    ) -> None:
        self._carried = carried
        with attached_as(carried):  # the tracer first: what is unpickled next may look for it
            self._settings = pickling.load_settings(settings)
            self._program = Caller(pickling.loads(program), threads)
            self._metric = Caller(pickling.loads(metric), min(threads, METRIC_THREADS))
        self._key, self._name = key, name
        self._rules = Rules(max_errors=2**62, provide_traceback=False, timeout=timeout)

    async def run(self, item: bytes) -> bytes:
        """Evaluate one example, and return the reply."""
        index, attempt, data = pickling.loads(item)
        threads = Threads()
        with attached_as(self._carried, self._settings):
            isolate_settings()
            tags = {EVALUATION_TAG: self._name, EXAMPLE_TAG: str(index), ATTEMPT_TAG: str(attempt)}
            TRACE_CONTEXT.set(extended_context(metadata={}, tags=tags))
            evaluation = Evaluation(self._key, self._metric.function, (), Door.here(current_settings()))
            region = Region(isolated=True, suppressed=False)
            frames.enter("remote-evaluation", region, evaluation=evaluation)
            region.enter()
            examples = _Example(self._program, self._metric, self._rules, Conditions(Slots(1)), evaluation)
            outcome, noted, error = await examples.outcome(index, pickling.loads(data), threads)
        trace = "" if error is None else "".join(traceback.format_exception(error))
        reply = Reply(outcome, noted.program_usage.calls, noted.metric_usage.calls, trace, process_name())
        return _dumped(reply)


class _Example(Examples):
    """One example on its own."""

    async def outcome(self, index: int, item: Any, threads: Threads) -> tuple[Outcome, Any, Exception | None]:
        return await self._outcome(index, item, threads)


def _dumped(reply: Reply) -> bytes:
    outcome = reply.outcome
    # What they are made of does not pickle.
    outcome = replace(outcome, program_tokens=dict(outcome.program_tokens), metric_tokens=dict(outcome.metric_tokens))
    try:
        return pickling.dumps("the prediction", replace(reply, outcome=outcome))
    except pickling.NotCarriedError as error:
        text = f"{type(error).__name__}: {error}"
        failed = replace(outcome, prediction=None, score=None, error=text)
        return pickling.dumps("the outcome", replace(reply, outcome=failed))
