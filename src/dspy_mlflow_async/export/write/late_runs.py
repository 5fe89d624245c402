"""Creation of runs, also of those that have to wait: a stand-in id until the store has made them, then the real one."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlflow.entities import LifecycleStage, Run, ViewType
from mlflow.tracing.constant import TraceMetadataKey

from dspy_mlflow_async.export.operations import Creation, TraceOperation, TraceUpdate
from dspy_mlflow_async.seams import mlflow_experiment
from dspy_mlflow_async.seams.mlflow_client import MlflowClient

PREFIX = "pending-"
# With the stand-in id. On a run: finds one whose creation was not answered; MLflow's UI hides tags of this prefix.
CREATION_TAG = "mlflow.dspyMlflowAsync.creation"
# On a trace that was stored before its run was.
WAITING_TRACE = "dspy_mlflow_async.pending_run"
_PARENT_TAG = "mlflow.parentRunId"

_runs: dict[str, Run] = {}  # by stand-in id; single operations on a dict are atomic


class RunNotThereError(LookupError):
    """Error of a run that has not been created yet."""


def new_id() -> str:
    """Return a stand-in id."""
    return f"{PREFIX}{uuid.uuid4().hex}"


def is_stand_in(run_id: Any) -> bool:
    """Return whether an id stands for a run that was not there when it was given."""
    return isinstance(run_id, str) and run_id.startswith(PREFIX)


def known(stand_in: str) -> Run | None:
    """Return the run that a stand-in id has become, as far as this process knows."""
    return _runs.get(stand_in)


def keep(stand_in: str, run: Run) -> Run:
    """Note what a stand-in id has become, unless it is known.

    Returns:
        The run that counts; any other was made a second time.
    """
    return _runs.setdefault(stand_in, run)


def create_run(client: MlflowClient, creation: Creation, stand_in: str | None = None) -> Run:
    """Create a run, in whichever thread: all of ours are made here.

    Args:
        client: MLflow's client of the store.
        creation: What it is created with.
        stand_in: Noted on the run, so that another attempt finds it whose answer was lost; None where there is none.
    """
    return client.create_run(
        _experiment_of(client, creation),
        start_time=creation.start_time_ms,
        tags=creation.tags if stand_in is None else creation.tags | {CREATION_TAG: stand_in},
        run_name=creation.name,
    )


def create(client: MlflowClient, stand_in: str, creation: Creation) -> tuple[str, list[str]]:
    """Create a run that had to wait, and give it the children that were there before it.

    It is not created where an earlier attempt has done so, and what was made besides is deleted.

    Returns:
        Its id, and the traces that were stored before it and belong to it.

    Raises:
        RunNotThereError: Where its parent is not there yet.
    """
    # MLflow itself sends a request again whose answer was lost, so that there may be several.
    found = _search(client, _condition(stand_in))
    run = known(stand_in) or (found[0] if found else None)
    if run is None:
        if (parent := creation.tags.get(_PARENT_TAG)) is not None:
            creation = replace(creation, tags=creation.tags | {_PARENT_TAG: real_id(client, parent)})
        run = create_run(client, creation, stand_in)
        found.append(run)
    run = keep(stand_in, run)
    for other in found:
        if other.info.run_id != run.info.run_id and other.info.lifecycle_stage == LifecycleStage.ACTIVE:
            client.delete_run(other.info.run_id)
    return str(run.info.run_id), _adopt(client, stand_in, run)


def real_id(client: MlflowClient, run_id: str) -> str:
    """Return the store's id of a run.

    Raises:
        RunNotThereError: Where it has not been created yet.
    """
    if not is_stand_in(run_id):
        return run_id
    run = known(run_id)
    if run is None and (run := _find(client, run_id)) is not None:
        run = _runs.setdefault(run_id, run)
    if run is None:
        raise RunNotThereError(f"the run {run_id} has not been created yet")
    return str(run.info.run_id)


def name_run(client: MlflowClient, metadata: dict[str, str]) -> None:
    """Put the store's id of its run into a trace's metadata; while there is none, a note by which it is found later."""
    stand_in = metadata.get(WAITING_TRACE) or metadata.get(TraceMetadataKey.SOURCE_RUN)
    if stand_in is None or not is_stand_in(stand_in):
        return
    try:
        metadata[TraceMetadataKey.SOURCE_RUN] = real_id(client, stand_in)
        metadata.pop(WAITING_TRACE, None)
    except RunNotThereError:
        metadata.pop(TraceMetadataKey.SOURCE_RUN, None)
        metadata[WAITING_TRACE] = stand_in


def link_since(client: MlflowClient, operation: TraceOperation, link: Callable[[str, str], None]) -> None:
    """Give a trace that has been stored without its run that run, where it has been created meanwhile.

    Its creator looks for such traces after the run is known, and this is asked after the trace is stored: one of the
    two finds the other.
    """
    try:
        run_id = real_id(client, operation.info.trace_metadata[WAITING_TRACE])
    except RunNotThereError:
        return
    link(operation.key, run_id)


def has_stand_in(operation: Any) -> bool:
    """Return whether the metadata of a trace names a run by a stand-in id."""
    if isinstance(operation, TraceOperation):
        metadata = operation.info.trace_metadata
    else:
        metadata = operation.metadata if isinstance(operation, TraceUpdate) else {}
    return WAITING_TRACE in metadata or is_stand_in(metadata.get(TraceMetadataKey.SOURCE_RUN))


def _find(client: MlflowClient, stand_in: str) -> Run | None:
    """Look in the store for the run that an attempt has created whose answer was lost."""
    found = _search(client, _condition(stand_in))
    return found[0] if found else None


def _condition(stand_in: str) -> str:
    return f"tags.`{CREATION_TAG}` = '{stand_in}'"


def _search(client: MlflowClient, condition: str) -> list[Run]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments(view_type=ViewType.ALL)]
    return list(client.search_runs(experiments, condition, run_view_type=ViewType.ALL, max_results=1000))


def _experiment_of(client: MlflowClient, creation: Creation) -> str:
    if creation.experiment_name is not None:
        return mlflow_experiment.look_up(client, creation.experiment_name)
    return creation.experiment_id or mlflow_experiment.default_experiment_id() or "0"


def _adopt(client: MlflowClient, stand_in: str, run: Run) -> list[str]:
    for child in _search(client, f"tags.`{_PARENT_TAG}` = '{stand_in}'"):
        client.set_tag(child.info.run_id, _PARENT_TAG, run.info.run_id)
    trace_ids: list[str] = []
    token = None
    while True:
        found = client.search_traces(
            locations=[run.info.experiment_id],
            filter_string=f"metadata.`{WAITING_TRACE}` = '{stand_in}'",
            page_token=token,
            include_spans=False,
        )
        trace_ids += [trace.info.trace_id for trace in found]
        token = found.token
        if not token:
            return trace_ids
