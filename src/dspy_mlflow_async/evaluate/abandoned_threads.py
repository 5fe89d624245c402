"""Worker threads that outlive their example: Python cannot stop them, so they keep their slots until they end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread


class Threads:
    """Worker threads of one example. It belongs to one event loop, so it needs no lock."""

    def __init__(self) -> None:
        self._running = 0
        self._then: list[Callable[[], None]] = []

    @property
    def are_running(self) -> bool:
        """True if one is at work, perhaps after its example."""
        return self._running > 0

    def when_over(self, function: Callable[[], None]) -> None:
        """Call ``function`` in the event loop once none is at work: now, or later."""
        if self.are_running:
            self._then.append(function)
        else:
            function()

    async def run(self, function: Callable[[], Any], limiter: anyio.CapacityLimiter) -> Any:
        """Call ``function`` in a thread and return its result.

        Should this be cancelled, the thread goes on unheeded, and keeps its place in ``limiter``.
        """
        borrower, work, into_loop = object(), _Work(function), _way_into_loop()
        await limiter.acquire_on_behalf_of(borrower)
        self._running += 1

        def is_over() -> None:
            limiter.release_on_behalf_of(borrower)
            self._running -= 1
            if not self.are_running:
                then, self._then = self._then, []
                for each in then:
                    each()

        try:
            return await anyio.to_thread.run_sync(
                work.run, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(math.inf)
            )
        finally:
            if not work.leave(lambda: into_loop(is_over)):
                is_over()


class _Work:
    """Call in a thread. ``lock`` guards whether it has begun, and who is told of its end."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._is_running = self._is_left = False
        self._tell: Callable[[], None] | None = None

    def run(self) -> Any:
        with self._lock:
            if self._is_left:
                return None
            self._is_running = True
        try:
            return self._function()
        finally:
            with self._lock:
                self._is_running, tell = False, self._tell
            if tell is not None:
                with contextlib.suppress(RuntimeError):  # the loop has ended, and all that it limited
                    tell()

    def leave(self, tell: Callable[[], None]) -> bool:
        """Stop waiting; return whether the thread is at work, and so ``tell`` will be called at its end."""
        with self._lock:
            self._is_left = True
            if self._is_running:
                self._tell = tell
            return self._is_running


def _way_into_loop() -> Callable[[Callable[[], None]], Any]:
    """Return a function by which a thread has functions called in this event loop, without waiting for them."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio

        return trio.lowlevel.current_trio_token().run_sync_soon
