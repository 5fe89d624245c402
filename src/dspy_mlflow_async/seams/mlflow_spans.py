"""Span operations on MLflow by hand, and the context that spans are current in."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import mlflow.tracing.provider as trace_provider
import mlflow.tracing.sampling as trace_sampling
from mlflow.entities import SpanStatusCode, SpanType
from mlflow.tracing.config import get_config
from mlflow.tracing.constant import SpanAttributeKey, TokenUsageKey, TraceMetadataKey, TraceTagKey
from mlflow.tracing.context import _USER_TRACE_CONTEXT, _UserTraceContext
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import encode_span_id
from mlflow.tracing.utils.processor import apply_span_processors
from opentelemetry import context as otel_context
from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span as OtelSpan
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.mlflow_call_span import (
    BegunCall,
    CallTracer,
    call_tracer,
    is_root,
    number_of,
    trace_number_of,
)
from dspy_mlflow_async.seams.mlflow_live import (
    attributes_of,
    computes_cost,
    is_isolated,
    live_span_of,
    propagates_to_opentelemetry,
    write,
)
from dspy_mlflow_async.seams.mlflow_suppression import DISABLED, no_op_tracer
from dspy_mlflow_async.seams.own_ids import OwnIds

__all__ = ["EXCLUDE_LM_PARAMS", "SpanAttributeKey", "SpanStatusCode", "SpanType", "TokenUsageKey"]

SOURCE_RUN = TraceMetadataKey.SOURCE_RUN
# Marks traces that a scorer made, which MLflow's UI keeps apart from predictions.
SOURCE_SCORER_TAG = getattr(TraceTagKey, "SOURCE_SCORER_NAME", "mlflow.trace.sourceScorer")

# None before mlflow 3.12, which has no log levels.
default_log_level_for_span_type = taken("mlflow.tracing.utils.default_log_level:default_log_level_for_span_type")
EXCLUDE_LM_PARAMS: Any = taken(
    "mlflow.dspy.util:EXCLUDE_LM_PARAMS",
    frozenset(("api_key", "api_base", "azure_ad_token", "client_secret", "azure_password", "extra_headers", "headers")),
)
set_span_cost_attribute = taken("mlflow.tracing.utils:set_span_cost_attribute")
_LOG_LEVEL = getattr(SpanAttributeKey, "LOG_LEVEL", "mlflow.spanLogLevel")
_ERROR_LEVEL = "40"  # mlflow.entities.span_log_level.SpanLogLevel.ERROR


# --- the context that tells which span is current ---------------------------------------------------------------


class _OpenTelemetryContext:
    """OpenTelemetry's global context: MLflow's when it shares the provider, and everybody's baggage."""

    @staticmethod
    def get() -> Any:
        return otel_context.get_current()

    @staticmethod
    def set(value: Any) -> None:
        otel_context.attach(value)


# MLflow's own runtime context. The variable itself: a ``Token`` of attach() is never kept, see ``context.frame``.
RUNTIME_CONTEXT = trace_provider.mlflow_runtime_context._current_context
OPENTELEMETRY_CONTEXT = _OpenTelemetryContext()
# mlflow.tracing.context(): session, user, tags, metadata, enabled.
TRACE_CONTEXT = _USER_TRACE_CONTEXT


def _optional_variables() -> list[Any]:
    """Return the variables that decide where a trace goes and whether it is sampled, as far as this MLflow has them."""
    found = [
        getattr(trace_sampling, "_SAMPLING_RATIO_OVERRIDE", None),
        getattr(trace_provider._MLFLOW_TRACE_USER_DESTINATION, "_context_local_value", None),
    ]
    # mlflow-tracing and mlflow-skinny have no pyfunc, no serving.
    found.append(taken("mlflow.pyfunc.context:_PREDICTION_REQUEST_CTX"))
    return [variable for variable in found if variable is not None]


