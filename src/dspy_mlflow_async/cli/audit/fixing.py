"""Ends runs and traces that nobody owns any more, and changes nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from mlflow.exceptions import MlflowException

from dspy_mlflow_async.cli.audit.findings import Finding
from dspy_mlflow_async.cli.audit.store import Store
from dspy_mlflow_async.cli.audit.traces import Trace
from dspy_mlflow_async.seams.mlflow_store import end_stored_trace

_OPEN_RUN, _OPEN_TRACE = {"RUNNING", "SCHEDULED"}, "IN_PROGRESS"


def fix(store: Store, left: Sequence[Finding]) -> Iterator[tuple[Finding, str | None]]:
    """End what was left open; yield each with what kept it from being ended, or None.

    Each is looked at once more before: what has ended meanwhile, or goes on, is left as it is.
    """
    for finding in left:
        yield finding, _end(store, finding)


def _end(store: Store, finding: Finding) -> str | None:
    try:
        return _end_trace(store, finding.trace_id) if finding.trace_id else _end_run(store, finding.run_id)
    except MlflowException as error:
        return error.message


def _end_run(store: Store, run_id: str | None) -> str | None:
    if store.client.get_run(run_id).info.status not in _OPEN_RUN:
        return "it has ended meanwhile"
    store.client.set_terminated(run_id, "KILLED", int(time.time() * 1000))
    return None


def _end_trace(store: Store, trace_id: str) -> str | None:
    row = next(store.traces_by_id([trace_id]), None)
    if row is None or row.state != _OPEN_TRACE:
        return "it has ended meanwhile"
    end_stored_trace(store.uri, trace_id, max(Trace(row).last_sign_ms - row.start_ms, 0))
    return None
