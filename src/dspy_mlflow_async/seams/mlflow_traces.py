"""MLflow's traces in memory and the spans in them, and the steps that MLflow takes besides storing them.

For the export room. Checked on mlflow 3.11.1 and 3.17.2.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from mlflow.entities import Span, TraceData, TraceInfo
from mlflow.entities.trace_location import TraceLocation
from mlflow.environment_variables import MLFLOW_ENABLE_ASYNC_TRACE_LOGGING
from mlflow.tracing.attachments import Attachment
from mlflow.tracing.constant import SpanAttributeKey
from mlflow.tracing.trace_manager import InMemoryTraceManager, _Trace
from mlflow.tracing.utils import encode_span_id
from mlflow.utils.workspace_context import get_request_workspace
from opentelemetry.sdk.trace import ReadableSpan

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.mlflow_call_span import (
    attachments_of,
    is_call,
    is_root,
    is_sampled,
    number_of,
    parent_number_of,
    resource_of_span,
    trace_number_of,
)
from dspy_mlflow_async.seams.mlflow_experiment import is_in_notebook_of_databricks
from dspy_mlflow_async.seams.mlflow_live import attributes_of, is_in_environment
from dspy_mlflow_async.seams.mlflow_span_text import SpanRecord, add_sizes, as_given, read, text_of

__all__ = [
    "InMemoryTrace",
    "adopt_trace",
    "aggregate_cost_from_spans",
    "as_given",
    "complete_metadata",
    "complete_recorded",
    "display",
    "displays",
    "encode_span_id",
    "ended_root",
    "experiment_of",
    "finished_span",
    "generate_assessment_id",
    "has_attachments",
    "is_call",
    "is_evaluating",
    "is_root",
    "is_sampled",
    "manager_lock",
    "move_to_experiment",
    "number_of",
    "peek_trace",
    "pop_trace",
    "resource_of",
    "restore_attachment",
    "restore_span",
    "trace_id_of",
    "trace_number_of",
    "usage_of_records",
    "usage_of_trace",
    "wants_async",
    "weigh",
    "without_contents",
    "workspace_here",
    "workspace_of",
]

_UTILS = "mlflow.tracing.utils"
_WORKSPACE: Any = taken("mlflow.utils.workspace_context:_WORKSPACE")
_WORKSPACE_VARIABLE = "MLFLOW_WORKSPACE"


def _nothing(*_: Any, **__: Any) -> None:
    """Stand for what MLflow does beside storing a trace, where it has gone."""


aggregate_cost_from_spans: Any = taken(f"{_UTILS}:aggregate_cost_from_spans", _nothing)
aggregate_usage_from_spans: Any = taken(f"{_UTILS}:aggregate_usage_from_spans", _nothing)
generate_assessment_id: Any = taken(f"{_UTILS}:generate_assessment_id", lambda: f"a-{uuid.uuid4().hex}")
# From mlflow 3.15 on.
SpanAggregationNode: Any = taken(f"{_UTILS}:SpanAggregationNode")
aggregate_usage_from_span_nodes: Any = taken(f"{_UTILS}:aggregate_usage_from_span_nodes")
maybe_get_request_id: Any = taken(f"{_UTILS}:maybe_get_request_id", _nothing)
set_request_response_preview: Any = taken(f"{_UTILS}.truncation:set_request_response_preview", _nothing)
get_display_handler: Any = taken("mlflow.tracing.display:get_display_handler")

# The in-memory record of a trace: we keep it past `pop_trace`, to serialise in the writer and not in the caller.
InMemoryTrace = _Trace


def trace_id_of(otel_trace_id: int) -> str | None:
    """Return MLflow's id of the trace, if the manager knows it."""
    return InMemoryTraceManager.get_instance().get_mlflow_trace_id_from_otel_id(otel_trace_id)


def peek_trace(trace_id: str) -> _Trace | None:
    """Return the in-memory record of a trace. ``get_trace`` is public but holds the manager's lock while one looks."""
    manager = InMemoryTraceManager.get_instance()
    with manager._lock:
        trace: _Trace | None = manager._traces.get(trace_id)
    return trace