TRACING_VARIABLES: tuple[Any, ...] = (
    RUNTIME_CONTEXT,
    OPENTELEMETRY_CONTEXT,
    TRACE_CONTEXT,
    DISABLED,
    *_optional_variables(),
)


def is_context_enabled() -> bool:
    """Return whether ``mlflow.tracing.context(enabled=False)`` is not in force here."""
    configured = TRACE_CONTEXT.get()
    return configured is None or configured.enabled is not False


def disabled_context() -> Any:
    """Return what ``mlflow.tracing.context(enabled=False)`` would set, for use without a ``with`` block."""
    configured = TRACE_CONTEXT.get()
    return _UserTraceContext(
        metadata=configured.metadata if configured else {},
        tags=configured.tags if configured else {},
        enabled=False,
    )


def extended_context(*, metadata: Mapping[str, str], tags: Mapping[str, str]) -> Any:
    """Return what ``mlflow.tracing.context(metadata=..., tags=...)`` would set, for use without a ``with`` block."""
    configured = TRACE_CONTEXT.get()
    return _UserTraceContext(
        metadata={**(configured.metadata if configured else {}), **metadata},
        tags={**(configured.tags if configured else {}), **tags},
        enabled=configured.enabled if configured else None,
    )


def plain_context() -> tuple[dict[str, str], dict[str, str], bool | None] | None:
    """Return metadata, tags and ``enabled`` of ``mlflow.tracing.context`` here, as plain data; None for nothing."""
    configured = TRACE_CONTEXT.get()
    if configured is None:
        return None
    return dict(configured.metadata or {}), dict(configured.tags or {}), configured.enabled


def context_of(metadata: Mapping[str, str], tags: Mapping[str, str], enabled: bool | None) -> Any:
    """Return what ``plain_context`` has told of, for ``TRACE_CONTEXT``; None for nothing."""
    if not metadata and not tags and enabled is None:
        return None
    return _UserTraceContext(metadata=dict(metadata), tags=dict(tags), enabled=enabled)


INVALID_SPAN = otel.INVALID_SPAN
# Under this key a context has its span; as OpenTelemetry makes it, with a random end.
_SPAN_KEY = next(iter(otel.set_span_in_context(INVALID_SPAN, Context())))


def _variable_of_opentelemetry() -> Any:
    """Return what has OpenTelemetry's own context in it, read without the detours of its API."""
    variable = getattr(taken("opentelemetry.context:_RUNTIME_CONTEXT"), "_current_context", None)
    return variable if isinstance(variable, ContextVar) else OPENTELEMETRY_CONTEXT


_get_shared = _variable_of_opentelemetry().get


class TracingContext(NamedTuple):
    """MLflow's tracing context at the point where it was asked for.

    Attributes:
        is_isolated: Whether MLflow has a provider and a context of its own.
        runtime: MLflow's own context.
        shared: OpenTelemetry's context.
        span: The OpenTelemetry span that MLflow takes for current: of ours, of the user, remote, or INVALID_SPAN.
    """

    is_isolated: bool
    runtime: Any
    shared: Any
    span: Any


def current_context() -> TracingContext:
    """Return MLflow's tracing context at this point."""
    isolated, runtime, shared = is_isolated(), RUNTIME_CONTEXT.get(), _get_shared()
    span = (runtime if isolated else shared).get(_SPAN_KEY, INVALID_SPAN)
    return TracingContext(isolated, runtime, shared, span if isinstance(span, otel.Span) else INVALID_SPAN)


def attach(span: Any, before: TracingContext) -> None:
    """Make an OpenTelemetry span current, as ``mlflow.tracing.provider.set_span_in_context`` does.

    Args:
        span: The span.
        before: What is current now; ``reattach`` puts it back.
    """
    if not before.is_isolated:
        otel_context.attach(otel.set_span_in_context(span, before.shared))
        return
    RUNTIME_CONTEXT.set(Context({**before.runtime, _SPAN_KEY: span}))
    if propagates_to_opentelemetry():
        otel_context.attach(otel.set_span_in_context(span, before.shared))


