"""Worker thread that empties a queue, and its progress, for those who wait for it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from dspy_mlflow_async.export.queue.turns import Turns

logger = logging.getLogger("dspy_mlflow_async")

# How long the first of a batch waits for others, in seconds, unless somebody waits for it.
_LINGER = 0.5


class Worker:
    """Daemon thread that works when there is something to do, and takes its time unless somebody is in a hurry.

    Args:
        work: Does what there is to do; called in the thread.
        next_wait: Seconds until something is due that nobody wakes the thread for; None where nothing is.

    Attributes:
        turns: What callers give it of the interpreter.
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
        self.turns = Turns()
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

    @property
    def is_hurried(self) -> bool:
        """Return whether somebody waits for what the thread does."""
        return self._hurry.is_set()

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

    def linger(self) -> None:
        """Wait, in the thread, for what may follow what is there, unless somebody is in a hurry."""
        self.rest(_LINGER)

    def rest(self, seconds: float) -> None:
        """Wait, in the thread, unless somebody is in a hurry."""
        if not self._hurry.is_set():
            self.turns.rest()
            self._hurry.wait(seconds)
        self.turns.begin()

    def pause(self, seconds: float) -> None:
        """Wait, in the thread, whoever is in a hurry; not at the end."""
        self.turns.rest()
        self._stop.wait(seconds)
        self.turns.begin()

    def stop(self) -> None:
        """End the thread after what it is doing."""
        self._stop.set()
        self.hurry()

    def _run(self) -> None:
        while not self.is_stopped:
            self.turns.rest()
            self._wake.wait(self._next_wait())
            self.linger()
            self._wake.clear()
            try:
                self._work()
            except Exception:
                logger.exception("dspy-mlflow-async: the export queue failed; it goes on")
                self.pause(1.0)


class Progress:
    """Progress of a queue: told by whoever writes, and waited for by those who flush, or want one operation stored."""

    def __init__(self) -> None:
        self._made = threading.Condition()
        self._flushing = 0

    @property
    def is_awaited(self) -> bool:
        """Return whether somebody flushes."""
        return self._flushing > 0

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Count the caller among those who flush."""
        with self._made:
            self._flushing += 1
        try:
            yield
        finally:
            with self._made:
                self._flushing -= 1

    def note(self, otherwise: Callable[[], None] | None = None) -> None:
        """Tell those who wait that something was done.

        Args:
            otherwise: Called where nobody flushes, and before anybody can begin to.
        """
        with self._made:
            if otherwise is not None and not self.is_awaited:
                otherwise()
            self._made.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait until something was done, at most so long."""
        with self._made:
            self._made.wait(seconds)

    def wait_for(self, is_done: Callable[[], bool], deadline: float | None, is_useless: Callable[[], bool]) -> bool:
        """Wait until it is done, waiting is of no use, or the deadline (monotonic) is over; return whether it is."""
        with self._made:
            while not is_done():
                left = 0.5 if deadline is None else min(0.5, deadline - time.monotonic())
                if left <= 0 or is_useless():
                    return False
                self._made.wait(left)
            return True
