"""Which run an evaluation or a compile logs into: its own, the user's, or a child of one that is taken."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from dspy_mlflow_async.export import before_leaving
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.runs import active
from dspy_mlflow_async.runs.asking import ask
from dspy_mlflow_async.runs.handle import KILLED, RunHandle
from dspy_mlflow_async.seams import mlflow_runs as seam


def create(name: str | None, *, parent: Any | None = None, tags: Mapping[str, str] | None = None) -> RunHandle:
    """Create a run of our own, under ``parent`` where there is one.

    Raises:
        Exception: Where the store does not create it within a bound: an evaluation neither fails nor waits for that.
            A run that it creates later after all is ended KILLED.
    """
    tags = dict(tags or {})
    experiment_id = None
    if parent is not None:
        tags[seam.MLFLOW_PARENT_RUN_ID] = parent.info.run_id
        experiment_id = parent.info.experiment_id
    return _owned(lambda: RunHandle(seam.create_run(name, experiment_id, tags), is_own=True))


def _resume(run_id: str, name: str | None, tags: Mapping[str, str] | None) -> RunHandle:
    """Take up a run that ends with what begins here, as ``mlflow.start_run`` does with ``MLFLOW_RUN_ID``."""
    return _owned(lambda: RunHandle(seam.resume_run(run_id, name, tags or {}), is_own=True, is_new=False))


def _owned(make: Callable[[], RunHandle]) -> RunHandle:
    handle = ask(make, discard=lambda late: late.end(KILLED))
    active.notes(handle.run).is_ours = True
    _occupancy.claim(handle.run_id)  # it is this one's, in whichever thread and task
    register(handle)
    return handle


class Occupancy:
    """Which runs somebody logs into now. ``lock`` guards the set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._run_ids: set[str] = set()

    def claim(self, run_id: str) -> bool:
        """Take a run for oneself; False where somebody else has it."""
        with self._lock:
            if run_id in self._run_ids:
                return False
            self._run_ids.add(run_id)
            return True

    def release(self, run_id: str) -> None:
        """Give it back."""
        with self._lock:
            self._run_ids.discard(run_id)


_occupancy = Occupancy()


def find_run(
    name: str | None, *, child_name: str | None = None, tags: Mapping[str, str] | None = None
) -> RunHandle | Callable[[], RunHandle]:
    """The run that an evaluation or a compile which begins here logs into, or what opens it, in whichever thread.

    None open: its own, or the one that ``mlflow run`` has made for this process. One that the user opened in this
    thread and task, and nobody else is in: that one, as MLflow does. One that was inherited, or that somebody is in:
    a child of it.

    Args:
        name: The name of a run of its own, or None for one that MLflow makes up.
        child_name: The name of a child run; by default ``name``.
        tags: Tags of a run that is created.

    Returns:
        A run that is there, and taken from now on; or a function that asks the store for one, and raises where it
        does not give one within a bound.
    """
    run = active.innermost()
    if run is None:
        run_id = seam.take_run_id()
        if run_id is None:
            return functools.partial(create, name, tags=tags)
        return functools.partial(_resume, run_id, name, tags)
    if active.was_opened_here(run) and _occupancy.claim(run.info.run_id):
        return RunHandle(run, is_own=False)
    return functools.partial(create, child_name or name, parent=run, tags=tags)


def open_run(name: str | None, *, child_name: str | None = None, tags: Mapping[str, str] | None = None) -> RunHandle:
    """The run of ``find_run``, opened.

    Raises:
        Exception: Where one has to be created, and the store does not do it within a bound.
    """
    found = find_run(name, child_name=child_name, tags=tags)
    return found if isinstance(found, RunHandle) else found()


def close(handle: RunHandle, status: str) -> None:
    """End the run of ``open_run`` or ``create``, or give it back, with everything that was logged into it stored."""
    _occupancy.release(handle.run_id)
    unregister(handle)
    handle.end(status)


# --- the end of the process ---------------------------------------------------------------------------------------

_open: dict[str, RunHandle] = {}  # single operations on a dict are atomic


def register(handle: RunHandle, *, is_resumed: bool = False) -> None:
    """Note a run of ours that is open: it has system metrics if MLflow's runs do, and a process that ends kills it."""
    _open[handle.run_id] = handle
    handle.start_system_metrics(is_resumed=is_resumed)


def unregister(handle: RunHandle) -> None:
    """It ends in another way."""
    _open.pop(handle.run_id, None)


@guarded
def end_open_runs() -> None:
    """End what is open as KILLED, the innermost first. For the end of the process."""
    while _open:
        try:
            _, handle = _open.popitem()
        except KeyError:  # another thread was faster
            return
        active.forget(handle.run)  # lest MLflow's own exit handler ends it once more, FINISHED
        handle.end(KILLED, is_leaving=True)


before_leaving(end_open_runs)


def _start_afresh() -> None:
    """In a forked child: what is open is the parent's, and nobody holds a lock."""
    _open.clear()
    _occupancy.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
