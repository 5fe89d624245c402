"""What is said by id about a trace that is held or waits in our queue comes to it, as to one that is stored."""

import contextlib
import inspect
import json
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
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
    assert [sorted([*SAID[say], ("metric", 1.0), ("gold", gold)]) for gold in ("@a-0", "no")] == [
        said(trace.info.assessments) for trace in traces
    ]
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


# --- every function of MLflow's that takes a trace's id, right after a call -----------------------------------------


def call_once():
    """A call that has just ended: its trace waits in the queue."""
    Program()(question="@waiting")
    return last()


def assessed():
    """A trace with an assessment, and the id of that; both wait."""
    trace_id = call_once()
    return trace_id, mlflow.log_feedback(trace_id=trace_id, name="mine", value=1, source=HUMAN).assessment_id


def prompt():
    return mlflow.genai.register_prompt(name="by-id", template="Ask {{question}}")


def tags_of(trace_id):
    return TracingClient().get_trace_info(trace_id).tags


def linked_prompts(trace_id):
    return json.loads(tags_of(trace_id)["mlflow.linkedPrompts"])[0]["name"]


def feedback_after(trace_id, *_):
    return said(TracingClient().get_trace(trace_id).info.assessments)


def is_whole(trace):
    return trace.data.spans[0].name == "Program.forward" and len(trace.data.spans) > 1


SOMETHING = Feedback(name="mine", value=2, source=HUMAN)
# By owner and name: what is done with a trace that waits, and what is to come of it.
DONE_BY_ID = {
    "mlflow.get_trace": lambda store: is_whole(mlflow.get_trace(call_once())),
    "mlflow.log_feedback": lambda store: feedback_after(assessed()[0]) == [("mine", 1)],
    "mlflow.log_expectation": lambda store: (
        mlflow.log_expectation(trace_id=(it := call_once()), name="gold", value="x", source=HUMAN),
        feedback_after(it) == [("gold", "x")],
    )[1],
    "mlflow.log_issue": None,  # needs an issue that the store knows
    "mlflow.log_assessment": lambda store: (
        mlflow.log_assessment(trace_id=(it := call_once()), assessment=SOMETHING),
        feedback_after(it) == [("mine", 2)],
    )[1],
    "mlflow.get_assessment": lambda store: mlflow.get_assessment(*assessed()).feedback.value == 1,
    "mlflow.update_assessment": lambda store: (
        mlflow.update_assessment(*(it := assessed()), SOMETHING),
        feedback_after(*it) == [("mine", 2)],
    )[1],
    "mlflow.override_feedback": lambda store: (
        mlflow.override_feedback(trace_id=(it := assessed())[0], assessment_id=it[1], value=3),
        ("mine", 3) in feedback_after(*it),
    )[1],
    "mlflow.delete_assessment": lambda store: (
        mlflow.delete_assessment(*(it := assessed())),
        feedback_after(*it) == [],
    )[1],
    "mlflow.set_trace_tag": lambda store: (
        mlflow.set_trace_tag(it := call_once(), "kept", "1"),
        tags_of(it)["kept"] == "1",
    )[1],
    "mlflow.delete_trace_tag": lambda store: (
        mlflow.set_trace_tag(it := call_once(), "gone", "1"),
        mlflow.delete_trace_tag(it, "gone"),
        "gone" not in tags_of(it),
    )[2],
    "mlflow.search_traces": lambda store: (
        it := call_once(),
        it in [t.info.trace_id for t in mlflow.search_traces(locations=[store.experiment_id], return_type="list")],
    )[1],
    "MlflowClient.get_trace": lambda store: is_whole(MlflowClient().get_trace(call_once())),
    "MlflowClient.set_trace_tag": lambda store: (
        MlflowClient().set_trace_tag(it := call_once(), "kept", "1"),
        tags_of(it)["kept"] == "1",
    )[1],
    "MlflowClient.delete_trace_tag": lambda store: (
        MlflowClient().set_trace_tag(it := call_once(), "gone", "1"),
        MlflowClient().delete_trace_tag(it, "gone"),
        "gone" not in tags_of(it),
    )[2],
    "MlflowClient.delete_traces": lambda store: (
        MlflowClient().delete_traces(store.experiment_id, trace_ids=[call_once()]) == 1
        and (call_once(), MlflowClient().delete_traces(store.experiment_id, max_timestamp_millis=2**42))[1] == 1
    ),
    "MlflowClient.link_prompt_versions_to_trace": lambda store: (
        MlflowClient().link_prompt_versions_to_trace([prompt()], it := call_once()),
        linked_prompts(it) == "by-id",
    )[1],
    "MlflowClient.link_traces_to_run": lambda store: (
        run := MlflowClient().create_run(store.experiment_id).info.run_id,
        MlflowClient().link_traces_to_run([it := call_once()], run),
        [it]
        == [
            t.info.trace_id
            for t in MlflowClient().search_traces(locations=[store.experiment_id], run_id=run, include_spans=False)
        ],
    )[2],
    "MlflowClient.unlink_traces_from_run": None,  # no store of MLflow's own has it
    "MlflowClient.search_traces": lambda store: (
        it := call_once(),
        it in [t.info.trace_id for t in MlflowClient().search_traces(locations=[store.experiment_id])],
    )[1],
    "MlflowClient.start_span": None,  # of an open trace
    "MlflowClient.end_span": None,
    "MlflowClient.end_trace": None,
    "TracingClient.batch_get_traces": lambda store: len(TracingClient().batch_get_traces([call_once()])) == 1,
    "TracingClient.get_trace": lambda store: is_whole(TracingClient().get_trace(call_once())),
    "TracingClient.get_trace_info": lambda store: TracingClient().get_trace_info(it := call_once()).trace_id == it,
    "TracingClient.set_trace_tags": lambda store: (
        TracingClient().set_trace_tags(it := call_once(), {"kept": "1"}),
        tags_of(it)["kept"] == "1",
    )[1],
    "TracingClient.link_prompt_versions_to_trace": lambda store: (
        TracingClient().link_prompt_versions_to_trace(it := call_once(), [prompt()]),
        linked_prompts(it) == "by-id",
    )[1],
}


