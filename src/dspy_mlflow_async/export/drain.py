"""The child process that drains a spool; started by `process.Child`."""

from __future__ import annotations

import os
import select
import threading
import time
from pathlib import Path

from dspy_mlflow_async.export import spool
from dspy_mlflow_async.export.books import Books
from dspy_mlflow_async.export.folder import uri_of
from dspy_mlflow_async.export.lock import Lock
from dspy_mlflow_async.export.options import ExportOptions
from dspy_mlflow_async.export.store_queue import StoreQueue
from dspy_mlflow_async.export.tail import Tail
from dspy_mlflow_async.seams import mlflow_http

LOCK = "drain.lock"
# What the parent writes: something is new, or somebody waits for it.
NEWS, HURRY = b".", b"!"
# How often it looks for what is new when nobody tells it.
_LOOK = 0.25
# How long it goes on after its parent, if the store does not take what is left.
_OUTLIVE = 60.0


def main(path: str) -> None:
    """Drain the spool in a folder until the parent is gone and nothing is left, or a bound has passed.

    The store stands in the spool's own note: everybody on the machine can read a command line, and a URI may hold a
    password.
    """
    folder = Path(path)
    uri = uri_of(folder)
    if uri is None:
        return
    parent = int(os.environ.get("DSPY_MLFLOW_ASYNC_PARENT") or os.getppid())
    mlflow_http.bound_http()
    lock = Lock(folder / LOCK)
    if not lock.acquire():  # another child drains for all
        return
    lock.note("")
    tail = Tail(folder, counts=True, follows_living=True)
    queue = StoreQueue(ExportOptions(), Books(), uri, spool.Spool(folder, uri, tail=tail))
    gone_since: float | None = None
    away_at = 0
    while True:
        has_parent = _wait(parent, 0.0, queue)
        queue.feed(queue.spool.adopt())
        queue.work()
        if queue.availability.away_at != away_at:
            away_at = queue.availability.away_at
            lock.note(f"{os.getpid()} {away_at}")
        if not has_parent:
            gone_since = gone_since or time.monotonic()
            if queue.is_empty() or time.monotonic() - gone_since > _OUTLIVE:
                break
        rest = queue.next_wait()
        pause = _LOOK if rest is None else max(0.05, min(rest, 1.0))
        if has_parent:
            _wait(parent, pause, queue)
        else:
            threading.Event().wait(pause)
    queue.spool.close()
    lock.release()


def _wait(parent: int, seconds: float, queue: StoreQueue) -> bool:
    """Wait for news from the parent, at most so long; where somebody there waits for us, make haste.

    Returns:
        Whether the parent lives.
    """
    if os.getppid() != parent:
        return False
    readable, _, _ = select.select([0], [], [], seconds)
    if not readable:
        return True
    news = os.read(0, 65536)
    if HURRY in news:
        queue.hurry()
    return bool(news)
