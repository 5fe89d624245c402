"""MLflow's active run, context-local: each task and each of DSPy's worker threads has the one it came from."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from dspy_mlflow_async.seams import mlflow as tracing
from dspy_mlflow_async.seams import mlflow_runs as seam

logger = logging.getLogger("dspy_mlflow_async")

Undo = Callable[[], None]
Runs = tuple[Any, ...]

# The runs that are active here, outermost first. None: MLflow's own thread-local list counts.
VARIABLE: ContextVar[Runs | None] = ContextVar("dspy_mlflow_async_active_runs", default=None)


def stack() -> Runs:
    """The runs that are active here, outermost first."""
    runs = VARIABLE.get()
    if runs is not None:
        return runs
    if not seam.has_run_stack():
        return ()
    original = seam.run_stack()
    if isinstance(original, ContextRunStack):
        original = original.original
    return tuple(original.get())


def innermost() -> Any | None:
    """MLflow's active run here, or None."""
    runs = stack()
    return runs[-1] if runs else None


def forget(run: Any) -> None:
    """Make a run inactive here, wherever in the stack it is."""
    runs = VARIABLE.get()
    if runs is not None:
        VARIABLE.set(tuple(each for each in runs if each is not run))


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
    """Whether ``run`` was opened in this thread and task. A run on MLflow's own list always was, as to the thread."""
    opened = getattr(run, "_opened_in", None)
    return opened is None or opened == place()


def mark_opened_here(run: Any) -> None:
    """Note that ``run`` is opened in this thread and task."""
    run._opened_in = place()


class _View:
    """The list that MLflow's fluent functions read and change, over the immutable tuple of this context."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __len__(self) -> int:
        return len(VARIABLE.get() or ())

    def __getitem__(self, index: Any) -> Any:
        return (VARIABLE.get() or ())[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(VARIABLE.get() or ())

    def append(self, run: Any) -> None:
        mark_opened_here(run)
        VARIABLE.set((*(VARIABLE.get() or ()), run))

    def pop(self) -> Any:
        *rest, run = VARIABLE.get() or ()
        # Back to what this thread would see without us, where that is the same: no scope of ours is left.
        VARIABLE.set(None if rest == list(self._original.get()) else tuple(rest))
        return run


class ContextRunStack:
    """Stands in for ``mlflow.tracking.fluent._active_run_stack``, with its interface.

    Where a context has active runs of its own it shows those, and elsewhere MLflow's thread-local list, so that
    ``mlflow.start_run()`` without ``with`` behaves as MLflow documents.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self._view = _View(original)

    def get(self) -> Any:
        """The active runs here, as something with the list methods that MLflow uses."""
        return self.original.get() if VARIABLE.get() is None else self._view

    def get_all_thread_values(self) -> dict[int, list[Any]]:
        """What MLflow takes the newest of, to attribute a trace: here, the innermost run of this context."""
        runs = VARIABLE.get()
        if runs is None:
            return dict(self.original.get_all_thread_values())
        return {threading.get_ident(): list(runs[-1:])}

    def __getattr__(self, name: str) -> Any:
        """Everything else is the original's."""
        return getattr(self.original, name)


# --- in and out of MLflow -----------------------------------------------------------------------------------------


class _Installation:
    """Whether MLflow's stack is replaced. ``lock`` guards all of it.

    It is replaced as long as ``autolog`` wants it, or a block is open that relies on it: taking it away inside
    ``with mlflow.start_run()`` would leave that run active nowhere, and open for ever.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.is_wanted = False
        self.open_blocks = 0
        self.undo: Undo | None = None

    def change(self, *, is_wanted: bool | None = None, blocks: int = 0) -> None:
        with self.lock:
            self.is_wanted = self.is_wanted if is_wanted is None else is_wanted
            self.open_blocks += blocks
            is_needed = self.is_wanted or self.open_blocks > 0
            if is_needed and self.undo is None:
                self.undo = _replace_stack()
            elif not is_needed and self.undo is not None:
                undo, self.undo = self.undo, None
                undo()


_installation = _Installation()


def _start_afresh() -> None:
    """In a forked child: the active runs are the parent's, as MLflow has it, and nobody holds a lock."""
    VARIABLE.set(None)
    _installation.lock = threading.Lock()
    _installation.open_blocks = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)


def ensure_installed() -> None:
    """Make MLflow's active run follow the context inside ``with mlflow.start_run()`` and our own scopes."""
    _installation.change(is_wanted=True)


def uninstall() -> None:
    """Give MLflow its own stack back, as soon as no block relies on ours."""
    _installation.change(is_wanted=False)


def is_installed() -> bool:
    """Whether MLflow reads its active run from here."""
    return isinstance(seam.run_stack(), ContextRunStack) if seam.has_run_stack() else False


class Block:
    """A run that is active from ``__init__`` to ``leave``, here and in what is started here.

    Args:
        run: MLflow's run.
        needs_stack: Whether MLflow's active run shall follow it even where ``autolog`` does not ask for that.
    """

    def __init__(self, run: Any, *, needs_stack: bool = False) -> None:
        self._before = VARIABLE.get()
        self._trace_context = tracing.TRACE_CONTEXT.get()
        self._is_counted = needs_stack or _installation.is_wanted
        if self._is_counted:
            _installation.change(blocks=1)
        VARIABLE.set((*stack(), run))
        if not is_installed():
            # MLflow would give a trace to the newest active run of any thread.
            source = {tracing.SOURCE_RUN: run.info.run_id}
            tracing.TRACE_CONTEXT.set(tracing.extended_context(metadata=source, tags={}))

    def leave(self) -> None:
        """Make active again, by value, what was before. Once is enough."""
        VARIABLE.set(self._before)
        tracing.TRACE_CONTEXT.set(self._trace_context)
        if self._is_counted:
            self._is_counted = False
            _installation.change(blocks=-1)


def _replace_stack() -> Undo:
    if not seam.has_run_stack():
        logger.warning(
            "This MLflow keeps its active runs elsewhere: mlflow.active_run() stays thread-local. All else works."
        )
        return lambda: None
    original = seam.run_stack()
    replacement = ContextRunStack(original)
    enter, leave = seam.ActiveRun.__enter__, seam.ActiveRun.__exit__

    @functools.wraps(enter)
    def enter_context(self: Any) -> Any:
        runs = original.get()
        if VARIABLE.get() is None and runs and runs[-1] is self and seam.run_stack() is replacement:
            mark_opened_here(self)
            VARIABLE.set(tuple(runs))
            runs.pop()
            self._holds_block = True
            _installation.change(blocks=1)
        return enter(self)

    @functools.wraps(leave)
    def leave_context(self: Any, *exception: Any) -> Any:
        try:
            return leave(self, *exception)
        finally:
            if self.__dict__.pop("_holds_block", False):
                _installation.change(blocks=-1)

    setattr(seam.fluent, seam.STACK_NAME, replacement)
    seam.ActiveRun.__enter__, seam.ActiveRun.__exit__ = enter_context, leave_context

    def undo() -> None:
        if seam.run_stack() is replacement:
            setattr(seam.fluent, seam.STACK_NAME, original)
        if seam.ActiveRun.__enter__ is enter_context:
            seam.ActiveRun.__enter__ = enter
        if seam.ActiveRun.__exit__ is leave_context:
            seam.ActiveRun.__exit__ = leave

    return undo
