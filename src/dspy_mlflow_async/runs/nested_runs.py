"""Keeps ``mlflow.start_run`` from raising where MLflow alone would not: below a run that was inherited or is ours."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from dspy_mlflow_async.runs import stack
from dspy_mlflow_async.seams.mlflow_runs import fluent, mlflow
from dspy_mlflow_async.seams.patching import Undo, patch, together


def replace_start_run() -> Undo:
    """Replace ``mlflow.start_run`` where MLflow's users find it, and return the undo."""
    undos = []
    known: dict[Any, Any] = {}
    for owner in (fluent, mlflow):
        start = owner.start_run
        if {"nested", "parent_run_id"} <= set(inspect.signature(start).parameters):
            known[start] = known.get(start) or _nesting(start)
            undos.append(patch(owner, start_run=known[start]))
    return together(*undos)


def _nesting(start: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``mlflow.start_run``: it raises below a run that the user has opened in this thread and task, and no other.

    What is active here because it was inherited, or was made for an evaluation or a compile, MLflow alone would not
    know of, and the program would run: below such a run the new one is nested unasked.
    """
    signature = inspect.signature(start)

    @functools.wraps(start)
    def start_run(*args: Any, **kwargs: Any) -> Any:
        runs = stack.in_context()
        if not runs:
            run = start(*args, **kwargs)
            stack.mark_opened_here(run)
            return run
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return start(*args, **kwargs)  # which says it in its own words
        opened = tuple(run for run in runs if stack.was_opened_here(run) and not stack.notes(run).is_ours)
        parent = bound.arguments.get("parent_run_id")
        bound.arguments["nested"] = bound.arguments.get("nested") or not opened
        # MLflow takes no other parent than the innermost run that it sees.
        shown = runs if not parent or parent == runs[-1].info.run_id else opened
        stack.VARIABLE.set(shown)
        try:
            return start(*bound.args, **bound.kwargs)
        finally:
            stack.VARIABLE.set((*runs, *(stack.VARIABLE.get() or ())[len(shown) :]))

    return start_run