def functions_of_traces():
    """Every public function of MLflow's for users that takes a trace's id, or looks through traces."""
    found = {}
    for owner in (mlflow, MlflowClient, TracingClient):
        for name, function in inspect.getmembers(owner, callable):
            with contextlib.suppress(TypeError, ValueError):
                parameters = set(inspect.signature(function).parameters)
                if not name.startswith("_") and (parameters & {"trace_id", "trace_ids"} or name == "search_traces"):
                    found[f"{owner.__name__}.{name}"] = function
    # What the functions of `mlflow` call, under the same names.
    return {name for name in found if not (name.startswith("TracingClient.") and f"mlflow.{name[14:]}" in found)}


def test_no_function_of_traces_is_forgotten():
    """The table below the line, and that of docs/export.md, know each function by which users name a trace."""
    skipped = {"TracingClient.get_online_trace_details", "TracingClient.delete_traces", "mlflow.log_metric"}
    docs = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")

    assert functions_of_traces() - skipped <= set(DONE_BY_ID)
    assert [] == [name for name in DONE_BY_ID if f"{name.partition('.')[2]}" not in docs]


@pytest.mark.parametrize("name", [name for name, done in DONE_BY_ID.items() if done is not None])
def test_right_after_a_call(runs, name):
    """Each of them finds the trace of a call that has just ended."""
    owner, _, function = name.partition(".")
    if not hasattr({"mlflow": mlflow, "MlflowClient": MlflowClient, "TracingClient": TracingClient}[owner], function):
        pytest.skip("not in this MLflow")

    assert DONE_BY_ID[name](runs) is True
