"""Writing of whole traces that a server has received, many in one transaction: as rows where that is proved."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from dspy_mlflow_async.export.operations import TraceOperation
from dspy_mlflow_async.export.write.batches import by_experiment
from dspy_mlflow_async.export.write.row_writer import row_writer
from dspy_mlflow_async.seams import mlflow_store

logger = logging.getLogger("dspy_mlflow_async")


def store_traces(store: Any, experiment_id: str, infos: Sequence[Any], spans: Sequence[Any]) -> list[str]:
    """Store those of some traces that are not there yet, each with all of its spans, or not at all.

    Args:
        store: MLflow's store of the server.
        experiment_id: The experiment that the request is for. Whoever may write into it may not into another.
        infos: What `start_trace` would be told of each.
        spans: The spans of all of them.

    Returns:
        The ids of those that are stored. The client sends the others as MLflow does, and hears what is wrong.
    """
    operations = _operations(experiment_id, infos, spans)
    places: dict[int, str] = {}
    try:
        places = row_writer(store.db_uri).write(store, operations, {}, may_try=True)
    except Exception:
        logger.debug("dspy-mlflow-async: traces were not written as rows", exc_info=True)
    left = [operation for operation in operations if id(operation) not in places]
    return [operation.key for operation in operations if id(operation) in places] + [
        operation.key for operation in _by_mlflow(store, left)
    ]


def _operations(experiment_id: str, infos: Sequence[Any], spans: Sequence[Any]) -> list[TraceOperation]:
    grouped: dict[str, list[Any]] = {}
    for span in spans:
        grouped.setdefault(span.trace_id, []).append(span)
    return [
        TraceOperation(
            key=info.trace_id,
            info=info,
            spans=grouped.pop(info.trace_id),
            experiment_id=experiment_id,
            prepared=True,
        )
        for info in infos
        if info.experiment_id == experiment_id and info.trace_id in grouped
    ]


def _by_mlflow(store: Any, operations: Sequence[TraceOperation]) -> list[TraceOperation]:
    """Let MLflow's functions write traces in one transaction, or in one each, and return those that are stored."""
    if not operations:
        return []
    try:
        with mlflow_store.one_transaction(SimpleNamespace(store=store)) as view:
            if view is None:
                return []
            for operation in operations:
                view.start_trace(operation.info)
            for experiment, some in by_experiment(operations):
                view.log_spans(experiment, some)
    except Exception:  # noqa: BLE001 - one of them is refused, or there already
        return (
            []
            if len(operations) == 1
            else [each for operation in operations for each in _by_mlflow(store, [operation])]
        )
    return list(operations)
