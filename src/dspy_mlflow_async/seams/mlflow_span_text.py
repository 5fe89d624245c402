"""Texts of spans as MLflow stores and weighs them, made without a dict of each, and what a row has besides.

For the export room. Checked on mlflow 3.11.1, 3.12.0, 3.17.2 and 3.18.0.
"""

from __future__ import annotations

import binascii
import copy
import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any, NamedTuple

from mlflow.entities import Span, Trace, TraceData
from mlflow.tracing import constant
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.made_once import MadeOnce
from dspy_mlflow_async.seams.mlflow_call_span import (
    number_of,
    parent_number_of,
    resource_of_span,
    trace_number_of,
)
from dspy_mlflow_async.seams.mlflow_live import attributes_of

__all__ = ["SpanRecord", "StillSpans", "add_sizes", "as_given", "has_more", "read", "record_of", "still", "text_of"]

TraceJSONEncoder: Any = taken("mlflow.tracing.utils:TraceJSONEncoder", json.JSONEncoder)
add_size_stats_to_trace_metadata: Any = taken(
    "mlflow.tracing.utils:add_size_stats_to_trace_metadata", lambda _trace: None
)
_calculate_percentile: Any = taken("mlflow.tracing.utils:_calculate_percentile")
TraceSizeStatsKey: Any = getattr(constant, "TraceSizeStatsKey", None)

_encode = TraceJSONEncoder(ensure_ascii=False).encode


@functools.lru_cache(maxsize=1024)
def read(text: str) -> Any:
    """Return what JSON says, which nobody changes. The usage of an LM call is that of the calls around it, too."""
    return json.loads(text)


def still(span: Any) -> Span:
    """Return the immutable form of a span."""
    found: Span = span.to_immutable_span() if hasattr(span, "to_immutable_span") else span
    return found


class StillSpans(MadeOnce):
    """Immutable forms of spans that have ended, made once somebody asks for one: rows need none.

    Attributes:
        given: The spans as they came.
    """

    __slots__ = ("given",)

    def __init__(self, given: Sequence[Any]) -> None:
        super().__init__()
        self.given = given

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.given)

    def make(self) -> list[Span]:
        """Make all of them."""
        return list(map(still, self.given))


def as_given(spans: Sequence[Any]) -> Sequence[Any]:
    """Return spans as they came, live or immutable, where their immutable forms are made once somebody asks."""
    return spans.given if type(spans) is StillSpans else spans


class SpanRecord(NamedTuple):
    """Facts of a span that has ended, for its row.

    Attributes:
        span: MLflow's span, live or immutable.
        span_id: MLflow's id.
        parent_id: That of its parent, or None.
        name: Its name.
        type: Its type, as it was recorded.
        status: "OK", "ERROR" or "UNSET".
        start_ns: When it began, in nanoseconds since 1970.
        end_ns: When it ended; None where nobody has ended it.
        attributes: As they were recorded: texts in JSON, where MLflow has written them.
        has_more: Whether it has events or links.
        resource: What OpenTelemetry says of its maker; None where it says nothing.
        text: What MLflow stores of it, see `text_of`.
    """

    span: Span
    span_id: str
    parent_id: str | None
    name: str
    type: str | None
    status: str
    start_ns: int
    end_ns: int | None
    attributes: Mapping[str, Any]
    has_more: bool
    resource: Any
    text: str


def record_of(span: Span) -> SpanRecord:
    """Return the facts of a span that has ended."""
    otel = span._span
    ids, attributes, is_long = _ids_of(otel), attributes_of(otel), has_more(span, otel)
    type_text, status = attributes.get(SpanAttributeKey.SPAN_TYPE), _name_of(otel.status.status_code)
    return SpanRecord(
        span,
        ids.digits,
        ids.parent_digits,
        otel.name,
        (_simple_text(type_text) if type(type_text) is str else None) or span.span_type,
        status,
        otel.start_time,
        otel.end_time,
        attributes,
        is_long,
        resource_of_span(otel),
        _dumped(span, None) if is_long else _written(span, otel, ids, status, attributes),
    )


