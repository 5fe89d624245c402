"""End of the process: wait for the store for a bounded time, bring the rest to the disk, and say so."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from dspy_mlflow_async.export import worker_processes
from dspy_mlflow_async.export.write import fork_gate
from dspy_mlflow_async.printable import counted
from dspy_mlflow_async.seams.patching import Undo

if TYPE_CHECKING:
    from dspy_mlflow_async.export.queue.pipeline import Pipeline

logger = logging.getLogger("dspy_mlflow_async")

_HOLDS_LOCKS = frozenset({__name__.partition(".")[0], "threading", "logging"})
_NEAREST_FRAMES = 5
# What a thread does with such a lock takes microseconds; one that waits in `threading`, which looks alike, costs this
# many moments of so many seconds.
_MOST_MOMENTS = 40
_MOMENT = 0.005

_OUR_THREADS = "dspy-mlflow-async"
_LONGEST_PARTING = 1.0  # seconds; who is not back by then waits for a store, and not in the middle of anything

_first: list[Callable[[], None]] = []


def before_leaving(function: Callable[[], None]) -> None:
    """Call ``function``, which must not raise, before the last flush of the process: what it writes goes with that."""
    _first.append(function)


def leave(pipeline: Pipeline | None, closing: list[tuple[Pipeline, threading.Thread]], timeout: float) -> None:
    """Do what others have asked for first, flush within ``timeout`` seconds, and save the rest.

    Args:
        pipeline: The one in use.
        closing: Those that were replaced or undone, with the thread that brings each to its end.
        timeout: Seconds for all of that but the saving.
    """
    deadline = time.monotonic() + timeout
    if pipeline is not None:
        pipeline.prepare_for_end()
    for function in _first:
        function()
    for _, thread in closing:
        thread.join(max(0.0, deadline - time.monotonic()))
    if pipeline is not None:
        pipeline.flush(max(0.0, deadline - time.monotonic()))
        count = pipeline.assembler.show_open(is_end=True)
        save(pipeline)
        if count:
            logger.warning(
                "dspy-mlflow-async: %s still open when the process ended; shown with the spans that had ended, in "
                "state IN_PROGRESS.",
                counted(count, "trace was", "traces were"),
            )
    for replaced, thread in closing:
        if thread.is_alive():
            save(replaced)


def save(pipeline: Pipeline) -> None:
    """Bring what is left to the disk, and say so."""
    for folder, count in pipeline.save_everything().items():
        logger.warning(
            "dspy-mlflow-async: %s could not be stored in time, and will be found in %s; "
            "send what is there with: dspy-mlflow-async replay",
            counted(count, "operation"),
            folder,
        )


def at_exit(function: Callable[[], None]) -> None:
    """Call ``function`` at the normal end of the process, an exception's included, and of workers of pools."""
    atexit.register(_at_exit_of_interpreter, function)
    worker_processes.at_exit_of_workers(function)


def _at_exit_of_interpreter(function: Callable[[], None]) -> None:
    function()
    fork_gate.is_over.set()
    # A daemon that comes back while Python is being taken down is ended where it stands (pthread_exit, before 3.14),
    # and with it the whole process where a library's C++ or Rust is around it. Its work is on the disk by now.
    deadline = time.monotonic() + _LONGEST_PARTING
    for thread in threading.enumerate():
        if thread.name.startswith(_OUR_THREADS) and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


def _may_hold_a_lock(frame: FrameType | None) -> bool:
    """Return whether code that holds locks for moments is being run: ours, or what it calls."""
    for _ in range(_NEAREST_FRAMES):
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").partition(".")[0] in _HOLDS_LOCKS:
            return True
        frame = frame.f_back
    return False


class _Handler:
    """Signal handler that runs a function, and then lets the signal end the process."""

    def __init__(self, function: Callable[[], None], timeout: float) -> None:
        self._function = function
        self._timeout = timeout
        self._moments = iter(range(_MOST_MOMENTS))
        self._is_running = _thread.allocate_lock()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        # No `threading.Thread`: starting one takes a lock of that module.
        with contextlib.suppress(RuntimeError):  # no new thread: the interpreter is ending already
            if _may_hold_a_lock(frame) and next(self._moments, None) is not None:
                _thread.start_new_thread(self._come_again, (signum,))
                return
            if self._is_running.acquire(blocking=False):
                _thread.start_new_thread(self._run, ())
            self._is_running.acquire(timeout=self._timeout)
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    def _run(self) -> None:
        try:
            self._function()
        finally:
            self._is_running.release()

    @staticmethod
    def _come_again(signum: int) -> None:
        time.sleep(_MOMENT)
        os.kill(os.getpid(), signum)


def on_signals(function: Callable[[], None], timeout: float) -> Undo:
    """Call ``function`` before SIGTERM or SIGHUP ends the process, where nobody else cares for that signal.

    A handler of the user's stays alone, and a signal that is ignored stays ignored: they decide how the process ends,
    and a normal end is cared for. The function runs in a thread of its own, and the main one waits for it. Where that
    may just hold a lock that the function needs, it first goes on for a moment.

    Args:
        function: What to do.
        timeout: Seconds it may take.

    Returns:
        The undo.
    """
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGHUP) if is_main and os.name == "posix" else ()
    handler = _Handler(function, timeout)
    handled = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, handler)

    def undo() -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in handled:
            current: Any = signal.getsignal(number)
            if current is handler:
                signal.signal(number, signal.SIG_DFL)

    return undo
