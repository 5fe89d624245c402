"""Worker thread that empties a queue."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

logger = logging.getLogger("dspy_mlflow_async")

# How long the first of a batch waits for others, in seconds, unless somebody waits for it.
_LINGER = 0.5


class Worker:
    """Daemon thread that works when there is something to do, and takes its time unless somebody is in a hurry.

    Args:
        work: Does what there is to do; called in the thread.
        next_wait: Seconds until something is due that nobody wakes the thread for; None where nothing is.

    Attributes:
        is_paused: For tests: the thread is not started, as if it had not had its turn yet.
    """

    def __init__(self, work: Callable[[], None], next_wait: Callable[[], float | None]) -> None:
        self._work = work
        self._next_wait = next_wait
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._stop = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self.is_paused = False

    @property
    def thread(self) -> threading.Thread | None:
        """Thread, once there was something to do."""
        return self._thread

    @property
    def is_running(self) -> bool:
        """Return whether the thread lives."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_stopped(self) -> bool:
        """Return whether the thread shall do nothing further."""
        return self._stop.is_set()

    def start(self) -> None:
        """Start the thread, unless it lives."""
        with self._starting:
            if not (self.is_running or self.is_paused):
                thread = threading.Thread(target=self._run, name="dspy-mlflow-async-writer", daemon=True)
                with contextlib.suppress(RuntimeError):  # the interpreter shuts down; `flush` writes in its thread
                    thread.start()
                    self._thread = thread

    def wake(self) -> None:
        """Tell the thread that there is something to do."""
        if not (self._wake.is_set() and self.is_running):
            self._wake.set()
            self.start()

    def hurry(self) -> None:
        """Let the thread neither linger nor rest, if it lives, until it may `take_time` again."""
        self._hurry.set()
        self._wake.set()

    def take_time(self) -> None:
        """End the hurry."""
        self._hurry.clear()

    def rest(self, seconds: float) -> None:
        """Wait, in the thread, unless somebody is in a hurry."""
        if not self._hurry.is_set():
            self._hurry.wait(seconds)

    def pause(self, seconds: float) -> None:
        """Wait, in the thread, whoever is in a hurry; not at the end."""
        self._stop.wait(seconds)

    def stop(self) -> None:
        """End the thread after what it is doing."""
        self._stop.set()
        self.hurry()

    def _run(self) -> None:
        while not self.is_stopped:
            self._wake.wait(self._next_wait())
            self.rest(_LINGER)
            self._wake.clear()
            try:
                self._work()
            except Exception:
                logger.exception("dspy-mlflow-async: the export queue failed; it goes on")
                self.pause(1.0)
