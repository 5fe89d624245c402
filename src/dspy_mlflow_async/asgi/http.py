"""HTTP request of an ASGI app: its inputs and response as span attributes, and how it ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dspy_mlflow_async.asgi.receive_ahead import Inbox, Message, Receive
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.requests.lazy_root import Beginning
from dspy_mlflow_async.requests.scope import Scope
from dspy_mlflow_async.spans import outcome as outcomes
from dspy_mlflow_async.spans.outcome import Failure, failure_of

AsgiScope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[AsgiScope, Receive, Send], Awaitable[None]]

METHOD, ROUTE, STATUS = "http.request.method", "http.route", "http.response.status_code"
HUNG_UP = Failure(outcomes.CANCELLED, "Disconnected", "The client hung up before the response was complete.", "")
_SERVER_ERROR = 500
_BODILESS = frozenset({204, 304})


class Exchange:
    """Request and response, seen from between the server and the app.

    Args:
        asgi: The ASGI scope; frameworks note the route in it.
        receive: The server's.
        send: The server's.
        header: The name of the response header that tells the trace's id; empty for none.
    """

    def __init__(self, asgi: AsgiScope, receive: Receive, send: Send, header: bytes) -> None:
        self.asgi = asgi
        self.scope: Scope | None = None
        self._inbox = Inbox(receive, self._note_gone, may_ask=header_of(asgi, b"expect") is None)
        self._server_send = send
        self._header = header
        self._root_path = asgi.get("root_path", "")
        self._status: int | None = None
        self._is_finishing = False
        self._is_complete = False
        self._has_hung_up = False
        self._may_have_hung_up = False
        self.receive = self._inbox.receive

    # --- between the server and the app ---------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """Send the app's message to the server, and note the response's status and end."""
        kind = message["type"]
        is_last = kind == "http.response.pathsend" or (
            kind == "http.response.body" and not message.get("more_body", False)
        )
        if kind == "http.response.start":
            self._status = message.get("status")
            message = self._with_header(message)
        if is_last:
            await self._finish()
        try:
            await self._server_send(message)
        except OSError:  # what the ASGI specification has servers raise when the client has gone
            self._has_hung_up = True
            raise
        if is_last and not self._has_hung_up:
            self._is_complete = True

    async def _finish(self) -> None:
        if self.scope is not None and self.scope.root is not None and self.scope.root.has_begun:
            await self._inbox.settle()
        self._is_finishing = True

    def _note_gone(self) -> None:
        """Note that the client has gone, as the server says; it also says so once the response is complete."""
        if self._is_finishing:
            self._may_have_hung_up = True  # unless the last message goes through
        else:
            self._has_hung_up = True

    def _with_header(self, message: Message) -> Message:
        headers = list(message.get("headers") or ())
        trace_id = self._trace_id_for(headers, message.get("status"))
        if not trace_id or any(name.lower() == self._header for name, _ in headers):
            return message
        return {**message, "headers": [*headers, (self._header, trace_id.encode("ascii"))]}

    @guarded
    def _trace_id_for(self, headers: list[tuple[bytes, bytes]], status: int | None) -> str | None:
        """Return the trace's id, where there is a trace, or where the body that follows may yet begin one."""
        root = self.scope.root if self.scope is not None else None
        if root is None or not self._header:
            return None
        is_streamed = status not in _BODILESS and not any(name.lower() == b"content-length" for name, _ in headers)
        return root.promised_trace_id() if root.has_begun or is_streamed else None

    # --- for the span ---------------------------------------------------------------------------------------------

    def beginning(self, name: str | None) -> Beginning:
        """Describe the request when its span starts: the app is in its handler, so the route is found."""
        self._inbox.watch()
        method = str(self.asgi.get("method", ""))
        route = route_of(self.asgi, self._root_path)
        attributes = {METHOD: method} if route is None else {METHOD: method, ROUTE: route}
        return Beginning(name or f"{method} {route or ''}".rstrip(), None, attributes)

    def close(self, error: BaseException | None) -> None:
        """End the request's span: the app has returned or raised, and is done with all that follows the response."""
        self._inbox.close()
        scope = self.scope
        if scope is None:
            return
        scope.leave()
        failure = self._failure(error)
        if self._status is None and isinstance(error, Exception) and failure is not HUNG_UP:
            self._status = _SERVER_ERROR  # what whoever catches it makes of it: the framework, or the server
        scope.close(failure, attributes={} if self._status is None else {STATUS: self._status})

    def _failure(self, error: BaseException | None) -> Failure | None:
        if self._has_hung_up or (self._may_have_hung_up and not self._is_complete):
            return HUNG_UP
        if error is not None:
            return failure_of(error)
        if self._status is not None and self._status >= _SERVER_ERROR:
            return Failure(outcomes.ERROR, f"HTTP {self._status}", "The response has a server error's status.", "")
        return None


def route_of(asgi: AsgiScope, root_path: str = "") -> str | None:
    """Return the template of the framework's route, such as ``/items/{item_id}``; None where it tells none.

    Args:
        asgi: The ASGI scope after routing.
        root_path: Its ``root_path`` before; what mounts have added to it belongs to the route.

    Source: Starlette and FastAPI, which note the route in ``scope["route"]``.
    """
    route = asgi.get("route")
    context = _effective_context(asgi)
    if context is not None and getattr(context, "original_route", None) is route:
        route = context  # FastAPI's route of an included router, with the router's prefix
    template = getattr(route, "path_format", None) or getattr(route, "path", None)
    if not isinstance(template, str):
        return None
    mounted = str(asgi.get("root_path", "")).removeprefix(root_path)
    if mounted:
        names = {str(value): f"{{{name}}}" for name, value in dict(asgi.get("path_params") or {}).items()}
        mounted = "/".join(names.get(part, part) for part in mounted.split("/"))
    return f"{mounted.rstrip('/')}{template}" or "/"


def _effective_context(asgi: AsgiScope) -> Any | None:
    state = asgi.get("fastapi")  # FastAPI >= 0.140 or so; before, included routes had their prefix
    return state.get("effective_route_context") if isinstance(state, dict) else None


def header_of(asgi: AsgiScope, name: bytes) -> str | None:
    """Return a header of the request; None where it has none of this name (in small letters)."""
    for key, value in asgi.get("headers") or ():
        if key.lower() == name:
            return str(value.decode("latin-1"))
    return None
