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
    uri: str, items: Sequence[RunOperation], statuses: list[mlflow_http.Status], link: Callable[[str, str], None]
) -> list[Outcome]:
    """Write operations on runs, those on one run in order and in as few requests as they take.

    Once the store is found to be away nothing further is tried.

    Args:
        uri: The store.
        items: The operations.
        statuses: Where the HTTP statuses are noted.
        link: Called with a trace and its run, where the trace was stored before the run was created.

    Returns:
        An outcome for each operation.
    """
    runs: dict[tuple[str, str | None], list[RunOperation]] = {}
    for item in items:
        runs.setdefault((item.key, item.workspace), []).append(item)
    outcomes: list[Outcome] = []
    for (_, workspace), operations in runs.items():
        with mlflow_store.workspace_scope(workspace):
            _write_run(uri, operations, statuses, outcomes, link)
    return outcomes


def _write_run(
    uri: str,
    items: Sequence[RunOperation],
    statuses: list[mlflow_http.Status],
    outcomes: list[Outcome],
    link: Callable[[str, str], None],
) -> None:
    """Write operations on one run: it, values, data sets, artifacts, then its end. What worked is not repeated."""

    def write(how: Callable[[MlflowClient, str, Sequence[RunOperation]], None], some: Sequence[RunOperation]) -> None:
        waiting = [outcome for item in some if (outcome := blocked_by(item, outcomes)) is not None]
        if waiting:  # all of them: they are operations on one run
            outcomes.extend(waiting)
            return
        statuses.clear()
        try:
            for item in some:
                prepare.prepare(item)
            client = mlflow_store.client_of(uri)  # which opens a store that is not open yet
            how(client, items[0].key if how is create else late_runs.real_id(client, items[0].key), some)
        except Exception as error:  # noqa: BLE001 - judged
            verdict = classify(error, statuses)
            if len(some) == 1 or verdict is Verdict.AWAY:
                outcomes.extend(Outcome(item, verdict, error) for item in some)
                return
            for item in some:  # one of them is to blame
                write(how, [item])
            return
        outcomes.extend(Outcome(item, Verdict.STORED) for item in some)

    create = functools.partial(_create, link=link)
    for how, some in (
        (create, [item for item in items if item.creation is not None]),
        (_log_values, [item for item in items if _is_values(item)]),
        (_log_datasets, [item for item in items if item.datasets]),
        (_log_artifacts, [item for item in items if item.path is not None]),
        (_end, [item for item in items if item.status is not None]),
    ):
        if some:
            write(how, some)


def _is_values(item: RunOperation) -> bool:
    return item.creation is None and item.path is None and item.status is None and not item.datasets


def _create(
    client: MlflowClient, stand_in: str, items: Sequence[RunOperation], *, link: Callable[[str, str], None]
) -> None:
    for item in items:
        if item.creation is not None:
            run_id, trace_ids = late_runs.create(client, stand_in, item.creation)
            for trace_id in trace_ids:
                link(trace_id, run_id)


def _log_values(client: MlflowClient, run_id: str, items: Sequence[RunOperation]) -> None:
    # The last word on a tag counts. MLflow takes no param twice, and says so.
    tags = {tag.key: tag for item in items for tag in item.tags}
    values = [value for item in items for value in item.metrics], [param for item in items for param in item.params]
    for metrics, params, some_tags in parts(*values, list(tags.values())):
        client.log_batch(run_id, metrics, params, some_tags)


def _log_datasets(client: MlflowClient, run_id: str, items: Sequence[RunOperation]) -> None:
    client.log_inputs(run_id, [dataset for item in items for dataset in item.datasets])


def _log_artifacts(client: MlflowClient, run_id: str, items: Sequence[RunOperation]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for item in items:
            file = Path(folder) / str(item.path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(item.content)
        client.log_artifacts(run_id, folder)


def _end(client: MlflowClient, run_id: str, items: Sequence[RunOperation]) -> None:
    for item in items:
        client.set_terminated(run_id, item.status, item.end_time_ms)


def parts(metrics: list[Any], params: list[Any], tags: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Split any number of values into portions that MLflow takes in one ``log_batch``."""
    while metrics or params or tags:
        yield metrics[:_MOST_METRICS], params[:_MOST_OTHERS], tags[:_MOST_OTHERS]
        metrics, params, tags = metrics[_MOST_METRICS:], params[_MOST_OTHERS:], tags[_MOST_OTHERS:]
