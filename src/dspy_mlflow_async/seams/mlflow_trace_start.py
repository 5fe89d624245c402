"""Start of a trace, as MLflow's processor does it, by the number of its root.

``MlflowV3SpanProcessor._start_trace`` asks the root for its span context, which a call's span has not made, and
``InMemoryTraceManager.register_trace`` asks the environment twice and gives the record to nobody. Read on mlflow 3.11.1
to 3.18.0; where their code speaks of anything else, they do it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlflow.entities import TraceInfo, TraceLocation
from mlflow.entities.trace_state import TraceState
from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor
from mlflow.tracing.trace_manager import InMemoryTraceManager, _Trace

from dspy_mlflow_async.seams.listed import is_known
from dspy_mlflow_async.seams.mlflow_call_span import trace_number_of
from dspy_mlflow_async.seams.mlflow_live import is_in_environment
from dspy_mlflow_async.seams.mlflow_remote_traces import mlflow_trace_id
from dspy_mlflow_async.seams.mlflow_traces import workspace_here

_PROCESSOR = "mlflow.tracing.processor.mlflow_v3:MlflowV3SpanProcessor"
_CALLED = (f"{_PROCESSOR}._get_basic_trace_metadata", f"{_PROCESSOR}._get_basic_trace_tags")
_SPOKEN_OF = {
    MlflowV3SpanProcessor._start_trace: (
        *("get_experiment_id_for_trace", "_logger", "debug", "generate_trace_id_v3", "context", "trace_id"),
        *("TraceInfo", "TraceLocation", "from_experiment_id", "start_time", "TraceState", "IN_PROGRESS"),
        *("_get_basic_trace_metadata", "_get_basic_trace_tags", "_trace_manager", "register_trace"),
    ),
    InMemoryTraceManager.register_trace: (
        *("_check_timeout_update", "_lock", "_Trace", "get_request_workspace", "_traces", "trace_id"),
        "_otel_id_to_mlflow_trace_id",
    ),
}
_TIMEOUT = "MLFLOW_TRACE_TIMEOUT_SECONDS"
_HAS_WORKSPACE = "workspace" in _Trace.__dataclass_fields__  # from mlflow 3.12 on


def is_start_known(processor: Any) -> bool:
    """Return whether a processor of MLflow's starts a trace as it is done here, with no time-out to look after."""
    if is_in_environment(_TIMEOUT) or getattr(processor._trace_manager._traces, "timeout", None) is not None:
        return False
    return _is_as_known


def start_trace(processor: Any, root: Any, experiment_id: str | None) -> _Trace:
    """Start a trace with a root span.

    Args:
        processor: The processor of MLflow's that the span began in.
        root: The span.
        experiment_id: Where the trace belongs.

    Returns:
        MLflow's record of it, which its trace manager knows.
    """
    number, manager = trace_number_of(root), processor._trace_manager
    info = TraceInfo(
        trace_id=mlflow_trace_id(number),
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=root.start_time // 1_000_000,
        execution_duration=None,
        state=TraceState.IN_PROGRESS,
        trace_metadata=processor._get_basic_trace_metadata(),
        tags=processor._get_basic_trace_tags(root),
    )
    trace = _Trace(info, workspace=workspace_here()) if _HAS_WORKSPACE else _Trace(info)
    with manager._lock:
        manager._traces[info.trace_id] = trace
        manager._otel_id_to_mlflow_trace_id[number] = info.trace_id
    return trace


def speaks_only_of(function: Any, names: Iterable[str]) -> bool:
    """Return whether the code of a function uses no other names than these."""
    return set(function.__code__.co_names) <= set(names)


_is_as_known = all(map(is_known, _CALLED)) and all(map(speaks_only_of, _SPOKEN_OF, _SPOKEN_OF.values()))