def reattach(before: TracingContext) -> None:
    """Make current again, by value, what ``attach`` or ``detach`` has replaced."""
    RUNTIME_CONTEXT.set(before.runtime)
    if _get_shared() is not before.shared:
        otel_context.attach(before.shared)


def without_span(where: TracingContext) -> TracingContext:
    """Return the same context with no span current in it."""
    return where._replace(
        runtime=otel.set_span_in_context(otel.INVALID_SPAN, where.runtime),
        shared=otel.set_span_in_context(otel.INVALID_SPAN, where.shared),
        span=otel.INVALID_SPAN,
    )


def detach() -> TracingContext:
    """Make no span current, so that the next one begins a trace of its own.

    Returns:
        What was current before.
    """
    before = current_context()
    attach(otel.INVALID_SPAN, before)
    return before


# --- spans ------------------------------------------------------------------------------------------------------


def is_live(span: Any) -> bool:
    """Return whether a span may have children: it was begun by an SDK and has not ended."""
    return isinstance(span, OtelSpan) and span.end_time is None


def has_ended(span: Any) -> bool:
    """Return whether a span of an SDK has ended. One that records nothing never does."""
    return isinstance(span, OtelSpan) and span.end_time is not None


class OpenSpan:
    """Span that has begun: MLflow's live span, the OpenTelemetry span under it, and the root of its trace."""

    __slots__ = ("level", "live", "otel", "root")

    def __init__(self, live: Any, otel_span: Any, root: Any, level: str | None) -> None:
        self.live = live
        self.otel = otel_span
        self.root = root
        self.level = level

    @property
    def trace_id(self) -> str:
        """MLflow's id of the trace, ``tr-`` and 32 hexadecimal digits."""
        return str(self.live.trace_id)

    @property
    def number(self) -> int:
        """OpenTelemetry's id of the span."""
        return number_of(self.otel)

    @property
    def trace_number(self) -> int:
        """OpenTelemetry's id of the trace."""
        return trace_number_of(self.otel)


class Unsampled(NamedTuple):
    """Span that the sampler has left out: nothing below it is recorded either.

    Attributes:
        otel: OpenTelemetry's span; it records nothing, and must be current for its children to be left out.
    """

    otel: Any


class _Tracer:
    """Tracer of MLflow's provider, fetched once per provider."""

    def __init__(self) -> None:
        self._known: tuple[Any, Any] = (None, None)
        self.calls: CallTracer | None = None  # of the one that was got last

    def get(self, *, is_isolated: bool) -> Any:
        wrapper = trace_provider.provider
        provider = wrapper._isolated_tracer_provider if is_isolated else wrapper.get()
        known, tracer = self._known
        if provider is None or known is not provider:
            wrapper.once.do_once(trace_provider._initialize_tracer_provider)
            provider = wrapper.get()
            tracer = provider.get_tracer(__name__)
            if type(getattr(tracer, "id_generator", None)) is RandomIdGenerator:
                tracer.id_generator = OwnIds()
            self._known, self.calls = (provider, tracer), call_tracer(tracer) if is_isolated else None
        return tracer


_tracer = _Tracer()


def current_tracer(where: TracingContext) -> Any:
    """Return the tracer of MLflow's provider."""
    if DISABLED.get():
        return no_op_tracer()
    return _tracer.get(is_isolated=where.is_isolated)


def forget_tracer() -> None:
    """Fetch the tracer anew: its provider has another sampler."""
    _tracer._known = (None, None)


