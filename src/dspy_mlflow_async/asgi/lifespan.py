"""Flush at an ASGI server's shutdown: ended traces are stored, or safe on disk, before the process ends."""

from __future__ import annotations

import logging

from dspy_mlflow_async.asgi.http import App, AsgiScope, Send
from dspy_mlflow_async.asgi.receive_ahead import Message, Receive
from dspy_mlflow_async.guard import report
from dspy_mlflow_async.health import secure
from dspy_mlflow_async.workers import in_thread

logger = logging.getLogger("dspy_mlflow_async")

_OVER = frozenset({"lifespan.shutdown.complete", "lifespan.shutdown.failed"})


async def live(app: App, asgi: AsgiScope, receive: Receive, send: Send, timeout: float) -> None:
    """Pass the lifespan on to the app, and flush when it has shut down.

    An app that knows no lifespan gets one: servers end by a signal that nothing else would be stored before.

    Args:
        app: The app.
        asgi: The lifespan's scope.
        receive: The server's.
        send: The server's.
        timeout: Seconds that flushing may take.
    """
    has_asked = False

    async def receive_noted() -> Message:
        nonlocal has_asked
        has_asked = True
        return await receive()

    async def send_after_flush(message: Message) -> None:
        if message["type"] in _OVER:
            await _flush(timeout)
        await send(message)

    try:
        await app(asgi, receive_noted, send_after_flush)
    except Exception:
        if has_asked:
            raise
        logger.debug("the app knows no lifespan", exc_info=True)
    if not has_asked:
        await _live_alone(receive, send, timeout)


async def _live_alone(receive: Receive, send: Send, timeout: float) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        else:
            await _flush(timeout)
            await send({"type": "lifespan.shutdown.complete"})
            return


async def _flush(timeout: float) -> None:
    try:
        await in_thread(secure, timeout)
    except Exception as error:  # noqa: BLE001 - the never-raise boundary: a server must come to its end
        report("dspy_mlflow_async.asgi.lifespan", error)
