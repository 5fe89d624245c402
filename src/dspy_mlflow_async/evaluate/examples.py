"""Run of an evaluation's examples in tasks, by the rules of DSPy's ``ParallelExecutor``."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import anyio

from dspy_mlflow_async.evaluate.calling import Caller
from dspy_mlflow_async.evaluate.example_result import NO_TOKENS, Outcome, Tokens
from dspy_mlflow_async.evaluate.limits import Entrance, Slots
from dspy_mlflow_async.runs.evaluation import Evaluation
from dspy_mlflow_async.runs.feedback import text_of
from dspy_mlflow_async.runs.usage import restore, tokens_by_model
from dspy_mlflow_async.seams import dspy_evaluate
from dspy_mlflow_async.spans.usage import Ledger
from dspy_mlflow_async.workers import Threads

if TYPE_CHECKING:
    from typing_extensions import Self

# Both texts are ParallelExecutor's.
CANCELLED_TEXT = "Execution cancelled due to errors or interruption."


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules for each example.

    Attributes:
        max_errors: How many failed examples end the evaluation.
        provide_traceback: Whether a failed example is logged with its traceback.
        timeout: Seconds that an example may take, or None.
    """

    max_errors: int
    provide_traceback: bool
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Conditions:
    """Slots that an evaluation shares with others, earlier outcomes, and functions that are told of its examples.

    Attributes:
        slots: How many examples may be in flight.
        case: What the evaluation is called among others, for the log; empty for one on its own.
        finished: The outcomes of an earlier, interrupted evaluation, by place in the devset.
        note: Called with the outcome of each example that ends.
        note_late: Called when the thread that an example has left behind ends: with the outcome as it is then, and with
            one whose tokens are those alone that were used after the example.
        crew: Who evaluates the examples in other processes; None where this one does.
    """

    slots: Slots
    finished: Mapping[int, Outcome] = field(default_factory=lambda: MappingProxyType({}))
    note: Callable[[Outcome], None] = lambda _: None
    note_late: Callable[[Outcome, Outcome], None] = lambda _, __: None
    crew: Any = None
    case: str = ""


