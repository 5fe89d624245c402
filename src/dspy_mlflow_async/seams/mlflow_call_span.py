"""Spans of DSPy's calls: OpenTelemetry's and MLflow's span objects, whose parts are made when somebody asks for them.

OpenTelemetry's constructor makes a dozen objects for a span (locks, lists of events and links, a bounded mapping, ids),
of which a call of DSPy's uses none. Checked on opentelemetry-sdk 1.45.2, mlflow 3.11.1, 3.17.2 and 3.18.0; where they
are others, their own objects are made.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mlflow.entities import Span as MlflowSpan
from mlflow.entities.span import LiveSpan, _SpanAttributesRegistry
from mlflow.tracing.constant import SpanAttributeKey
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.trace import Span, SynchronousMultiSpanProcessor, Tracer
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from dspy_mlflow_async.seams.listed import is_known, taken
from dspy_mlflow_async.seams.own_ids import probe_span

_MlflowSampler: Any = taken("mlflow.tracing.sampling:_MlflowSampler")
_SAMPLING_RATIO_OVERRIDE: Any = taken("mlflow.tracing.sampling:_SAMPLING_RATIO_OVERRIDE")

_UNSET = Status(StatusCode.UNSET)
FEWEST_ATTRIBUTES = 64  # with less room the SDK drops some of a span's, which is its own affair


class CallSpan(Span):
    """Span of OpenTelemetry's SDK that records a call of DSPy's.

    To whoever looks it is one that the SDK has begun. What is recorded is in a plain dict; all else is made when it is
    read for the first time.

    Attributes:
        begun_by: What has begun it.
        above: The span that it began under, or None.
        trace_number: OpenTelemetry's id of its trace.
        number: OpenTelemetry's id of it.
        recorded: Its attributes.
        is_shown: Whether a part of it has been made.
        trace: What follows its trace, for whoever follows one.
    """

    __slots__ = (
        *("_end_time", "is_open", "_name", "_start_time", "_status"),
        *("above", "begun_by", "is_shown", "number", "recorded", "trace", "trace_number"),
    )

    above: Any
    begun_by: CallTracer
    is_open: bool
    is_shown: bool
    number: int
    recorded: dict[str, Any]
    trace: Any
    trace_number: int

    _kind = SpanKind.INTERNAL

    def __getattr__(self, name: str) -> Any:
        """Make a part of the span, as the SDK's own constructor does."""
        make = _PARTS.get(name)
        if make is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.is_shown = True
        part = self.__dict__.setdefault(name, make(self))  # atomic: two threads get the same
        if self._end_time is not None:
            self._close_attributes()
        return part

    @property
    def attributes(self) -> Any:
        """A view of its attributes, as the SDK gives it."""
        return MappingProxyType(self.recorded)

    @property
    def parent(self) -> Any:
        """Ids of its parent, as the SDK gives them."""
        return None if self.above is None else super().parent

    @property
    def events(self) -> Any:
        """Events, as the SDK gives them."""
        return super().events if self.is_shown and "_events" in self.__dict__ else ()

    @property
    def links(self) -> Any:
        """Links to other spans, as the SDK gives them."""
        return super().links if self.is_shown and "_links" in self.__dict__ else ()

    def set_status(self, status: Any, description: str | None = None) -> None:
        """Set the status, as the SDK does: one that is OK stays."""
        if self._status is _UNSET and self._end_time is None and type(status) is Status and description is None:
            self._status = status
        else:
            super().set_status(status, description)

    def end(self, end_time: int | None = None) -> None:
        """End the span. Ending it twice does nothing."""
        try:
            del self.is_open  # atomic: one of two threads ends it
        except AttributeError:
            if self._end_time is not None:
                super().end(end_time)  # for its warning
            return
        self._end_time = time.time_ns() if end_time is None else end_time
        if self.is_shown:
            self._close_attributes()
        self.begun_by.end(self)

    def _close_attributes(self) -> None:
        held = self.__dict__.get("_attributes")
        if held is not None and _closes_attributes:
            held._immutable = True


def _context_of(span: CallSpan) -> SpanContext:
    top: Any = span
    while type(top) is CallSpan and top.above is not None:
        top = top.above
    if type(top) is CallSpan:
        ids, state = span.begun_by.tracer.id_generator, None
        is_random = bool(getattr(ids, "is_trace_id_random", bool)())
    else:
        context = top.get_span_context()
        is_random, state = bool(getattr(context.trace_flags, "random_trace_id", False)), context.trace_state
    flags = TraceFlags.SAMPLED | (getattr(TraceFlags, "RANDOM_TRACE_ID", 0) if is_random else 0)
    return SpanContext(
        span.trace_number, span.number, is_remote=False, trace_flags=TraceFlags(flags), trace_state=state
    )


