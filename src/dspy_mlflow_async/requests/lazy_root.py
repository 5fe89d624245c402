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


class Root:
    """Root span of a request, promised in its context and started on demand, once.

    Args:
        record: Who is told the trace's id.
        preview: What the span shows of its calls.
        settings: What the span goes by.
        describe: What is known of the request when the span begins.
        where: What is current around the request.
        said: What holds in the request, and decides on its trace, whatever holds where the span begins.
        remote: The caller's span in another process, or None.
        successor: Says who begins spans in its place when it is over, or None for nobody.
    """

    def __init__(
        self,
        record: Record,
        preview: Preview,
        settings: Settings,
        describe: Callable[[], Beginning],
        where: TracingContext,
        said: Carrier,
        remote: Any | None = None,
        successor: Callable[[], Promise | None] = lambda: None,
    ) -> None:
        self._span: Any | None = None  # OpenTelemetry's; one that records nothing where the sampler left it out
        self._open: OpenSpan | None = None
        self._is_over = False
        self._record = record
        self.preview = preview
        self._settings = settings
        self._describe = describe
        self._where = where
        self._said = said
        self._remote = remote
        self._successor = successor
        self._adopted: int | None = None  # the trace of another process that is kept open for the span
        self._promised_id: int | None = None
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
                    self._said.run(self._begin)
                return self._span
        successor = self._successor()
        return INVALID_SPAN if successor is None else successor.begin()

    @guarded
    def _begin(self) -> None:
        where = self._where
        if type(where.span) is LazySpan:
            where = where._replace(span=where.span.begun())
        parent: Any = where.span if is_live(where.span) else None
        if has_ended(where.span):
            parent = INVALID_SPAN
        beginning = self._describe()
        plain = Door(self._settings).plain()
        attributes = {key: plain.encode(plain(value)) for key, value in beginning.attributes.items()}
        if (inputs := self.preview.of_inputs(beginning.inputs)) is not None:
            attributes[SpanAttributeKey.INPUTS] = inputs
        tracer_ = current_tracer(where)
        if self._remote is not None and parent is None:
            parent = self._remote
            self._adopted = remote_traces.adopt(parent.get_span_context().trace_id)
        elif self._promised_id is not None:
            tracer_ = with_trace_id(tracer_, self._promised_id)
        begun = start_span(mask(beginning.name), SpanType.CHAIN, where, parent, None, attributes, tracer_)
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
            return self._said.run(self._promise_id)

    @guarded
    def _promise_id(self) -> str | None:
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
            if self._adopted is not None:
                remote_traces.release(self._adopted)

    def _end(self, span: OpenSpan, failure: Failure | None, outputs: Any, attributes: Mapping[str, Any]) -> None:
        plain = Door(self._settings).plain()
        texts: dict[str, str] = {}
        try:
            texts = {key: plain.encode(plain(value)) for key, value in attributes.items()}
            if (shown := self.preview.of_outputs(outputs, failure)) is not None:
                texts[SpanAttributeKey.OUTPUTS] = shown
        finally:
            tracer.end_span(span, self._settings, texts, failure)


class CurrentMessage:
    """Promise current in a WebSocket of which each message is a trace: it stands for the current message's span.

    A message holds in the context of the task that has received it, which need not be the handler's: before Python
    3.12 ``asyncio.wait_for`` receives in a task of its own. The handler finds the message here.

    Attributes:
        root: That of the message that is being worked on, or None.
        is_handed_on: Whether another task than the handler's has received, so that what holds in the handler's context
            may be an earlier message.
    """

    def __init__(self) -> None:
        self.root: Root | None = None
        self.is_handed_on = False

    @property
    def span(self) -> Any | None:
        """The message's span, once it has started."""
        root = self.root
        return None if root is None else root.span

    def call_started(self, span: OpenSpan, inputs: str | None) -> None:
        """Let the message's span show what its first call is asked."""
        if (root := self.root) is not None:
            root.preview.call_started(span, inputs)

    def call_ended(self, span: OpenSpan, outputs: str | None) -> None:
        """Let the message's span show what its last call has returned."""
        if (root := self.root) is not None:
            root.preview.call_ended(span, outputs)

    def begin(self) -> Any:
        """Return the message's span; between two messages INVALID_SPAN, so that calls begin traces of their own."""
        root = self.root
        return INVALID_SPAN if root is None else root.begin()

    def successor(self) -> CurrentMessage | None:
        """Return the promise that starts spans where a message that is over is still current."""
        return self if self.is_handed_on else None
