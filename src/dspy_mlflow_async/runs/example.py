"""One example of an evaluation: the trace of its prediction, its feedback, its latency and its LM usage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import dspy

from dspy_mlflow_async import export
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.runs.feedback import expectations_of, feedback_of, metric_name, text_of
from dspy_mlflow_async.seams.mlflow_spans import SOURCE_SCORER_TAG, TRACE_CONTEXT, OpenSpan, extended_context
from dspy_mlflow_async.spans.door import Door
from dspy_mlflow_async.spans.usage import Ledger

JUDGED_TRACE = "dspy_mlflow_async.judgedTrace"


class Example:
    """Record of the work on one example, written by the one thread or task that works on it.

    Args:
        index: Its place in the devset, or None where that is not known.
        item: The example itself.
        door: What is stored of its feedback passes it.

    Attributes:
        prediction: What the program returned, as far as ``run_program`` was used.
        trace_id: MLflow's id of the prediction's trace, or None where there is none.
        error: What the program or the metric raised, as text, or None.
        duration: How long the program took, in seconds.
        program_usage: The LM calls of the program.
        metric_usage: The LM calls of the metric.
    """

    def __init__(self, index: int | None, item: Any = None, door: Door | None = None) -> None:
        self._door = door or Door()
        self.index = index
        self.item = item
        self.prediction: Any = None
        self.trace_id: str | None = None
        self.error: str | None = None
        self.duration: float | None = None
        self.program_usage = Ledger()
        self.metric_usage = Ledger()
        self._inputs: Collection[str] = ()
        self._is_predicting = False
        self._is_held = False

    def on_span_start(self, span: OpenSpan) -> None:
        """Note the trace of the first span that begins while the program predicts: it is the prediction's."""
        if self._is_predicting and self.trace_id is None:
            self.trace_id = span.trace_id
            # The metric's feedback goes with the trace, so that it cannot race with the store.
            export.hold(self.trace_id)
            self._is_held = True

    @property
    def is_judging(self) -> bool:
        """Return whether the program has predicted, so that what happens now is the metric's doing."""
        return self.duration is not None

    def ledger(self) -> Ledger:
        """Return the ledger of an LM call that begins now."""
        return self.metric_usage if self.is_judging else self.program_usage

    @contextlib.contextmanager
    def predicting(self, program: Any, inputs: Collection[str]) -> Iterator[None]:
        """Note the duration and the trace of the program's prediction, sync or async, for a block around it.

        Args:
            program: The program.
            inputs: The names of its arguments: what else the example has are labels.
        """
        self._inputs = inputs
        # What is not a module may make any number of traces, none of which is the prediction's.
        self._is_predicting = isinstance(program, dspy.Module)
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.duration = time.perf_counter() - begun
            self._is_predicting = False

    @contextlib.contextmanager
    def judging(self, metric: Any) -> Iterator[Callable[[Any], None]]:
        """Attach the result of the metric, sync or async, to the trace of the prediction, for a block around the call.

        Traces that the metric makes itself, as an LM judge does, are marked as its own and linked to the judged one.

        Yields:
            A function to call with what the metric returned.
        """
        before = TRACE_CONTEXT.get()
        self._mark_judge_traces(metric)
        scores: list[Any] = []
        try:
            yield scores.append
        except Exception as error:
            self._attach(metric, error=error)
            raise
        finally:
            TRACE_CONTEXT.set(before)
        for score in scores:
            self._attach(metric, score=score)

    def run_program(self, program: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Call the program, and note its prediction."""
        with self.predicting(program, inputs):
            self.prediction = program(**inputs)
        return self.prediction

    def run_metric(self, metric: Callable[..., Any], *judged: Any) -> Any:
        """Call the metric, and attach its feedback."""
        with self.judging(metric) as judge:
            score = metric(*judged)
            judge(score)
        return score

    @guarded
    def close(self, error: BaseException | None) -> None:
        """End the example; ``error`` is what it raised, or None."""
        if error is not None:
            self.error = f"{type(error).__name__}: {text_of(error)}"
        self._release()

    @guarded
    def _mark_judge_traces(self, metric: Any) -> None:
        metadata = {} if self.trace_id is None else {JUDGED_TRACE: self.trace_id}
        tags = {SOURCE_SCORER_TAG: metric_name(metric)}
        TRACE_CONTEXT.set(extended_context(metadata=metadata, tags=tags))

    @guarded
    def _attach(self, metric: Any, *, score: Any = None, error: Exception | None = None) -> None:
        if self.trace_id is not None:
            self._release(feedback_of(metric, self._door, score=score, error=error))

    def _release(self, *assessments: Any) -> None:
        if self._is_held and self.trace_id is not None:
            self._is_held = False
            export.release(self.trace_id, assessments=[*assessments, *(self._expectations() or ())])

    @guarded
    def _expectations(self) -> list[Any]:
        return expectations_of(self.item, self._inputs, self._door)
