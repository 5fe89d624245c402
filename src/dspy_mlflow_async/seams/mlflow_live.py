"""MLflow's live spans, made without the detours of their constructor.

``LiveSpan.__init__`` builds a JSON encoder for each of two attributes and writes them one by one, and MLflow's trace
manager then parses one of them back to learn the trace's id: a third of what a span costs.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from mlflow.entities.span import LiveSpan, _SpanAttributesRegistry, create_mlflow_span
from mlflow.environment_variables import MLFLOW_USE_DEFAULT_TRACER_PROVIDER
from mlflow.tracing.constant import SpanAttributeKey
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracking._tracking_service.utils import get_tracking_uri, is_tracking_uri_set
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.trace import Span
from opentelemetry.trace import format_span_id

from dspy_mlflow_async.seams.listed import is_known, taken
from dspy_mlflow_async.seams.mlflow_call_span import (
    FEWEST_ATTRIBUTES,
    CallSpan,
    live_call_span,
    number_of,
    parent_number_of,
)
from dspy_mlflow_async.seams.own_ids import probe_span

try:  # mlflow >= 3.12
    from mlflow.environment_variables import MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT
except ImportError:  # pragma: no cover - the lowest supported version keeps its spans to itself
    MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT = None

should_compute_cost_client_side = taken("mlflow.tracing.utils:should_compute_cost_client_side", lambda: False)
# Where a span that is being recorded keeps its MLflow counterpart; OpenTelemetry's spans have a ``__dict__``.
_LIVE = "_dspy_mlflow_live"


def live_span(span: Span, trace_id: str) -> LiveSpan:
    """Make the same span as ``create_mlflow_span(span, trace_id)``."""
    if not _is_as_known:
        return create_mlflow_span(span, trace_id)
    live: LiveSpan = LiveSpan.__new__(LiveSpan)
    live.__dict__.update(
        _span=span,
        _attachments={},
        _attributes=_SpanAttributesRegistry(span),
        _links=[],
        _original_name=span.name,
        trace_id=trace_id,  # the cached property, known without parsing
    )
    write(span, {SpanAttributeKey.REQUEST_ID: f'"{trace_id}"', SpanAttributeKey.SPAN_TYPE: "null"})
    return live


def write(span: Span, attributes: dict[str, str]) -> None:
    """Set attributes that are texts, which need no checks, as ``span.set_attributes`` does, under one lock for all.

    Where OpenTelemetry is told to limit attributes, or keeps them elsewhere, it does the work itself.
    """
    if type(span) is CallSpan and len(span.recorded) + len(attributes) <= FEWEST_ATTRIBUTES:
        span.recorded.update(attributes)
        return
    held = span._attributes
    if not isinstance(held, BoundedAttributes) or held.max_value_len is not None or not _has_open_dict:
        span.set_attributes(attributes)
        return
    with held._lock:
        if held.maxlen is None or len(held._dict) + len(attributes) <= held.maxlen:
            held._dict.update(attributes)
            return
    span.set_attributes(attributes)


def attributes_of(span: Any) -> Mapping[str, Any]:
    """Return the attributes of an OpenTelemetry span; to iterate over its own mapping copies them, under a lock."""
    if type(span) is CallSpan:
        return span.recorded
    held = span._attributes
    return held._dict if _has_open_dict and isinstance(held, BoundedAttributes) else held or {}


def register(span: Span, trace_id: str, trace: Any) -> LiveSpan:
    """Make MLflow know a span that began in ``trace``, as ``BaseMlflowSpanProcessor.on_start`` does.

    Returns:
        MLflow's span of it.
    """
    if type(span) is CallSpan:
        live, span_id = live_call_span(span, trace_id), f"{span.number:016x}"
    else:
        live, span_id = live_span(span, trace_id), format_span_id(number_of(span))
        span.__dict__[_LIVE] = live
    with InMemoryTraceManager.get_instance()._lock:
        trace.span_dict[span_id] = live
    return live


def live_span_of(span: Span) -> LiveSpan | None:
    """Return MLflow's span for one that an SDK has begun, without its trace manager; None where that must be asked."""
    return span.__dict__.get(_LIVE)


class UsageSpan(NamedTuple):
    """LM call that somebody has recorded below a span of ours.

    Attributes:
        span_id: OpenTelemetry's id of the span.
        model: The model's name, or that of the span.
        tokens: Its usage, under MLflow's keys.
        start_ns: When it began, in nanoseconds since 1970.
        end_ns: When it ended, the same.
    """

    span_id: int
    model: str
    tokens: dict[str, Any]
    start_ns: int
    end_ns: int


