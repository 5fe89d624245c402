"""MLflow run that ends in any case, however the awaits on it are cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable

import anyio
import anyio.to_thread

from dspy_mlflow_async.evaluate import stored_runs
from dspy_mlflow_async.evaluate.uninterrupted import run_uninterrupted
from dspy_mlflow_async.runs.handle import KILLED, RunHandle, run_status


class HeldRun:
    """Run from before it is opened to its end. ``lock`` guards which task or thread ends it.

    Args:
        open_run: What opens it, in a thread: creates a run or takes one up.
    """

    def __init__(self, open_run: Callable[[], RunHandle | None]) -> None:
        self._open_run = open_run
        self._lock = threading.Lock()
        self._handle: RunHandle | None = None
        self._status: str | None = None

    async def open(self) -> RunHandle | None:
        """Open it. Should this be cancelled, it ends KILLED: now, or as soon as it is there."""
        try:
            await anyio.to_thread.run_sync(self._open)
        except BaseException as error:
            with self._lock:
                self._status = run_status(error)
                handle = self._handle
            if handle is not None:
                await run_uninterrupted(stored_runs.end, handle, self._status)
            raise
        return self._handle

    async def end(self, status: str) -> None:
        """End it, also while this task is being cancelled; KILLED if that happens meanwhile."""
        try:
            await run_uninterrupted(stored_runs.end, self._handle, status)
        except anyio.get_cancelled_exc_class():
            await run_uninterrupted(stored_runs.end, self._handle, KILLED)
            raise

    def _open(self) -> None:
        handle = self._open_run()
        with self._lock:
            self._handle, status = handle, self._status
        if status is not None:  # nobody waits for it any more
            stored_runs.end(handle, status)
