"""WebSocket connection of an ASGI app: one trace for all of it, or one for each message and what is sent for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio

from dspy_mlflow_async.asgi.http import HUNG_UP, ROUTE, AsgiScope, Send, route_of
from dspy_mlflow_async.asgi.receive_ahead import Message, Receive
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.requests.lazy_root import Beginning, Root, RootTrace
from dspy_mlflow_async.requests.options import Options
from dspy_mlflow_async.requests.scope import Scope
from dspy_mlflow_async.seams.mlflow_lazy_span import LazySpan
from dspy_mlflow_async.seams.mlflow_spans import INVALID_SPAN, OpenSpan, TracingContext
from dspy_mlflow_async.spans.observer import RequestObserver
from dspy_mlflow_async.spans.outcome import Failure, failure_of

# Normal closure, going away, no code given. Source: RFC 6455, section 7.4.1.
_FINE = frozenset({1000, 1001, 1005})
_BARE = Options()  # of a message: what was asked for holds for the connection


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


class ConnectionScope(Scope):
    """Scope of a connection of which each message is a trace: its promise stands for the current message's span.

    Attributes:
        message: That promise.
    """

    def __init__(self, options: Options, asgi: AsgiScope) -> None:
        super().__init__(options, (asgi,))
        self.message = CurrentMessage()

    def _promise(self, here: TracingContext) -> LazySpan:  # noqa: ARG002 - wherever the connection is
        self.record.show_by(self.message)
        return LazySpan(self.message)


class _MessageScope(Scope):
    """Scope of a message. What the connection's scope says holds in whatever context the message begins."""

    def __init__(self, around: ConnectionScope, describe: Callable[[], Beginning], remote: Any | None) -> None:
        super().__init__(_BARE, describe=describe, remote=remote)
        self._around = around

    def _outer_record(self) -> RequestObserver:
        return self._around.record

    def _promise(self, here: TracingContext) -> LazySpan:
        around = self._around
        trace = RootTrace(around.where or here, around.decisive, self._remote)
        self.root = self._new_root(around.options, around.values, trace, around.message.successor)
        return self.root.promise


class Messages:
    """Traces of a connection's messages, one of what comes before the first and one for each.

    Args:
        around: The connection's scope.
        describe: Describes a message when its span starts.
        remote: The caller's span in another process, or None.
    """

    def __init__(self, around: ConnectionScope, describe: Callable[[], Beginning], remote: Any | None) -> None:
        self._around = around
        self._describe = describe
        self._remote = remote
        self._task = anyio.get_current_task().id
        self._scope: Scope | None = None
        self.begin()
        if self._scope is not None:
            self._scope.leave()  # it holds by `message` alone: nobody knows which task receives next

    @property
    def root(self) -> Root | None:
        """Root of the message that is being worked on."""
        return self._around.message.root

    def receive(self) -> None:
        """Begin the trace of a message that has just been received, in this task."""
        self._around.message.is_handed_on |= anyio.get_current_task().id != self._task
        self.begin()

    @guarded
    def begin(self) -> None:
        """Begin a trace here."""
        scope = _MessageScope(self._around, self._describe, self._remote)
        scope.enter()
        self._scope, self._around.message.root = scope, scope.root

    def end(self, failure: Failure | None) -> None:
        """End the trace of the last message, if there is one."""
        scope, self._scope = self._scope, None
        self._around.message.root = None
        if scope is not None:
            scope.leave()
            scope.close(failure)


class Connection:
    """Connection, seen from between the server and the app.

    Args:
        asgi: The ASGI scope.
        receive: The server's.
        send: The server's.
        header: The name of the header of the handshake's response that tells the trace's id; empty for none.

    Attributes:
        scope: What holds for the connection.
    """

    def __init__(self, asgi: AsgiScope, receive: Receive, send: Send, header: bytes) -> None:
        self.asgi = asgi
        self.scope: Scope | None = None
        self._messages: Messages | None = None  # where each is a trace
        self._server_receive = receive
        self._server_send = send
        self._header = header
        self._root_path = asgi.get("root_path", "")
        self._code: int | None = None
        self._is_connected = self._is_closed = self._has_hung_up = False

    @guarded
    def split(self, scope: ConnectionScope, describe: Callable[[], Beginning], remote: Any | None) -> None:
        """Begin the connection's scope, and make each message inside a trace."""
        scope.enter()
        self.scope = scope
        self._messages = Messages(scope, describe, remote)

    # --- between the server and the app ---------------------------------------------------------------------------

    async def receive(self) -> Message:
        """Return the next message to the app; asking for it ends the trace of the last one."""
        if self._is_connected and self._messages is not None:
            self._messages.end(HUNG_UP if self._has_hung_up else None)
        message = await self._server_receive()
        kind = message["type"]
        if kind == "websocket.connect":
            self._is_connected = True
        elif kind == "websocket.disconnect" and not self._is_closed:
            self._code = message.get("code", 1005)
        elif kind == "websocket.receive" and self._messages is not None:
            self._messages.receive()
        return message

    async def send(self, message: Message) -> None:
        """Send the app's message to the server."""
        if message["type"] == "websocket.close":
            self._is_closed = True
        elif message["type"] == "websocket.accept":
            message = self._with_header(message)
        try:
            await self._server_send(message)
        except OSError:  # the client has gone; frameworks make an exception of their own of it, which may be caught
            self._has_hung_up |= not self._is_closed
            raise

    def _with_header(self, message: Message) -> Message:
        trace_id = self._trace_id() if self._header else None
        if trace_id is None:
            return message
        return {**message, "headers": [*(message.get("headers") or ()), (self._header, trace_id.encode("ascii"))]}

    @guarded
    def _trace_id(self) -> str | None:
        """Return the id of the connection's trace, which may yet begin; of many traces, the first's if it has begun."""
        root = self.scope.root if self.scope is not None else None
        if self._messages is not None and (message := self._messages.root) is not None and message.has_begun:
            root = message
        return None if root is None else root.promised_trace_id()

    # --- for the spans --------------------------------------------------------------------------------------------

    def beginning(self, name: str | None) -> Beginning:
        """Describe the connection when its span starts."""
        route = route_of(self.asgi, self._root_path)
        attributes: dict[str, Any] = {} if route is None else {ROUTE: route}
        return Beginning(name or f"WEBSOCKET {route or ''}".rstrip(), None, attributes)

    def close(self, error: BaseException | None) -> None:
        """End the connection's span: the app has returned or raised."""
        failure = self._failure(error)
        if self._messages is not None:
            self._messages.end(failure)
        if self.scope is not None:
            self.scope.leave()
            self.scope.close(failure)

    def _failure(self, error: BaseException | None) -> Failure | None:
        if self._has_hung_up:
            return HUNG_UP
        if self._code is not None and (error is None or type(error).__name__ == "WebSocketDisconnect"):
            return None if self._code in _FINE else HUNG_UP
        if isinstance(error, OSError):
            return HUNG_UP
        return None if error is None else failure_of(error)