def pop_trace(otel_trace_id: int, trace_id: str) -> None:
    """Forget a trace. ``InMemoryTraceManager.pop_trace`` would convert every span in the caller's thread."""
    manager = InMemoryTraceManager.get_instance()
    with manager._lock:
        manager._otel_id_to_mlflow_trace_id.pop(otel_trace_id, None)
        try:  # noqa: SIM105 - `suppress` takes as long as this, and `pop` three times
            del manager._traces[trace_id]
        except KeyError:  # evicted, or timed out
            pass


def adopt_trace(otel_trace_id: int, trace_id: str, trace: _Trace) -> None:
    """Make the manager know a trace (again): its cache evicts (1,000 entries), and late spans come after the end."""
    manager = InMemoryTraceManager.get_instance()
    with manager._lock:
        manager._otel_id_to_mlflow_trace_id[otel_trace_id] = trace_id
        if trace_id not in manager._traces:
            manager._traces[trace_id] = trace


def manager_lock() -> Any:
    """Return the manager's lock, taken around ``fork`` so that the child does not inherit it locked."""
    return InMemoryTraceManager.get_instance()._lock


def experiment_of(trace: _Trace) -> str | None:
    """Return the experiment of a trace; None for a remote one, whose location is None."""
    try:
        return trace.info.experiment_id
    except AttributeError:
        return None


def move_to_experiment(operation: Any, experiment_id: str) -> None:
    """Give spans on their way, and the trace where it goes with them, their experiment."""
    operation.experiment_id = experiment_id
    if (info := getattr(operation, "info", None)) is not None:
        info.trace_location = TraceLocation.from_experiment_id(experiment_id)


def without_contents(info: TraceInfo) -> TraceInfo:
    """Return what tells of which trace this is, without what it says."""
    bare: TraceInfo = object.__new__(type(info))
    bare.__dict__.update(info.__dict__)
    bare.request_preview = bare.response_preview = None
    bare.trace_metadata, bare.tags, bare.assessments = {}, {}, []
    return bare


def ended_root(trace: _Trace) -> ReadableSpan | None:
    """Return OpenTelemetry's root span of a trace, which MLflow's span keeps to itself; None while it is open."""
    root = next((span for span in list(trace.span_dict.values()) if is_root(span._span)), None)
    return None if root is None or root.end_time_ns is None else root._span


def workspace_of(trace: _Trace | None) -> str | None:
    """Return the workspace the trace began in (from mlflow 3.12 on it is kept with the trace)."""
    if trace is None:
        return None
    return getattr(trace, "workspace", None) or workspace_here()


def workspace_here() -> str | None:
    """Return the workspace that is in force here: ``get_request_workspace``."""
    if _WORKSPACE is None or _WORKSPACE.get() or is_in_environment(_WORKSPACE_VARIABLE):
        return cast("str | None", get_request_workspace())
    return None


# What MLflow's and OpenTelemetry's objects for one span take without its texts, by tracemalloc on CPython 3.11.
_SPAN_BYTES = 4_000
_CALL_BYTES = 800  # the same for a span whose parts nobody has asked for


def weigh(spans: Iterable[Any]) -> int:
    """Return about how many bytes these spans hold."""
    size = 0
    for span in spans:
        recorded = span._span
        size += _CALL_BYTES if is_call(recorded) else _SPAN_BYTES
        size += sum(map(sys.getsizeof, (*attributes_of(recorded).values(),)))
        if attachments := attachments_of(span):
            size += sum(len(attachment.content_bytes) for attachment in attachments.values())
    return size


_is_async_by_default = bool(MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.default)


def wants_async() -> bool:
    """Decide as ``MlflowV3SpanExporter._should_enable_async_logging`` of 3.17; 3.11 is synchronous by default."""
    if is_in_environment("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"):
        return bool(MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.get())
    return _is_async_by_default and not is_in_notebook_of_databricks()


def is_evaluating() -> bool:
    """Return whether MLflow's evaluation harness waits for this very trace."""
    return bool(maybe_get_request_id(is_evaluate=True))


