"""One evaluation: its run, its examples in devset order, and what is logged when it is over."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import dspy

from dspy_mlflow_async.context import frame as frames
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.runs import active_runs, artifacts, selection
from dspy_mlflow_async.runs.compile import Compile
from dspy_mlflow_async.runs.datasets import EVALUATION, is_at_hand
from dspy_mlflow_async.runs.example import Example
from dspy_mlflow_async.runs.feedback import metric_name
from dspy_mlflow_async.runs.handle import FINISHED, MAX_KEY_LENGTH, RunHandle
from dspy_mlflow_async.runs.lineage import Trial, hash_of
from dspy_mlflow_async.runs.results import Results, usage_of
from dspy_mlflow_async.seams.dspy import program_and_metric, with_program_and_metric
from dspy_mlflow_async.settings import Settings
from dspy_mlflow_async.spans.door import Door

logger = logging.getLogger("dspy_mlflow_async")

DEFAULT_METRIC_KEY = "eval"
# In an evaluation's callback_metadata: it is logged as a run whatever the tracer was told, as evaluate_all wants.
ALWAYS_LOGGED = "dspy_mlflow_async.always_logged"


# Takes an evaluation's examples to other processes in this context: called with the evaluation, its program and its
# metric, it returns the function that evaluates one example, or None where they cannot go there.
ELSEWHERE: ContextVar[Callable[[Evaluation, Any, Any], Callable[[Any], Any] | None] | None] = ContextVar(
    "dspy_mlflow_async_elsewhere", default=None
)


class Postponed:
    """Store requests of an evaluation in an event loop, left to threads: a slow store would block the loop.

    Attributes:
        evaluation: The evaluation, once it has begun.
        opening: What opens its run, or None. To be called before its first example; then comes ``Evaluation.enter``.
        closing: What logs its results and ends its run. To be called when it is over.
    """

    def __init__(self) -> None:
        self.evaluation: Evaluation | None = None
        self.opening: Callable[[], None] | None = None
        self.closing: list[Callable[[], None]] = []


# Where the evaluation that begins next in this context puts what it postpones; None: it postpones nothing.
POSTPONED: ContextVar[Postponed | None] = ContextVar("dspy_mlflow_async_postponed", default=None)


class Attempt:
    """One of the evaluations in a compile: of a candidate of its optimizer, and, where it is logged, at a step.

    Args:
        compile: The compile.
        key: The metric key of the evaluation.
        trial: What notes its score in the lineage of the compile, or None.
    """

    def __init__(self, compile: Compile, key: str, trial: Trial | None = None) -> None:  # noqa: A002 - DSPy's word
        self._compile = compile
        self._key = key
        self._trial = trial
        self._handle: RunHandle | None = None
        self._step: int | None = None
        self._parent: Any = None

    def count(self) -> None:
        """Give it the next step: it is logged."""
        self._handle, self._step = self._compile.begin_evaluation(self._key)
        self._parent = self._handle.run if self._handle is not None else active_runs.innermost()

    def open_run(self) -> RunHandle:
        """Create its run, below that of the compile."""
        return selection.create(f"{self._key}_{self._step}", parent=self._parent)

    def end(self, score: float, run: RunHandle | None) -> None:
        """Tell the compile its score, and in which run it stands."""
        if self._step is not None:
            self._compile.end_evaluation(self._handle, self._key, self._step, score)
        if self._trial is not None:
            self._trial.end(score, self._step, lambda: None if run is None else run.run_id)


class NotedExamples:
    """Examples of an evaluation, in the order in which they have begun, and in that in which they have ended."""

    __slots__ = ("begun", "ended")

    def __init__(self) -> None:
        self.begun: list[Example] = []
        self.ended: list[Example] = []


class Evaluation:
    """One call of ``dspy.Evaluate``, from its start to its end: its run, its examples and its score.

    Args:
        key: The metric key under which an optimizer follows the score.
        metric: The metric.
        devset: The examples.
        door: What is stored passes it.
    """

    def __init__(self, key: str, metric: Any, devset: Sequence[Any], door: Door | None = None) -> None:
        self._door = door or Door()
        self.key = self._door.text(key, MAX_KEY_LENGTH)
        self.metric = metric
        self.devset_size = len(devset)
        self._devset = devset if is_at_hand(devset) else None
        self.run: RunHandle | None = None
        self._examples = NotedExamples()
        self._attempt: Attempt | None = None
        self._postponed = POSTPONED.get()
        if self._postponed is not None:
            self._postponed.evaluation = self
        self._is_logged = False
        self._failure: Exception | None = None
        self._block: active_runs.Block | None = None

    @classmethod
    def of_call(cls, instance: Any, inputs: dict[str, Any], settings: Settings | None = None) -> Evaluation:
        """Return the evaluation that ``instance``, a ``dspy.Evaluate``, begins with these arguments."""
        metadata = inputs.get("callback_metadata") or {}
        metric, devset = inputs.get("metric"), inputs.get("devset")
        return cls(
            metadata.get("metric_key") or DEFAULT_METRIC_KEY,
            instance.metric if metric is None else metric,
            (instance.devset if devset is None else devset) or (),
            Door.here(settings),
        )

    @guarded
    def attempt(self, program: Any, compile: Compile) -> None:  # noqa: A002 - DSPy's word
        """Note which candidate of a compile it evaluates, whether it is logged or not."""
        if compile.lineage is None:
            return
        trial = compile.lineage.begin(program, self.key, metric_name(self.metric), self._devset, self.devset_size)
        self._attempt = Attempt(compile, self.key, trial)

    # --- the run ------------------------------------------------------------------------------------------------

    @guarded
    def open(self, instance: Any, inputs: dict[str, Any], compile: Compile | None) -> None:  # noqa: A002 - DSPy's word
        """Open the run that the contract gives this evaluation, make it active, and log what is being evaluated.

        The choice of the run, and its step, is made here and now, whenever the store is asked.
        """
        self._is_logged = True
        if compile is not None:
            self._attempt = self._attempt or Attempt(compile, self.key)
            self._attempt.count()
        found = selection.find_run(self.key) if self._attempt is None else self._attempt.open_run
        if isinstance(found, RunHandle):
            self.run = found
        threads = inputs.get("num_threads") or instance.num_threads or dspy.settings.num_threads
        fill = functools.partial(self._fill, found, inputs.get("program"), threads)
        if self._postponed is None:
            fill()
            self.enter()
        else:
            self._postponed.opening = fill

    @guarded
    def _fill(self, found: RunHandle | Callable[[], RunHandle], program: Any, threads: Any) -> None:
        try:
            self.run = found if isinstance(found, RunHandle) else found()
        except Exception as error:  # noqa: BLE001 - the store may fail in any way; the evaluation goes on
            self._failure = error
            return
        self.run.door = self._door
        if self._devset is not None:
            self.run.dataset("devset", EVALUATION, self._devset)
        state = artifacts.program_state(program)
        if state is not None:
            self.run.document("model.json", state)
        self.run.show_program(program)
        self.run.params(artifacts.program_params(program) | artifacts.lm_params(self._door))
        self.run.tags(
            {
                "dspy.metric": metric_name(self.metric),
                "dspy.devset_size": self.devset_size,
                "dspy.num_threads": threads,
                "dspy.program_hash": hash_of(program),
            }
        )

    @guarded
    def enter(self) -> None:
        """Make the run active here, if there is one."""
        if self.run is not None:
            self._block = active_runs.Block(self.run.run)

    def leave(self) -> None:
        """Make the run inactive here: what was active before is so again."""
        if self._block is not None:
            self._block.leave()

    def close(self, outputs: Any, status: str) -> None:
        """Log the score and the table, end the run, and tell the compile around it."""
        if self._postponed is None:
            self._close(outputs, status)
        else:
            self._postponed.closing.append(functools.partial(self._close, outputs, status))

    @guarded
    def _close(self, outputs: Any, status: str) -> None:
        score = score_of(outputs)
        try:
            if self.run is not None and status == FINISHED:
                self._log_results(self.run, outputs, score)
        finally:
            if self.run is not None:
                selection.close(self.run, status)
            if self._attempt is not None and score is not None:
                self._attempt.end(score, self.run)
            self._report_gaps(score)

    def _log_results(self, run: RunHandle, outputs: Any, score: float | None) -> None:
        run.metrics({"eval": score})  # first: whatever the user's values do to the rest, the score is there
        results = Results(outputs, self._examples.ended)
        run.metrics({"examples": self.devset_size} | results.statistics() | usage_of(self._examples.begun))
        if self._devset is None:  # read by whoever evaluated it
            run.dataset("devset", EVALUATION, [row[0] for row in getattr(outputs, "results", None) or ()])
        run.table("result_table.json", results.table())

    def _report_gaps(self, score: float | None) -> None:
        if not self._is_logged:
            return
        if self.run is None:
            logger.warning("The evaluation %r scored %s; it has no run (%s).", self.key, score, self._failure)
        elif not self.run.is_complete:
            logger.warning(
                "The evaluation %r scored %s; its run could not be logged in full now. What is in the spool is sent "
                "later, or by `dspy-mlflow-async replay`.",
                self.key,
                score,
            )

    # --- the examples -------------------------------------------------------------------------------------------

    def watch(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Wrap the function that evaluates one example, so that the example is noted.

        Args:
            function: What DSPy gives its worker pool. Its program and its metric are exchanged for ones that tell
                the example; where this DSPy hides them elsewhere, examples have traces and errors but no feedback.
        """

        def evaluate_example(item: Any) -> Any:
            with self.example(item) as example:
                return with_program_and_metric(function, example.run_program, example.run_metric)(item)

        return evaluate_example

    @contextlib.contextmanager
    def example(self, item: Any, index: int | None = None) -> Iterator[Example]:
        """Note the work on one example, sync or async, in the thread or task that does it.

        Args:
            item: The example of the devset. A straggler that DSPy runs twice is noted twice.
            index: Its place in the devset, where the caller knows it.

        Yields:
            What notes its prediction, its score and its end.
        """
        example = Example(index, item, self._door)
        self._examples.begun.append(example)
        frames.enter(f"example-{id(example)}", example=example)
        error: BaseException | None = None
        try:
            yield example
        except BaseException as raised:
            error = raised
            raise
        finally:
            frames.leave(f"example-{id(example)}")
            example.close(error)
            self._examples.ended.append(example)

    def recall(self, index: int | None, trace_id: str | None, error: str | None, duration: float | None) -> Example:
        """Note an example that an earlier, interrupted evaluation has finished; the arguments are ``Example``'s."""
        example = Example(index)
        example.trace_id, example.error, example.duration = trace_id, error, duration
        self._examples.begun.append(example)
        self._examples.ended.append(example)
        return example


def watch_items(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``function`` as DSPy's worker pool should run it here: watched, if an evaluation runs it."""
    evaluation = begun_here()
    if evaluation is None:
        return function
    elsewhere, found = ELSEWHERE.get(), program_and_metric(function)
    sent = None if elsewhere is None or found is None else elsewhere(evaluation, *found)
    return evaluation.watch(function) if sent is None else sent


def begun_here() -> Evaluation | None:
    """Return the evaluation that has just begun in this context; None where none has, or we are inside its work."""
    frame = frames.current()
    if frame is None or not isinstance(frame.evaluation, Evaluation) or frame.example is not None:
        return None
    if frame.parent is not None and frame.parent.evaluation is frame.evaluation:
        return None  # something inside the evaluation runs a pool of its own
    return frame.evaluation


def score_of(outputs: Any) -> float | None:
    """The score of what ``Evaluate`` returned. Source: ``MlflowCallback.on_evaluate_end``."""
    if isinstance(outputs, tuple):
        outputs = outputs[0]
    if isinstance(outputs, dspy.Prediction) or (isinstance(outputs, (int, float)) and not isinstance(outputs, bool)):
        return float(outputs)
    return None
