"""Spans as the message in which a server of MLflow's takes them, made without the objects of protobuf.

For the export room. MLflow reads each attribute out of its JSON and copies it, value by value, into objects of
protobuf's, which then write bytes: a third of what sending a trace costs. Checked on mlflow 3.12.0, 3.17.2 and 3.18.0.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Sequence
from typing import Any

from mlflow.entities import Span
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.mlflow_call_span import (
    number_of,
    parent_number_of,
    resource_of_span,
    trace_number_of,
)
from dspy_mlflow_async.seams.mlflow_live import attributes_of
from dspy_mlflow_async.seams.mlflow_span_text import has_more, still

__all__ = ["message_of", "varint", "writes_same_messages"]

resource_to_otel_proto: Any = taken("mlflow.tracing.utils.otlp:resource_to_otel_proto")

# Keys of fields, as protobuf writes them: number * 8, and 0 for a number, 1 for eight bytes, 2 for what has a length.
_TRACE_ID, _SPAN_ID, _PARENT_ID, _NAME = b"\x0a\x10", b"\x12\x08", b"\x22\x08", b"\x2a"
_TIMES = struct.Struct("<BQBQ")
_KIND = b"\x30"
_START, _END = 7 * 8 + 1, 8 * 8 + 1
_ATTRIBUTE, _STATUS = b"\x4a", b"\x7a"
_TEXT, _BOOL, _INT, _FLOAT, _LIST, _MAP = b"\x0a", b"\x10", b"\x18", b"\x21", b"\x2a", b"\x32"
_FIRST, _SECOND = b"\x0a", b"\x12"  # the first and the second field of a message, which have lengths
_DOUBLE = struct.Struct("<d")
_CONTINUES, _ALL_BITS = 0x80, 0xFFFFFFFFFFFFFFFF

_scan: Any = vars(json.JSONDecoder())["scan_once"]  # which typeshed leaves out
# An attribute of which most spans have the same, such as its type, is made once.
_SHORT = 120


def varint(number: int) -> bytes:
    """Return a number as protobuf writes it, in seven bits a byte."""
    digits = bytearray()
    while number >= _CONTINUES:
        digits.append(number & 0x7F | _CONTINUES)
        number >>= 7
    return bytes([*digits, number])


class _Lengths(dict[int, bytes]):
    """Lengths as protobuf writes them, of which the usual ones are there."""

    def __missing__(self, number: int) -> bytes:
        return varint(number)


_LENGTHS = _Lengths((number, varint(number)) for number in range(4096))


def message_of(spans: Sequence[Span]) -> bytes:
    """Return the message for spans of one resource, as MLflow writes it.

    Raises:
        ValueError: Where one of them has a number that is too large for what is sent; MLflow raises the same.
    """
    inner = b"".join([_part(_SECOND, _span(span)) for span in spans])
    resource = resource_to_otel_proto(resource_of_span(spans[0]._span)).SerializeToString()
    return _part(_FIRST, _part(_FIRST, resource) + _part(_SECOND, inner))


def _part(key: bytes, content: bytes) -> bytes:
    return key + _LENGTHS[len(content)] + content


def _span(span: Span) -> bytes:
    otel = span._span
    attributes, parent, end = attributes_of(otel), parent_number_of(otel), otel.end_time
    if has_more(span, otel) or not (end and otel.start_time):
        return bytes(still(span).to_otel_proto().SerializeToString())
    try:
        content = [
            _short_attribute(key, text) if len(text) < _SHORT else _attribute(key, text)
            for key, text in attributes.items()
        ]
    except TypeError:  # some value that is no text
        return bytes(still(span).to_otel_proto().SerializeToString())
    name, status = otel.name.encode(), otel.status
    other_kind = None if otel.kind is SpanKind.INTERNAL else otel.kind  # to hash it takes a while
    return b"".join(
        (
            _TRACE_ID,
            trace_number_of(otel).to_bytes(16, "big"),
            _SPAN_ID,
            number_of(otel).to_bytes(8, "big"),
            b"" if parent is None else _PARENT_ID + parent.to_bytes(8, "big"),
            _part(_NAME, name) if name else b"",
            _kind(other_kind),
            _TIMES.pack(_START, otel.start_time, _END, end),
            *content,
            _status(status.status_code, status.description),
        )
    )


@functools.lru_cache(maxsize=8)
def _kind(other_kind: SpanKind | None) -> bytes:
    """Return the kind of a span, as MLflow's own function writes it: before 3.18 not at all."""
    number = _sample(kind=other_kind or SpanKind.INTERNAL, attributes=_REQUEST).to_otel_proto().kind
    return _KIND + varint(number) if number else b""


@functools.lru_cache(maxsize=64)
def _status(code: StatusCode, description: str | None) -> bytes:
    """Return the status of a span, as MLflow's own function writes it."""
    status = _sample(code, description).status.to_otel_proto_status()
    return _part(_STATUS, status.SerializeToString())


