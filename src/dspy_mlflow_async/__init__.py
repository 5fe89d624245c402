"""MLflow tracing for DSPy programs that run concurrently.

PYTEST_DONT_REWRITE (its asserts are no test's)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_mlflow_async import asgi as asgi
    from dspy_mlflow_async import cli as cli
    from dspy_mlflow_async import testing as testing
    from dspy_mlflow_async.callback import TracingCallback
    from dspy_mlflow_async.composition import autolog
    from dspy_mlflow_async.evaluate.case import Case
    from dspy_mlflow_async.evaluate.evaluate_all import aevaluate_all, evaluate_all
    from dspy_mlflow_async.evaluate.evaluator import AsyncEvaluate
    from dspy_mlflow_async.health import flush, stats
    from dspy_mlflow_async.propagation import ThreadPoolExecutor
    from dspy_mlflow_async.remote.carried import attached, carry
    from dspy_mlflow_async.remote.propagated import propagate
    from dspy_mlflow_async.requests.scope import request
    from dspy_mlflow_async.requests.wrap import wrap
    from dspy_mlflow_async.runs.run_block import run
    from dspy_mlflow_async.spans.tracer import suppress

__all__ = [
    "AsyncEvaluate",
    "Case",
    "ThreadPoolExecutor",
    "TracingCallback",
    "aevaluate_all",
    "attached",
    "autolog",
    "carry",
    "evaluate_all",
    "flush",
    "propagate",
    "request",
    "run",
    "stats",
    "suppress",
    "wrap",
]

# Imported when somebody asks: MLflow's DSPy flavor, which the callback is built on, takes longer than all of ours.
_HOMES = {
    "AsyncEvaluate": "evaluate.evaluator",
    "Case": "evaluate.case",
    "ThreadPoolExecutor": "propagation",
    "TracingCallback": "callback",
    "aevaluate_all": "evaluate.evaluate_all",
    "attached": "remote.carried",
    "autolog": "composition",
    "carry": "remote.carried",
    "evaluate_all": "evaluate.evaluate_all",
    "flush": "health",
    "propagate": "remote.propagated",
    "request": "requests.scope",
    "run": "runs.run_block",
    "stats": "health",
    "suppress": "spans.tracer",
    "wrap": "requests.wrap",
}


# Modules of the public names that stand for themselves, which Python would know only once somebody has imported them.
_MODULES = ("asgi", "cli", "testing")
_NEED_RUNS = ("AsyncEvaluate", "Case", "aevaluate_all", "evaluate_all", "run")


def _home(name: str) -> str:
    """Return the module of this package in which a public name lives.

    Raises:
        ImportError: Where the part of MLflow that is installed has not what it needs, with the extra that brings it.
    """
    listed = importlib.import_module(f"{__name__}.seams.listed")
    if listed.lost_ground():
        return "fallback"
    installed = importlib.import_module(f"{__name__}.seams.installed")
    if packages := listed.missing_packages():
        raise ImportError(
            installed.needs_whole(f"dspy_mlflow_async with this MLflow ({', '.join(packages)} is missing)")
        )
    if name in _NEED_RUNS and not installed.has_runs():
        raise ImportError(installed.needs_whole(f"dspy_mlflow_async.{name}"))
    return _HOMES[name]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use; ``__version__`` is read from the installed metadata."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_home(name)}"), name)
    elif name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("dspy-mlflow-async")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, those not imported yet included."""
    return sorted({*globals(), *__all__, *_MODULES})
