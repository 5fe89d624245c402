"""Choice of the run that an evaluation or a compile logs into: its own, the user's, or a child of one that is taken."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from dspy_mlflow_async import export
from dspy_mlflow_async.export import before_leaving
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.runs import active_runs
from dspy_mlflow_async.runs.handle import KILLED, RunHandle, run_status
from dspy_mlflow_async.seams import mlflow_runs

logger = logging.getLogger("dspy_mlflow_async")


def create(name: str | None, *, parent: Any | None = None, tags: Mapping[str, str] | None = None) -> RunHandle:
    """Create a run of our own, under ``parent`` where there is one.

    Where the store does not answer within a bound, the run is created in the background, under the same name and
    parent and with the time at which it began.

    Raises:
        Exception: Where the store refuses to create it.
    """
    return _owned(create_or_queue(name, parent=parent, tags=tags))


def creation_here(
    name: str | None,
    *,
    parent: Any | None = None,
    tags: Mapping[str, str] | None = None,
    experiment_id: str | None = None,
) -> export.Creation:
    """Return what a run that begins here is created with.

    Args:
        name: Its name; None for one that MLflow makes up.
        parent: The run that it is a child of.
        tags: Its tags.
        experiment_id: Its experiment; by default the parent's, or the one in force here.
    """
    tags, experiment_name = mlflow_runs.resolve_tags(tags or {}), None
    if parent is not None:
        tags[mlflow_runs.MLFLOW_PARENT_RUN_ID] = parent.info.run_id
        is_known = not isinstance(parent, mlflow_runs.PendingRun)
        experiment_id = experiment_id or (parent.info.experiment_id if is_known else parent.known_experiment_id)
    if experiment_id is None:
        experiment_id, experiment_name = mlflow_runs.experiment_here()
    return export.Creation(
        name=name,
        experiment_id=experiment_id,
        experiment_name=experiment_name,
        tags=tags,
        start_time_ms=int(time.time() * 1000),
    )


def create_now(creation: export.Creation, stand_in: str | None = None) -> RunHandle:
    """Create a run in this thread.

    Raises:
        Exception: Where the store refuses or is not there.
    """
    return RunHandle(mlflow_runs.ActiveRun(export.create_run(creation, stand_in)), is_own=True)


def create_or_queue(
    name: str | None, *, parent: Any | None = None, tags: Mapping[str, str] | None = None, timeout: float | None = None
) -> RunHandle:
    """Create a run, or let the queue do it later where the store does not do it within ``timeout`` seconds.

    Raises:
        Exception: Where the store refuses.
    """
    creation, stand_in = creation_here(name, parent=parent, tags=tags), export.new_id()
    writer = export.run_writer(None)

    def came_late(handle: RunHandle, why: BaseException) -> None:
        if isinstance(why, TimeoutError):  # we have gone on without
            writer.keep(stand_in, handle.run, creation)
        else:
            handle.end(run_status(why))

    try:
        if not export.is_stand_in(creation.tags.get(mlflow_runs.MLFLOW_PARENT_RUN_ID)):
            return export.ask(lambda: create_now(creation, stand_in), discard=came_late, timeout=timeout)
    except Exception as error:
        if export.is_refusal(error):
            raise
        logger.info("The run %r is created in the background (%s).", name, error)
    writer.create(stand_in, creation)
    run = mlflow_runs.PendingRun(stand_in, creation.experiment_id, name, creation.start_time_ms, export.known)
    return RunHandle(run, is_own=True)


def _resume(run_id: str, name: str | None, tags: Mapping[str, str] | None) -> RunHandle:
    """Take up a run that ends with what begins here, as ``mlflow.start_run`` does with ``MLFLOW_RUN_ID``."""
    begun = int(time.time() * 1000)
    try:
        handle = export.ask(
            lambda: RunHandle(mlflow_runs.resume_run(run_id, name, tags or {}), is_own=True, is_new=False)
        )
    except Exception as error:
        if export.is_refusal(error):
            raise
        handle = RunHandle(
            mlflow_runs.PendingRun(run_id, mlflow_runs.experiment_here()[0], name, begun, export.known),
            is_own=True,
            is_new=False,
        )
        handle.tags(dict(tags or {}) | ({} if name is None else {"mlflow.runName": name}))
    return _owned(handle)


def _owned(handle: RunHandle) -> RunHandle:
    active_runs.notes(handle.run).is_ours = True
    _occupancy.claim(handle.key)  # it is this one's, in whichever thread and task
    register(handle)
    return handle


class Occupancy:
    """Ids of the runs that an evaluation or a compile logs into now. ``lock`` guards the set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._run_ids: set[str] = set()

    def claim(self, run_id: str) -> bool:
        """Claim a run; return False where somebody else has it."""
        with self._lock:
            if run_id in self._run_ids:
                return False
            self._run_ids.add(run_id)
            return True

    def release(self, run_id: str) -> None:
        """Give a claimed run back."""
        with self._lock:
            self._run_ids.discard(run_id)


