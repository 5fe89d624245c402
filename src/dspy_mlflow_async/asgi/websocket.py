"""WebSocket connection of an ASGI app: one trace for all of it, or one for each message and what is sent for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio

from dspy_mlflow_async.asgi.http import HUNG_UP, ROUTE, AsgiScope, Send, route_of
from dspy_mlflow_async.asgi.receive_ahead import Message, Receive
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.requests.lazy_root import Beginning, CurrentMessage
from dspy_mlflow_async.requests.scope import Scope
from dspy_mlflow_async.spans.outcome import Failure, failure_of

# Normal closure, going away, no code given. Source: RFC 6455, section 7.4.1.
_FINE = frozenset({1000, 1001, 1005})


class Connection:
    """Connection, seen from between the server and the app.

    Args:
        asgi: The ASGI scope.
        receive: The server's.
        send: The server's.
        header: The name of the header of the handshake's response that tells the trace's id; empty for none.

    Attributes:
        scope: What holds for the connection.
        message: Stands for the span of the current message, where each message is a trace.
    """

    def __init__(self, asgi: AsgiScope, receive: Receive, send: Send, header: bytes) -> None:
        self.asgi = asgi
        self.scope: Scope | None = None
        self.message = CurrentMessage()
        self._new_scope: Callable[[], Scope] | None = None
        self._server_receive = receive
        self._server_send = send
        self._header = header
        self._task = anyio.get_current_task().id
        self._message_scope: Scope | None = None
        self._root_path = asgi.get("root_path", "")
        self._code: int | None = None
        self._is_connected = self._is_closed = self._has_hung_up = False

    def split(self, new_scope: Callable[[], Scope]) -> None:
        """Make each message a trace, and one of what comes before the first."""
        self._new_scope = new_scope
        self._begin_message()
        if self._message_scope is not None:
            self._message_scope.leave()  # it holds by `message` alone: nobody knows which task receives next

    # --- between the server and the app ---------------------------------------------------------------------------

    async def receive(self) -> Message:
        """Return the next message to the app; asking for it ends the trace of the last one."""
        if self._is_connected:
            self._end_message(HUNG_UP if self._has_hung_up else None)
        message = await self._server_receive()
        kind = message["type"]
        if kind == "websocket.connect":
            self._is_connected = True
        elif kind == "websocket.disconnect" and not self._is_closed:
            self._code = message.get("code", 1005)
        elif kind == "websocket.receive" and self._new_scope is not None:
            self.message.is_handed_on |= anyio.get_current_task().id != self._task
            self._begin_message()
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
        if root is None and self.message.root is not None and self.message.root.has_begun:
            root = self.message.root
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
        self._end_message(failure)
        if self.scope is not None:
            self.scope.leave()
            self.scope.close(failure)

    @guarded
    def _begin_message(self) -> None:
        if self._new_scope is None:
            return
        scope = self._new_scope()
        scope.enter()
        self._message_scope, self.message.root = scope, scope.root

    def _end_message(self, failure: Failure | None) -> None:
        scope, self._message_scope = self._message_scope, None
        self.message.root = None
        if scope is not None:
            scope.leave()
            scope.close(failure)

    def _failure(self, error: BaseException | None) -> Failure | None:
        if self._has_hung_up:
            return HUNG_UP
        if self._code is not None and (error is None or type(error).__name__ == "WebSocketDisconnect"):
            return None if self._code in _FINE else HUNG_UP
        if isinstance(error, OSError):
            return HUNG_UP
        return None if error is None else failure_of(error)
