"""Operations on runs: queued like traces, and brought to the store together and at once where somebody waits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.tracking import MlflowClient

from dspy_mlflow_async.export.installation import pipeline
from dspy_mlflow_async.export.items import Fate, RunItem
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.seams import mlflow_export as seam

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, RunTag

# What MLflow takes in one `log_batch` (mlflow.utils.validation).
_MOST_METRICS, _MOST_OTHERS = 800, 100  # 1,000 together


class RunWriter:
    """Writes to the runs of one store, by id, in the background. Its methods never raise."""

    def __init__(self, tracking_uri: str | None) -> None:
        self._uri = seam.resolve_tracking_uri(tracking_uri)
        self._fate = Fate()

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
    ) -> None:
        """Log any number of metrics, params and tags."""
        for m, p, t in _parts(list(metrics), list(params), list(tags)):
            self._put(RunItem(key=run_id, size=500, metrics=m, params=p, tags=t))

    def artifact(self, run_id: str, path: str, content: bytes) -> None:
        """Store an artifact.

        Args:
            run_id: The run.
            path: Where it goes in the run's artifacts, with "/" between folders.
            content: The whole of it.
        """
        self._put(RunItem(key=run_id, size=len(content) + 500, path=path, content=content))

    def end(self, run_id: str, status: str, end_time_ms: int) -> None:
        """End a run.

        Args:
            run_id: The run.
            status: MLflow's word for it: "FINISHED", "FAILED", "KILLED".
            end_time_ms: Milliseconds since the epoch.
        """
        self._put(RunItem(key=run_id, status=status, end_time_ms=end_time_ms))

    def settle(self, run_id: str, timeout: float = 10.0) -> bool:
        """Bring to the store what waits of a run, in as few requests as it takes, ahead of all else that waits.

        Args:
            run_id: The run.
            timeout: Seconds to wait for what somebody else is writing of it just now. Each request is bounded, too.

        Returns:
            Whether the store has everything that was logged into the run by this writer.
        """
        return bool(self._settle(run_id, timeout)) and not self._fate.was_refused

    @guarded
    def _put(self, item: RunItem) -> None:
        item.workspace, item.fate = seam.request_workspace(), self._fate
        pipeline().current().queue(self._uri).put(item)

    @guarded
    def _settle(self, run_id: str, timeout: float) -> bool:
        return pipeline().current().queue(self._uri).write_waiting(run_id, timeout)


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


def write_run_items(uri: str, items: Sequence[RunItem]) -> None:
    """Write operations on one run, in order, in as few requests as they take.

    Doing so twice leaves the run as doing it once.
    """
    client, run_id = MlflowClient(tracking_uri=uri), items[0].key
    # The last word on a tag counts. MLflow takes no param twice, and says so.
    tags = {tag.key: tag for item in items for tag in item.tags}
    values = [value for item in items for value in item.metrics], [param for item in items for param in item.params]
    for metrics, params, some_tags in _parts(*values, list(tags.values())):
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
