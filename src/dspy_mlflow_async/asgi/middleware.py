"""ASGI middleware: a request scope around each HTTP request and WebSocket, and a trace from its first DSPy call on."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from dspy_mlflow_async.asgi import lifespan
from dspy_mlflow_async.asgi.http import App, AsgiScope, Exchange, Send, header_of
from dspy_mlflow_async.asgi.receive_ahead import Receive
from dspy_mlflow_async.asgi.websocket import Connection, ConnectionScope
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.requests import sampling
from dspy_mlflow_async.requests.incoming_traceparent import Callers, Trust
from dspy_mlflow_async.requests.lazy_root import Beginning
from dspy_mlflow_async.requests.options import Options, Show, call, refuse_async
from dspy_mlflow_async.requests.scope import Scope
from dspy_mlflow_async.settings import Redact

__all__ = ["TracingMiddleware"]

OfScope = Callable[[AsgiScope], Any]

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # a header's name, by RFC 9110


class TracingMiddleware:
    """Makes each request to an ASGI app one trace, from its first DSPy call on, with its session, user and status.

    For Starlette and FastAPI ``app.add_middleware(TracingMiddleware, session_id="x-session-id")``; for any other app
    ``TracingMiddleware(app, ...)``. The trace's root is named by method and route template and has them, and the
    response's status, as attributes; never the query string or the body. It ends when the app is done with the
    request: after the last byte of a stream, and after background tasks. Its outcome is ``error`` where the handler
    raises or the status is 500 or more, ``cancelled`` where the client hangs up.

    A ``traceparent`` header (W3C) makes the request part of the caller's trace where ``traceparent`` says that the
    caller is to be believed: whoever is can add spans to any trace whose id they know, and hide requests from you. When
    the server shuts down, traces are flushed.

    Args:
        app: The ASGI app.
        name: The name of the traces, or a function of the ASGI scope; by default ``GET /items/{item_id}``.
        session_id: The header that tells MLflow's session, or a function of the ASGI scope.
        user: The header that tells MLflow's user, or a function. Whoever sets the header is believed.
        tags: Trace tags by key, or a function.
        metadata: Trace metadata by key, or a function.
        experiment_id: The experiment that the traces go to, or a function.
        sample: As for ``request``: a ratio from 0 to 1, or ratios by outcome.
        redact: As for ``request``.
        inputs: As for ``request``: by default the inputs of the first DSPy call, so that the list of traces shows them.
        outputs: The same: by default the outputs of the last.
        traceparent: Whose ``traceparent`` header is believed: nobody's (False), everybody's (True), that of requests
            for which a function of the ASGI scope is true, or of callers that connect from one of these networks
            (``["10.0.0.0/8"]``). Both are counted, see ``stats()``.
        response_header: The response header that tells the trace's id; None for none. A response that is streamed
            begins before DSPy is called: it tells the id that the trace will have if DSPy is called.
        websocket: ``"connection"`` for one trace a connection, ``"message"`` for one for each message received
            with what is done for it until the next is asked for.
        flush_timeout: Seconds that a server's shutdown waits for the store. The rest is kept in the spool.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a header's name or a network that is none, an unknown ``websocket``, a negative
            ``flush_timeout``, an unknown key of ``sample``, a ratio outside 0 to 1, or an experiment that is not there.
    """

    def __init__(
        self,
        app: App,
        *,
        name: str | OfScope | None = None,
        session_id: str | OfScope | None = None,
        user: str | OfScope | None = None,
        tags: Mapping[str, Any] | OfScope | None = None,
        metadata: Mapping[str, Any] | OfScope | None = None,
        experiment_id: str | int | OfScope | None = None,
        sample: sampling.Sample = 1.0,
        redact: Redact | None = None,
        inputs: Show = True,
        outputs: Show = True,
        traceparent: Trust = False,
        response_header: str | None = "x-trace-id",
        websocket: Literal["connection", "message"] = "connection",
        flush_timeout: float = 5.0,
    ) -> None:
        if not callable(app):
            raise TypeError(f"app must be an ASGI application, not {app!r}")
        if websocket not in {"connection", "message"}:
            raise ValueError(f"websocket must be 'connection' or 'message', not {websocket!r}")
        if isinstance(flush_timeout, bool) or not isinstance(flush_timeout, (int, float)):
            raise TypeError(f"flush_timeout must be a number of seconds, not {flush_timeout!r}")
        if not flush_timeout >= 0:
            raise ValueError(f"flush_timeout must be 0 or more seconds, not {flush_timeout}")
        refuse_async("name", name)
        self.app = app
        self._name = name
        self._options = Options(
            None if callable(name) else name,
            sample,
            _from_header("session_id", session_id),
            _from_header("user", user),
            tags,
            metadata,
            experiment_id,
            redact,
            inputs,
            outputs,
        )
        self._options.check_experiment()
        self._callers = Callers(traceparent)
        self._header = _header_name("response_header", response_header) if response_header else b""
        self._websocket = websocket
        self._flush_timeout = float(flush_timeout)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve one connection of the ASGI app."""
        kind = scope["type"]
        if kind == "http":
            exchange = Exchange(scope, receive, send, self._header)
            exchange.scope = self._begin(scope, exchange.beginning, self._caller(scope))
            await self._run(exchange)
        elif kind == "websocket":
            connection, caller = Connection(scope, receive, send, self._header), self._caller(scope)
            if self._websocket == "connection":
                connection.scope = self._begin(scope, connection.beginning, caller)
            else:
                describe = functools.partial(self._describe, scope, connection.beginning)
                connection.split(ConnectionScope(self._options, scope), describe, caller)
            await self._run(connection)
        elif kind == "lifespan":
            await lifespan.live(self.app, scope, receive, send, self._flush_timeout)
        else:
            await self.app(scope, receive, send)

    async def _run(self, traffic: Exchange | Connection) -> None:
        error: BaseException | None = None
        try:
            await self.app(traffic.asgi, traffic.receive, traffic.send)
        except BaseException as raised:
            error = raised
            raise
        finally:
            traffic.close(error)

    @guarded
    def _caller(self, asgi: AsgiScope) -> Any | None:
        return self._callers.parent(asgi)

    @guarded
    def _begin(
        self,
        asgi: AsgiScope,
        beginning: Callable[[str | None], Beginning],
        caller: Any | None,
    ) -> Scope:
        describe = functools.partial(self._describe, asgi, beginning)
        scope = Scope(self._options, (asgi,), describe=describe, remote=caller)
        scope.enter()
        return scope

    def _describe(self, asgi: AsgiScope, beginning: Callable[[str | None], Beginning]) -> Beginning:
        return beginning(self._name_of(asgi))

    def _name_of(self, asgi: AsgiScope) -> str | None:
        if not callable(self._name):
            return self._name
        name = call(self._name, (asgi,), {})
        return None if name is None else str(name)


def _from_header(argument: str, source: str | OfScope | None) -> OfScope | None:
    """Return a function of the ASGI scope, given a header's name or such a function."""
    if source is None or callable(source):
        return source
    return functools.partial(_read, name=_header_name(argument, source))


def _read(asgi: AsgiScope, name: bytes) -> str | None:
    return header_of(asgi, name)


def _header_name(argument: str, name: Any) -> bytes:
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a header's name or a function of the ASGI scope, not {name!r}")
    if not _TOKEN.fullmatch(name):
        raise ValueError(f"{argument} must be a header's name, not {name!r}")
    return name.lower().encode("ascii")
