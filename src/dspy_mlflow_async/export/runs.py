"""Operations on runs: tried at once, and when the store is away queued, spooled and sent in order."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mlflow.tracking import MlflowClient

from dspy_mlflow_async.export.installation import pipeline
from dspy_mlflow_async.export.items import RunItem
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.seams import mlflow_export as seam

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, RunTag

# What MLflow takes in one `log_batch` (mlflow.utils.validation).
_MOST_METRICS, _MOST_OTHERS = 900, 100


class RunWriter:
    """Writes to the runs of one store, by id. Its methods return whether the store has it now, and never raise."""

    def __init__(self, tracking_uri: str | None) -> None:
        self._uri = seam.resolve_tracking_uri(tracking_uri)

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
    ) -> bool:
        """Log any number of metrics, params and tags."""
        parts = [
            RunItem(key=run_id, size=500, metrics=m, params=p, tags=t, workspace=seam.request_workspace())
            for m, p, t in _parts(list(metrics), list(params), list(tags))
        ]
        return [self._do(part) for part in parts].count(False) == 0

    def artifact(self, run_id: str, path: str, content: bytes) -> bool:
        """Store an artifact.

        Args:
            run_id: The run.
            path: Where it goes in the run's artifacts, with "/" between folders.
            content: The whole of it.
        """
        return self._do(
            RunItem(key=run_id, size=len(content) + 500, path=path, content=content, workspace=seam.request_workspace())
        )

    def end(self, run_id: str, status: str, end_time_ms: int) -> bool:
        """End a run.

        Args:
            run_id: The run.
            status: MLflow's word for it: "FINISHED", "FAILED", "KILLED".
            end_time_ms: Milliseconds since the epoch.
        """
        return self._do(RunItem(key=run_id, status=status, end_time_ms=end_time_ms, workspace=seam.request_workspace()))

    def _do(self, item: RunItem) -> bool:
        return bool(self._try(item))

    @guarded
    def _try(self, item: RunItem) -> bool:
        return pipeline().current().queue(self._uri).write_now(item)


def run_writer(tracking_uri: str | None) -> RunWriter:
    """A writer for the runs of a store.

    Args:
        tracking_uri: The store; None for the one that MLflow uses now.
    """
    return RunWriter(tracking_uri)


def _parts(metrics: list[Any], params: list[Any], tags: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    while metrics or params or tags:
        yield metrics[:_MOST_METRICS], params[:_MOST_OTHERS], tags[:_MOST_OTHERS]
        metrics, params, tags = metrics[_MOST_METRICS:], params[_MOST_OTHERS:], tags[_MOST_OTHERS:]


def write_run_item(uri: str, item: RunItem) -> None:
    """Write one operation. Doing so twice leaves the run as doing it once."""
    client = MlflowClient(tracking_uri=uri)
    if item.metrics or item.params or item.tags:
        client.log_batch(item.key, list(item.metrics), list(item.params), list(item.tags))
    if item.path is not None:
        _write_artifact(client, item.key, item.path, item.content)
    if item.status is not None:
        client.set_terminated(item.key, item.status, item.end_time_ms)


def _write_artifact(client: MlflowClient, run_id: str, path: str, content: bytes) -> None:
    target = PurePosixPath(path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / target.name
        file.write_bytes(content)
        parent = str(target.parent)
        client.log_artifact(run_id, str(file), artifact_path=None if parent == "." else parent)
