"""The start of a trace: what our processor makes of a root is what MLflow's makes of it."""

import contextlib
import dataclasses

import mlflow
import pytest
from mlflow.pyfunc.context import Context, set_prediction_context
from mlflow.tracing import provider
from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.utils import workspace_context

import dspy_mlflow_async as dma
from dspy_mlflow_async.seams.mlflow_store import workspace_scope
from dspy_mlflow_async.seams.mlflow_trace_start import is_start_known, speaks_only_of
from dspy_mlflow_async.seams.mlflow_traces import workspace_here
from dspy_mlflow_async.seams.own_ids import probe_span


def told(record):
    """What a record says, but for its id."""
    return dataclasses.replace(record.info, trace_id="").to_dict(), {
        field.name: getattr(record, field.name) for field in dataclasses.fields(record) if field.name != "info"
    }


@contextlib.contextmanager
def in_active_model():
    mlflow.set_active_model(name="served")
    try:
        yield
    finally:
        mlflow.tracking.fluent.clear_active_model()


@contextlib.contextmanager
def in_evaluation():
    with set_prediction_context(Context(request_id="asked", is_evaluate=True, dependencies_schemas={"schemas": "{}"})):
        yield


SITUATIONS = {
    "plain": contextlib.nullcontext,
    "in a run": mlflow.start_run,
    "with an active model": in_active_model,
    "in a context": lambda: mlflow.tracing.context(metadata={"a": "b"}, tags={"c": "d", "mlflow.traceName": "mine"}),
    "in an evaluation": in_evaluation,
    "in a workspace": lambda: workspace_scope("team"),
}


@pytest.fixture
def processor():
    dma.autolog()
    provider.provider.once.do_once(provider._initialize_tracer_provider)
    (processor,) = provider.provider.get()._active_span_processor._span_processors
    return processor


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_trace_starts_as_mlflow_starts_it(processor, situation):
    """Ids, place, times, metadata and tags, in whatever is in force."""
    assert is_start_known(processor)
    with SITUATIONS[situation]():
        roots = [probe_span(), probe_span()]
        roots[1]._start_time = roots[0]._start_time
        ours = processor.start_trace(roots[0])
        info = MlflowV3SpanProcessor._start_trace(processor, roots[1])

    manager = InMemoryTraceManager.get_instance()
    with manager.get_trace(info.trace_id) as theirs, manager.get_trace(ours.info.trace_id) as known:
        assert told(theirs) == told(ours)
        assert known is ours
    for root, record in zip(roots, (ours, theirs), strict=True):
        number = root.context.trace_id
        assert f"tr-{number:032x}" == record.info.trace_id == manager.get_mlflow_trace_id_from_otel_id(number)
        manager.pop_trace(number)
    assert 1 == processor.span_exporter.pipeline.assembler.forget_open()


def test_the_workspace_of_the_environment(processor, monkeypatch):
    """Which threads take up where no request has another."""
    monkeypatch.setenv("MLFLOW_WORKSPACE", " shared ")

    assert "shared" == workspace_here()
    with workspace_scope("team"):
        assert ("team" if hasattr(workspace_context, "ServerWorkspaceContext") else "shared") == workspace_here()


def test_traces_with_a_timeout_are_started_by_mlflow(processor, monkeypatch):
    """Its cache ends those, and is exchanged where the time-out changes."""
    monkeypatch.setenv("MLFLOW_TRACE_TIMEOUT_SECONDS", "60")

    assert not is_start_known(processor)
    with mlflow.start_span("root") as span:
        manager = InMemoryTraceManager.get_instance()
        assert 60 == manager._traces.timeout
        assert "root" == manager._traces[span.trace_id].get_root_span().name
    dma.flush()
    manager._traces._expire_checker_stop_event.set()
    monkeypatch.delenv("MLFLOW_TRACE_TIMEOUT_SECONDS")
    assert not is_start_known(processor)
    manager._check_timeout_update()
    assert is_start_known(processor)


def test_another_code_is_left_to_do_it():
    """Who speaks of something that we do not know starts traces itself."""

    class Newer:
        def start(self, root):
            return self.asks_somebody(root)

    assert not speaks_only_of(Newer.start, ())
    assert speaks_only_of(Newer.start, ("asks_somebody", "more"))