def _attributes_of(span: CallSpan) -> Any:
    held = BoundedAttributes(span.begun_by.limits.max_span_attributes, None, immutable=False)
    held._dict = span.recorded
    return held


_PARTS: dict[str, Callable[[Any], Any]] = {
    "_attributes": _attributes_of,
    "_context": _context_of,
    "_events": lambda span: span._new_events(),
    "_instrumentation_info": lambda span: span.begun_by.tracer.instrumentation_info,
    "_instrumentation_scope": lambda span: span.begun_by.tracer._instrumentation_scope,
    "_limits": lambda span: span.begun_by.limits,
    "_links": lambda span: span._new_links(()),
    "_lock": lambda _: threading.Lock(),
    "_parent": lambda span: None if span.above is None else span.above.get_span_context(),
    "_record_end_metrics": lambda _: None,
    "_record_exception": lambda _: True,
    "_resource": lambda span: span.begun_by.tracer.resource,
    "_sampler": lambda span: span.begun_by.tracer.sampler,
    "_set_status_on_exception": lambda _: True,
    "_span_processor": lambda span: span.begun_by.tracer.span_processor,
    "_trace_config": lambda _: None,
}


class CallLiveSpan(LiveSpan):
    """MLflow's live span of a call, likewise."""

    def __getattr__(self, name: str) -> Any:
        """Make a part of the span, as MLflow's own constructor does."""
        make = _LIVE_PARTS.get(name)
        return super().__getattr__(name) if make is None else self.__dict__.setdefault(name, make(self))

    @property
    def trace_id(self) -> str:
        """MLflow's id of the trace."""
        return str(self._span.recorded[SpanAttributeKey.REQUEST_ID][1:-1])


CallLiveSpan.__name__ = CallLiveSpan.__qualname__ = LiveSpan.__name__  # its text begins with that

_LIVE_PARTS: dict[str, Callable[[Any], Any]] = {
    "_attachments": lambda _: {},
    "_attributes": lambda live: _SpanAttributesRegistry(live._span),
    "_links": lambda _: [],
    "_original_name": lambda live: live._span.name,
}


def live_call_span(span: CallSpan, trace_id: str) -> LiveSpan:
    """Make MLflow's span of a call."""
    live: LiveSpan = object.__new__(CallLiveSpan)
    live._span = span
    above, recorded = span.above, span.recorded
    quoted = above.recorded.get(_REQUEST_ID) if type(above) is CallSpan else None
    recorded[_REQUEST_ID] = quoted or f'"{trace_id}"'
    recorded[_SPAN_TYPE] = "null"
    return live


_REQUEST_ID, _SPAN_TYPE = SpanAttributeKey.REQUEST_ID, SpanAttributeKey.SPAN_TYPE


def with_plain_span(still: MlflowSpan) -> MlflowSpan:
    """Return MLflow's immutable span over a readable span of the SDK in place of one of these, for whoever keeps it."""
    if type(still._span) is not CallSpan:
        return still
    plain = MlflowSpan(still._span._readable_span())
    plain.__dict__.update((name, still.__dict__[name]) for name in ("_attachments", "_links") if name in still.__dict__)
    return plain


def attachments_of(span: Any) -> Mapping[str, Any]:
    """Return the attachments of MLflow's span."""
    held: Mapping[str, Any] = span.__dict__.get("_attachments", {}) if type(span) is CallLiveSpan else span._attachments
    return held


class BegunCall(NamedTuple):
    """Span that has begun.

    Attributes:
        span: The SDK's.
        live: MLflow's, as far as a processor of ours has made it known there.
    """

    span: CallSpan
    live: LiveSpan | None


