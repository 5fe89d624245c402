"""Read-ahead of an ASGI server's messages, so that a client's hang-up is known when it happens."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio.lowlevel

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

logger = logging.getLogger("dspy_mlflow_async")

# Rounds of the loop from a write that fails to a receive that returns: the transport tells its protocol, that wakes
# the receiver. A stream that never waits gives them none.
_TURNS = 2


class Inbox:
    """Buffer between the server's ``receive`` and the app's.

    Servers tell an app that its client has gone only when it receives, and few handlers do once they have the body.
    Once it is to watch, a task receives in their place. What it gets is handed to the app when that asks: no receive
    is cancelled, so nothing is lost. It reads no further than one part of a body, so that a server may still make a
    client wait.

    Args:
        receive: The server's.
        gone: Called when the server says that the client has gone, or that the response is complete.
        may_ask: Whether to receive before the app does. With ``Expect: 100-continue`` that would have an effect.
    """

    def __init__(self, receive: Receive, gone: Callable[[], None], *, may_ask: bool = True) -> None:
        self._server_receive = receive
        self._gone = gone
        self._may_ask = may_ask
        self._ahead: deque[Message] = deque()
        self._arrival = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._is_receiving = 0
        self._is_wanted = self._is_over = False
        # The task is the server's, as it were: it must not see what holds in the request.
        self._context = contextvars.copy_context()
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:  # trio: a hang-up is known where the app receives
            self._loop = None

    async def receive(self) -> Message:
        """Return the server's next message to the app."""
        while self._watching is not None and not self._ahead:
            self._arrival.clear()
            await self._arrival.wait()
        if self._ahead:
            message = self._ahead.popleft()
        else:
            self._is_receiving += 1
            try:
                message = await self._server_receive()
            finally:
                self._is_receiving -= 1
            self._note(message)
        self._may_ask = True
        if self._is_wanted:
            self._watch()
        return message

    def watch(self) -> None:
        """Listen for a hang-up from now on. May be called in any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._watch)

    async def settle(self) -> None:
        """Take what the server has to say at this moment, without waiting."""
        self._watch()
        for _ in range(_TURNS):
            if self._watching is not None or self._is_receiving:
                await anyio.lowlevel.checkpoint()

    def close(self) -> None:
        """Stop receiving."""
        self._is_over = True
        if self._watching is not None:
            self._watching.cancel()

    def _watch(self) -> None:
        self._is_wanted = True
        is_busy = self._watching is not None or self._is_receiving or self._ahead
        if self._loop is None or is_busy or self._is_over or not self._may_ask:
            return
        self._watching = self._context.run(self._loop.create_task, self._read())

    async def _read(self) -> None:
        more = True
        try:
            while more:
                message = await self._server_receive()
                self._ahead.append(message)
                self._note(message)
                self._arrival.set()
                more = message["type"] == "http.request" and not message.get("more_body")
        except Exception:
            logger.debug("the server's receive raised", exc_info=True)
        finally:
            self._watching = None
            self._arrival.set()

    def _note(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self._is_over = True
            self._gone()
