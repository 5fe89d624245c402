"""Writes what belongs to one trace or run together; operations on a run in as few requests as they take."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from dspy_mlflow_async.export import prepare
from dspy_mlflow_async.export.items import Item, RunItem
from dspy_mlflow_async.export.retry import Verdict, judge
from dspy_mlflow_async.export.writer import Outcome, Writer
from dspy_mlflow_async.seams import mlflow_http, mlflow_store

# What MLflow takes in one `log_batch` (mlflow.utils.validation).
_MOST_METRICS, _MOST_OTHERS = 800, 100  # 1,000 together


class TogetherWriter(Writer):
    """A ``Writer`` that is also given all that waits of one trace or run."""

    def write_together(self, items: Sequence[Item]) -> list[Outcome]:
        """Write what belongs to one trace or run, in order; operations on a run in as few requests as they take.

        Returns:
            An outcome for each item.
        """
        if len(items) > 1:
            operations = [item for item in items if isinstance(item, RunItem)]
            outcomes = self._run_at_once(operations) if len(operations) == len(items) else None
            if outcomes is not None:
                return outcomes
        return self.write(items)

    def _run_at_once(self, items: Sequence[RunItem]) -> list[Outcome] | None:
        """All operations on one run; None where one is to blame, which shows when they are written one by one."""
        with (
            self._gate,
            mlflow_http.suppressed_instrumentation(),
            mlflow_http.limited_http(self._request_seconds) as statuses,
        ):
            try:
                for item in items:
                    prepare.prepare(item)
                with mlflow_store.workspace_scope(items[0].workspace):
                    write_run_items(self.uri, items)
            except Exception as error:  # noqa: BLE001 - judged
                is_away = judge(error, statuses) is Verdict.AWAY
                return [Outcome(item, Verdict.AWAY, error) for item in items] if is_away else None
        return [Outcome(item, Verdict.STORED) for item in items]


def write_run_items(uri: str, items: Sequence[RunItem]) -> None:
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
