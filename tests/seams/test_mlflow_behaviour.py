"""MLflow's modes and ways that our spans must keep: one provider or two, remote parents, processors, time-outs."""

import asyncio
import contextvars
import importlib

import dspy
import mlflow
import pytest
from opentelemetry import baggage as otel_baggage
from opentelemetry import context as otel_context
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import TracerProvider

import dspy_mlflow_async
from dspy_mlflow_async.seams import mlflow_spans as seam
from dspy_mlflow_async.testing import capture_traces, tree
from echo import Chain, EchoLM, chain_tree, marker


@pytest.fixture
def shared_provider(monkeypatch):
    """MLflow shares OpenTelemetry's global provider and context."""
    monkeypatch.setenv("MLFLOW_USE_DEFAULT_TRACER_PROVIDER", "false")
    before = otel._TRACER_PROVIDER
    with capture_traces() as traces:
        dspy_mlflow_async.autolog(silent=True)
        yield traces
    dspy_mlflow_async.autolog(disable=True)
    otel._TRACER_PROVIDER = before


def test_one_provider_with_opentelemetry(shared_provider):
    """Trees are whole in workers and tasks, and a span of plain OpenTelemetry above us is the parent."""
    dspy.Parallel(num_threads=2, disable_progress_bar=True)(
        [(Chain(), {"question": "@a"}), (Chain(), {"question": "@b"})]
    )

    async def tasks():
        await asyncio.gather(*(Chain().acall(question=each) for each in ("@c", "@d")))

    asyncio.run(tasks())

    assert [chain_tree(each) for each in ("@a", "@b", "@c", "@d")] == sorted(
        tree(trace, marker) for trace in shared_provider
    )


def test_a_plain_opentelemetry_span_above_and_below(shared_provider):
    """Spans of any OpenTelemetry library are in the tree where they belong, workers included."""
    tracer = otel.get_tracer("mine")

    class Program(dspy.Module):
        def __init__(self):
            super().__init__()
            self.chain = Chain()

        def forward(self, question):
            with tracer.start_as_current_span("inside"):
                return dspy.Parallel(num_threads=2, disable_progress_bar=True)([(self.chain, {"question": question})])

    with mlflow.start_span("warm-up"):
        pass
    with tracer.start_as_current_span("above"):
        Program()(question="@a")

    shown = [tree(trace) for trace in shared_provider if tree(trace)[0] != "warm-up"]
    assert [("above", [("Program.forward", [("inside", [chain_tree()])])])] == shown


def test_mlflows_span_in_opentelemetrys_context(traces, monkeypatch):
    """With ``MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT``, OpenTelemetry sees our span, and nothing afterwards."""
    monkeypatch.setenv("MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT", "true")
    seen = []

    def look(each):
        seen.append(otel.get_current_span())

    dspy.configure(lm=EchoLM(during=look))
    Chain()(question="@a")

    propagates = hasattr(
        importlib.import_module("mlflow.environment_variables"), "MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT"
    )
    assert [propagates, propagates] == [span.get_span_context().is_valid for span in seen]
    assert not otel.get_current_span().get_span_context().is_valid


def test_opentelemetrys_own_context_is_left_alone(traces):
    """By default MLflow and OpenTelemetry are apart: a plain span above us is no parent, and stays current inside."""
    tracer = TracerProvider().get_tracer("mine")
    seen = []

    def look(each):
        seen.append(otel.get_current_span())

    dspy.configure(lm=EchoLM(during=look))
    with tracer.start_as_current_span("above") as span:
        Chain()(question="@a")

    assert [chain_tree("@a")] == [tree(trace, marker) for trace in traces]
    assert [span, span] == seen


def test_baggage_travels_to_workers(traces):
    """OpenTelemetry's context is a tracing context: what it carries is there in the worker threads."""
    from opentelemetry import baggage, context

    seen = []
    dspy.configure(lm=EchoLM(during=lambda each: seen.append(baggage.get_baggage("tenant"))))
    token = context.attach(baggage.set_baggage("tenant", "blue"))
    try:
        dspy.Parallel(num_threads=2, disable_progress_bar=True)([(Chain(), {"question": "@a"})])
    finally:
        context.detach(token)

    assert ["blue", "blue"] == seen


