"""The end of the process: wait for the store for a bounded time, bring the rest to the disk, and say so."""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_mlflow_async.export.pipeline import Pipeline

logger = logging.getLogger("dspy_mlflow_async")

_first: list[Callable[[], None]] = []
_kept: list[Callable[..., None]] = []


def before_leaving(function: Callable[[], None]) -> None:
    """Call ``function``, which must not raise, before the last flush of the process: what it writes goes with that."""
    _first.append(function)


def leave(pipeline: Pipeline | None, closing: list[threading.Thread], timeout: float) -> None:
    """Do what others have asked for first, flush within ``timeout`` seconds, and save the rest."""
    deadline = time.monotonic() + timeout
    for function in _first:
        function()
    for thread in closing:
        thread.join(max(0.0, deadline - time.monotonic()))
    if pipeline is None:
        return
    pipeline.flush(max(0.0, deadline - time.monotonic()))
    save(pipeline)


def save(pipeline: Pipeline) -> None:
    """Bring what is left to the disk, and say so."""
    for folder, count in pipeline.save_everything().items():
        logger.warning(
            "dspy-mlflow-async: %d operations could not be stored in time and are kept in %s; "
            "send them with: dspy-mlflow-async replay",
            count,
            folder,
        )


def at_exit(function: Callable[[], None]) -> None:
    """Call ``function`` at the normal end of the process, an exception's included, and of its ``multiprocessing`` ones.

    Those leave by ``os._exit``, without ``atexit``; what they do call, they forget when they are forked.
    """
    atexit.register(function)

    def at_exit_of_child(_: object) -> None:
        multiprocessing.util.Finalize(None, function, exitpriority=0)

    multiprocessing.util.register_after_fork(at_exit_of_child, at_exit_of_child)
    _kept.append(at_exit_of_child)  # it is registered weakly
    if multiprocessing.parent_process() is not None:
        at_exit_of_child(None)


def on_sigterm(function: Callable[[], None], timeout: float) -> Callable[[], None]:
    """Call ``function`` before SIGTERM ends the process, where nobody else cares for that signal.

    A handler of the user's stays alone: it decides how the process ends, and a normal end is cared for.
    The function runs in a thread, since the main one may hold any lock when the signal comes.

    Args:
        function: What to do.
        timeout: Seconds it may take.

    Returns:
        The undo.
    """

    def nothing() -> None: ...

    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        return nothing
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return nothing

    def handler(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of handlers
        with contextlib.suppress(RuntimeError):  # no new thread: the interpreter is ending already
            thread = threading.Thread(target=function, name="dspy-mlflow-async-sigterm", daemon=True)
            thread.start()
            thread.join(timeout)
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    signal.signal(signal.SIGTERM, handler)

    def undo() -> None:
        on_main: Any = threading.current_thread() is threading.main_thread()
        if on_main and signal.getsignal(signal.SIGTERM) is handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return undo