def _attribute(key: str, text: Any) -> bytes:
    return _named(_ATTRIBUTE, key.encode(), _any(_value(text)))


def _named(key: bytes, name: bytes, content: bytes | None) -> bytes:
    """Return a field with a name and a value, of which an empty name and a value that is not set are left out."""
    inner = _FIRST + _LENGTHS[len(name)] + name if name else b""
    if content is not None:
        inner += _SECOND + _LENGTHS[len(content)] + content
    return key + _LENGTHS[len(inner)] + inner


_short_attribute = functools.lru_cache(maxsize=1024)(_attribute)


def _value(text: Any) -> Any:
    """Return what an attribute says, as MLflow reads it: JSON, or else the text itself."""
    if not text:
        return None
    if type(text) is str:
        try:
            value, end = _scan(text, 0)
        except (StopIteration, ValueError, RecursionError):
            pass
        else:
            if end == len(text):
                return value
    try:
        return json.loads(text)
    except Exception:  # noqa: BLE001 - as MLflow does
        return text


def _any(value: Any) -> bytes | None:
    """Return a value of JSON as protobuf's ``AnyValue``; None where nothing is set."""
    kind = type(value)
    if kind is str:
        data = value.encode("utf-8", "replace")
        return _TEXT + _LENGTHS[len(data)] + data
    if kind is dict:
        data = b"".join([_named(_FIRST, name.encode("utf-8", "replace"), _any(each)) for name, each in value.items()])
        return _MAP + _LENGTHS[len(data)] + data
    if kind is list:
        data = b"".join([_part(_FIRST, _any(each) or b"") for each in value])
        return _LIST + _LENGTHS[len(data)] + data
    if value is None:
        return None
    if kind is bool:
        return _BOOL + (b"\x01" if value else b"\x00")
    if kind is int:
        if not -(1 << 63) <= value < 1 << 63:
            raise ValueError("an attribute has a number that is too large")
        return _INT + varint(value & _ALL_BITS)
    if kind is float:
        return _FLOAT + _DOUBLE.pack(value)
    raise TypeError(f"no value of JSON: {kind}")


# --- whether these are MLflow's ---------------------------------------------------------------------------------------


@functools.cache
def writes_same_messages() -> bool:
    """Return whether samples are written as MLflow's own functions write them."""
    try:
        return all(_writes_same(_sample(**each)) for each in _SAMPLES)
    except Exception:  # noqa: BLE001 - a future MLflow may do anything; then its own functions write
        return False


def _writes_same(span: Span) -> bool:
    request = ExportTraceServiceRequest()
    part = request.resource_spans.add()
    part.resource.CopyFrom(resource_to_otel_proto(span._span.resource))
    part.scope_spans.add().spans.append(span.to_otel_proto())
    return bool(message_of([span]) == request.SerializeToString())


def _context(number: int) -> SpanContext:
    return SpanContext(trace_id=number << 100 | 0xA5, span_id=number << 50 | 0x5A, is_remote=False)


def _sample(code: StatusCode = StatusCode.OK, description: str | None = None, **more: Any) -> Span:
    otel = ReadableSpan(
        context=_context(7),
        status=Status(code, description),
        start_time=1_700_000_000_000_000_001,
        **{
            "name": "é",
            "kind": SpanKind.INTERNAL,
            "end_time": 1_800_000_000_000_000_001,
            "resource": Resource({}),
            **more,
        },
    )
    return Span(otel)


_REQUEST = {"mlflow.traceRequestId": '"tr-sample"'}
_VALUES = {
    "text": '"a\\u0000\\ud800 \\u00e9"',
    "plain": "no JSON",
    "more": '1 "and more"',
    "spaces": " [1] ",
    "empty": "",
    "null": "null",
    "numbers": "[0, 1, -1, 300, 9223372036854775807, -9223372036854775808, 0.5, -1e400, NaN, true, false]",
    "nested": '{"a": {"b": [{}, [], null, ""], "é": null}, "": {"long": "' + 3000 * "é" + '"}}',
    "long": json.dumps(5000 * "x"),
}
_SAMPLES: tuple[dict[str, Any], ...] = (
    {"attributes": _REQUEST | _VALUES, "parent": _context(3), "resource": Resource({"service.name": "é", "n": 1})},
    {"attributes": _REQUEST, "code": StatusCode.ERROR, "description": "ö"},
    {"attributes": _REQUEST | {"number": 5, "flag": True}, "code": StatusCode.UNSET, "name": ""},
    {"attributes": _REQUEST, "kind": SpanKind.CLIENT},
    {"attributes": _REQUEST, "end_time": None},
    {"attributes": _REQUEST, "events": [Event("exception", {"text": "ü"}, 1)]},
)
