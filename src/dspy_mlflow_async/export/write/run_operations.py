"""Writes operations on runs, those on one run in as few requests as they take."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dspy_mlflow_async.export.operations import RunOperation
from dspy_mlflow_async.export.write import late_runs, prepare
from dspy_mlflow_async.export.write.errors import Outcome, Verdict, blocked_by, classify
from dspy_mlflow_async.seams import mlflow_http, mlflow_store
from dspy_mlflow_async.seams.mlflow_client import MlflowClient

# What MLflow takes in one `log_batch` (mlflow.utils.validation).
_MOST_METRICS, _MOST_OTHERS = 800, 100  # 1,000 together


def write_runs(
    uri: str, operations: Sequence[RunOperation], statuses: list[mlflow_http.Status], link: Callable[[str, str], None]
) -> list[Outcome]:
    """Write operations on runs, those on one run in order and in as few requests as they take.

    Once the store is found to be away nothing further is tried.

    Args:
        uri: The store.
        operations: The operations.
        statuses: Where the HTTP statuses are noted.
        link: Called with a trace and its run, where the trace was stored before the run was created.

    Returns:
        An outcome for each operation.
    """
    runs: dict[tuple[str, str | None], list[RunOperation]] = {}
    for operation in operations:
        runs.setdefault((operation.key, operation.workspace), []).append(operation)
    outcomes: list[Outcome] = []
    for (_, workspace), of_run in runs.items():
        with mlflow_store.workspace_scope(workspace):
            _write_run(uri, of_run, statuses, outcomes, link)
    return outcomes


def _write_run(
    uri: str,
    operations: Sequence[RunOperation],
    statuses: list[mlflow_http.Status],
    outcomes: list[Outcome],
    link: Callable[[str, str], None],
) -> None:
    """Write operations on one run: it, values, data sets, artifacts, then its end. What worked is not repeated."""

    def write(how: Callable[[MlflowClient, str, Sequence[RunOperation]], None], some: Sequence[RunOperation]) -> None:
        waiting = [outcome for operation in some if (outcome := blocked_by(operation, outcomes)) is not None]
        if waiting:  # all of them: they are operations on one run
            outcomes.extend(waiting)
            return
        statuses.clear()
        try:
            for operation in some:
                prepare.prepare(operation)
            client = mlflow_store.client_of(uri)  # which opens a store that is not open yet
            how(client, operations[0].key if how is create else late_runs.real_id(client, operations[0].key), some)
        except Exception as error:  # noqa: BLE001 - judged
            verdict = classify(error, statuses)
            if len(some) == 1 or verdict is Verdict.AWAY:
                outcomes.extend(Outcome(operation, verdict, error) for operation in some)
                return
            for operation in some:  # one of them is to blame
                write(how, [operation])
            return
        outcomes.extend(Outcome(operation, Verdict.STORED) for operation in some)

    create = functools.partial(_create, link=link)
    for how, some in (
        (create, [operation for operation in operations if operation.creation is not None]),
        (_log_values, [operation for operation in operations if _is_values(operation)]),
        (_log_datasets, [operation for operation in operations if operation.datasets]),
        (_log_artifacts, [operation for operation in operations if operation.path is not None]),
        (_end, [operation for operation in operations if operation.status is not None]),
    ):
        if some:
            write(how, some)


def _is_values(operation: RunOperation) -> bool:
    return operation.creation is None and operation.path is None and operation.status is None and not operation.datasets


def _create(
    client: MlflowClient, stand_in: str, operations: Sequence[RunOperation], *, link: Callable[[str, str], None]
) -> None:
    for operation in operations:
        if operation.creation is not None:
            run_id, trace_ids = late_runs.create(client, stand_in, operation.creation)
            for trace_id in trace_ids:
                link(trace_id, run_id)


def _log_values(client: MlflowClient, run_id: str, operations: Sequence[RunOperation]) -> None:
    # The last word on a tag counts. MLflow takes no param twice, and says so.
    tags = {tag.key: tag for operation in operations for tag in operation.tags}
    values = (
        [value for operation in operations for value in operation.metrics],
        [param for operation in operations for param in operation.params],
    )
    for metrics, params, some_tags in parts(*values, list(tags.values())):
        client.log_batch(run_id, metrics, params, some_tags)


def _log_datasets(client: MlflowClient, run_id: str, operations: Sequence[RunOperation]) -> None:
    client.log_inputs(run_id, [dataset for operation in operations for dataset in operation.datasets])


def _log_artifacts(client: MlflowClient, run_id: str, operations: Sequence[RunOperation]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for operation in operations:
            file = Path(folder) / str(operation.path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(operation.content)
        client.log_artifacts(run_id, folder)


def _end(client: MlflowClient, run_id: str, operations: Sequence[RunOperation]) -> None:
    for operation in operations:
        client.set_terminated(run_id, operation.status, operation.end_time_ms)


def parts(metrics: list[Any], params: list[Any], tags: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Split any number of values into portions that MLflow takes in one ``log_batch``."""
    while metrics or params or tags:
        yield metrics[:_MOST_METRICS], params[:_MOST_OTHERS], tags[:_MOST_OTHERS]
        metrics, params, tags = metrics[_MOST_METRICS:], params[_MOST_OTHERS:], tags[_MOST_OTHERS:]
