"""Lazy span: a current span that begins with its first child, as the root of a request that may need none."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import IdGenerator

from dspy_mlflow_async.seams.own_ids import OwnIds


class Promise(Protocol):
    """Promise of a span, kept by beginning it when it is wanted."""

    @property
    def span(self) -> Any | None:
        """Span, if it has begun."""

    def begin(self) -> Any:
        """Begin the span now if it was not; INVALID_SPAN once it is too late."""


class LazySpan(otel.Span):
    """Lazy span that stands where MLflow and OpenTelemetry look for the current span.

    Both ask the current span for its ``get_span_context()`` when they begin a child, and only then: that is when
    the span begins. Until then it passes for the ``NonRecordingSpan`` that MLflow sees where nothing is current.
    """

    def __init__(self, promise: Promise) -> None:
        self._promise = promise

    @property
    def __class__(self) -> Any:
        """Class that ``isinstance`` is told; MLflow's ``get_current_active_span`` sorts spans by it."""
        span = self._promise.span
        return otel.NonRecordingSpan if span is None or isinstance(span, otel.NonRecordingSpan) else LazySpan

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("the class of a promised span is its own affair")

    def begun(self) -> Any:
        """Return the span itself, begun now if it was not."""
        return self._promise.begin()

    def get_span_context(self) -> otel.SpanContext:
        """Return the span context that a child needs of its parent."""
        context: otel.SpanContext = self.begun().get_span_context()
        return context

    def _span(self) -> Any:
        return self._promise.span or otel.INVALID_SPAN

    def __getattr__(self, name: str) -> Any:
        """Return ``attributes``, ``context`` and whatever else there is: the span's, once it has begun."""
        return getattr(self._span(), name)

    def end(self, end_time: int | None = None) -> None:
        """Do nothing: who has promised the span ends it."""

    def is_recording(self) -> bool:
        """Return whether the span has begun, and records."""
        return bool(self._span().is_recording())

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of the span."""
        self._span().set_attributes(attributes)

    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute of the span."""
        self._span().set_attribute(key, value)

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        """Add an event to the span."""
        self._span().add_event(name, attributes, timestamp)

    def update_name(self, name: str) -> None:
        """Rename the span."""
        self._span().update_name(name)

    def set_status(self, status: Any, description: str | None = None) -> None:
        """Set the status of the span."""
        self._span().set_status(status, description)

    def record_exception(self, exception: BaseException, *args: Any, **kwargs: Any) -> None:
        """Record an exception in the span."""
        self._span().record_exception(exception, *args, **kwargs)


# --- a trace id that is known before the trace begins -------------------------------------------------------------


class _PromisedIds(IdGenerator):
    def __init__(self, ids: IdGenerator, trace_id: int) -> None:
        self._ids = ids
        self._trace_id = trace_id

    def generate_trace_id(self) -> int:
        return self._trace_id

    def generate_span_id(self) -> int:
        return self._ids.generate_span_id()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ids, name)


def new_trace_id(tracer: Any) -> int:
    """Make an id for a trace that ``tracer`` will begin."""
    ids = getattr(tracer, "id_generator", None) or OwnIds()
    return int(ids.generate_trace_id())


def with_trace_id(tracer: Any, trace_id: int) -> Any:
    """Make a tracer whose next trace has this id; ``start_span`` takes none."""
    ids = getattr(tracer, "id_generator", None)
    if ids is None:  # no SDK: tracing is disabled
        return tracer
    tracer = copy.copy(tracer)
    tracer.id_generator = _PromisedIds(ids, trace_id)
    return tracer


def leaves_out(tracer: Any, trace_id: int) -> bool:
    """Return whether the sampler would leave out a trace with this id that began here."""
    sampler = getattr(tracer, "sampler", None)
    if sampler is None:
        return False
    return not sampler.should_sample(Context(), trace_id, "").decision.is_sampled()
