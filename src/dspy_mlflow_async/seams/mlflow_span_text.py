"""Texts of spans as MLflow stores and weighs them, made without a dict of each, and what a row has besides.

For the export room. Checked on mlflow 3.11.1, 3.12.0, 3.17.2 and 3.18.0.
"""

from __future__ import annotations

import base64
import copy
import functools
import json
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any, NamedTuple

from mlflow.entities import Span, Trace, TraceData
from mlflow.tracing import constant
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, format_span_id

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.mlflow_call_span import (
    number_of,
    parent_number_of,
    resource_of_span,
    trace_number_of,
)
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
    parent, resource, attributes = parent_number_of(otel), resource_of_span(otel), attributes_of(otel)
    type_text = attributes.get(SpanAttributeKey.SPAN_TYPE)
    return SpanRecord(
        format_span_id(number_of(otel)),
        None if parent is None else format_span_id(parent),
        otel.name,
        _simple_text(type_text) or span.span_type,
        otel.status.status_code.name,
        otel.start_time,
        otel.end_time,
        attributes,
        bool(otel.events or getattr(span, "_links", None)),
        {} if resource is None else resource.attributes,
    )


def _simple_text(text: Any) -> str | None:
    """Return the text in a JSON text that escapes nothing; None for any other."""
    return text[1:-1] if type(text) is str and text[:1] == '"' and "\\" not in text else None


def text_of(span: Span, attributes: Mapping[str, Any] | None = None) -> str:
    """Return a span as MLflow stores it, in JSON that leaves letters beyond ASCII as they are.

    Args:
        span: An immutable span.
        attributes: What it is to have in place of its own.
    """
    otel = span._span
    if not (otel.events or getattr(span, "_links", None)):
        status = otel.status
        has_parent = parent_number_of(otel) is not None
        template = _template(otel.kind, status.status_code, has_parent, bool(status.description))
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
    parent, end = parent_number_of(otel), otel.end_time
    return (
        base64.b64encode(trace_number_of(otel).to_bytes(16, "big")).decode(),
        base64.b64encode(number_of(otel).to_bytes(8, "big")).decode(),
        "" if parent is None else base64.b64encode(parent.to_bytes(8, "big")).decode(),
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
    total = sum(sizes) + _length_of_rest(info) + (len(sizes) - 1) * 2
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


def _length_of_rest(info: Any) -> int:
    """Return how long the JSON of a trace is without its spans."""
    location, metadata, tags = info.trace_location, info.trace_metadata, info.tags
    texts = [info.trace_id, *metadata.values(), *tags.values()]
    if (
        info.assessments
        or location.mlflow_experiment is None
        or info.execution_duration is None
        or any(len(text) > _UNCUT for text in texts)
    ):
        return len(Trace(info, TraceData([])).to_json())
    others = tuple(getattr(info, name) for name in _OPTIONAL)
    fixed = _length_of_fixed(
        (location.mlflow_experiment.experiment_id, info.state, info.request_time % 1000 == 0),
        (tuple(metadata), tuple(tags)),
        tuple(text is not None for text in others),
    )
    texts += [text for text in others if text is not None]
    return fixed + len(str(info.execution_duration)) + sum(len(encode_basestring_ascii(text)) for text in texts)


# Beyond it MLflow cuts metadata and tags; and what a trace may have besides.
_UNCUT = 200
_OPTIONAL = ("request_preview", "response_preview", "client_request_id")


@functools.lru_cache(maxsize=256)
def _length_of_fixed(sort: tuple[str, Any, bool], keys: tuple[tuple[str, ...], ...], has: tuple[bool, ...]) -> int:
    """Return how long the JSON of a trace is without its spans and the texts that differ from trace to trace.

    Args:
        sort: Its experiment, its state, and whether it began at a whole second.
        keys: Of its metadata, and of its tags.
        has: Which of the texts in `_OPTIONAL` it has.
    """
    from mlflow.entities import TraceInfo
    from mlflow.entities.trace_location import TraceLocation

    experiment_id, state, is_whole_second = sort
    sample = TraceInfo(
        trace_id="x",
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=1_000 if is_whole_second else 1_001,
        state=state,
        execution_duration=1,
        trace_metadata=dict.fromkeys(keys[0], "x"),
        tags=dict.fromkeys(keys[1], "x"),
        **{name: "x" for name, is_there in zip(_OPTIONAL, has, strict=True) if is_there},
    )
    texts = 1 + len(keys[0]) + len(keys[1]) + sum(has)
    return len(Trace(sample, TraceData([])).to_json()) - len("1") - texts * len('"x"')


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
        texts = list(map(text_of, spans))
        infos: tuple[dict[str, Any], ...] = ({}, {"execution_duration": 12}, {"execution_duration": 9, "tags": _ODD})
        return all(_adds_same(texts, spans, info) for info in infos)
    except Exception:  # noqa: BLE001 - a future MLflow may do anything; then its own function is used
        return False


_ODD = {"a": "x\ny", "é": "ü"}


def _adds_same(texts: Sequence[str], spans: Sequence[Span], info: Mapping[str, Any]) -> bool:
    mine, theirs = (_sample_info(**info) for _ in range(2))
    _add_sizes(mine, texts)
    add_size_stats_to_trace_metadata(Trace(theirs, TraceData(list(spans))))
    return bool(mine.trace_metadata and mine.trace_metadata == theirs.trace_metadata)


def _sample_info(**more: Any) -> Any:
    from mlflow.entities import TraceInfo, TraceState
    from mlflow.entities.trace_location import TraceLocation

    return TraceInfo(
        trace_id="tr-sample",
        trace_location=TraceLocation.from_experiment_id("0"),
        request_time=1,
        state=TraceState.OK,
        request_preview="é",
        **copy.deepcopy(more),
    )