def has_more(span: Span, otel: Any) -> bool:
    """Return whether a span has events or links."""
    return bool(otel.events or span.__dict__.get("_links"))  # a live span makes an empty list for whoever asks


@functools.lru_cache(maxsize=1024)
def _simple_text(text: str) -> str | None:
    """Return the text in a JSON text that escapes nothing; None for any other."""
    return text[1:-1] if text[:1] == '"' and "\\" not in text else None


def text_of(span: Span, attributes: Mapping[str, Any] | None = None) -> str:
    """Return a span as MLflow stores it, in JSON that leaves letters beyond ASCII as they are.

    Args:
        span: A span that has ended.
        attributes: What it is to have in place of its own.
    """
    otel = span._span
    if has_more(span, otel):
        return _dumped(span, attributes)
    own = attributes_of(otel) if attributes is None else attributes
    return _written(span, otel, _ids_of(otel), _name_of(otel.status.status_code), own)


def _dumped(span: Span, attributes: Mapping[str, Any] | None) -> str:
    """Return MLflow's own text, from a dict of the span."""
    found = still(span).to_dict()
    if attributes is not None:
        found["attributes"] = dict(attributes)
    return _encode(found)


def _written(span: Span, otel: Any, ids: _Ids, status: str, attributes: Mapping[str, Any]) -> str:
    """Return the text of a span without events, by a template."""
    kind, message = otel.kind, otel.status.description
    other_kind = None if kind is _INTERNAL else kind  # to hash it takes a while
    template = _template(other_kind, status, ids.parent is not None, bool(message))
    if template is None:
        return _dumped(span, attributes)
    return template.fill(_values(otel, ids, message, attributes))


def _name_of(code: StatusCode) -> str:
    # An enumeration looks for the name of one of its own in a roundabout way.
    return "OK" if code is _OK else "ERROR" if code is _ERROR else code.name


class _Ids(NamedTuple):
    """Ids of a span and of its parent: in hexadecimal digits, and in the letters of its text."""

    digits: str
    letters: str
    parent_digits: str | None
    parent: str | None


def _ids_of(otel: Any) -> _Ids:
    parent = parent_number_of(otel)
    return _Ids(*_id_texts(number_of(otel)), *(_NO_ID if parent is None else _id_texts(parent)))


_NO_ID = (None, None)
_INTERNAL, _OK, _ERROR = SpanKind.INTERNAL, StatusCode.OK, StatusCode.ERROR


class _Template(NamedTuple):
    """Text of a span, with gaps where one differs from the other.

    Attributes:
        text: The text, with `%s` for each gap.
        pick: Returns what goes into the gaps, of all `_values`.
    """

    text: str
    pick: Callable[[tuple[Any, ...]], tuple[Any, ...]]

    def fill(self, values: tuple[Any, ...]) -> str:
        return self.text % self.pick(values)


