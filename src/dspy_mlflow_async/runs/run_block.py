"""MLflow run for a block of sync or async code, safe in concurrent tasks, since it is active in the block's context."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from dspy_mlflow_async.runs import active_runs, selection
from dspy_mlflow_async.runs.handle import MAX_TAG_LENGTH, RunHandle, run_status
from dspy_mlflow_async.seams import mlflow_runs
from dspy_mlflow_async.spans.door import Door
from dspy_mlflow_async.workers import call_or_discard, run_uninterrupted


class run:  # noqa: N801 - used like a function
    """Open a run for a ``with`` or ``async with`` block, as a child of the run that is active there.

    Inside it, and in all tasks and DSPy worker threads that it starts, ``mlflow.active_run()`` is this run, and
    evaluations, compiles and traces belong to it. Tasks side by side do not see each other's::

        async with dma.run("nightly") as nightly:
            await program.acall(question="...")

    Args:
        name: The run's name; by default one that MLflow makes up.
        tags: Its tags.
        description: Its description.
        experiment_id: Its experiment; by default the parent's, or the active one.
        parent_run_id: The run to put it under; by default the one that is active.

    Yields:
        MLflow's ``ActiveRun``. It ends FINISHED, FAILED after an exception, KILLED after a cancellation.

    Raises:
        TypeError: For a name that is no text, and tags that are no mapping.
        MlflowException: Where the store refuses to create or end it.
        RuntimeError: Where it is entered a second time: each block is a run of its own.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        tags: Mapping[str, Any] | None = None,
        description: str | None = None,
        experiment_id: str | None = None,
        parent_run_id: str | None = None,
    ) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a text, not {name!r}")
        if tags is not None and not isinstance(tags, Mapping):
            raise TypeError(f"tags must be a mapping of names to values, not {tags!r}")
        self._name = name if name is None else Door.here().text(name, MAX_TAG_LENGTH)
        door = Door.here()
        self._tags = {key: _tag(door, key, value) for key, value in (tags or {}).items()}
        if description is not None:
            self._tags["mlflow.note.content"] = door.text(description, MAX_TAG_LENGTH)
        self._experiment_id = experiment_id
        self._parent_run_id = parent_run_id
        self._block: active_runs.Block | None = None
        self._lock = threading.Lock()  # guards the two below
        self._was_entered = False
        self._handle: RunHandle | None = None

    def __enter__(self) -> Any:
        """Create the run and make it active."""
        self._enter_once()
        return self._activate(self._create())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Make active what was before, and end the run."""
        self._deactivate()
        self._end_once(run_status(error))

    async def __aenter__(self) -> Any:
        """Create the run, without blocking the event loop, and make it active."""
        self._enter_once()
        # Cancelled meanwhile: it ends now, or when it is there.
        return self._activate(await call_or_discard(self._create, lambda handle, why: _end(handle, run_status(why))))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Make active what was before, and end the run, also when the task is being cancelled."""
        self._deactivate()
        await run_uninterrupted(self._end_once, run_status(error))

    def _enter_once(self) -> None:
        with self._lock:
            was_entered, self._was_entered = self._was_entered, True
        if was_entered:
            raise RuntimeError(f"run({self._name!r}) was entered before; each block needs a run() of its own")

    def _create(self) -> RunHandle:
        parent, tags = active_runs.innermost(), self._tags
        if self._parent_run_id is not None:
            parent, tags = None, tags | {mlflow_runs.MLFLOW_PARENT_RUN_ID: self._parent_run_id}
        creation = selection.creation_here(self._name, parent=parent, tags=tags, experiment_id=self._experiment_id)
        handle = selection.create_now(creation)
        selection.register(handle)
        return handle

    def _activate(self, handle: RunHandle) -> Any:
        self._handle, created = handle, handle.run
        active_runs.mark_opened_here(created)
        self._block = active_runs.Block(created, needs_stack=True)
        return created

    def _deactivate(self) -> None:
        if self._block is not None:
            self._block.leave()

    def _end_once(self, status: str) -> None:
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            _end(handle, status)


def _end(handle: RunHandle, status: str) -> None:
    selection.unregister(handle)
    handle.end(status)


def _tag(door: Door, key: str, value: Any) -> str:
    """Redact and bound a tag of the user's; MLflow's own keys, which point to runs and sources, stay whole."""
    return str(value) if key.startswith("mlflow.") else door.text(value, MAX_TAG_LENGTH, name=key)
