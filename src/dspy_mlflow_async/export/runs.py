"""Operations on MLflow runs: queued like traces, and brought to the store together and at once where somebody waits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from dspy_mlflow_async.export.installation import pipeline
from dspy_mlflow_async.export.operations import Creation, RunOperation, WriteStatus
from dspy_mlflow_async.export.write import late_runs
from dspy_mlflow_async.export.write.errors import Verdict, classify
from dspy_mlflow_async.export.write.run_operations import parts
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.seams import mlflow_store
from dspy_mlflow_async.workers import Discard, call_with_timeout

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag

    from dspy_mlflow_async.export.queue.store_queue import StoreQueue

ASK_SECONDS = 10.0  # a busy machine must not be taken for a store that is away

_Answer = TypeVar("_Answer")


class RunWriter:
    """Writes to the runs of one store, by id, in the background. Its methods never raise."""

    def __init__(self, tracking_uri: str | None) -> None:
        self._uri = mlflow_store.resolve_tracking_uri(tracking_uri)
        self._write_status = WriteStatus()

    def create(self, stand_in: str, creation: Creation) -> None:
        """Create a run as soon as the store does that; the other methods take ``stand_in`` for its id at once."""
        self._put(RunOperation(key=stand_in, size=1000, creation=creation))

    def keep(self, stand_in: str, run: Run, creation: Creation) -> None:
        """Note that a run is there under a stand-in id; one that was created a second time is deleted.

        By the queue, which tries again: a busy database may refuse a deletion.
        """
        if late_runs.keep(stand_in, run) is not run:
            self.create(stand_in, creation)

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
            self._put(RunOperation(key=run_id, size=500, metrics=m, params=p, tags=t))

    def dataset(self, run_id: str, dataset: DatasetInput) -> None:
        """Note a data set as an input of a run."""
        self._put(RunOperation(key=run_id, size=len(dataset.dataset.schema or "") + 1000, datasets=[dataset]))

    def artifact(self, run_id: str, path: str, content: bytes) -> None:
        """Store an artifact.

        Args:
            run_id: The run.
            path: Where it goes in the run's artifacts, with "/" between folders.
            content: The whole of it.
        """
        self._put(RunOperation(key=run_id, size=len(content) + 500, path=path, content=content))

    def end(self, run_id: str, status: str, end_time_ms: int) -> None:
        """End a run.

        Args:
            run_id: The run.
            status: MLflow's word for it: "FINISHED", "FAILED", "KILLED".
            end_time_ms: Milliseconds since the epoch.
        """
        self._put(RunOperation(key=run_id, status=status, end_time_ms=end_time_ms))

    def settle(self, run_id: str, timeout: float = 10.0) -> bool:
        """Bring to the store what waits of a run, in as few requests as it takes, ahead of all else that waits.

        Args:
            run_id: The run.
            timeout: Seconds to wait for what somebody else is writing of it just now. Each request is bounded, too.

        Returns:
            Whether the store has everything that was logged into the run by this writer.
        """
        return bool(self._settle(run_id, timeout)) and not self._write_status.was_refused

    def _queue(self) -> StoreQueue:
        return pipeline().current().queue(self._uri)

    @guarded
    def _put(self, operation: RunOperation) -> None:
        operation.workspace, operation.write_status = mlflow_store.request_workspace(), self._write_status
        self._queue().put(operation)

    @guarded
    def _settle(self, run_id: str, timeout: float) -> bool:
        is_stored = self._queue().synchronous.write_waiting(run_id, timeout)
        if is_stored and late_runs.is_stand_in(run_id) and late_runs.known(run_id) is None:
            with contextlib.suppress(late_runs.RunNotThereError):  # another process has created it, or it was refused
                late_runs.real_id(mlflow_store.client_of(self._uri), run_id)
        return is_stored


def create_run(creation: Creation, stand_in: str | None = None) -> Run:
    """Create a run in MLflow's current store, now, in this thread.

    Args:
        creation: What it is created with.
        stand_in: The id that stands for it where nobody waits for the answer any more.

    Raises:
        Exception: Where the store refuses or is not there.
    """
    return late_runs.create_run(mlflow_store.client_of(mlflow_store.resolve_tracking_uri()), creation, stand_in)


def run_writer(tracking_uri: str | None) -> RunWriter:
    """Return a writer for the runs of a store.

    Args:
        tracking_uri: The store; None for the one that MLflow uses now.
    """
    return RunWriter(tracking_uri)


def ask(
    question: Callable[[], _Answer], discard: Discard[_Answer] | None = None, timeout: float | None = None
) -> _Answer:
    """Call ``question``, which talks to MLflow's current store, for a bounded time, in a thread.

    MLflow's own retries can take minutes: an evaluation neither fails nor waits for a store that is away.

    Args:
        question: What to call.
        discard: Called, in that thread, with an answer that came too late, and with why nobody waited any more.
        timeout: Seconds to wait; ``ASK_SECONDS`` by default.

    Raises:
        TimeoutError: Where there is no answer in time, or the queue of this store knows that it gives none now.
        Exception: What ``question`` raised.
    """
    availability = pipeline().current().queue(mlflow_store.resolve_tracking_uri()).availability
    if not availability.may_wait():
        raise TimeoutError("the store is away")
    begun = time.monotonic()
    try:
        return call_with_timeout(question, ASK_SECONDS if timeout is None else timeout, discard)
    except Exception as error:
        if not is_refusal(error):
            availability.note_wait(begun)
        raise


def is_refusal(error: BaseException) -> bool:
    """Return whether an error of the store says that it will never do what it was asked for."""
    return classify(error) is Verdict.REFUSED


def real_id(run_id: str) -> str:
    """Return the id in the current store of the run that a stand-in id stands for; any other id as it is.

    Raises:
        LookupError: Where the run has not been created yet.
    """
    return late_runs.real_id(mlflow_store.client_of(mlflow_store.resolve_tracking_uri()), run_id)
