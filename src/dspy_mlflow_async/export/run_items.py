"""Writes operations on runs, those on one run in as few requests as they take."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from dspy_mlflow_async.export import prepare
from dspy_mlflow_async.export.items import RunItem
from dspy_mlflow_async.export.retry import Outcome, Verdict, judge
from dspy_mlflow_async.seams import mlflow_store

# What MLflow takes in one `log_batch` (mlflow.utils.validation).
_MOST_METRICS, _MOST_OTHERS = 800, 100  # 1,000 together


def write_runs(uri: str, items: Sequence[RunItem], statuses: list[int]) -> list[Outcome]:
    """Write operations on runs, those on one run in order and in as few requests as they take.

    Once the store is found to be away nothing further is tried.

    Args:
        uri: The store.
        items: The operations.
        statuses: Where the HTTP statuses are noted.

    Returns:
        An outcome for each item.
    """
    runs: dict[str, list[RunItem]] = {}
    for item in items:
        runs.setdefault(item.key, []).append(item)
    outcomes: list[Outcome] = []
    for operations in runs.values():
        if outcomes and outcomes[-1].verdict is Verdict.AWAY:
            outcomes += [Outcome(item, Verdict.AWAY, outcomes[-1].error) for item in operations]
        else:
            outcomes += _write_run(uri, operations, statuses)
    return outcomes


def _write_run(uri: str, items: Sequence[RunItem], statuses: list[int]) -> list[Outcome]:
    statuses.clear()
    try:
        with mlflow_store.workspace_scope(items[0].workspace):
            for item in items:
                prepare.prepare(item)
            _write_together(uri, items)
    except Exception as error:  # noqa: BLE001 - judged
        verdict = judge(error, statuses)
        if len(items) == 1 or verdict is Verdict.AWAY:
            return [Outcome(item, verdict, error) for item in items]
        # One of them is to blame, which shows when they are written one by one.
        outcomes: list[Outcome] = []
        for item in items:
            if outcomes and outcomes[-1].verdict is Verdict.AWAY:
                outcomes.append(Outcome(item, Verdict.AWAY, outcomes[-1].error))
            else:
                outcomes += _write_run(uri, [item], statuses)
        return outcomes
    return [Outcome(item, Verdict.STORED) for item in items]


def _write_together(uri: str, items: Sequence[RunItem]) -> None:
    """Write operations on one run, in order, in as few requests as they take.

    Doing so twice leaves the run as doing it once.
    """
    client, run_id = MlflowClient(tracking_uri=uri), items[0].key
    # The last word on a tag counts. MLflow takes no param twice, and says so.
    tags = {tag.key: tag for item in items for tag in item.tags}
    values = [value for item in items for value in item.metrics], [param for item in items for param in item.params]
    for metrics, params, some_tags in parts(*values, list(tags.values())):
        client.log_batch(run_id, metrics, params, some_tags)
    _write_artifacts(client, run_id, {item.path: item.content for item in items if item.path is not None})
    for item in items:
        if item.status is not None:
            client.set_terminated(run_id, item.status, item.end_time_ms)


def _write_artifacts(client: MlflowClient, run_id: str, artifacts: Mapping[str, bytes]) -> None:
    if not artifacts:
        return
    with tempfile.TemporaryDirectory() as folder:
        for path, content in artifacts.items():
            file = Path(folder) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        client.log_artifacts(run_id, folder)


def parts(metrics: list[Any], params: list[Any], tags: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Any number of values in portions that MLflow takes in one ``log_batch``."""
    while metrics or params or tags:
        yield metrics[:_MOST_METRICS], params[:_MOST_OTHERS], tags[:_MOST_OTHERS]
        metrics, params, tags = metrics[_MOST_METRICS:], params[_MOST_OTHERS:], tags[_MOST_OTHERS:]
