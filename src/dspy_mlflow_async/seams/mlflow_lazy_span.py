"""Lazy span: a current span that begins with its first child, as the root of a request that may need none."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mlflow.entities.trace_info import TraceInfo
from mlflow.entities.trace_state import TraceState
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import generate_mlflow_trace_id_from_otel_trace_id
from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator


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
    ids = getattr(tracer, "id_generator", None) or RandomIdGenerator()
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


def mlflow_trace_id(otel_trace_id: int) -> str:
    """Return MLflow's id of a trace, ``tr-`` and 32 hexadecimal digits."""
    return str(generate_mlflow_trace_id_from_otel_trace_id(otel_trace_id))


# --- traces that began in another process -----------------------------------------------------------------------


def remote_parent(headers: Sequence[tuple[str, str]]) -> Any | None:
    """Return the caller's span as the W3C headers ``traceparent`` and ``tracestate`` name it.

    Returns:
        OpenTelemetry's span, or None where the headers are not there or malformed (the W3C has them ignored).
    """
    carrier: dict[str, Any] = {}
    for name, value in headers:
        if name == "traceparent" and name in carrier:
            return None  # several of them are none
        carrier[name] = value if name == "traceparent" else [*carrier.get(name, ()), value]
    if "traceparent" not in carrier:
        return None
    span = otel.get_current_span(TraceContextTextMapPropagator().extract(carrier, context=Context()))
    return span if span.get_span_context().is_valid else None


class _RemoteTraces:
    """Remote traces that spans of ours belong to. ``lock`` guards how many requests each has."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()

    def adopt(self, otel_trace_id: int) -> int | None:
        """Let MLflow accept spans of a trace that it does not know.

        As ``mlflow.tracing.distributed.set_tracing_context_from_http_request_headers`` does, which lets go of the
        trace when the first of two requests of the same caller ends.

        Returns:
            What to ``release``; None for a trace that began in this very process.
        """
        manager = InMemoryTraceManager.get_instance()
        trace_id = mlflow_trace_id(otel_trace_id)
        with self._lock:
            with manager.get_trace(trace_id) as trace:
                is_known = trace is not None
            if is_known and not self._requests[otel_trace_id]:
                return None
            self._requests[otel_trace_id] += 1
            if not is_known:
                info = TraceInfo(
                    trace_id=trace_id, trace_location=None, request_time=None, state=TraceState.IN_PROGRESS
                )
                manager.register_trace(otel_trace_id, info, is_remote_trace=True)
            return otel_trace_id

    def release(self, otel_trace_id: int) -> None:
        """Release a trace whose request is over; with the last one MLflow forgets the trace."""
        with self._lock:
            self._requests[otel_trace_id] -= 1
            if not self._requests[otel_trace_id]:
                del self._requests[otel_trace_id]
                InMemoryTraceManager.get_instance().pop_trace(otel_trace_id)


remote_traces = _RemoteTraces()
