"""Deferral of spans that end while Python's garbage collector runs: a generator that nobody finished may hold one.

The garbage collector runs wherever something is made, and so while its thread may hold any lock of this room. What
ends in there waits until somebody else ends a span, flushes, or looks after what is overdue.
"""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Any

from dspy_mlflow_async.seams.patching import Undo

waiting: deque[tuple[Callable[[Any], None], Any]] = deque()
_thread: int | None = None  # where the garbage collector runs


def watch() -> Undo:
    """Track from now on where the garbage collector runs.

    Returns:
        The undo.
    """
    gc.callbacks.append(_note)

    def undo() -> None:
        global _thread  # noqa: PLW0603 - there is one garbage collector
        with contextlib.suppress(ValueError):  # somebody has cleared the list
            gc.callbacks.remove(_note)
        _thread = None
        take_up()

    return undo


def _note(phase: str, info: dict[str, int]) -> None:  # noqa: ARG001 - Python's signature
    global _thread  # noqa: PLW0603
    _thread = get_ident() if phase == "start" else None


def is_running_here() -> bool:
    """Return whether this thread is in the middle of a collection."""
    return _thread is not None and _thread == get_ident()


def put_off(end: Callable[[Any], None], span: Any) -> None:
    """Let ``end`` take the span later, in any thread."""
    waiting.append((end, span))


def take_up() -> None:
    """End what was put off."""
    while waiting:
        try:
            end, span = waiting.popleft()
        except IndexError:  # somebody else was faster
            return
        end(span)
