"""Active runs of this context: an immutable tuple in a context variable or, where it holds none, MLflow's own list."""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from dspy_mlflow_async.seams import mlflow_runs

Runs = tuple[Any, ...]

# The runs that are active here, outermost first. None: MLflow's own thread-local list counts.
VARIABLE: ContextVar[Runs | None] = ContextVar("dspy_mlflow_async_active_runs", default=None)


def stack() -> Runs:
    """The runs that are active here, outermost first."""
    runs = in_context()
    return native() if runs is None else runs


def innermost() -> Any | None:
    """MLflow's active run here, or None."""
    runs = stack()
    return runs[-1] if runs else None


def in_context() -> Runs | None:
    """The runs that this context has; None where MLflow's own list counts.

    Finished is never current: one that was opened here and has been ended elsewhere goes out when it is looked for.
    """
    runs = VARIABLE.get()
    if runs and any(map(has_ended, runs)):
        kept = tuple(run for run in runs if not (has_ended(run) and was_opened_here(run)))
        if len(kept) < len(runs):
            runs = kept or None
            VARIABLE.set(runs)
    return runs


def native() -> Runs:
    """The runs on MLflow's own list in this thread; where it keeps them elsewhere, the one that it shows."""
    if not mlflow_runs.has_run_stack():
        run = mlflow_runs.fluent.active_run()
        return () if run is None else (run,)
    shown = mlflow_runs.run_stack()
    return tuple(without_ended(getattr(shown, "original", shown).get()))


def without_ended(runs: list[Any]) -> list[Any]:
    """MLflow's own list, less what was ended in another place: there MLflow cannot take it off this thread's list."""
    if any(map(has_ended, runs)):
        runs[:] = [run for run in runs if not has_ended(run)]
    return runs


def show(runs: Runs) -> None:
    """Make these active here. Where MLflow's own list says the same, that counts: no scope of ours is left."""
    VARIABLE.set(None if runs == native() else runs)


def forget(run: Any) -> None:
    """Make a run inactive here, wherever in the stack it is."""
    runs = VARIABLE.get()
    if runs is not None:
        VARIABLE.set(without(runs, run))


def without(runs: Runs, run: Any) -> Runs:
    """``runs`` less this one."""
    return tuple(each for each in runs if each is not run)


# --- what threads without a context see --------------------------------------------------------------------------


class _Open:
    """The user's runs that are active in some context, which MLflow alone would keep on a thread's list.

    MLflow gives a trace of a thread that has no run to the newest active one of any thread. Kept weakly: a context
    that is dropped with its run leaves nothing here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[int, weakref.ref[Any]] = {}

    def add(self, run: Any) -> None:
        with self._lock:
            self._runs[id(run)] = weakref.ref(run)

    def discard(self, run: Any) -> None:
        with self._lock:
            self._runs.pop(id(run), None)

    def runs(self) -> list[Any]:
        """The runs, less those that have ended."""
        with self._lock:
            found = [(key, reference()) for key, reference in self._runs.items()]
            for key, run in found:
                if run is None:
                    del self._runs[key]
        return [run for _, run in found if run is not None and not has_ended(run)]

    def after_fork(self) -> None:
        """Make a new lock in a forked child; the parent's runs are seen there, as MLflow has it."""
        self._lock = threading.Lock()


OPEN = _Open()


# --- what is noted of a run ---------------------------------------------------------------------------------------


class Notes:
    """Notes on one of MLflow's run objects, kept beside it, since the object is MLflow's.

    Attributes:
        opened_in: The thread and task that opened it, or None where we have not seen that.
        is_ours: Whether it was made for an evaluation or a compile, and not opened by the user.
        holds_block: Whether a ``with`` block of MLflow's is open on it.
        is_scoped: Whether a block of ours holds it, and takes it away.
        ends_in_place: Whether that block is just ending in the thread and task that opened it.
        has_ended: Whether it has been ended where it could not be taken out of the context that opened it.
    """

    __slots__ = ("ends_in_place", "has_ended", "holds_block", "is_ours", "is_scoped", "opened_in")

    def __init__(self) -> None:
        self.opened_in: tuple[int, int | None] | None = None
        self.is_ours = self.is_scoped = self.holds_block = self.ends_in_place = self.has_ended = False


_notes: WeakKeyDictionary[Any, Notes] = WeakKeyDictionary()


def notes(run: Any) -> Notes:
    """Return what is noted of ``run``."""
    found = _notes.get(run)
    return _notes.setdefault(run, Notes()) if found is None else found


def has_ended(run: Any) -> bool:
    """Return whether ``run`` has been ended somewhere else than at the end of its own block."""
    return notes(run).has_ended


def place() -> tuple[int, int | None]:
    """The thread and task we are in, to tell a run that was opened here from one that was inherited."""
    task: object | None = None
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop of asyncio's in this thread
        trio = sys.modules.get("trio")
        if trio is not None and trio.lowlevel.in_trio_task():
            task = trio.lowlevel.current_task()
    return threading.get_ident(), id(task) if task is not None else None


def was_opened_here(run: Any) -> bool:
    """Return whether ``run`` was opened in this thread and task. One that we have not seen opened counts as such."""
    opened = notes(run).opened_in
    return opened is None or opened == place()


def mark_opened_here(run: Any) -> None:
    """Note that ``run`` is opened in this thread and task."""
    notes(run).opened_in = place()