_occupancy = Occupancy()


def find_run(
    name: str | None, *, renames: bool = True, tags: Mapping[str, str] | None = None
) -> RunHandle | Callable[[], RunHandle]:
    """Find the run for an evaluation or a compile that begins here, or a function that opens it in any thread.

    None open: its own, or the one that ``mlflow run`` has made for this process. One that the user opened in this
    thread and task, and nobody else is in: that one, as MLflow does. One that was inherited, or that somebody is in:
    a child of it.

    Args:
        name: The name of a run that is created, or None for one that MLflow makes up.
        renames: Whether the one that ``mlflow run`` has made takes the name, too.
        tags: Tags of a run that is created.

    Returns:
        A run that is there, and taken from now on; or a function that asks the store for one, and raises where it
        refuses.
    """
    run = active_runs.innermost()
    if run is None:
        run_id = mlflow_runs.take_run_id()
        if run_id is None:
            return functools.partial(create, name, tags=tags)
        return functools.partial(_resume, run_id, name if renames else None, tags)
    handle = RunHandle(run, is_own=False)
    if active_runs.was_opened_here(run) and _occupancy.claim(handle.key):
        return handle
    return functools.partial(create, name, parent=run, tags=tags)


def open_run(name: str | None, *, renames: bool = True, tags: Mapping[str, str] | None = None) -> RunHandle:
    """Open the run of ``find_run``.

    Raises:
        Exception: Where one has to be created, and the store refuses.
    """
    found = find_run(name, renames=renames, tags=tags)
    return found if isinstance(found, RunHandle) else found()


def close(handle: RunHandle, status: str) -> None:
    """End the run of ``open_run`` or ``create``, or give it back, with everything that was logged into it stored."""
    _occupancy.release(handle.key)
    unregister(handle)
    handle.end(status)


# --- the end of the process ---------------------------------------------------------------------------------------

_open: dict[str, RunHandle] = {}  # single operations on a dict are atomic


def register(handle: RunHandle, *, is_resumed: bool = False) -> None:
    """Note a run of ours that is open: it has system metrics if MLflow's runs do, and a process that ends kills it."""
    _open[handle.key] = handle
    handle.start_system_metrics(is_resumed=is_resumed)


def unregister(handle: RunHandle) -> None:
    """Forget a run that ends in another way."""
    _open.pop(handle.key, None)


@guarded
def end_open_runs() -> None:
    """End what is open as KILLED, the innermost first. For the end of the process."""
    while _open:
        try:
            _, handle = _open.popitem()
        except KeyError:  # another thread was faster
            return
        active_runs.forget(handle.run)  # lest MLflow's own exit handler ends it once more, FINISHED
        handle.end(KILLED, is_leaving=True)


before_leaving(end_open_runs)


def _start_afresh() -> None:
    """Start afresh in a forked child: what is open is the parent's, and nobody holds a lock."""
    _open.clear()
    _occupancy.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
