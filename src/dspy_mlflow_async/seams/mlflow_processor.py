"""MLflow's span processor and exporter: the points where ours takes their place, and gives it back.

For the export room. Checked on mlflow 3.11.1 and 3.17.2.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable
from typing import Any

from mlflow.tracing import provider as tracing_provider
from mlflow.tracing.client import TracingClient
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey, TraceTagKey
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor
from mlflow.tracing.trace_manager import _Trace
from mlflow.tracing.utils import (
    update_trace_state_from_span_conditionally,
)
from mlflow.utils.uri import is_databricks_uri
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.mlflow_experiment import experiment_of_trace
from dspy_mlflow_async.seams.mlflow_store import resolve_tracking_uri
from dspy_mlflow_async.seams.mlflow_trace_start import is_start_known, start_trace
from dspy_mlflow_async.seams.mlflow_traces import peek_trace
from dspy_mlflow_async.seams.patching import Undo, over, patch

__all__ = [
    "SpanExporter",
    "SpanProcessor",
    "exports_metrics",
    "finish_root",
    "flush",
    "is_replaceable",
    "original_processor",
    "patch_processor_factory",
    "replace_processors",
    "reset_processor_locks",
    "retire",
    "tracking_uri_of",
]


# By which the evaluation harness asks for a trace.
_EVAL_REQUEST_ID_TO_TRACE_ID: Any = taken("mlflow.tracing.fluent:_EVAL_REQUEST_ID_TO_TRACE_ID", {})
_set_last_active_trace_id: Any = taken("mlflow.tracing.fluent:_set_last_active_trace_id", lambda _trace_id: None)
should_export_otlp_metrics: Any = taken("mlflow.tracing.utils.otlp:should_export_otlp_metrics", lambda: False)


class _LaterClient:
    """Client of an MLflow store, which is opened by the first who asks the client something.

    Args:
        tracking_uri: The store; None for MLflow's current one.
    """

    def __init__(self, tracking_uri: str | None) -> None:
        self.tracking_uri = resolve_tracking_uri(tracking_uri)
        self._opened: TracingClient | None = None

    def __getattr__(self, name: str) -> Any:
        """Return whatever MLflow's own exporter asks for, where it writes."""
        if self._opened is None:
            self._opened = TracingClient(self.tracking_uri)
        return getattr(self._opened, name)


# MLflow's opens the store with its client, and so would in the thread that makes the first span.
_init_exporter = over(
    MlflowV3SpanExporter.__init__, vars(inspect.getmodule(MlflowV3SpanExporter)) | {"TracingClient": _LaterClient}
)


class SpanExporter(MlflowV3SpanExporter):
    """MLflow's exporter, with a queue of ours where it looks for its own.

    Args:
        tracking_uri: The store; None for MLflow's current one.
        queue: What MLflow's flush functions and exit handlers look for, see ``export.assemble.span_processor.Queue``.
    """

    def __init__(self, tracking_uri: str | None, queue: Any) -> None:
        _init_exporter(self, tracking_uri)
        self.uri = resolve_tracking_uri(tracking_uri)
        self._async_queue: Any = queue

    def _should_enable_async_logging(self, *_: Any, **__: Any) -> bool:
        return False  # keeps MLflow's queue from being made; whether *we* write at once is asked per trace


class SpanProcessor(MlflowV3SpanProcessor):
    """MLflow's processor, open where ours needs it."""

    def __init__(self, span_exporter: Any, *, export_metrics: bool) -> None:
        super().__init__(span_exporter=span_exporter, export_metrics=export_metrics)
        uri = span_exporter.uri

        def experiment_of(root: Any) -> str | None:
            return experiment_of_trace(root, uri)

        begin = MlflowV3SpanProcessor._start_trace
        self._experiment_of = experiment_of
        self._start_unasked = over(begin, begin.__globals__ | {"get_experiment_id_for_trace": experiment_of})
        record = MlflowV3SpanProcessor.record_metrics_for_span
        self._record_unasked = over(record, record.__globals__ | {"get_experiment_id_for_trace": experiment_of})

    @property
    def asks_store(self) -> bool:
        """Return whether the store is asked for the experiment when a trace begins, as by MLflow's own."""
        return True

    def trace_started(self, root: Any, trace: _Trace) -> None:
        """Take note of a trace that has begun with this root span."""

    def start_trace(self, root: Any) -> _Trace | None:
        """Begin a trace with this root span, as MLflow does, and return its record; None where MLflow has none."""
        if self.asks_store or not is_start_known(self):
            info = self._start_trace(root)
            return None if info is None else peek_trace(info.trace_id)
        trace = start_trace(self, root, self._experiment_of(root))
        self.trace_started(root, trace)
        return trace

    @property
    def records_metrics(self) -> bool:
        """Return whether each span is counted for OpenTelemetry's metrics."""
        return bool(self._export_metrics)

    def record_metrics(self, span: Any) -> None:
        """Count an ended span for OpenTelemetry's metrics, as MLflow does, but for asking the store."""
        if self.asks_store:
            self.record_metrics_for_span(span)
        else:
            self._record_unasked(self, span)

    def _start_trace(self, root_span: Any) -> Any:
        info = super()._start_trace(root_span) if self.asks_store else self._start_unasked(self, root_span)
        if info is not None and (trace := peek_trace(info.trace_id)) is not None:
            self.trace_started(root_span, trace)
        return info


