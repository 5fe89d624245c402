"""Texts of spans as MLflow stores and weighs them, made without a dict of each, and what a row has besides.

For the export room. Checked on mlflow 3.11.1, 3.12.0, 3.17.2 and 3.18.0.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlflow.entities import Span, Trace, TraceData
from mlflow.tracing import constant
from mlflow.tracing.constant import TraceMetadataKey
from mlflow.tracing.utils import encode_span_id
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.mlflow_live import attributes_of

__all__ = ["SpanRecord", "add_sizes", "record_of", "text_of"]

TraceJSONEncoder: Any = taken("mlflow.tracing.utils:TraceJSONEncoder", json.JSONEncoder)
add_size_stats_to_trace_metadata: Any = taken(
    "mlflow.tracing.utils:add_size_stats_to_trace_metadata", lambda _trace: None
)
_calculate_percentile: Any = taken("mlflow.tracing.utils:_calculate_percentile")
TraceSizeStatsKey: Any = getattr(constant, "TraceSizeStatsKey", None)

_encode = TraceJSONEncoder(ensure_ascii=False).encode


class SpanRecord(NamedTuple):
    """Facts of a span that has ended, for its row.

    Attributes:
        span_id: MLflow's id.
        parent_id: That of its parent, or None.
        name: Its name.
        type: Its type, as it was recorded.
        status: "OK", "ERROR" or "UNSET".
        start_ns: When it began, in nanoseconds since 1970.
        end_ns: When it ended; None where nobody has ended it.
        attributes: As they were recorded: texts in JSON, where MLflow has written them.
        has_more: Whether it has events or links.
        resource: The attributes of what made it.
    """

    span_id: str
    parent_id: str | None
    name: str
    type: str | None
    status: str
    start_ns: int
    end_ns: int | None
    attributes: Mapping[str, Any]
    has_more: bool
    resource: Mapping[str, Any]


def record_of(span: Span) -> SpanRecord:
    """Return the facts of an immutable span."""
    otel = span._span
    parent, resource = otel.parent, otel.resource
    return SpanRecord(
        encode_span_id(otel.context.span_id),
        None if parent is None else encode_span_id(parent.span_id),
        otel.name,
        span.span_type,
        otel.status.status_code.name,
        otel.start_time,
        otel.end_time,
        attributes_of(otel),
        bool(otel.events or getattr(span, "_links", None)),
        {} if resource is None else resource.attributes,
    )


def text_of(span: Span, attributes: Mapping[str, Any] | None = None) -> str:
    """Return a span as MLflow stores it, in JSON that leaves letters beyond ASCII as they are.

    Args:
        span: An immutable span.
        attributes: What it is to have in place of its own.
    """
    otel = span._span
    if not (otel.events or getattr(span, "_links", None)):
        parent, status = otel.parent, otel.status
        template = _template(otel.kind, status.status_code, parent is not None, bool(status.description))
        if template is not None:
            own = attributes_of(otel) if attributes is None else attributes
            return template.fill(otel, own if type(own) is dict else dict(own))
    found = span.to_dict()
    if attributes is not None:
        found["attributes"] = dict(attributes)
    return _encode(found)


class _Template(NamedTuple):
    """Text of a span, cut where one differs from the other.

    Attributes:
        first: What comes before the first value.
        rest: The index of a value in `_values`, and what follows it.
    """

    first: str
    rest: tuple[tuple[int, str], ...]

    def fill(self, otel: Any, attributes: dict[str, Any]) -> str:
        values = _values(otel, attributes)
        return self.first + "".join([values[index] + text for index, text in self.rest])


def _values(otel: Any, attributes: dict[str, Any]) -> tuple[str, ...]:
    context, parent, end = otel.context, otel.parent, otel.end_time
    return (
        base64.b64encode(context.trace_id.to_bytes(16, "big")).decode(),
        base64.b64encode(context.span_id.to_bytes(8, "big")).decode(),
        "" if parent is None else base64.b64encode(parent.span_id.to_bytes(8, "big")).decode(),
        _encode(otel.name),
        str(otel.start_time),
        "null" if end is None else str(end),
        _encode(otel.status.description or ""),
        _encode(attributes),
    )


@functools.cache
def _template(kind: SpanKind, code: StatusCode, has_parent: bool, has_message: bool) -> _Template | None:
    """Return MLflow's own text of a sample, cut; None where it cannot be cut so."""
    try:
        return _cut(*(_sample(number, kind, code, has_parent, has_message) for number in (1, 2)))
    except Exception:  # noqa: BLE001 - a sample that MLflow does not take as expected; its own function writes the text
        return None


