"""What users say by id about a trace that has ended and is not stored yet: with MLflow's exporter it would be there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlflow
from mlflow.tracing.client import TracingClient
from mlflow.tracing.trace_manager import InMemoryTraceManager

from dspy_mlflow_async.seams.patching import patch

# All take the trace's id first.
_OF_ASSESSMENTS = ("get_assessment", "update_assessment", "delete_assessment")
_OF_TAGS = ("set_trace_tag", "delete_trace_tag")


def patch_by_id(
    note: Callable[[str, str, Any], Any | None], ensure_stored: Callable[[str], None]
) -> Callable[[], None]:
    """Let ``TracingClient`` find the traces that are on their way; all of MLflow's functions for one trace go by it.

    Args:
        note: Called with tracking URI, trace id and assessment. Takes the assessment along with a trace that is not
            handed on yet, as MLflow does with the active one, and returns it with an id; or returns None.
        ensure_stored: Called with a trace id, before the store is asked. As MLflow's own request, it may take a while.

    Returns:
        The undo.
    """
    originals = {name: getattr(TracingClient, name) for name in ("log_assessment", *_OF_ASSESSMENTS, *_OF_TAGS)}
    replacements = {"log_assessment": _noting(originals["log_assessment"], note, ensure_stored)}
    for name in _OF_ASSESSMENTS:
        replacements[name] = _storing(originals[name], ensure_stored, lambda _: True)
    for name in _OF_TAGS:  # of a trace in memory MLflow changes them there, and they go with it
        replacements[name] = _storing(originals[name], ensure_stored, lambda trace_id: not _is_in_memory(trace_id))
    return patch(TracingClient, **replacements)


def _is_in_memory(trace_id: str) -> bool:
    with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
        return trace is not None


def _noting(original: Any, note: Callable[[str, str, Any], Any | None], ensure_stored: Callable[[str], None]) -> Any:
    @functools.wraps(original)
    def log_assessment(self: Any, trace_id: str, assessment: Any) -> Any:
        if trace_id and trace_id != mlflow.get_active_trace_id():
            noted = note(self.tracking_uri, trace_id, assessment)
            if noted is not None:
                return noted
            ensure_stored(trace_id)
        return original(self, trace_id, assessment)

    return log_assessment


def _storing(original: Any, ensure_stored: Callable[[str], None], asks_store: Callable[[str], bool]) -> Any:
    @functools.wraps(original)
    def by_id(self: Any, trace_id: str, *args: Any, **kwargs: Any) -> Any:
        if asks_store(trace_id):
            ensure_stored(trace_id)
        return original(self, trace_id, *args, **kwargs)

    return by_id
