"""Requests by id for a trace that has ended and is not stored yet: with MLflow's exporter it might be there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import mlflow
from mlflow.tracing.client import TracingClient
from mlflow.tracing.trace_manager import InMemoryTraceManager

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.mlflow_http import is_limited
from dspy_mlflow_async.seams.patching import Undo, patch, together

# All that MLflow's public functions for traces go by. A trace that is held or open is brought to the store for them.
_OF_ONE = (
    "batch_get_traces",
    "delete_assessment",
    "delete_traces",
    "get_assessment",
    "get_trace",
    "link_prompt_versions_to_trace",
    "update_assessment",
)
# MLflow does these in memory for a trace that is still there: it goes on its way with what they change.
_IN_MEMORY = ("delete_trace_tag", "get_trace_info", "set_trace_tag", "set_trace_tags")
_OF_ALL = ("search_traces",)
_OF_RUNS = ("link_traces_to_run", "unlink_traces_from_run")


class OnTheirWay(Protocol):
    """Access to the traces that have ended, and that the store has not got yet."""

    def note(self, uri: str, trace_id: str, assessment: Any) -> Any | None:
        """Take an assessment along with a trace that is not handed on yet, as MLflow does with the active one.

        Returns:
            The assessment, with an id; None where there is no such trace.
        """

    def ensure_stored(self, trace_id: str) -> None:
        """Bring a trace to the store. As MLflow's own request, that may take a while."""

    def ensure_all_stored(self, uri: str) -> None:
        """Bring what waits for a store there."""


def patch_by_id(traces: OnTheirWay) -> Undo:
    """Let MLflow's clients find the traces that are on their way.

    Returns:
        The undo.
    """
    undos = [
        patch(
            TracingClient,
            log_assessment=_noting(TracingClient.log_assessment, traces),
            **_replacements(TracingClient, _OF_ONE, lambda original: _by_id(original, traces)),
            **_replacements(
                TracingClient, _IN_MEMORY, lambda original: _by_id(original, traces, unless_in_memory=True)
            ),
            **_replacements(TracingClient, _OF_ALL, lambda original: _over_all(original, traces)),
        )
    ]
    for owner, names in _other_clients():
        undos.append(patch(owner, **_replacements(owner, names, lambda original: _by_id(original, traces))))
    return together(*undos)


def _other_clients() -> list[tuple[Any, tuple[str, ...]]]:
    """Return the clients that link traces to runs and to prompts; installs without MLflow's stores lack the second."""
    clients = (
        (taken("mlflow.tracking._tracking_service.client:TrackingServiceClient"), _OF_RUNS),
        (taken("mlflow.tracking._model_registry.client:ModelRegistryClient"), ("link_prompt_versions_to_trace",)),
    )
    return [(client, names) for client, names in clients if client is not None]


def _replacements(owner: Any, names: tuple[str, ...], wrap: Callable[[Any], Any]) -> Mapping[str, Any]:
    """Return the methods of these names, as far as this MLflow has them, wrapped."""
    return {name: wrap(getattr(owner, name)) for name in names if hasattr(owner, name)}


def _is_in_memory(trace_id: str) -> bool:
    with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
        return trace is not None


def _noting(original: Any, traces: OnTheirWay) -> Any:
    @functools.wraps(original)
    def log_assessment(self: Any, trace_id: str, assessment: Any) -> Any:
        if trace_id and trace_id != mlflow.get_active_trace_id():
            noted = traces.note(self.tracking_uri, trace_id, assessment)
            if noted is not None:
                return noted
            traces.ensure_stored(trace_id)
        return original(self, trace_id, assessment)

    return log_assessment


def _by_id(original: Any, traces: OnTheirWay, *, unless_in_memory: bool = False) -> Any:
    """Wrap a method so that it finds the traces which its arguments name."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def by_id(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_limited():  # the exporter's own requests do not wait for themselves
            for trace_id in _ids_of(signature, (self, *args), kwargs):
                if not (unless_in_memory and _is_in_memory(trace_id)):
                    traces.ensure_stored(trace_id)
            if original.__name__ == "delete_traces" and not _ids_of(signature, (self, *args), kwargs):
                traces.ensure_all_stored(self.tracking_uri)  # those of a time
        return original(self, *args, **kwargs)

    return by_id


def _ids_of(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError:  # which the original says in its own words
        return []
    named = arguments.get("trace_id") or arguments.get("trace_ids") or ()
    ids = [named] if isinstance(named, str) else list(named) if isinstance(named, (list, tuple, set)) else []
    return [each for each in ids if isinstance(each, str)]


def _over_all(original: Any, traces: OnTheirWay) -> Any:
    """Wrap a method that looks through all traces of the store."""

    @functools.wraps(original)
    def over_all(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_limited():
            traces.ensure_all_stored(self.tracking_uri)
        return original(self, *args, **kwargs)

    return over_all
