"""MLflow's active run, context-local: each task and each of DSPy's worker threads has the one it came from."""

from __future__ import annotations

import os
import threading
from typing import Any

from dspy_mlflow_async.runs.mlflow_stack import ContextRunStack, replace_stack
from dspy_mlflow_async.runs.stack import (
    OPEN,
    VARIABLE,
    forget,
    in_context,
    innermost,
    mark_opened_here,
    notes,
    show,
    stack,
    was_opened_here,
)
from dspy_mlflow_async.seams import mlflow_runs
from dspy_mlflow_async.seams import mlflow_spans as tracing
from dspy_mlflow_async.seams.installed import has_runs
from dspy_mlflow_async.seams.patching import Patches

__all__ = [
    "VARIABLE",
    "Block",
    "ensure_installed",
    "forget",
    "innermost",
    "is_installed",
    "mark_opened_here",
    "notes",
    "stack",
    "uninstall",
    "was_opened_here",
]


class _Installation:
    """Replacement of MLflow's run stack, and its need. ``lock`` guards all of it.

    It is replaced as long as ``autolog`` wants it, or a block is open that relies on it: taking it away inside
    ``with mlflow.start_run()`` would leave that run active nowhere, and open for ever.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.is_wanted = False
        self.open_blocks = 0
        self._patches = Patches()

    def change(self, *, is_wanted: bool | None = None, blocks: int = 0) -> None:
        with self.lock:
            self.is_wanted = self.is_wanted if is_wanted is None else is_wanted
            self.open_blocks += blocks
            self._patches.set(
                "stack",
                lambda: replace_stack(lambda blocks: self.change(blocks=blocks)),
                is_needed=self.is_wanted or self.open_blocks > 0,
            )


_installation = _Installation()


def _start_afresh() -> None:
    """Start afresh in a forked child: the active runs are the parent's, as MLflow has it, and nobody holds a lock."""
    VARIABLE.set(None)
    OPEN.after_fork()
    _installation.lock = threading.Lock()
    _installation.open_blocks = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)


def ensure_installed() -> None:
    """Make MLflow's active run follow the context inside ``with mlflow.start_run()`` and our own scopes."""
    if has_runs():
        _installation.change(is_wanted=True)


def uninstall() -> None:
    """Give MLflow its own stack back, as soon as no block relies on ours."""
    _installation.change(is_wanted=False)


def is_installed() -> bool:
    """Return whether MLflow reads its active run from here."""
    return isinstance(mlflow_runs.run_stack(), ContextRunStack) if mlflow_runs.has_run_stack() else False


class Block:
    """A run that is active from ``__init__`` to ``leave``, here and in what is started here.

    Args:
        run: MLflow's run.
        needs_stack: Whether MLflow's active run shall follow it even where ``autolog`` does not ask for that.
    """

    def __init__(self, run: Any, *, needs_stack: bool = False) -> None:
        self._run = run
        self._is_open = True
        self._is_counted = needs_stack or _installation.is_wanted
        if self._is_counted:
            _installation.change(blocks=1)
        self._began_without = in_context() is None
        around = stack()
        # The user's run that an evaluation logs into is there already.
        self._is_added = not around or around[-1] is not run
        if self._is_added:
            noted = notes(run)
            noted.has_ended, noted.is_scoped = False, True
            if noted.opened_in is None:
                mark_opened_here(run)
            if not noted.is_ours:
                OPEN.add(run)
        VARIABLE.set((*around, run) if self._is_added else around)
        self._trace_context_around = tracing.TRACE_CONTEXT.get()
        self._trace_context: Any = None
        if not is_installed():
            # MLflow would give a trace to the newest active run of any thread.
            source = {tracing.SOURCE_RUN: run.info.run_id}
            self._trace_context = tracing.extended_context(metadata=source, tags={})
            tracing.TRACE_CONTEXT.set(self._trace_context)

    def leave(self) -> None:
        """Take the run away, and nothing else: blocks need not end last in, first out. Once is enough."""
        if not self._is_open:
            return
        self._is_open = False
        self._take_away()
        if self._trace_context is not None and tracing.TRACE_CONTEXT.get() is self._trace_context:
            tracing.TRACE_CONTEXT.set(self._trace_context_around)
        if self._is_counted:
            _installation.change(blocks=-1)

    def _take_away(self) -> None:
        runs = in_context()
        if self._is_added:
            OPEN.discard(self._run)
            places = [index for index, each in enumerate(runs or ()) if each is self._run]
            if not places:
                notes(self._run).has_ended = True  # we are in another context than the one that has it
                return
            assert runs is not None  # noqa: S101 - it is in there
            runs = (*runs[: places[-1]], *runs[places[-1] + 1 :])
        if not runs and self._began_without:
            VARIABLE.set(None)
        elif runs is not None:
            show(runs)
