"""The public test helper."""

import asyncio

import dspy
import mlflow
import pytest

from dspy_mlflow_async.testing import capture_traces, tree
from echo import feedback_on, marker, predict_tree


def ask(question):
    """One call."""
    return dspy.Predict("question -> answer")(question=question)


def test_a_call_becomes_one_literal(traces):
    """One call is one trace, and its tree compares with a nested literal."""
    ask("@a")

    assert [predict_tree()] == [tree(trace) for trace in traces]
    assert [predict_tree("@a")] == [tree(trace, marker) for trace in traces]


def test_stored_traces_read_alike(stored):
    """``tree`` reads a trace from the store like one from memory."""
    ask("@a")

    assert [predict_tree("@a")] == [tree(trace, marker) for trace in stored()]


def test_details(traces):
    """Fields of the span, attributes by key, functions; what a span has not is None."""
    with mlflow.start_span("mine", span_type="TOOL") as span:
        span.set_inputs({"a": 1})
        span.set_outputs([2])
        span.set_attribute("key", "value")

    shown = tree(traces[0], "inputs", "outputs", "span_type", "status", "key", "absent", lambda span: span.name.upper())
    assert ("mine", {"a": 1}, [2], "TOOL", "OK", "value", None, "MINE", []) == shown


async def test_sorted_siblings(traces):
    """Siblings by their details, equal ones in the order in which they began."""
    begun = asyncio.Event()

    async def span(name, number, *, first):
        if not first:
            await begun.wait()
        with mlflow.start_span(name) as made:
            made.set_attribute("n", number)
            begun.set()

    with mlflow.start_span("root"):
        await asyncio.gather(span("b", 2, first=False), span("a", 2, first=True))
        await asyncio.gather(span("c", 1, first=False))

    assert ("root", None, [("a", 2, []), ("b", 2, []), ("c", 1, [])]) == tree(traces[0], "n")
    assert ("root", None, [("c", 1, []), ("a", 2, []), ("b", 2, [])]) == tree(traces[0], "n", sort=True)


def test_what_is_no_tree_is_refused(traces):
    """A trace of several roots, or without spans, is a fragment, and says so."""
    for name in ("one", "two"):
        with mlflow.start_span(name):
            pass
    one, two = traces
    one.data.spans += two.data.spans

    with pytest.raises(ValueError, match="one, two"):
        tree(one)
    two.data.spans.clear()
    with pytest.raises(ValueError, match="none"):
        tree(two)


def test_a_trace_arrives_when_its_last_span_has_ended(captured):
    """A trace whose root has ended is kept back while a child of it is open."""
    root = mlflow.start_span_no_context("root")
    child = mlflow.start_span_no_context("child", parent_span=root)
    root.end()
    assert [] == captured
    child.end()

    assert [("root", [("child", [])])] == [tree(trace) for trace in captured]


def test_nothing_is_captured_outside_of_the_block(store_uri):
    """What ends after the block goes where it would have gone."""
    with capture_traces() as traces, mlflow.start_span("inside"):
        pass
    with mlflow.start_span("after"):
        pass
    mlflow.flush_trace_async_logging()

    assert ["inside"] == [tree(trace)[0] for trace in traces]


def test_it_survives_what_makes_mlflow_build_its_provider_anew(captured, store_uri):
    """Setting the tracking URI, disabling and enabling inside the block change nothing."""
    mlflow.set_tracking_uri(store_uri)
    with mlflow.start_span("one"):
        pass
    mlflow.tracing.disable()
    with mlflow.start_span("silent"):
        pass
    mlflow.tracing.enable()
    with mlflow.start_span("two"):
        pass

    assert ["one", "two"] == [tree(trace)[0] for trace in captured]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_feedback_is_captured_with_its_trace(traces, num_threads):
    """A metric's score is on the trace of the prediction that it judged, without a store."""

    def exact(example, prediction, trace=None):
        return example.question == prediction.answer

    examples = [dspy.Example(question=each).with_inputs("question") for each in ("@a", "@b")]
    dspy.Evaluate(devset=examples, metric=exact, num_threads=num_threads, display_progress=False)(
        dspy.Predict("question -> answer")
    )

    assert [[("exact", True)]] * 2 == [
        [(assessment.name, assessment.feedback.value) for assessment in feedback_on(trace)] for trace in traces
    ]
