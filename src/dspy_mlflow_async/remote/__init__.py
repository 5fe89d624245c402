"""Calls and examples in other processes: what travels, who works there, and what comes home."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_mlflow_async.evaluate.remote_examples import on
    from dspy_mlflow_async.remote.executor import Executor
    from dspy_mlflow_async.remote.processes import Processes
    from dspy_mlflow_async.remote.ray_actors import Ray

__all__ = ["Executor", "Processes", "Ray", "on"]

# Imported when somebody asks: each brings an engine of its own.
_HOMES = {
    "Executor": "remote.executor",
    "Processes": "remote.processes",
    "Ray": "remote.ray_actors",
    "on": "evaluate.remote_examples",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dspy_mlflow_async.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, those not imported yet included."""
    return sorted({*globals(), *__all__})
