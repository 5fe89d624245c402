"""``dspy.Evaluate`` for async programs: its examples run in tasks, thousands at once in one thread."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import anyio
import dspy

from dspy_mlflow_async.evaluate import calling, results
from dspy_mlflow_async.evaluate.calling import METRIC_THREADS, Caller
from dspy_mlflow_async.evaluate.examples import Conditions, Examples, Rules
from dspy_mlflow_async.evaluate.limits import Slots
from dspy_mlflow_async.evaluate.progress import BOARD
from dspy_mlflow_async.evaluate.remote_examples import Crew, RemoteExamples, check_parts, workers_of
from dspy_mlflow_async.remote.workers import Workers
from dspy_mlflow_async.runs.evaluation import POSTPONED, Postponed, begun_here
from dspy_mlflow_async.runs.handle import KILLED
from dspy_mlflow_async.seams.dspy_evaluate import with_callbacks
from dspy_mlflow_async.workers import run_uninterrupted


class AsyncEvaluate(dspy.Evaluate):
    """A ``dspy.Evaluate`` with ``await evaluator.acall(program)`` beside its own ``evaluator(program)``.

    Programs run through ``acall``, those that have no ``aforward`` in worker threads; metrics may be ``async def``,
    and sync ones run in worker threads too, so that a slow one holds nobody up. The result, the rules for failures
    and what callbacks see are those of ``dspy.Evaluate``::

        evaluator = AsyncEvaluate(devset=devset, metric=metric, max_concurrency=1000)
        result = await evaluator.acall(program)

    Args:
        devset: The examples.
        metric: A function of an example and a prediction, sync or async.
        max_concurrency: How many examples may be in flight; by default ``num_threads``, or else
            ``dspy.settings.async_max_workers``.
        timeout: Seconds that an example may take, prediction and metric together, once it has begun. One that takes
            longer is a failed example, and what it awaits is cancelled.
        workers: Processes that evaluate the examples in ``acall``: a number of them on this machine, or ``Processes``,
            ``Ray`` or ``Executor`` of ``dspy_mlflow_async.remote``. By default this process does.
        num_threads: For calls without ``acall``, as in ``dspy.Evaluate``.
        display_progress: Show a line of progress.
        display_table: Show the results as a table, all or so many of them.
        max_errors: How many failed examples end the evaluation; by default ``dspy.settings.max_errors``.
        provide_traceback: Log failed examples with their traceback; by default ``dspy.settings.provide_traceback``.
        failure_score: The score of a failed example.
        save_as_csv: Where to write the results as CSV.
        save_as_json: Where to write them as JSON.
        **kwargs: Arguments that a later ``dspy.Evaluate`` may have.

    Raises:
        TypeError: For a limit, a timeout, ``max_errors`` or ``failure_score`` that is no number, and for an argument
            that ``dspy.Evaluate`` does not have, which it would itself ignore.
        ValueError: For a limit below 1, or a timeout that is not above 0.
    """

    def __init__(
        self,
        *,
        devset: Sequence[dspy.Example],
        metric: Callable[..., Any] | None = None,
        max_concurrency: int | None = None,
        timeout: float | None = None,
        workers: int | Workers | None = None,
        num_threads: int | None = None,
        display_progress: bool = False,
        display_table: bool | int = False,
        max_errors: int | None = None,
        provide_traceback: bool | None = None,
        failure_score: float = 0.0,
        save_as_csv: str | None = None,
        save_as_json: str | None = None,
        **kwargs: Any,
    ) -> None:
        known = {*inspect.signature(AsyncEvaluate).parameters, *inspect.signature(dspy.Evaluate).parameters} - {
            "kwargs"
        }
        calling.check_keywords(kwargs, "AsyncEvaluate", known)
        super().__init__(
            devset=devset,
            metric=metric,
            num_threads=num_threads,
            display_progress=display_progress,
            display_table=display_table,
            max_errors=calling.check_max_errors(max_errors),
            provide_traceback=provide_traceback,
            failure_score=calling.check_number(failure_score, "failure_score"),
            save_as_csv=save_as_csv,
            save_as_json=save_as_json,
            **kwargs,
        )
        self.max_concurrency = None if max_concurrency is None else calling.check_limit(max_concurrency)
        self.timeout = calling.check_positive(timeout, "timeout", "seconds")
        self.workers = workers_of(workers)

    async def acall(
        self,
        program: Callable[..., Any],
        metric: Callable[..., Any] | None = None,
        devset: Sequence[dspy.Example] | None = None,
        num_threads: int | None = None,
        display_progress: bool | None = None,
        display_table: bool | int | None = None,
        callback_metadata: dict[str, Any] | None = None,
        save_as_csv: str | None = None,
        save_as_json: str | None = None,
        *,
        max_concurrency: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - per example, not of this call
    ) -> dspy.evaluate.EvaluationResult:
        """Evaluate ``program`` without blocking the event loop.

        Cancelling this call cancels its examples and ends its run KILLED. The examples' tasks have each their own
        copy of DSPy's settings, as ``dspy.Evaluate``'s worker threads do.

        Args:
            program: A module, or another callable that takes the examples' inputs by name.
            metric: In place of the evaluator's.
            devset: In place of the evaluator's.
            num_threads: In place of the evaluator's.
            display_progress: In place of the evaluator's.
            display_table: In place of the evaluator's.
            callback_metadata: For callbacks. Source: ``dspy.Evaluate``.
            save_as_csv: In place of the evaluator's.
            save_as_json: In place of the evaluator's.
            max_concurrency: In place of the evaluator's.
            timeout: In place of the evaluator's; seconds.

        Returns:
            The score in percent, and in ``results`` a tuple of example, prediction and score for each example, in
            devset order. A failed one has an empty prediction and the failure score.

        Raises:
            TypeError: For a program or metric that cannot be called, or a limit that is no number.
            ValueError: For an empty devset, no metric, or a limit out of range. Nothing has run then.
            NotCarriedError: For a program or a metric that cannot be sent to ``workers``; says which. Nothing has run.
            Exception: "Execution cancelled due to errors or interruption.", after ``max_errors`` failed examples.

        Source: ``dspy.Evaluate.__call__``.
        """
        calling.check_program(program)
        metric = self.metric if metric is None else metric
        calling.check_metric(metric)
        limit = self.max_concurrency if max_concurrency is None else max_concurrency
        if limit is None:
            limit = num_threads or self.num_threads or dspy.settings.async_max_workers
        if self.workers is not None:
            check_parts(program, metric)
        call = self._evaluate(
            program=program,
            metric=metric,
            devset=calling.check_devset(self.devset if devset is None else devset),
            num_threads=calling.check_limit(limit),
            display_progress=self.display_progress if display_progress is None else display_progress,
            display_table=self.display_table if display_table is None else display_table,
            callback_metadata=callback_metadata,
            save_as_csv=self.save_as_csv if save_as_csv is None else save_as_csv,
            save_as_json=self.save_as_json if save_as_json is None else save_as_json,
            timeout=self.timeout if timeout is None else calling.check_positive(timeout, "timeout", "seconds"),
        )
        async with _closing_in_threads():
            return await call

    @with_callbacks  # type: ignore[untyped-decorator]
    async def _evaluate(
        self,
        program: Callable[..., Any],
        metric: Callable[..., Any],
        devset: list[dspy.Example],
        num_threads: int,
        display_progress: bool,
        display_table: bool | int,
        callback_metadata: dict[str, Any] | None,  # noqa: ARG002 - for callbacks
        save_as_csv: str | None,
        save_as_json: str | None,
        timeout: float | None,  # noqa: ASYNC109
    ) -> dspy.evaluate.EvaluationResult:
        """Evaluate as callbacks see it, with the arguments of ``dspy.Evaluate.__call__`` resolved."""
        settings = dspy.settings
        rules = Rules(
            max_errors=settings.max_errors if self.max_errors is None else self.max_errors,
            provide_traceback=bool(
                settings.provide_traceback if self.provide_traceback is None else self.provide_traceback
            ),
            timeout=timeout,
        )
        callers = Caller(program, num_threads), Caller(metric, min(num_threads, METRIC_THREADS))
        conditions, evaluation = self._conditions(num_threads), begun_here()
        postponed = POSTPONED.get()
        POSTPONED.set(None)  # what the examples evaluate is on its own
        if postponed is not None and postponed.evaluation is evaluation is not None:
            if postponed.opening is not None:
                await run_uninterrupted(postponed.opening)  # cancelled meanwhile: the run is there, and ends KILLED
            evaluation.enter()
        name = getattr(program, "__name__", None) or type(program).__name__
        with BOARD.line(name, len(devset), self.failure_score, is_shown=display_progress) as line:
            if display_progress:
                conditions = replace(conditions, note=line.advance)
                if conditions.crew is not None:
                    conditions.crew.board = line.board
            kind = Examples if conditions.crew is None else RemoteExamples
            outcomes = await kind(*callers, rules, conditions, evaluation).run(devset)
        if not outcomes:
            raise results.NothingRun("a budget was reached before the first example")
        if evaluation is not None:
            evaluation.devset_size = len(outcomes)  # what its run has as `examples`: a budget may have left some out
        result = results.result_of(outcomes, devset, self.failure_score)
        if display_table:
            results.show(self, result.results, metric, display_table)
        if save_as_csv:
            results.save_as_csv(save_as_csv, result.results, metric)
        if save_as_json:
            results.save_as_json(save_as_json, result.results, metric)
        return result

    def _conditions(self, limit: int) -> Conditions:
        """Return the conditions for the examples of one call."""
        return Conditions(Slots(limit), crew=None if self.workers is None else Crew(self.workers))


@contextlib.asynccontextmanager
async def _closing_in_threads() -> AsyncIterator[None]:
    """Log what the evaluation in this block has to log at its end, without blocking the loop, cancelled or not."""
    before, postponed = POSTPONED.get(), Postponed()
    POSTPONED.set(postponed)
    try:
        yield
    finally:
        POSTPONED.set(before)
        if postponed.closing:
            try:
                await run_uninterrupted(_call_all, postponed.closing)
            except anyio.get_cancelled_exc_class():
                # No result for the caller, so its run is no whole one either.
                if postponed.evaluation is not None and postponed.evaluation.run is not None:
                    await run_uninterrupted(postponed.evaluation.run.end, KILLED)
                raise


def _call_all(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()
