"""Preparation of an operation for the store, in the writer's thread: immutable clean spans, totals, previews, sizes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

from mlflow.entities import Param, RunTag
from mlflow.tracing.constant import TraceMetadataKey, TraceSizeStatsKey
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import Status

from dspy_mlflow_async.export.operations import Operation, RunOperation, SpansOperation, TraceOperation, TraceUpdate
from dspy_mlflow_async.seams import mlflow_traces
from dspy_mlflow_async.seams.mlflow_live import computes_cost
from dspy_mlflow_async.seams.mlflow_span_text import SpanRecord, StillSpans, record_of, still

# What a trace tells of all its spans.
TOTALS = (
    TraceMetadataKey.TOKEN_USAGE,
    TraceMetadataKey.COST,
    TraceMetadataKey.SIZE_STATS,
    TraceMetadataKey.SIZE_BYTES,
)

Records = dict[int, list[SpanRecord]]  # those of an operation's spans, by its `id`


def prepare(operation: Operation) -> list[SpanRecord] | None:
    """Complete an operation in place. Doing so twice does nothing.

    Returns:
        The facts of the spans, where they were found on the way.
    """
    if isinstance(operation, TraceUpdate):
        operation.assessments = [_clean_assessment(assessment) for assessment in operation.assessments]
        operation.metadata, operation.tags = _clean_value(dict(operation.metadata)), _clean_value(dict(operation.tags))
    elif isinstance(operation, RunOperation):
        operation.params = [Param(clean(param.key), clean(param.value)) for param in operation.params]
        operation.tags = [RunTag(clean(tag.key), clean(tag.value)) for tag in operation.tags]
    elif isinstance(operation, (TraceOperation, SpansOperation)) and not operation.prepared:
        return _prepare_spans(operation)
    return None


def _prepare_spans(operation: TraceOperation | SpansOperation) -> list[SpanRecord]:
    records = list(map(record_of, operation.spans))
    if all(map(_is_clean_json, [record.text for record in records])):
        operation.spans = StillSpans(operation.spans)
    else:
        operation.spans = [_clean_span(still(record.span), record.text) for record in records]
        records = list(map(record_of, operation.spans))
    if isinstance(operation, TraceOperation):
        info = operation.info
        _clean_info(info)
        if operation.stage == "whole":
            if not operation.is_shared:  # the first total that a store holds counts, and these are not all spans
                _note_totals(info, mlflow_traces.usage_of_records(records), operation.spans)
            if records:
                mlflow_traces.complete_recorded(info, records)
                _clean_texts(info)  # the previews are new
    operation.prepared = True
    return records


def totals_of(info: Any) -> list[Any]:
    """Return the usage, the cost and the number of spans that a trace tells, whatever a store makes of their texts."""
    usage, cost, sizes = (json.loads(info.trace_metadata.get(key) or "{}") for key in TOTALS[:3])
    return [usage, cost, sizes.get(TraceSizeStatsKey.NUM_SPANS)]


def total(info: Any, spans: Any) -> None:
    """Write the usage and cost of these spans into the trace."""
    _note_totals(info, mlflow_traces.usage_of_trace(spans), spans)


def _note_totals(info: Any, usage: dict[str, int] | None, spans: Any) -> None:
    if usage:
        info.trace_metadata[TraceMetadataKey.TOKEN_USAGE] = json.dumps(usage)
    if computes_cost() and (cost := mlflow_traces.aggregate_cost_from_spans(spans)):
        info.trace_metadata[TraceMetadataKey.COST] = json.dumps(cost)


def clean(text: str) -> str:
    """Clean text for any database: no lone surrogates, which UTF-8 cannot say, and no NUL, which PostgreSQL cannot."""
    if text.isascii():
        return text.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in text else text
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in text else text


def _clean_span(span: Any, text: str) -> Any:
    """Return an immutable span, or a repaired copy of it where it holds what no database takes.

    Args:
        span: The span.
        text: Its text.
    """
    if _is_clean_json(text):
        return span
    otel = mlflow_traces.otel_of(span)
    if (
        all(map(_is_clean, (otel.attributes or {}).values()))
        and _is_clean(otel.name)
        and _is_clean(otel.status.description)
        and all(_is_clean(v) for event in otel.events for v in (event.name, *(event.attributes or {}).values()))
    ):
        return span
    status = otel.status
    repaired = ReadableSpan(
        name=clean(otel.name),
        context=otel.context,
        parent=otel.parent,
        resource=otel.resource,
        attributes=_clean_value(dict(otel.attributes or {})),
        events=[Event(clean(e.name), _clean_value(dict(e.attributes or {})), e.timestamp) for e in otel.events],
        links=otel.links,
        kind=otel.kind,
        start_time=otel.start_time,
        end_time=otel.end_time,
        status=Status(status.status_code, clean(status.description)) if status.description else status,
    )
    return mlflow_traces.over(repaired, span)


def _is_clean_json(text: str) -> bool:
    """Return whether no text in this JSON needs cleaning; False also where that would take a closer look."""
    return "\\u0000" not in text and _has_letters_only(text)


def _has_letters_only(text: str) -> bool:
    """Return whether text has no lone surrogates."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _clean_info(info: Any) -> None:
    info.trace_metadata, info.tags = _clean_pairs(info.trace_metadata), _clean_pairs(info.tags)
    info.assessments = [_clean_assessment(assessment) for assessment in info.assessments]
    _clean_texts(info)