def displays() -> bool:
    """Return whether somebody looks: a notebook, or Databricks serving. Otherwise no trace is built for showing."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    is_notebook = get_ipython is not None and get_ipython() is not None
    if is_notebook and get_display_handler is not None and not type(get_display_handler()).disabled:
        return True
    return is_in_environment("IS_IN_DB_MODEL_SERVING_ENV")


def display(trace: Any) -> None:
    """Show a finished trace in the notebook, and keep it for the response of Databricks serving."""
    if get_display_handler is not None and not is_evaluating():
        get_display_handler().display_traces([trace])
    # mlflow < 3.12 has none.
    taken("mlflow.tracing.export.inference_table:maybe_add_trace_to_serving_buffer", _nothing)(trace)


def complete_metadata(trace: Any, texts: Sequence[str] | None = None) -> None:
    """Add previews and size statistics, as MLflow does at export.

    Args:
        trace: The trace.
        texts: Those of its spans, see `mlflow_span_text.text_of`, where they are there already.
    """
    set_request_response_preview(trace.info, trace.data)
    spans = trace.data.spans
    add_sizes(trace.info, spans, list(map(text_of, spans)) if texts is None else texts)


def complete_recorded(info: Any, records: Sequence[SpanRecord]) -> None:
    """Add the same to a trace all of whose spans have been recorded, of which there is one at least."""
    root = next((record for record in records if record.parent_id is None), None)
    if root is not None and (info.request_preview is None or info.response_preview is None):
        set_request_response_preview(info, TraceData([root.span]))
    add_sizes(info, [record.span for record in records], [record.text for record in records])


def usage_of_trace(spans: Sequence[Any]) -> dict[str, int] | None:
    """Add up the usage of a trace's spans, as MLflow does: below a span that bears some it is in that one's already.

    Where the one root bears the sum, the others are not looked at.
    """
    return usage_of_records([_brief(span) for span in spans])


def usage_of_records(records: Sequence[SpanRecord | _Brief]) -> dict[str, int] | None:
    """Add up the usage of a trace's spans, which have been recorded, likewise."""
    ids = {record.span_id for record in records}
    tops = [record for record in records if record.parent_id not in ids]
    if len(tops) == 1 and (text := tops[0].attributes.get(SpanAttributeKey.CHAT_USAGE, "null")) != "null":
        if aggregate_usage_from_span_nodes is not None and text and type(text) is str:
            found: dict[str, int] | None = aggregate_usage_from_span_nodes([SpanAggregationNode("", None, read(text))])
            return found
        records = tops
    usage: dict[str, int] | None = aggregate_usage_from_spans([record.span for record in records])
    return usage


class _Brief(NamedTuple):
    """Part of a `SpanRecord` that usage needs."""

    span: Any
    span_id: int
    parent_id: int | None
    attributes: Mapping[str, Any]


def _brief(span: Any) -> _Brief:
    otel = span._span
    return _Brief(span, number_of(otel), parent_number_of(otel), attributes_of(otel))


def has_attachments(spans: Sequence[Any]) -> bool:
    """Return whether any of these spans has files beside it, which go where only the store's answer says."""
    return any(map(attachments_of, as_given(spans)))


def resource_of(spans: Sequence[Any]) -> frozenset[tuple[str, Any]]:
    """Return the attributes of what made these spans; MLflow sends those of the first span alone."""
    resource = resource_of_span(as_given(spans)[0]._span) if spans else None
    return frozenset() if resource is None else frozenset(resource.attributes.items())


def otel_of(span: Span) -> ReadableSpan:
    """Return OpenTelemetry's span below one of MLflow's."""
    return span._span


def over(otel_span: ReadableSpan, span: Span) -> Span:
    """Return a span like ``span`` over another one of OpenTelemetry's."""
    return restore_span(otel_span, span._attachments, getattr(span, "_links", None))


def restore_span(otel_span: ReadableSpan, attachments: dict[str, Any], links: list[Any] | None) -> Span:
    """Make a span from its parts; ``Span.from_dict`` differs between versions and loses attachments."""
    span = Span(otel_span)
    span._attachments = attachments
    if links:
        span._links = links
    return span


def restore_attachment(attachment_id: str, content_type: str, content: bytes) -> Attachment:
    """Make an attachment with the id that the span's text refers to; the constructor makes a new one."""
    attachment = Attachment(content_type=content_type, content_bytes=content)
    attachment._id = attachment_id
    return attachment


def finished_span(span: ReadableSpan) -> Span:
    """Return MLflow's view of a span that its trace manager no longer knows."""
    return Span(span)