@pytest.mark.long
def test_a_remote_parent(stored):
    """Headers of another process: our spans are in its trace, below its span."""
    from mlflow.tracing import (
        get_tracing_context_headers_for_http_request,
        set_tracing_context_from_http_request_headers,
    )

    with mlflow.start_span("client") as client:
        headers = get_tracing_context_headers_for_http_request()
    with set_tracing_context_from_http_request_headers(headers):
        Chain()(question="@a")
        dspy.Parallel(num_threads=2, disable_progress_bar=True)([(Chain(), {"question": "@b"})])
    Chain()(question="@after")

    found = stored()
    ours = [trace for trace in found if trace.info.trace_id == client.trace_id]
    assert chain_tree("@after") in [tree(trace, marker) for trace in found if trace not in ours]
    below = {span.name for trace in ours for span in trace.data.spans if span.parent_id == client.span_id}
    assert {"Chain.forward"} == below


def test_span_processors(traces):
    """``mlflow.tracing.configure(span_processors=...)`` sees and may change our spans."""

    def rename(span):
        span.set_attribute("seen", span.name)

    mlflow.tracing.configure(span_processors=[rename])
    try:
        Chain()(question="@a")
    finally:
        mlflow.tracing.configure(span_processors=[])

    assert {"Chain.forward", "Predict.forward", "EchoLM.__call__", "ChatAdapter.format", "ChatAdapter.parse"} == {
        span.get_attribute("seen") for span in traces[0].data.spans
    }


def test_destination_of_a_context(store_uri):
    """``set_destination(..., context_local=True)`` holds in worker threads."""
    from mlflow.entities.trace_location import MlflowExperimentLocation

    experiment = mlflow.create_experiment("destination of a context")
    with capture_traces() as traces:
        dspy_mlflow_async.autolog(silent=True)
        mlflow.tracing.set_destination(MlflowExperimentLocation(experiment), context_local=True)
        try:
            dspy.Parallel(num_threads=2, disable_progress_bar=True)([(Chain(), {"question": "@a"})] * 2)
        finally:
            mlflow.tracing.reset()

    assert [experiment] * 2 == [trace.info.experiment_id for trace in traces]


def test_capturing_restores_the_provider(store_uri):
    """After ``capture_traces`` the provider is the very one that was there, and nothing was sent to the store."""
    with mlflow.start_span("before"):
        pass
    mlflow.flush_trace_async_logging()
    wrapper = importlib.import_module("mlflow.tracing.provider").provider
    before = wrapper.get()
    with capture_traces() as traces:
        with mlflow.start_span("inside"):
            pass
        with capture_traces() as nested, mlflow.start_span("nested"):
            pass
    after = wrapper.get()

    assert before is after
    assert (["inside"], ["nested"]) == tuple([tree(trace)[0] for trace in each] for each in (traces, nested))


def test_tracing_variables_carry_all_that_mlflow_keeps_in_the_context(captured):
    """Read here and set in an empty context, they bring span, session and sampling there; put back, they are gone."""

    def seen():
        with mlflow.start_span("child") as span:
            session = seam.TRACE_CONTEXT.get()
            return span.parent_id, session and session.metadata, otel_baggage.get_baggage("mine"), span.trace_id

    def carry(values):
        before = [variable.get() for variable in seam.TRACING_VARIABLES]
        for variable, value in zip(seam.TRACING_VARIABLES, values, strict=True):
            variable.set(value)
        there = seen()
        for variable, value in zip(seam.TRACING_VARIABLES, before, strict=True):
            variable.set(value)
        return there, seen()

    token = otel_context.attach(otel_baggage.set_baggage("mine", "kept"))
    with mlflow.tracing.context(metadata={"mlflow.trace.session": "s"}), mlflow.start_span("parent") as parent:
        values = [variable.get() for variable in seam.TRACING_VARIABLES]
        there, after = contextvars.Context().run(carry, values)
    otel_context.detach(token)

    assert (parent.span_id, {"mlflow.trace.session": "s"}, "kept", parent.trace_id) == there
    assert (None, None, None) == after[:3]
    assert parent.trace_id != after[3]
