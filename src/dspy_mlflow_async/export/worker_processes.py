"""Worker processes: whether this is one, and what is flushed when those of pools exit."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# include/linux/sched.h: forked, and no other program since. The ninth field of /proc/self/stat, see proc(5).
_FORKED_WITHOUT_EXEC = 0x40
_FLAGS = 6  # counted behind the name of the program, which may hold blanks

_is_forked = False  # since this module was imported
_leaving: list[Callable[[], None]] = []
_kept: list[Callable[..., None]] = []


def may_end_unheard() -> bool:
    """Return whether this process may end by ``os._exit``, or be killed by its pool: then nothing is in memory alone.

    That is so for every fork, whoever made it and when, and for the processes of ``multiprocessing``.
    """
    return _is_forked or multiprocessing.parent_process() is not None or _is_fork_of_linux()


@functools.cache  # asked for each trace; whoever is forked from here is one by `_is_forked`
def _is_fork_of_linux() -> bool:
    """Return whether this process was forked before this module was imported, as far as Linux tells."""
    try:
        flags = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[_FLAGS]
        return bool(int(flags) & _FORKED_WITHOUT_EXEC)
    except (OSError, ValueError, IndexError):  # another system, or a sandbox
        return False


def at_exit_of_workers(function: Callable[[], None]) -> None:
    """Call ``function`` when a process of ``multiprocessing`` ends, or one of Celery's pool.

    Those leave by ``os._exit``, without ``atexit``; what they do call, they forget when they are forked. The processes
    of ``billiard`` use the registries of ``multiprocessing``; the workers of its pool go round them.
    """

    def at_exit_of_child(_: object) -> None:
        multiprocessing.util.Finalize(None, function, exitpriority=0)

    multiprocessing.util.register_after_fork(at_exit_of_child, at_exit_of_child)
    _kept.append(at_exit_of_child)  # it is registered weakly
    _leaving.append(function)
    if multiprocessing.parent_process() is not None:
        at_exit_of_child(None)
    hear_of_celery()


def hear_of_celery() -> None:
    """Register for the end of the processes of Celery's pool, if Celery is imported. Doing so twice does nothing."""
    if (signals := sys.modules.get("celery.signals")) is not None:
        signals.worker_process_shutdown.connect(_leave, weak=False, dispatch_uid=__name__)


def _leave(**_: Any) -> None:
    for function in _leaving:
        function()


def _after_fork_in_child() -> None:
    global _is_forked  # noqa: PLW0603 - one fact of the process
    _is_forked = True
    hear_of_celery()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
