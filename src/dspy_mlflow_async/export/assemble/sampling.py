"""Tail sampling: decides on whole traces, at their end, by the rule that was set where they began."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.seams import mlflow_traces

# Given the ended root span, as OpenTelemetry has it, says whether the trace is stored.
Keeps = Callable[[Any], bool]

KEEPS: ContextVar[Keeps | None] = ContextVar("dspy_mlflow_async_keeps", default=None)


def is_kept(keeps: Keeps, trace: Any) -> bool:
    """Return whether ``keeps`` wants this trace. One whose root has not ended is stored, as is one that it fails on."""
    root = mlflow_traces.ended_root(trace)
    return root is None or _ask(keeps, root) is not False


@guarded
def _ask(keeps: Keeps, root: Any) -> bool:
    return keeps(root)