def _clean_pairs(pairs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy with clean text."""
    copied = dict(pairs)
    return copied if _are_clean((*copied, *copied.values())) else _clean_value(copied)


def _clean_texts(info: Any) -> None:
    if _are_clean(filter(None, (info.request_preview, info.response_preview, info.client_request_id))):
        return
    for name in ("request_preview", "response_preview", "client_request_id"):
        value = getattr(info, name)
        if isinstance(value, str):
            setattr(info, name, clean(value))


def _are_clean(texts: Iterable[Any]) -> bool:
    """Return whether all of these are texts that need no cleaning."""
    try:
        text = "".join(texts)
    except TypeError:
        return False
    return "\0" not in text and _has_letters_only(text)


def _clean_value(value: Any) -> Any:
    """Return JSON with clean text; the same object where all of it is clean."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        pairs = [(_clean_value(key), _clean_value(each)) for key, each in value.items()]
        is_same = all(k is a and v is b for (k, v), (a, b) in zip(pairs, value.items(), strict=True))
        return value if is_same else dict(pairs)
    if isinstance(value, (list, tuple)):
        values = [_clean_value(each) for each in value]
        return value if all(new is old for new, old in zip(values, value, strict=True)) else values
    return value


def _is_clean(value: Any) -> bool:
    return _clean_value(value) is value


def _clean_assessment(assessment: Any) -> Any:
    """Return an assessment all of whose text is clean; the same object where it is already."""
    changes = [
        (owner, name, cleaned)
        for owner, names in _TEXT_OF_ASSESSMENTS.items()
        if (part := getattr(assessment, owner) if owner else assessment) is not None
        for name in names
        if (cleaned := _clean_value(getattr(part, name, None))) is not getattr(part, name, None)
    ]
    if changes:
        assessment = copy.deepcopy(assessment)
        for owner, name, cleaned in changes:
            setattr(getattr(assessment, owner) if owner else assessment, name, cleaned)
    return assessment


# Where an assessment has text, by the attribute that holds it; "" is the assessment itself.
_TEXT_OF_ASSESSMENTS = {
    "": ("name", "rationale", "metadata"),
    "source": ("source_id",),
    "feedback": ("value",),
    "error": ("error_code", "error_message", "stack_trace"),
    "expectation": ("value",),
}
