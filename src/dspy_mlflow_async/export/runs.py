"""Operations on runs: queued like traces, and brought to the store together and at once where somebody waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dspy_mlflow_async.export.installation import pipeline
from dspy_mlflow_async.export.items import Fate, RunItem
from dspy_mlflow_async.export.run_items import parts
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.seams import mlflow_store

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, RunTag


class RunWriter:
    """Writes to the runs of one store, by id, in the background. Its methods never raise."""

    def __init__(self, tracking_uri: str | None) -> None:
        self._uri = mlflow_store.resolve_tracking_uri(tracking_uri)
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
        for m, p, t in parts(list(metrics), list(params), list(tags)):
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
        item.workspace, item.fate = mlflow_store.request_workspace(), self._fate
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
