"""Scopes of open calls: the state that a call holds, and that its end must put back; frames point to these."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from dspy_mlflow_async.seams.mlflow_spans import (
    TRACE_CONTEXT,
    OpenSpan,
    TracingContext,
    Unsampled,
    attach,
    current_context,
    detach,
    disabled_context,
    reattach,
)
from dspy_mlflow_async.settings import Settings
from dspy_mlflow_async.spans.observer import RequestObserver
from dspy_mlflow_async.spans.usage import Ledger


class Usage(Protocol):
    """Counter of tokens while a call is open."""

    def close(self, outputs: Any, exception: BaseException | None) -> None:
        """Stop counting: the call has returned or raised."""

    def attributes(self, outputs: Any) -> dict[str, Any]:
        """Return the span attributes for what was counted."""


class SpanScope:
    """Scope of an open span, with the context that its end must put back.

    Frames point to it, and contexts to frames. When the last of them is gone before the call has ended, nothing
    can end it any more: it has been abandoned.
    """

    __slots__ = ("before", "ended", "ledger", "request", "settings", "show_outputs", "span", "told", "usage")

    def __init__(self, span: OpenSpan, before: TracingContext, settings: Settings, ledger: Ledger | None) -> None:
        self.ended = False
        self.request: RequestObserver | None = None  # the request around it
        self.told: RequestObserver | None = None  # the same, for its outermost calls: it is told of their ends
        self.span = span
        self.settings = settings
        self.ledger = ledger
        self.usage: Usage | None = None
        self.show_outputs: Callable[[Any], Any] | None = None
        self.before = before

    def enter(self) -> None:
        """Make the span current. Its frame is entered first, so that an interruption can be undone."""
        attach(self.span.otel, self.before)

    def __del__(self) -> None:
        # The garbage collector may run while this very thread holds a lock of an exporter, so only append:
        # whoever begins, ends or flushes next ends the span.
        if not self.ended:
            abandoned.append((self.span, self.settings))


class Counting:
    """The scope of an LM call that gets no span, but of which an evaluation, a compile or a request wants to know."""

    __slots__ = ("left_out", "usage")

    def __init__(self, usage: Usage, left_out: SampledOut | None) -> None:
        self.usage = usage
        self.left_out = left_out


class Region:
    """The scope of an evaluation or a compile: no span of its own, but what holds for everything inside.

    Args:
        isolated: Whether calls inside begin traces of their own, whatever is current outside.
        suppressed: Whether calls inside are not recorded.
    """

    __slots__ = ("_is_suppressed", "before", "isolated", "trace_context")

    def __init__(self, *, isolated: bool, suppressed: bool) -> None:
        self.isolated = isolated
        self._is_suppressed = suppressed
        self.trace_context = TRACE_CONTEXT.get()
        self.before = current_context() if isolated else None

    def enter(self) -> None:
        """Put it in force. Its frame is entered first, so that an interruption can be undone."""
        if self.isolated:
            detach()
        if self._is_suppressed:
            TRACE_CONTEXT.set(disabled_context())

    def leave(self) -> None:
        """Put back, by value, what held outside."""
        TRACE_CONTEXT.set(self.trace_context)
        if self.before is not None:
            reattach(self.before)


class Untraced:
    """The scope of a call that began while its tracer was switched off: nothing below it begins a trace."""

    __slots__ = ("ended",)

    def __init__(self) -> None:
        self.ended = False


class SampledOut(Untraced):
    """The scope of a call that the sampler has left out, with all that is below it."""

    __slots__ = ("before",)

    def __init__(self, span: Unsampled, before: TracingContext) -> None:
        super().__init__()
        self.before = before
        attach(span.otel, before)


# Spans whose call is gone, for whoever begins, ends or flushes next to end.
abandoned: deque[tuple[OpenSpan, Settings]] = deque()
