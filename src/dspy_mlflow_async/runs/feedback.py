"""Turns what a metric returned or raised, and an example's labels, into assessments on the trace of the prediction."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection
from typing import Any

import dspy
from mlflow.entities import AssessmentError, AssessmentSource, AssessmentSourceType, Expectation, Feedback

from dspy_mlflow_async.spans.door import Door
from dspy_mlflow_async.spans.outcome import failure_of
from dspy_mlflow_async.spans.safe_inspection import contain
from dspy_mlflow_async.spans.serialize import with_floats_replaced

MAX_FEEDBACK_BYTES = 64 * 1024
MAX_EXPECTATIONS = 20  # of an example; more are one mapping
MAX_NAME = 250  # characters, what every store takes


def metric_name(metric: Any) -> str:
    """A metric's name, whatever its shape: function, lambda, partial, bound method, callable object."""
    while isinstance(metric, functools.partial):
        metric = metric.func
    try:
        name = getattr(metric, "__name__", None)
    except Exception:  # noqa: BLE001 - its __getattr__ is the user's code
        name = None
    name = name or type(metric).__name__
    return "metric" if name == "<lambda>" else str(name)


def text_of(value: Any) -> str:
    """The text of an exception or an example, whose ``__str__`` may be the user's, and raise."""
    try:
        return str(value)
    except BaseException as failure:  # noqa: BLE001 - as said
        contain(failure)
        return f"<no text: {type(failure).__name__}>"


def feedback_of(metric: Any, door: Door, *, score: Any = None, error: Exception | None = None) -> Feedback:
    """The feedback of one metric call.

    Args:
        metric: The metric.
        door: What is stored passes it.
        score: What it returned: a number, a boolean, a text, a ``dspy.Prediction`` with ``score`` and ``feedback``.
        error: What it raised, in place of a score.

    Source: ``mlflow.dspy.autolog._patch_metric``.
    """
    is_judge = isinstance(metric, dspy.Module)
    source = AssessmentSource(
        source_type=AssessmentSourceType.LLM_JUDGE if is_judge else AssessmentSourceType.CODE,
        source_id=metric_name(metric),
    )
    if error is not None:
        failure = door.failure(failure_of(error)._replace(message=text_of(error)))
        told = AssessmentError(failure.type, failure.message, failure.stacktrace)
        return Feedback(name=metric_name(metric), error=told, source=source)
    rationale = None
    if issubclass(type(score), dspy.Prediction):
        score, rationale = getattr(score, "score", None), getattr(score, "feedback", None)
    return Feedback(
        name=metric_name(metric),
        value=_storable(score, door),
        rationale=None if rationale is None else str(_storable(rationale, door)),
        source=source,
    )


def expectations_of(item: Any, inputs: Collection[str], door: Door) -> list[Expectation]:
    """Return the labels of an example, by which a reader of a wrong answer sees the right one.

    Args:
        item: The example.
        inputs: The fields that the program was given; all others are labels.
        door: What is stored passes it.
    """
    if not issubclass(type(item), dspy.Example):
        return []
    labels = {key: value for key, value in dspy.Example.items(item) if key not in inputs and value is not None}
    if len(labels) > MAX_EXPECTATIONS:
        labels = {"labels": labels}
    source = AssessmentSource(source_type=AssessmentSourceType.HUMAN, source_id="devset")
    return [
        Expectation(name=door.text(key, MAX_NAME), value=_storable(value, door), source=source)
        for key, value in labels.items()
    ]


def _storable(value: Any, door: Door) -> Any:
    if value is None:
        return "None"  # MLflow takes no feedback without a value
    if not issubclass(type(value), (str, bytes, dict, list, tuple)):
        with contextlib.suppress(Exception):  # not one, or an array of several; and it may be the user's code
            value = value.item()  # a NumPy scalar
    plain = door.plain(MAX_FEEDBACK_BYTES)
    shown = plain(value)
    # MLflow sends feedback as JSON.
    return with_floats_replaced(shown, str) if plain.has_unusual_floats else shown
