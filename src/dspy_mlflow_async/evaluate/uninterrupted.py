"""Work in threads that comes to its end however the task that waits for it is cancelled.

A shield of anyio's keeps out its own scopes alone: asyncio's ``task.cancel()``, as ``wait_for`` and Ctrl-C use it, goes
through, and leaves behind a thread that nobody waits for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread


async def run_uninterrupted(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` in a thread and wait for its end; a cancellation is raised only then.

    Raises:
        BaseException: What ``function`` raised, or the cancellation.
    """
    call, cancellation = _Once(function, args), None
    with anyio.CancelScope(shield=True):
        while True:
            try:
                await anyio.to_thread.run_sync(call)  # a second thread waits for the first, if that has begun
                break
            except anyio.get_cancelled_exc_class() as error:
                cancellation = error
    if call.error is not None:
        raise call.error
    if cancellation is not None:
        raise cancellation
    return call.result


class _Once:
    """Call that is made once, by the first that asks for it; the second waits for the first."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._function = function
        self._args = args
        self._is_over = False
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            try:
                self.result = self._function(*self._args)
            except BaseException as error:  # noqa: BLE001 - handed to the one who waits
                self.error = error