def tracking_uri_of(processor: Any) -> str:
    """Return the store that a processor of MLflow's writes to."""
    exporter = processor.span_exporter
    if isinstance(exporter, SpanExporter):
        return exporter.uri
    return str(getattr(getattr(exporter, "_client", None), "tracking_uri", None) or resolve_tracking_uri())


def finish_root(processor: Any, trace: _Trace, root: Any) -> None:
    """Finish a trace as ``BaseMlflowSpanProcessor._update_trace_info`` does; its totals are computed when written."""
    info = trace.info
    info.request_time = root.start_time // 1_000_000
    info.execution_duration = (root.end_time - root.start_time) // 1_000_000
    update_trace_state_from_span_conditionally(trace, root)
    attributes = root.attributes or {}
    info.trace_metadata.update(
        {
            TraceMetadataKey.INPUTS: processor._truncate_metadata(attributes.get(SpanAttributeKey.INPUTS)),
            TraceMetadataKey.OUTPUTS: processor._truncate_metadata(attributes.get(SpanAttributeKey.OUTPUTS)),
        }
    )
    _set_last_active_trace_id(info.trace_id)
    if evaluation_id := info.tags.get(TraceTagKey.EVAL_REQUEST_ID):
        # The evaluation harness asks for the trace by this id.
        _EVAL_REQUEST_ID_TO_TRACE_ID[evaluation_id] = info.trace_id


def patch_processor_factory(make: Callable[[str, Callable[[str], Any]], Any]) -> Undo:
    """Let ``make(tracking_uri, original)`` build the span processor whenever MLflow builds its provider.

    Returns:
        The undo.
    """
    original = tracing_provider._get_mlflow_span_processor

    def _get_mlflow_span_processor(tracking_uri: str) -> Any:
        return make(tracking_uri, original)

    return patch(tracing_provider, _get_mlflow_span_processor=_get_mlflow_span_processor)


def is_replaceable(processor: Any) -> bool:
    """Return whether this is MLflow's own processor for a tracking server, not for Databricks, UC or serving."""
    return (
        type(processor) is MlflowV3SpanProcessor
        and type(processor.span_exporter) is MlflowV3SpanExporter
        and not is_databricks_uri(tracking_uri_of(processor))
    )


def replace_processors(replacement: Callable[[Any], Any | None]) -> list[tuple[Any, Any]]:
    """Exchange processors inside the providers in use, so that their open spans end in the new one.

    ``provider.set`` or ``reset`` would build a new provider, and open spans would end in the old.

    Returns:
        The exchanged pairs, old and new.
    """
    pairs: list[tuple[Any, Any]] = []
    wrapper = tracing_provider.provider
    state = taken("mlflow.tracing.provider:_trace_disabled_state", {})  # a provider put aside by `trace_disabled`
    for provider in (wrapper.get(), state.get("saved_provider")):
        if not isinstance(provider, TracerProvider):
            continue
        active = provider._active_span_processor
        with active._lock:
            fresh = []
            for old in active._span_processors:
                new = replacement(old)
                fresh.append(old if new is None else new)
                if new is not None:
                    pairs.append((old, new))
            active._span_processors = tuple(fresh)
    return pairs


def retire(processor: Any) -> list[ReadableSpan]:
    """Flush a processor of MLflow's that is no longer used, and stop its threads.

    Returns:
        Roots it had put off because children were still open.
    """
    exporter = processor.span_exporter
    with getattr(exporter, "_deferred_lock", contextlib.nullcontext()):
        deferred = getattr(exporter, "_deferred_root_spans", {})
        roots = list(deferred.values())
        deferred.clear()

    def flush() -> None:
        from mlflow.tracing.processor import base_mlflow

        with contextlib.suppress(Exception):  # MLflow's own traces: it logs what it loses
            if getattr(processor, "_batch_delegate", None) is not None:
                base_mlflow.retire_batch_processor(processor)
            elif queue := getattr(exporter, "_async_queue", None):
                queue.flush(terminate=True)
                queue._stop_event.clear()  # a terminated queue would write in the caller, should it be used again

    if getattr(processor, "_batch_delegate", None) is not None or getattr(exporter, "_is_async_enabled", True):
        threading.Thread(target=flush, name="dspy-mlflow-async-retire", daemon=True).start()
    return roots


def flush(processor: Any, *, terminate: bool) -> None:
    """Flush the queue of a processor of MLflow's, if it has one."""
    queue = getattr(processor.span_exporter, "_async_queue", None)
    if queue is not None:
        queue.flush(terminate=terminate)


def reset_processor_locks(processor: Any) -> None:
    """Reset the processor's locks after ``fork``: another thread of the parent may have held them."""
    if hasattr(processor, "_deduplication_lock"):
        processor._deduplication_lock = threading.RLock()
    if hasattr(processor, "_pending_on_end_condition"):
        processor._pending_on_end_condition = threading.Condition(threading.Lock())
        processor._pending_on_end_count = 0


def exports_metrics() -> bool:
    """Return whether MLflow's processor would export OpenTelemetry metrics."""
    return bool(should_export_otlp_metrics())


def original_processor(tracking_uri: str) -> Any:
    """Return MLflow's own processor, to be put back; it opens the store when it first writes, and not here."""
    undo = patch(inspect.getmodule(MlflowV3SpanExporter), TracingClient=_LaterClient)  # serves others, too, meanwhile
    try:
        return tracing_provider._get_mlflow_span_processor(tracking_uri)
    finally:
        undo()
