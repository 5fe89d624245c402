"""Patch of MLflow's fluent functions, so that they read and change the active runs of the context; with its undo."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from dspy_mlflow_async import export
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.runs import stack
from dspy_mlflow_async.runs.nested_runs import replace_start_run
from dspy_mlflow_async.seams import mlflow_runs
from dspy_mlflow_async.seams.patching import Undo, patch, together

logger = logging.getLogger("dspy_mlflow_async")


_ELSEWHERE = -1  # no thread has this id


class _View:
    """The list that MLflow's fluent functions read and change, over the immutable tuple of this context."""

    def __len__(self) -> int:
        return len(stack.in_context() or ())

    def __getitem__(self, index: Any) -> Any:
        return (stack.in_context() or ())[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(stack.in_context() or ())

    def append(self, run: Any) -> None:
        stack.mark_opened_here(run)
        stack.OPEN.add(run)
        stack.VARIABLE.set((*(stack.in_context() or ()), run))

    def pop(self) -> Any:
        *rest, run = stack.in_context() or ()
        stack.OPEN.discard(run)
        noted = stack.notes(run)
        # mlflow.end_run() may be called anywhere, in a worker as well, and the context that opened it keeps the run.
        noted.has_ended = noted.has_ended or not noted.ends_in_place
        stack.show(tuple(rest))
        return run


class ContextRunStack:
    """Stands in for ``mlflow.tracking.fluent._active_run_stack``, with its interface.

    Where a context has active runs of its own it shows those, and elsewhere MLflow's thread-local list, so that
    ``mlflow.start_run()`` without ``with`` behaves as MLflow documents.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self._view = _View()

    def get(self) -> Any:
        """Return the active runs here, as something with the list methods that MLflow uses."""
        return stack.without_ended(self.original.get()) if stack.in_context() is None else self._view

    def get_all_thread_values(self) -> dict[int, list[Any]]:
        """Return the runs by thread, of which MLflow gives a trace to the newest: the innermost run of this context.

        Where there is none, return all that MLflow alone would list: also what other contexts have, off its own list.
        """
        runs = stack.in_context()
        if runs is None:
            listed = self.original.get_all_thread_values()
            elsewhere = {_ELSEWHERE: stack.OPEN.runs()}
            return {
                thread: [run for run in each if not stack.has_ended(run)] for thread, each in listed.items()
            } | elsewhere
        return {threading.get_ident(): list(runs[-1:])}

    def __getattr__(self, name: str) -> Any:
        """Take everything else from the original."""
        return getattr(self.original, name)


def replace_stack(count_blocks: Callable[[int], None]) -> Undo:
    """Let MLflow's active run follow the context.

    Args:
        count_blocks: Called with 1 where a block begins that relies on this, and with -1 where it ends.
    """
    if not mlflow_runs.has_run_stack():
        logger.warning(
            "This MLflow keeps its active runs elsewhere: mlflow.active_run() stays thread-local. All else works."
        )
        return lambda: None
    replacement = ContextRunStack(mlflow_runs.run_stack())
    return together(
        mlflow_runs.wait_in_fluent_calls(_wait_for_run),
        replace_start_run(),
        _replace_blocks(replacement, count_blocks),
        patch(mlflow_runs.fluent, **{mlflow_runs.STACK_NAME: replacement}),
    )


@guarded
def _wait_for_run() -> None:
    """Wait for the run that is active here, for a bounded time, where its creation waits in the queue."""
    run = stack.innermost()
    if isinstance(run, mlflow_runs.PendingRun) and not run.is_there:
        export.run_writer(None).settle(run.info.run_id)


# --- with mlflow.start_run() --------------------------------------------------------------------------------------


def _replace_blocks(replacement: ContextRunStack, count_blocks: Callable[[int], None]) -> Undo:
    enter, leave = mlflow_runs.ActiveRun.__enter__, mlflow_runs.ActiveRun.__exit__

    @functools.wraps(enter)
    def enter_context(self: Any) -> Any:
        runs = replacement.original.get()
        if stack.VARIABLE.get() is None and runs and runs[-1] is self and mlflow_runs.run_stack() is replacement:
            stack.mark_opened_here(self)
            stack.VARIABLE.set(tuple(runs))
            stack.OPEN.add(runs.pop())
        noted = stack.notes(self)
        if not noted.holds_block and any(each is self for each in stack.in_context() or ()):
            noted.holds_block = True
            count_blocks(1)
        return enter(self)

    @functools.wraps(leave)
    def leave_context(self: Any, *exception: Any) -> Any:
        noted = stack.notes(self)
        if not noted.holds_block:
            return leave(self, *exception)
        noted.holds_block, noted.ends_in_place = False, stack.was_opened_here(self)
        try:
            return _end_alone(self, leave, exception) if _is_elsewhere(self) else leave(self, *exception)
        finally:
            noted.ends_in_place = False
            count_blocks(-1)

    return patch(mlflow_runs.ActiveRun, __enter__=enter_context, __exit__=leave_context)


def _is_elsewhere(run: Any) -> bool:
    """Return whether MLflow, which ends what is innermost here, would not end ``run``, whose block ends now.

    A block may be entered in one task and left in another, and blocks of generators need not end last in, first out.
    """
    if stack.has_ended(run):
        return False
    runs = stack.in_context() or ()
    # By id, as MLflow does: a tool may have ended the run and started it again.
    if all(each.info.run_id != run.info.run_id for each in runs):
        return True
    last = stack.notes(runs[-1])
    return runs[-1].info.run_id != run.info.run_id and (last.holds_block or last.is_scoped)


def _end_alone(run: Any, leave: Callable[..., Any], exception: tuple[Any, ...]) -> Any:
    """Let MLflow end this run, and no other."""
    before = stack.VARIABLE.get()
    stack.VARIABLE.set((run,))
    try:
        return leave(run, *exception)
    finally:
        stack.notes(run).has_ended = True
        stack.OPEN.discard(run)
        if before is None:
            stack.VARIABLE.set(None)
        else:
            stack.show(stack.without(before, run))