def _values(otel: Any, ids: _Ids, message: str | None, attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    end = otel.end_time
    return (
        _trace_text(trace_number_of(otel)),
        ids.letters,
        ids.parent,
        _encode(otel.name),
        otel.start_time,
        "null" if end is None else end,
        _encode(message) if message else None,
        _attributes_text(attributes),
    )


@functools.lru_cache(maxsize=1024)
def _id_texts(number: int) -> tuple[str, str]:
    """Return the id of a span in hexadecimal digits, and in the letters of its text."""
    return f"{number:016x}", _letters(number.to_bytes(8, "big"))


@functools.lru_cache(maxsize=64)
def _trace_text(number: int) -> str:
    return _letters(number.to_bytes(16, "big"))


def _letters(number: bytes) -> str:
    return binascii.b2a_base64(number, newline=False).decode()


def _attributes_text(attributes: Mapping[str, Any]) -> str:
    try:
        return _gaps(tuple(attributes)) % tuple(map(encode_basestring, attributes.values()))
    except TypeError:  # a number is among them, or a list
        return _encode(dict(attributes))


@functools.lru_cache(maxsize=1024)
def _gaps(names: tuple[str, ...]) -> str:
    """Return the JSON of an object with these names, and `%s` for each value."""
    pairs = [encode_basestring(name).replace("%", "%%") + ": %s" for name in names]
    return "{" + ", ".join(pairs) + "}"


@functools.cache
def _template(other_kind: SpanKind | None, status: str, has_parent: bool, has_message: bool) -> _Template | None:
    """Return MLflow's own text of a sample, with gaps; None where it cannot be cut so.

    Args:
        other_kind: What kind of span, if it is not an internal one.
        status: The name of its status.
        has_parent: Whether it has one.
        has_message: Whether its status has a description.
    """
    kind, code = other_kind or SpanKind.INTERNAL, StatusCode[status]
    try:
        return _cut(*(_sample(number, kind, code, has_parent, has_message) for number in (1, 2)))
    except Exception:  # noqa: BLE001 - a sample that MLflow does not take as expected; its own function writes the text
        return None


def _cut(first: Span, second: Span) -> _Template | None:
    """Cut the values out of the first sample's text; None where the second cannot be made from what is left."""
    text, values = _encode(first.to_dict()), _values_of_sample(first)
    places = sorted((text.find(value), index) for index, value in enumerate(values) if value)
    if any(place < 0 or text.count(values[index]) > 1 for place, index in places):
        return None
    ends = [0, *(place + len(values[index]) for place, index in places)]
    pieces = [text[end:start] for end, start in zip(ends, [*(place for place, _ in places), None], strict=True)]
    gaps = "%s".join(piece.replace("%", "%%") for piece in pieces)
    template = _Template(gaps, operator.itemgetter(*(index for _, index in places)))
    return template if template.fill(tuple(_values_of_sample(second))) == _encode(second.to_dict()) else None


def _values_of_sample(span: Span) -> list[str]:
    """Return the values of a sample, as they stand in its text; none for what it does not have."""
    otel = span._span
    values = _values(otel, _ids_of(otel), otel.status.description, attributes_of(otel))
    return ["" if value is None else str(value) for value in values]


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
    quarters = [int(_calculate_percentile(sizes, part)) for part in (0.25, 0.50, 0.75)]
    info.trace_metadata[TraceMetadataKey.SIZE_STATS] = _statistics() % (total, len(sizes), sizes[-1], *quarters)
    info.trace_metadata[TraceMetadataKey.SIZE_BYTES] = str(total)


@functools.cache
def _statistics() -> str:
    """Return the JSON of a trace's statistics, with `%d` for each number."""
    keys = TraceSizeStatsKey
    quarters = (keys.P25_SPAN_SIZE_BYTES, keys.P50_SPAN_SIZE_BYTES, keys.P75_SPAN_SIZE_BYTES)
    names = (keys.TOTAL_SIZE_BYTES, keys.NUM_SPANS, keys.MAX_SPAN_SIZE_BYTES, *quarters)
    return json.dumps(dict.fromkeys(names, "%d")).replace('"%d"', "%d")


def _length_of_rest(info: Any) -> int:
    """Return how long the JSON of a trace is without its spans."""
    location, metadata, tags = info.trace_location, info.trace_metadata, info.tags
    texts = [info.trace_id, *metadata.values(), *tags.values()]
    if (
        info.assessments
        or location.mlflow_experiment is None
        or info.execution_duration is None
        or max(map(len, texts)) > _UNCUT
    ):
        return len(Trace(info, TraceData([])).to_json())
    others = _others(info)
    texts += [text for text in others if text is not None]
    fixed = _length_of_fixed(
        (location.mlflow_experiment.experiment_id, info.state, info.request_time % 1000 == 0),
        (tuple(metadata), tuple(tags)),
        tuple([text is not None for text in others]),
    )
    quotes = len(texts) * len('""')
    escaped = len(encode_basestring_ascii("".join(texts))) - len('""')
    return fixed + len(str(info.execution_duration)) + escaped + quotes


# Beyond it MLflow cuts metadata and tags; and what a trace may have besides.
_UNCUT = 200
_OPTIONAL = ("request_preview", "response_preview", "client_request_id")
_others = operator.attrgetter(*_OPTIONAL)


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