class CallTracer:
    """Begins the spans of calls in the place of one of the SDK's tracers, where nobody could tell.

    Attributes:
        tracer: The SDK's.
        limits: Its bounds for spans.
    """

    __slots__ = ("_begins_traces", "_known", "_new_number", "_new_trace_number", "_processors", "limits", "tracer")

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.limits = tracer._span_limits
        self._processors: Any = tracer.span_processor
        self._known: tuple[Any, Any] = (None, None)  # the processors that were there last, and the one that takes calls
        self._begins_traces = _takes_each_trace(tracer.sampler)
        self._new_number = tracer.id_generator.generate_span_id
        self._new_trace_number = tracer.id_generator.generate_trace_id

    def begin(self, name: str, above: Any | None) -> BegunCall | None:
        """Begin a span; None where that is for the SDK, since a sampler decides, or others listen.

        Args:
            name: Its name.
            above: The span of the SDK that it begins under; None for a new trace.
        """
        processor = self._listener()
        if processor is None or not (self._may_begin_trace() if above is None else is_sampled(above)):
            return None
        span = object.__new__(CallSpan)
        span.begun_by, span.above, span.recorded, span.is_shown = self, above, {}, False
        span._name, span._status, span._end_time, span.is_open = name, _UNSET, None, True
        span.trace = None
        span.trace_number = self._new_trace_number() if above is None else trace_number_of(above)
        span.number = self._new_number()
        span._start_time = time.time_ns()
        return BegunCall(span, processor.call_started(span))

    def end(self, span: CallSpan) -> None:
        """Tell those who listen of the end of a span."""
        processor = self._listener()
        if processor is not None:
            processor.call_ended(span)
        else:
            self._processors.on_end(span._readable_span())

    def _listener(self) -> Any | None:
        """Return the one processor there is, if it takes calls."""
        listening = self._processors._span_processors
        known, processor = self._known
        if known is not listening:
            processor = listening[0] if len(listening) == 1 and hasattr(listening[0], "takes_calls") else None
            self._known = listening, processor
        return processor if processor is not None and processor.takes_calls else None

    def _may_begin_trace(self) -> bool:
        return self._begins_traces and _SAMPLING_RATIO_OVERRIDE.get() is None


def _takes_each_trace(sampler: Any) -> bool:
    """Return whether a sampler, but for an override here and now, takes each trace that begins."""
    root = sampler._root
    return type(root) is _MlflowSampler and root._default_ratio == 1.0


def call_tracer(tracer: Any) -> CallTracer | None:
    """Return what begins the spans of calls in the place of a tracer; None where that must do so itself."""
    if (
        type(tracer) is not Tracer
        or type(tracer.span_processor) is not SynchronousMultiSpanProcessor
        or type(tracer.sampler) is not ParentBased
        or tracer.sampler._local_parent_sampled is not ALWAYS_ON  # so that a child is sampled as its parent is
        or os.environ.get("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED")
        or not _is_as_known()
    ):
        return None
    limits = tracer._span_limits
    most = limits.max_span_attributes
    if limits.max_span_attribute_length is not None or (most is not None and most < FEWEST_ATTRIBUTES):
        return None
    return CallTracer(tracer)


# --- what is asked of spans of all kinds ------------------------------------------------------------------------------


def trace_number_of(span: Any) -> int:
    """Return OpenTelemetry's id of a span's trace."""
    return span.trace_number if type(span) is CallSpan else span.context.trace_id


def number_of(span: Any) -> int:
    """Return OpenTelemetry's id of a span."""
    return span.number if type(span) is CallSpan else span.context.span_id


def parent_number_of(span: Any) -> int | None:
    """Return OpenTelemetry's id of a span's parent; None for a root."""
    if type(span) is CallSpan:
        return None if span.above is None else number_of(span.above)
    return None if span.parent is None else span.parent.span_id


def resource_of_span(span: Any) -> Any:
    """Return what OpenTelemetry says of the maker of a span; None where it says nothing."""
    return span.begun_by.tracer.resource if type(span) is CallSpan else span.resource


def is_call(span: Any) -> bool:
    """Return whether a span is one of a call whose parts are made when they are asked for."""
    return type(span) is CallSpan


def is_sampled(span: Any) -> bool:
    """Return whether a span was sampled."""
    return type(span) is CallSpan or bool(span.context.trace_flags.sampled)


def is_root(span: Any) -> bool:
    """Return whether a span has no parent."""
    return (span.above if type(span) is CallSpan else span.parent) is None


# --- whether that is the SDK's way ------------------------------------------------------------------------------------


@functools.cache
def _is_as_known() -> bool:
    """Return whether these spans have all that the SDK's and MLflow's have, and no more."""
    try:
        names = ("tracing.sampling:_MlflowSampler", "tracing.sampling:_SAMPLING_RATIO_OVERRIDE")
        if not all(is_known(f"mlflow.{name}") for name in names) or type(BoundedAttributes()._dict) is not dict:
            return False
        probe: Any = probe_span()
        known = {*_PARTS, *CallSpan.__slots__, "_kind"} - {"is_open"}
        made = LiveSpan(probe, "tr-probe")
        return set(probe.__dict__) <= known and set(made.__dict__) <= {"_span", *_LIVE_PARTS}
    except Exception:  # noqa: BLE001 - a future SDK may do anything; then its own objects are made
        return False


def _are_attributes_closed() -> bool:
    """Return whether the SDK makes the attributes of a span immutable when it ends."""
    try:
        probe: Any = probe_span()
        probe.end()
        return bool(probe._attributes._immutable)
    except Exception:  # noqa: BLE001 - as above
        return False


_closes_attributes = _are_attributes_closed()
