"""What is said by id about a trace that is held or waits in our queue comes to it, as to one that is stored."""

import mlflow
import pytest
from mlflow.entities import AssessmentSource, Feedback
from mlflow.tracing.client import TracingClient
from runtools import Program, evaluate

import dspy_mlflow_async

HUMAN = AssessmentSource(source_type="HUMAN", source_id="me")
NAMES = (
    "log_assessment", "get_assessment", "update_assessment", "delete_assessment", "set_trace_tag", "delete_trace_tag",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_the_background(runs, monkeypatch):
    """Traces wait in the queue, as they do by default."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "true")


def said(trace):
    """(name, value) of each assessment, by name."""
    return sorted((each.name, each.feedback.value if each.feedback else each.expectation.value) for each in trace)


def last():
    return mlflow.get_last_active_trace_id(thread_local=True)


def log(trace_id):
    mlflow.log_feedback(trace_id=trace_id, name="mine", value=3, source=HUMAN)
    mlflow.log_expectation(trace_id=trace_id, name="gold", value="x", source=HUMAN)
    mlflow.log_assessment(trace_id=trace_id, assessment=Feedback(name="other", value=True, source=HUMAN))


def change(trace_id):
    mine = mlflow.log_feedback(trace_id=trace_id, name="wrong", value=2, source=HUMAN)
    changed = Feedback(name="mine", value=3, source=HUMAN)
    mlflow.update_assessment(trace_id=trace_id, assessment_id=mine.assessment_id, assessment=changed)
    again = mlflow.log_feedback(trace_id=trace_id, name="again", value=1, source=HUMAN)
    mlflow.delete_assessment(trace_id=trace_id, assessment_id=again.assessment_id)
    assert 3 == mlflow.get_assessment(trace_id, mine.assessment_id).feedback.value


def tag(trace_id):
    mlflow.set_trace_tag(trace_id, "kept", "1")
    mlflow.set_trace_tag(trace_id, "gone", "1")
    mlflow.delete_trace_tag(trace_id, "gone")


SAID = {log: [("gold", "x"), ("mine", 3), ("other", True)], change: [("mine", 3)], tag: []}


@pytest.mark.parametrize("say", SAID)
def test_of_a_metric(runs, say):
    """While the trace is held for the metric that is at work: beside what the metric returns."""

    def metric(example, prediction):
        say(last())
        return 1.0

    result = evaluate("a", metric=metric)

    assert 100.0 == result.score
    traces = runs.traces()
    assert [sorted([*SAID[say], ("metric", 1.0)])] * 2 == [said(trace.info.assessments) for trace in traces]
    if say is tag:
        assert [("1", None)] * 2 == [(t.info.tags.get("kept"), t.info.tags.get("gone")) for t in traces]


@pytest.mark.parametrize("say", SAID)
def test_of_a_trace_that_waits(runs, say):
    """It has ended a moment ago."""
    Program()(question="@a")
    say(last())

    (trace,) = runs.traces()
    assert SAID[say] == said(trace.info.assessments)
    if say is tag:
        assert ("1", None) == (trace.info.tags.get("kept"), trace.info.tags.get("gone"))


def test_overriding_feedback(runs):
    """It needs the feedback that it overrides."""
    Program()(question="@a")
    first = mlflow.log_feedback(trace_id=last(), name="mine", value=1, source=HUMAN)
    mlflow.override_feedback(trace_id=last(), assessment_id=first.assessment_id, value=2, source=HUMAN)

    (trace,) = runs.traces()
    assert [2] == [each.feedback.value for each in trace.info.assessments if each.valid]


def test_an_unknown_trace_is_unknown():
    """As with MLflow alone."""
    with pytest.raises(mlflow.MlflowException):
        mlflow.log_feedback(trace_id="tr-none", name="mine", value=1)


def test_undone():
    """``autolog(disable=True)`` gives MLflow its functions back."""
    ours = {getattr(TracingClient, name) for name in NAMES}
    dspy_mlflow_async.autolog(disable=True)

    assert ours.isdisjoint(getattr(TracingClient, name) for name in NAMES)
