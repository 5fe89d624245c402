"""Traces that began in another process: the W3C headers that name one, and what lets MLflow take its spans here."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from mlflow.entities import TraceLocation
from mlflow.entities.trace_info import TraceInfo
from mlflow.entities.trace_state import TraceState
from mlflow.tracing.trace_manager import InMemoryTraceManager, _Trace
from mlflow.tracing.utils import generate_mlflow_trace_id_from_otel_trace_id
from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.patching import Undo, patch

# Traces whose work here is over, and in which a call that was left behind may still begin or end spans.
_REMEMBERED = 1_000


def mlflow_trace_id(otel_trace_id: int) -> str:
    """Return MLflow's id of a trace, ``tr-`` and 32 hexadecimal digits."""
    return str(generate_mlflow_trace_id_from_otel_trace_id(otel_trace_id))


def headers_of(span: Any) -> dict[str, str]:
    """Return the W3C headers ``traceparent`` and ``tracestate`` that name a span, for ``remote_parent`` elsewhere."""
    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers, otel.set_span_in_context(span, Context()))
    return headers


def patch_headers(sent: Callable[[str], None]) -> Undo:
    """Tell of each span that MLflow makes headers for another process of.

    ``mlflow.tracing.get_tracing_context_headers_for_http_request`` finds its propagator in its module, each time.

    Args:
        sent: Called with MLflow's id of the span's trace.
    """
    if taken("mlflow.tracing.distributed:TraceContextTextMapPropagator") is None:
        return lambda: None
    from mlflow.tracing import distributed

    class Propagator(TraceContextTextMapPropagator):
        def inject(self, carrier: Any, *args: Any, **kwargs: Any) -> None:
            super().inject(carrier, *args, **kwargs)
            if header := carrier.get("traceparent"):
                sent(f"tr-{header.split('-')[1]}")

    return patch(distributed, TraceContextTextMapPropagator=Propagator)


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
    """Remote traces that spans of ours belong to. ``lock`` guards how many blocks of work each has here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: Counter[int] = Counter()
        self._experiments: OrderedDict[int, str | None] = OrderedDict()  # of those in use, and of the last ones

    def after_fork(self) -> None:
        """Make a new lock in a forked child, which goes on in the traces of its parent."""
        self._lock = threading.Lock()

    def adopt(self, otel_trace_id: int, experiment_id: str | None = None) -> int | None:
        """Let MLflow accept spans of a trace that it does not know.

        As ``mlflow.tracing.distributed.set_tracing_context_from_http_request_headers`` does, which lets go of the
        trace when the first of two requests of the same caller ends.

        Args:
            otel_trace_id: OpenTelemetry's id of the trace.
            experiment_id: The experiment that the trace is in, where that is known.

        Returns:
            What to ``release``; None for a trace that began in this very process.
        """
        with self._lock:
            is_known = self._trace(otel_trace_id) is not None
            if is_known and otel_trace_id not in self._experiments:
                return None
            self._users[otel_trace_id] += 1
            if not is_known:
                self._experiments[otel_trace_id] = experiment_id
                self._register(otel_trace_id)
            self._experiments.move_to_end(otel_trace_id)
            return otel_trace_id

    def release(self, otel_trace_id: int) -> None:
        """Release a trace whose work here is over; MLflow forgets it when no span of it is open any more."""
        with self._lock:
            self._users[otel_trace_id] -= 1
            if not self._users[otel_trace_id]:
                del self._users[otel_trace_id]
                self._forget(otel_trace_id)

    def known_again(self, otel_trace_id: int) -> Any | None:
        """Let MLflow know a trace again that was released: a call that was left behind goes on in it.

        Returns:
            The trace; None for one that never was here, or too long ago.
        """
        with self._lock:
            if otel_trace_id not in self._experiments:
                return None
            if self._trace(otel_trace_id) is None:
                self._register(otel_trace_id)
            return self._trace(otel_trace_id)

    def span_ended(self, otel_trace_id: int) -> None:
        """Let go of a trace that was released before its last span ended."""
        with self._lock:
            if otel_trace_id in self._experiments and otel_trace_id not in self._users:
                self._forget(otel_trace_id)

    def _trace(self, otel_trace_id: int) -> Any | None:
        manager = InMemoryTraceManager.get_instance()
        with manager._lock:
            return manager._traces.get(mlflow_trace_id(otel_trace_id))

    def _register(self, otel_trace_id: int) -> None:
        experiment_id = self._experiments[otel_trace_id]
        info = TraceInfo(
            trace_id=mlflow_trace_id(otel_trace_id),
            trace_location=None if experiment_id is None else TraceLocation.from_experiment_id(experiment_id),
            request_time=None,
            state=TraceState.IN_PROGRESS,
        )
        InMemoryTraceManager.get_instance().register_trace(otel_trace_id, info, is_remote_trace=True)

    def _forget(self, otel_trace_id: int) -> None:
        trace: _Trace | None = self._trace(otel_trace_id)
        if trace is not None and not trace.span_dict:  # spans go out of it as they end
            InMemoryTraceManager.get_instance().pop_trace(otel_trace_id)
        while len(self._experiments) - len(self._users) > _REMEMBERED:
            oldest = next(each for each in self._experiments if each not in self._users)
            del self._experiments[oldest]


remote_traces = _RemoteTraces()