def _cut(first: Span, second: Span) -> _Template | None:
    """Cut the text of the first sample at its values; None where the second cannot be made from the pieces."""
    has_parent, has_message = first._span.parent is not None, bool(first._span.status.description)
    text, values = _encode(first.to_dict()), _values(first._span, dict(first._span.attributes or {}))
    left_out = {_PARENT} - {_PARENT if has_parent else None} | {_MESSAGE} - {_MESSAGE if has_message else None}
    places = sorted((text.find(value), index) for index, value in enumerate(values) if index not in left_out)
    if any(place < 0 or text.count(values[index]) > 1 for place, index in places):
        return None
    ends = [place + len(values[index]) for place, index in places]
    pieces = [text[end:start] for end, start in zip(ends, [*(place for place, _ in places[1:]), None], strict=True)]
    indexes = (index for _, index in places)
    template = _Template(text[: places[0][0]], tuple(zip(indexes, pieces, strict=True)))
    filled = template.fill(second._span, dict(second._span.attributes or {}))
    return template if filled == _encode(second.to_dict()) else None


_PARENT, _MESSAGE = 2, 6  # in `_values`


def _sample(number: int, kind: SpanKind, code: StatusCode, has_parent: bool, has_message: bool, **more: Any) -> Span:
    """Make a span all of whose values are found once in its text."""

    def context(offset: int) -> SpanContext:
        digits = (number * 0x1F2E3D4C5B6A7988 + offset) & 0xFFFFFFFFFFFFFFFF
        return SpanContext(trace_id=digits << 64 | 0xA5A5 + number, span_id=digits ^ 0x5A5A, is_remote=False)

    attributes = {"mlflow.traceRequestId": f'"tr-sample{number}"', "é": "ü", f"key{number}": "[1]"}
    otel = ReadableSpan(
        name=f"sample name {number}",
        context=context(0),
        parent=context(0x777777) if has_parent else None,
        kind=kind,
        status=Status(code, f"sample message {number}" if has_message else None),
        resource=Resource({}),  # without one OpenTelemetry asks threads for it, which the end of a process has no more
        start_time=1_700_000_000_000_000_000 + number,
        end_time=1_800_000_000_000_000_000 + number,
        **{"attributes": attributes, **more},
    )
    return Span(otel)


# --- sizes ------------------------------------------------------------------------------------------------------------


def add_sizes(info: Any, spans: Sequence[Span], texts: Sequence[str]) -> None:
    """Add the statistics of sizes to a trace's metadata, as MLflow does, from texts that are there already."""
    if texts and adds_same_sizes():
        _add_sizes(info, texts)
    else:
        add_size_stats_to_trace_metadata(Trace(info, TraceData(list(spans))))


def _add_sizes(info: Any, texts: Sequence[str]) -> None:
    sizes = sorted(map(_escaped_length, texts))
    total = sum(sizes) + len(Trace(info, TraceData([])).to_json()) + (len(sizes) - 1) * 2
    keys = TraceSizeStatsKey
    statistics = {
        keys.TOTAL_SIZE_BYTES: total,
        keys.NUM_SPANS: len(sizes),
        keys.MAX_SPAN_SIZE_BYTES: sizes[-1],
        keys.P25_SPAN_SIZE_BYTES: int(_calculate_percentile(sizes, 0.25)),
        keys.P50_SPAN_SIZE_BYTES: int(_calculate_percentile(sizes, 0.50)),
        keys.P75_SPAN_SIZE_BYTES: int(_calculate_percentile(sizes, 0.75)),
    }
    info.trace_metadata[TraceMetadataKey.SIZE_STATS] = json.dumps(statistics)
    info.trace_metadata[TraceMetadataKey.SIZE_BYTES] = str(total)


def _escaped_length(text: str) -> int:
    """Return how long a text of JSON is where all beyond ASCII is escaped, which MLflow weighs."""
    deletes = text.count("\x7f")
    if text.isascii():
        return len(text) + 5 * deletes
    plain = len(text.encode("ascii", "ignore"))
    units = len(text.encode("utf-16-le", "surrogatepass")) // 2
    return plain + 6 * (units - plain) + 5 * deletes


@functools.cache
def adds_same_sizes() -> bool:
    """Return whether our statistics of a sample are MLflow's."""
    try:
        more = {"attributes": {"odd": "\x7f é \N{GRINNING FACE} \\"}, "events": [Event("exception", {"text": "ü"}, 1)]}
        kind, code = SpanKind.INTERNAL, StatusCode.ERROR
        spans = [_sample(number, kind, code, number > 1, True) for number in (1, 2)]
        spans += [_sample(number, kind, code, True, True, **more) for number in (3, 4)]
        mine, theirs = (_sample_info() for _ in range(2))
        _add_sizes(mine, list(map(text_of, spans)))
        add_size_stats_to_trace_metadata(Trace(theirs, TraceData(spans)))
        return bool(mine.trace_metadata and mine.trace_metadata == theirs.trace_metadata)
    except Exception:  # noqa: BLE001 - a future MLflow may do anything; then its own function is used
        return False


def _sample_info() -> Any:
    from mlflow.entities import TraceInfo, TraceState
    from mlflow.entities.trace_location import TraceLocation

    return TraceInfo(
        trace_id="tr-sample",
        trace_location=TraceLocation.from_experiment_id("0"),
        request_time=1,
        state=TraceState.OK,
        request_preview="é",
    )
