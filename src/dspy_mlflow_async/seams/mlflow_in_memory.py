"""MLflow's tracer provider, exchanged for one that keeps complete traces in memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlflow.tracing.provider as trace_provider
from mlflow.entities import Trace
from mlflow.environment_variables import MLFLOW_USE_DEFAULT_TRACER_PROVIDER
from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor
from mlflow.tracing.trace_manager import InMemoryTraceManager
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from dspy_mlflow_async.seams.installed import has_runs
from dspy_mlflow_async.seams.mlflow_call_span import is_root, trace_number_of, with_plain_span
from dspy_mlflow_async.seams.mlflow_client import name_default_store
from dspy_mlflow_async.seams.mlflow_experiment import experiment_of_trace
from dspy_mlflow_async.seams.mlflow_live import register
from dspy_mlflow_async.seams.patching import over


class _MemoryExporter(SpanExporter):
    """Exporter that hands each trace on when its root and all other spans of it have ended.

    There is no lock: the garbage collector may run in here, and end the span of a generator that nobody has finished.
    """

    def __init__(self, keep: Callable[[Trace], None]) -> None:
        self._keep = keep
        self._ended_roots: dict[int, bool] = {}

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        manager = InMemoryTraceManager.get_instance()
        for span in spans:
            if is_root(span):
                self._ended_roots[trace_number_of(span)] = True
        # A span has ended before it comes here, so of two that end at once the later one finds the trace complete.
        for trace_id in tuple(self._ended_roots):
            if not _has_open_spans(manager, trace_id) and self._ended_roots.pop(trace_id, False):
                popped = manager.pop_trace(trace_id)
                if popped is not None:
                    popped.trace.data.spans[:] = map(with_plain_span, popped.trace.data.spans)
                    self._keep(popped.trace)
        return SpanExportResult.SUCCESS


def _has_open_spans(manager: Any, otel_trace_id: int) -> bool:
    # InMemoryTraceManager.has_open_spans, which the lowest supported version lacks.
    trace_id = manager.get_mlflow_trace_id_from_otel_id(otel_trace_id)
    with manager.get_trace(trace_id) as trace:
        return trace is not None and any(span.end_time_ns is None for span in tuple(trace.span_dict.values()))


class _MemoryProcessor(MlflowV3SpanProcessor):
    """MLflow's processor, for the spans of calls that begin without the SDK's tracer, too."""

    takes_calls = True

    def call_started(self, span: Any) -> None:
        """Take the span of a call that began."""
        if not is_root(span):
            trace_id = self._trace_manager.get_mlflow_trace_id_from_otel_id(span.trace_number)
        else:
            info = self._start_trace(span)
            trace_id = None if info is None else info.trace_id
        with self._trace_manager.get_trace(trace_id) as trace:
            if trace is not None:
                register(span, trace_id, trace)

    def call_ended(self, span: Any) -> None:
        """Take the span of a call that ended."""
        self.on_end(span)


def _take_default_experiment(processor: Any) -> None:
    """Begin traces where nobody has set an experiment, which MLflow's own fails to do with ``mlflow-tracing`` alone."""

    def experiment_of(root: Any) -> str | None:
        return experiment_of_trace(root, "")

    begin = MlflowV3SpanProcessor._start_trace
    begin = over(begin, begin.__globals__ | {"get_experiment_id_for_trace": experiment_of})
    processor._start_trace = functools.partial(begin, processor)


@contextlib.contextmanager
def memory_provider(keep: Callable[[Trace], None]) -> Iterator[None]:
    """Give every trace of the process to ``keep`` in this block, and then put MLflow's own provider back.

    MLflow makes its provider anew at ``set_tracking_uri``, ``set_destination`` and ``enable``, so what makes it is
    exchanged too. The provider that was there is neither flushed nor shut down.
    """
    unname = name_default_store()
    processor = _MemoryProcessor(_MemoryExporter(keep), export_metrics=False)
    if not has_runs():
        _take_default_experiment(processor)

    def only_memory(disabled: bool = False) -> list[Any]:  # MLflow's signature
        return [] if disabled else [processor]

    original = trace_provider._get_span_processors
    provider, once = _exchange(None, is_ready=False)
    trace_provider._get_span_processors = only_memory
    try:
        yield
    finally:
        trace_provider._get_span_processors = original
        _exchange(provider, is_ready=once)
        unname()


def _exchange(provider: Any, *, is_ready: bool) -> tuple[Any, bool]:
    """Set MLflow's provider as it is, without the shutdown of the former one that its own ``set`` brings."""
    wrapper = trace_provider.provider
    before = wrapper.once._done
    wrapper.once._done = is_ready
    if MLFLOW_USE_DEFAULT_TRACER_PROVIDER.get():
        former, wrapper._isolated_tracer_provider = wrapper._isolated_tracer_provider, provider
    else:
        former, otel._TRACER_PROVIDER = otel._TRACER_PROVIDER, provider
    return former, before