class Examples:
    """Pass over a devset.

    Args:
        program: What predicts.
        metric: What judges.
        rules: What holds for each example.
        conditions: What is shared with other evaluations.
        evaluation: What notes the examples for the tracer, or None.
    """

    def __init__(
        self, program: Caller, metric: Caller, rules: Rules, conditions: Conditions, evaluation: Evaluation | None
    ) -> None:
        self._program = program
        self._metric = metric
        self._rules = rules
        self._conditions = conditions
        self._evaluation = evaluation
        self._outcomes: dict[int, Outcome] = {}
        self._entrance = Entrance()
        self._group: Any = None
        self._errors = 0
        self._fatal: BaseException | None = None

    async def run(self, devset: Sequence[Any]) -> list[Outcome]:
        """Evaluate the examples.

        Returns:
            The outcomes in devset order; fewer than examples where the slots were closed.

        Raises:
            Exception: With ``ParallelExecutor``'s text, after ``max_errors`` failed examples.
            BaseException: What is no ``Exception`` and an example raised, such as ``KeyboardInterrupt``.
        """
        for index, outcome in self._conditions.finished.items():
            self._recall(index, outcome)
        self._end_if_too_many_errors()
        todo = [index for index in range(len(devset)) if index not in self._outcomes]
        async with anyio.create_task_group() as self._group:
            for index in todo:
                if not await self._conditions.slots.enter(self._entrance):
                    break
                self._group.start_soon(self._example, index, devset[index])
        if self._fatal is not None:
            raise self._fatal
        self._end_if_too_many_errors()
        return [self._outcomes[index] for index in sorted(self._outcomes)]

    def _end_if_too_many_errors(self) -> None:
        if self._has_too_many_errors():
            dspy_evaluate.PARALLELIZER_LOGGER.warning(CANCELLED_TEXT)
            raise Exception(CANCELLED_TEXT)  # noqa: TRY002 - ParallelExecutor's own

    def _has_too_many_errors(self) -> bool:
        return self._errors > 0 and self._errors >= self._rules.max_errors

    async def _example(self, index: int, item: Any) -> None:
        """Run one example, in its task."""
        threads = Threads()
        try:
            dspy_evaluate.isolate_settings()
            outcome, noted, error = await self._outcome(index, item, threads)
            if error is not None:
                self._note_error(item, error)
            self._outcomes[index] = outcome
            self._conditions.note(outcome)
            if threads.are_running:
                threads.when_over(functools.partial(self._note_late, outcome, noted))
        except BaseException as fatal:
            if self._fatal is not None and not isinstance(fatal, anyio.get_cancelled_exc_class()):
                return  # of several that end the evaluation the first counts: together they would be wrapped
            if not is_cancelled_from_outside() and self._fatal is None:
                # The program's own: it goes through as it is, where a task group would wrap or swallow it.
                self._fatal = fatal
                self._group.cancel_scope.cancel()
                return
            raise
        finally:
            # Not before what it has spent is counted, and its thread has ended: the limit is one of work.
            threads.when_over(functools.partial(self._conditions.slots.leave, self._entrance))

    async def _outcome(self, index: int, item: Any, threads: Threads) -> tuple[Outcome, Any, Exception | None]:
        noted: Any = None
        try:
            with self._watch(item, index) as noted:
                prediction, score = await self._evaluate(noted, item, threads)
        except Exception as error:  # noqa: BLE001 - ParallelExecutor's rule: any is a failed example
            return _outcome_of(index, noted, error=error), noted, error
        return _outcome_of(index, noted, prediction=prediction, score=score), noted, None

    async def _evaluate(self, noted: Any, item: Any, threads: Threads) -> tuple[Any, Any]:
        timeout = self._rules.timeout
        with time_limit(timeout) as scope:
            inputs = item.inputs()
            with noted.predicting(self._program.function, inputs.keys()):
                prediction = await self._program(threads, **inputs)
            with noted.judging(self._metric.function) as judge:
                score = await self._metric(threads, item, prediction)
                judge(score)
            return prediction, score
        assert scope.cancelled_caught  # noqa: S101 - nothing else ends the block without a result
        raise TimeoutError(f"the example took longer than {timeout:g} seconds")

    def _note_late(self, outcome: Outcome, noted: Any) -> None:
        """Count what the thread of an example that took too long has used until its end."""
        whole = replace(outcome, program_tokens=_tokens(noted.program_usage), metric_tokens=_tokens(noted.metric_usage))
        self._outcomes[outcome.index] = whole
        late = replace(
            outcome,
            program_tokens=_difference(whole.program_tokens, outcome.program_tokens),
            metric_tokens=_difference(whole.metric_tokens, outcome.metric_tokens),
        )
        self._conditions.note_late(whole, late)

    def _note_error(self, item: Any, error: Exception) -> None:
        self._errors += 1
        case = f"{self._conditions.case}: " if self._conditions.case else ""
        if self._rules.provide_traceback:
            trace = getattr(error, "traceback", None) or "".join(traceback.format_exception(error))
            dspy_evaluate.PARALLELIZER_LOGGER.error(f"{case}Error for {text_of(item)}: {text_of(error)}\n{trace}")
        else:
            hint = "Set `provide_traceback=True` for traceback."
            dspy_evaluate.PARALLELIZER_LOGGER.error(f"{case}Error for {text_of(item)}: {text_of(error)}. {hint}")
        if self._has_too_many_errors():
            self._group.cancel_scope.cancel()

    def _watch(self, item: Any, index: int) -> Any:
        return _Unwatched() if self._evaluation is None else self._evaluation.example(item, index)

    def _recall(self, index: int, outcome: Outcome) -> None:
        self._outcomes[index] = outcome
        self._errors += outcome.has_failed
        if self._evaluation is not None:
            example = self._evaluation.recall(index, outcome.trace_id, outcome.error, outcome.duration)
            restore(example.program_usage, outcome.program_tokens)
            restore(example.metric_usage, outcome.metric_tokens)


class _Unwatched:
    """Stand-in for ``runs.example.Example`` where no tracer is on: knows how long the program took."""

    trace_id = None
    program_usage = metric_usage = None
    duration: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @contextlib.contextmanager
    def predicting(self, program: Any, inputs: Any) -> Iterator[None]:  # noqa: ARG002 - Example's signature
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.duration = time.perf_counter() - begun

    @contextlib.contextmanager
    def judging(self, metric: Any) -> Iterator[Callable[[Any], None]]:  # noqa: ARG002 - Example's signature
        yield lambda _: None


def _outcome_of(
    index: int, noted: Any, *, prediction: Any = None, score: Any = None, error: Exception | None = None
) -> Outcome:
    return Outcome(
        index,
        prediction=prediction,
        score=score,
        error=None if error is None else f"{type(error).__name__}: {text_of(error)}",
        duration=noted.duration,
        trace_id=noted.trace_id,
        program_tokens=_tokens(noted.program_usage),
        metric_tokens=_tokens(noted.metric_usage),
    )


def _tokens(ledger: Ledger | None) -> Tokens:
    return NO_TOKENS if ledger is None or not ledger.entries else tokens_by_model([ledger])


def _difference(tokens: Tokens, earlier: Tokens) -> Tokens:
    return {
        model: {key: count - earlier.get(model, {}).get(key, 0) for key, count in counted.items()}
        for model, counted in tokens.items()
    }


def time_limit(seconds: float | None) -> anyio.CancelScope:
    """Return a scope that is cancelled after so many seconds; None for no bound."""
    return anyio.CancelScope(deadline=math.inf if seconds is None else anyio.current_time() + seconds)


def is_cancelled_from_outside() -> bool:
    """Return whether a scope around us, ours or the caller's, is being cancelled."""
    return anyio.current_effective_deadline() == -math.inf