def usage_spans_below(top: Span, trace_id: str, ours: Collection[int]) -> list[UsageSpan]:
    """Return the outermost spans below ``top`` that bear usage and are not ours.

    As MLflow adds usage up, what is below one that bears some is in it already, so that below an LM call of ours
    (LiteLLM's span below ``dspy.LM``'s) there is none.

    Args:
        top: A span that is open.
        trace_id: MLflow's id of its trace.
        ours: The ids of our own spans that bear usage.
    """
    began: dict[int, Any] = {}  # those that began later than the span, newest first
    found = []
    manager = InMemoryTraceManager.get_instance()
    with manager._lock:
        trace = manager._traces.get(trace_id)
        for live in reversed(trace.span_dict.values()) if trace is not None else ():
            span = live._span
            if span is top:
                break
            number = number_of(span)
            began[number] = span
            if number not in ours and SpanAttributeKey.CHAT_USAGE in attributes_of(span):
                found.append(span)
    top_id = number_of(top)
    return [_usage_span(span) for span in found if span.end_time and _is_outermost(span, top_id, began)]


def _is_outermost(span: Any, top_id: int, began: Mapping[int, Any]) -> bool:
    """Return whether the parents of a span lead to that one past no usage."""
    while span is not None and (parent := parent_number_of(span)) is not None:
        if parent == top_id:
            return True
        span = began.get(parent)
        if span is not None and SpanAttributeKey.CHAT_USAGE in attributes_of(span):
            return False
    return False


def _usage_span(span: Any) -> UsageSpan:
    attributes = attributes_of(span)
    tokens, model = (json.loads(attributes.get(key) or "null") for key in _OF_USAGE)
    return UsageSpan(
        number_of(span),
        model if isinstance(model, str) else span.name,
        tokens if isinstance(tokens, dict) else {},
        span.start_time,
        span.end_time,
    )


_OF_USAGE = (SpanAttributeKey.CHAT_USAGE, getattr(SpanAttributeKey, "MODEL", "mlflow.llm.model"))


# --- what MLflow asks of its settings for each span, asked more cheaply ----------------------------------------------

# ``os.environ`` encodes a name and raises KeyError for each look; what it keeps is a dict.
_encode = getattr(os.environ, "encodekey", str)
_environment = getattr(os.environ, "_data", os.environ)


@functools.cache
def _encoded(name: str) -> Any:
    return _encode(name)


def is_in_environment(name: str) -> bool:
    """Return whether an environment variable is set."""
    return _encoded(name) in _environment


_USE_DEFAULT = _encode("MLFLOW_USE_DEFAULT_TRACER_PROVIDER")
_PROPAGATE = _encode("MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT")


def is_isolated() -> bool:
    """Return whether MLflow has a tracer provider of its own (``MLFLOW_USE_DEFAULT_TRACER_PROVIDER``, its default)."""
    return _USE_DEFAULT not in _environment or bool(MLFLOW_USE_DEFAULT_TRACER_PROVIDER.get())


def propagates_to_opentelemetry() -> bool:
    """Return whether MLflow's current span is OpenTelemetry's too (``MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT``)."""
    if _PROPAGATE not in _environment or MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT is None:
        return False
    return bool(MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT.get())


_computing: dict[str, bool] = {}  # by tracking URI; a program has few


def computes_cost() -> bool:
    """Return whether the client computes the cost of an LM call (Databricks, SageMaker), as MLflow decides it.

    Where no store is set it is a local one, and those compute the cost themselves.
    """
    if not is_tracking_uri_set():
        return False
    uri = get_tracking_uri()
    known = _computing.get(uri)
    if known is None:
        known = bool(should_compute_cost_client_side())
        if uri == get_tracking_uri():  # nobody has set another one meanwhile
            _computing[uri] = known
    return known


def _probe() -> bool:
    """Return whether this MLflow's constructor leaves just what ``live_span`` makes."""
    try:
        span: Any = probe_span()
        made = create_mlflow_span(span, "tr-probe")
        known = {"_span", "_attachments", "_attributes", "_links", "_original_name"}
        written = {SpanAttributeKey.REQUEST_ID: '"tr-probe"', SpanAttributeKey.SPAN_TYPE: "null"}
        return set(made.__dict__) <= known and dict(span.attributes or {}) == written
    except Exception:  # noqa: BLE001 - a future MLflow may do anything; then its own constructor is used
        return False


_has_open_dict = all(is_known(f"opentelemetry.attributes:BoundedAttributes.{name}") for name in ("_dict", "_lock"))
_is_as_known = _probe()
