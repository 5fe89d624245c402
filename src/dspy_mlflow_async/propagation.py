"""Takes the tracing context into threads that DSPy did not start."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any, TypeVar

from dspy_mlflow_async import export
from dspy_mlflow_async.context import frame as frames
from dspy_mlflow_async.context.carrier import Carrier
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.runs import active_runs
from dspy_mlflow_async.runs.evaluation import ELSEWHERE
from dspy_mlflow_async.seams.mlflow_spans import TRACING_VARIABLES
from dspy_mlflow_async.settings import OVERRIDE
from dspy_mlflow_async.spans.tracer import enclosing_ledger

_Result = TypeVar("_Result")

_VARIABLES = (active_runs.VARIABLE, export.KEEPS, OVERRIDE, ELSEWHERE, *TRACING_VARIABLES)


def capture() -> Carrier:
    """Return the tracing context here: our frame, the active runs, MLflow's and OpenTelemetry's context.

    Nothing of the user's own travels.
    """
    return Carrier({frames.VARIABLE: frames.to_carry(), **{variable: variable.get() for variable in _VARIABLES}})


def spans_go_elsewhere(trace_id: str, *, is_kept: bool) -> None:
    """Note that another process is told of the span here, and adds its own to the trace, with LM calls of its own.

    The trace's totals are then those of what the store has, and the module around here shows no sum: MLflow takes that
    for the sum of all spans below.

    Args:
        trace_id: MLflow's id of the trace.
        is_kept: Whether the trace is stored whatever ``sample`` says.
    """
    export.share(trace_id, is_kept=is_kept)
    if (ledger := enclosing_ledger()) is not None:
        ledger.leave_unsettled()


@guarded
def headers_sent(trace_id: str) -> None:
    """Note that the headers of a request tell another process of the span here. What it stores may be left out here."""
    spans_go_elsewhere(trace_id, is_kept=False)


class ThreadPoolExecutor(concurrent.futures.ThreadPoolExecutor):
    """A ``concurrent.futures.ThreadPoolExecutor`` whose every call runs in the tracing context of its ``submit``."""

    def submit(self, fn: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[_Result]:
        """Schedule ``fn``, as the base class does."""
        return super().submit(capture().run, fn, *args, **kwargs)
