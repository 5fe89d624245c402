"""Parallel requests to a server, to hide the latency of its network."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def map_concurrently(work: Callable[[T], bool], items: Iterable[T], lanes: int) -> None:
    """Call ``work`` for each item, in this thread and in others beside it, each in a copy of this context.

    The threads end with the call: none is kept, and none is there after a fork.

    Args:
        work: Raises nothing, and says whether to go on. Once it says no, nothing further is begun.
        items: What to call it with.
        lanes: How many calls are made at once at the most.
    """
    waiting = deque(items)

    def lane() -> None:
        while waiting:
            try:
                item = waiting.popleft()
            except IndexError:  # another lane was faster
                return
            if not work(item):
                waiting.clear()

    beside: list[threading.Thread] = []
    try:
        for _ in range(min(lanes, len(waiting)) - 1):
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(lane,), name="dspy-mlflow-async-request", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter shuts down
                break
            beside.append(thread)
        lane()
    finally:
        waiting.clear()
        for thread in beside:
            thread.join()
