"""Lazy root span of a request: it starts with the first call inside that needs a parent, and otherwise never."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dspy_mlflow_async.context.carrier import Carrier
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.requests.preview import Preview
from dspy_mlflow_async.requests.record import Record
from dspy_mlflow_async.seams.mlflow_lazy_span import LazySpan, Promise, leaves_out, new_trace_id, with_trace_id
from dspy_mlflow_async.seams.mlflow_remote_traces import mlflow_trace_id, remote_traces
from dspy_mlflow_async.seams.mlflow_spans import (
    INVALID_SPAN,
    OpenSpan,
    SpanAttributeKey,
    SpanType,
    TracingContext,
    Unsampled,
    current_tracer,
    has_ended,
    is_live,
    start_span,
)
from dspy_mlflow_async.settings import Settings
from dspy_mlflow_async.spans import tracer
from dspy_mlflow_async.spans.door import Door
from dspy_mlflow_async.spans.outcome import Failure
from dspy_mlflow_async.spans.secret_texts import mask


class Beginning(NamedTuple):
    """Name, inputs and attributes of a request, as known when its span starts.

    Attributes:
        name: The span's name.
        inputs: What to show as its inputs; None for those of its first call.
        attributes: Further attributes by key.
    """

    name: str
    inputs: Any = None
    attributes: Mapping[str, Any] = {}


class RootTrace:
    """Trace that the root of a request is in: the one around it, the caller's, or one that it begins.

    Args:
        where: What is current around the request.
        decisive: What holds in the request, and decides on its trace, whatever holds where the span begins.
        remote: The caller's span in another process, or None.
    """

    def __init__(self, where: TracingContext, decisive: Carrier, remote: Any | None = None) -> None:
        self.run = decisive.run
        self._where = where
        self._remote = remote
        self._adopted: int | None = None  # the trace of another process that is kept open for the span
        self._promised_id: int | None = None

    def place(self) -> TracingContext:
        """Return what is current where the span begins; a span around it that was only promised has begun by then."""
        where = self._where
        return where._replace(span=where.span.begun()) if type(where.span) is LazySpan else where

    def start_span(self, name: str, place: TracingContext, attributes: dict[str, str]) -> OpenSpan | Unsampled | None:
        """Start the span. To be called by ``run``, as `promise_id` is.

        Args:
            name: Its name.
            place: Where, as `place` has said.
            attributes: JSON texts by key.

        Returns:
            The span; None or what stands for it where it is not recorded.
        """
        parent: Any = place.span if is_live(place.span) else None
        if has_ended(place.span):
            parent = INVALID_SPAN
        tracer_ = current_tracer(place)
        if self._remote is not None and parent is None:
            parent = self._remote
            self._adopted = remote_traces.adopt(parent.get_span_context().trace_id)
        elif self._promised_id is not None:
            tracer_ = with_trace_id(tracer_, self._promised_id)
        return start_span(name, SpanType.CHAIN, place, parent, None, attributes, tracer_)

    @guarded
    def promise_id(self) -> str | None:
        """Return MLflow's id of the trace that the span would begin; None where there will be none, or nobody knows."""
        span = self._where.span
        if is_live(span) or type(span) is LazySpan:
            return None  # below somebody else's span, which has not said
        if self._remote is not None:
            context = self._remote.get_span_context()
            return mlflow_trace_id(context.trace_id) if context.trace_flags.sampled else None
        tracer_ = current_tracer(self._where)
        if self._promised_id is None:
            self._promised_id = new_trace_id(tracer_)
        if leaves_out(tracer_, self._promised_id):
            return None
        return mlflow_trace_id(self._promised_id)

    def release(self) -> None:
        """Let the caller's trace go on to the store, as far as it is in this process."""
        if self._adopted is not None:
            remote_traces.release(self._adopted)


class Root:
    """Root span of a request, promised in its context and started on demand, once.

    Args:
        record: Who is told the trace's id.
        preview: What the span shows of its calls.
        settings: What the span goes by.
        describe: What is known of the request when the span begins.
        trace: The trace that it is in.
        successor: Says who begins spans in its place when it is over, or None for nobody.
    """

    def __init__(
        self,
        record: Record,
        preview: Preview,
        settings: Settings,
        describe: Callable[[], Beginning],
        trace: RootTrace,
        successor: Callable[[], Promise | None] = lambda: None,
    ) -> None:
        self._span: Any | None = None  # OpenTelemetry's; one that records nothing where the sampler left it out
        self._open: OpenSpan | None = None
        self._is_over = False
        self._record = record
        self.preview = preview
        self._settings = settings
        self._describe = describe
        self._trace = trace
        self._successor = successor
        # Tasks and threads of one request may want its span at once.
        self._lock = threading.Lock()
        self.promise = LazySpan(self)

    def __del__(self) -> None:
        # As for tracer.SpanScope: a request that was dropped without an end.
        if self._open is not None and not self._is_over:
            tracer.abandon(self._open, self._settings)

    @property
    def has_begun(self) -> bool:
        """True if the span has started and is recorded."""
        return self._open is not None

    @property
    def span(self) -> Any | None:
        """The span, or None if it has not started."""
        successor = self._successor() if self._is_over else None
        return self._span if successor is None else successor.span

    def begin(self) -> Any:
        """Return the span, started now if it was not; INVALID_SPAN once the request is over."""
        with self._lock:
            if not self._is_over:
                if self._span is None:
                    self._span = INVALID_SPAN  # whatever goes wrong, once
                    self._trace.run(self._begin)
                return self._span
        successor = self._successor()
        return INVALID_SPAN if successor is None else successor.begin()

    @guarded
    def _begin(self) -> None:
        place = self._trace.place()
        beginning = self._describe()
        plain = Door(self._settings).plain()
        attributes = {key: plain.encode(plain(value)) for key, value in beginning.attributes.items()}
        if (inputs := self.preview.of_inputs(beginning.inputs)) is not None:
            attributes[SpanAttributeKey.INPUTS] = inputs
        begun = self._trace.start_span(mask(beginning.name), place, attributes)
        if isinstance(begun, Unsampled):
            self._span = begun.otel
        elif begun is not None:
            self._open, self._span = begun, begun.otel
            self.preview.begin(begun)
            self._record.on_span_start(begun)

    def promised_trace_id(self) -> str | None:
        """Return MLflow's id of the span's trace, or of the one it would start; None where there will be none."""
        with self._lock:
            if self._open is not None:
                return self._open.trace_id
            if self._is_over or self._span is not None:
                return None
            return self._trace.run(self._trace.promise_id)

    def end(self, failure: Failure | None, outputs: Any = None, attributes: Mapping[str, Any] | None = None) -> None:
        """End the span if it began, and begin none from now on.

        Args:
            failure: What ended the request, or None.
            outputs: What to show as its outputs; None for those of its last call.
            attributes: Further attributes by key.
        """
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        try:
            if self._open is not None:
                self._end(self._open, failure, outputs, attributes or {})
        finally:
            self.preview.close()
            self._trace.release()

    def _end(self, span: OpenSpan, failure: Failure | None, outputs: Any, attributes: Mapping[str, Any]) -> None:
        plain = Door(self._settings).plain()
        texts: dict[str, str] = {}
        try:
            texts = {key: plain.encode(plain(value)) for key, value in attributes.items()}
            if (shown := self.preview.of_outputs(outputs, failure)) is not None:
                texts[SpanAttributeKey.OUTPUTS] = shown
        finally:
            tracer.end_span(span, self._settings, texts, failure)