def start_span(
    name: str,
    span_type: str,
    where: TracingContext,
    parent: Any | None,
    root: Any | None,
    attributes: dict[str, str],
    tracer: Any | None = None,
) -> OpenSpan | Unsampled | None:
    """Begin a span, as ``mlflow.start_span_no_context`` does, with all attributes in one write.

    Args:
        name: The span's name.
        span_type: One of ``SpanType``.
        where: What is current.
        parent: The OpenTelemetry span above it. None leaves it to the current context, which then holds a
            remote parent, a trace that was sampled out, or nothing.
        root: The first span of the trace in this process, or None where that is not known.
        attributes: JSON texts by key.
        tracer: What begins it; by default MLflow's tracer.

    Returns:
        The span; what stands for it where the sampler left it out; None where MLflow records none here (tracing
        disabled, trace timed out).
    """
    begun = _begin_call(name, where, parent) if tracer is None else None
    if begun is not None:
        return _open(begun.span, begun.live, span_type, root, attributes)
    context = where.runtime if where.is_isolated else where.shared
    if parent is not None and where.span is not parent:
        context = otel.set_span_in_context(parent, context)
    span = (tracer or current_tracer(where)).start_span(name, context)
    if not span.is_recording():
        return Unsampled(span) if span.get_span_context().is_valid else None
    return _open(span, live_span_of(span), span_type, root, attributes)


def _begin_call(name: str, where: TracingContext, parent: Any | None) -> BegunCall | None:
    """Begin the span of a call in the place of MLflow's tracer; None where that must do so itself."""
    if DISABLED.get() or not where.is_isolated or (parent is None and where.span is not INVALID_SPAN):
        return None
    tracer = _tracer.get(is_isolated=True)
    calls = _tracer.calls
    return calls.begin(name, parent) if calls is not None and calls.tracer is tracer else None


def _open(span: Any, live: Any | None, span_type: str, root: Any | None, attributes: dict[str, str]) -> OpenSpan | None:
    if live is None:
        live = _registered(span)
        if live is None:
            return None
    attributes[SpanAttributeKey.SPAN_TYPE] = _quoted(span_type)
    write(span, attributes)
    if root is None:
        root = span if is_root(span) else _root_of(live.trace_id, span)
    return OpenSpan(live, span, root, _level_of(span_type))


@functools.lru_cache(maxsize=64)
def _quoted(span_type: str) -> str:
    return f'"{span_type}"'


def _registered(span: Any) -> Any | None:
    """Return MLflow's span for one that a processor of MLflow's own has registered."""
    request_id = span.attributes.get(SpanAttributeKey.REQUEST_ID)
    if request_id is None:
        return None
    manager = InMemoryTraceManager.get_instance()
    return manager.get_span_from_id(json.loads(request_id), encode_span_id(span.context.span_id))


def _root_of(trace_id: str, span: Any) -> Any:
    with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
        first = next(iter(trace.span_dict.values()), None) if trace is not None else None
    return first._span if first is not None else span


@functools.lru_cache(maxsize=64)
def _level_of(span_type: str) -> str | None:
    """Return the log level that ``LiveSpan.end`` gives a span of this type, as JSON text."""
    if default_log_level_for_span_type is None:
        return None
    return str(int(default_log_level_for_span_type(span_type)))


def finish_span(
    span: OpenSpan, attributes: dict[str, str], status: otel.Status, event: Mapping[str, str] | None = None
) -> None:
    """End a span, as ``LiveSpan.end`` does. Ending it twice does nothing.

    Args:
        span: The span.
        attributes: JSON texts by key, written before it ends.
        status: OK or ERROR.
        event: The attributes of an ``exception`` event, or None.
    """
    recording = span.otel
    if recording.end_time is not None:
        return
    if span.level is not None:
        if event is not None:
            attributes[_LOG_LEVEL] = _ERROR_LEVEL
        elif _LOG_LEVEL not in attributes_of(recording):  # the user may have set one
            attributes[_LOG_LEVEL] = span.level
    write(recording, attributes)
    if event is not None:
        recording.add_event("exception", event)
    recording.set_status(status)
    if SpanAttributeKey.CHAT_USAGE in attributes and set_span_cost_attribute and computes_cost():
        set_span_cost_attribute(span.live)
    if get_config().span_processors:  # asked here, since it imports that anew for each span
        apply_span_processors(span.live)
    recording.end()
