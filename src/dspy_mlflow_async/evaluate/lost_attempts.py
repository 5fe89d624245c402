"""Marks on the traces of examples that other processes evaluate: which example, which attempt, and which are lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dspy_mlflow_async.remote.workers import Loss
from dspy_mlflow_async.runs.handle import RunHandle
from dspy_mlflow_async.seams import mlflow_store
from dspy_mlflow_async.seams.mlflow_experiment import experiment_in_force

# Tags of the traces that an example makes in a worker: of which evaluation, which example it is, which attempt at it.
EVALUATION_TAG = "dspy_mlflow_async.evaluation"
EXAMPLE_TAG, ATTEMPT_TAG = "dspy_mlflow_async.example", "dspy_mlflow_async.attempt"
# On those of an attempt that was lost with its process: another one counts.
LOST_TAG = "dspy_mlflow_async.lost"
_PAGE = 500  # traces read at once


def mark_losses(evaluation: str, losses: Sequence[tuple[int, Loss]]) -> None:
    """Mark the traces of attempts that were lost with their process, as far as they have arrived.

    Args:
        evaluation: What the evaluation's traces are tagged with.
        losses: The losses, each with the example's place.
    """
    client = mlflow_store.client_of(mlflow_store.resolve_tracking_uri())
    experiment_id = experiment_in_force(mlflow_store.resolve_tracking_uri())
    for index, loss in losses:
        wanted = {EVALUATION_TAG: evaluation, EXAMPLE_TAG: str(index), ATTEMPT_TAG: str(loss.attempt)}
        condition = " AND ".join(f"tags.`{tag}` = '{value}'" for tag, value in wanted.items())
        for trace in client.search_traces(locations=[experiment_id], filter_string=condition, include_spans=False):
            client.set_trace_tag(trace.info.trace_id, LOST_TAG, loss.reason)


def mark_unfinished(run: RunHandle, counted: Mapping[int, str | None]) -> None:
    """Mark what an evaluation that was killed had under way, and a resume has done again.

    Args:
        run: The run of both.
        counted: The traces of the examples' outcomes, by place.
    """
    client = mlflow_store.client_of(mlflow_store.resolve_tracking_uri())
    condition = f"metadata.`mlflow.sourceRun` = '{run.run_id}'"
    attempts: dict[tuple[str, str, str], list[str]] = {}  # a metric's LM calls are traces of the attempt, too
    token = None
    while True:
        page = client.search_traces(
            locations=[run.experiment_id],
            filter_string=condition,
            include_spans=False,
            max_results=_PAGE,
            page_token=token,
        )
        for info in (trace.info for trace in page):
            if EXAMPLE_TAG in info.tags and LOST_TAG not in info.tags:
                attempt = info.tags.get(EVALUATION_TAG, ""), info.tags[EXAMPLE_TAG], info.tags.get(ATTEMPT_TAG, "")
                attempts.setdefault(attempt, []).append(info.trace_id)
        if not (token := page.token):
            break
    is_whole = {index for (_, index, _), ids in attempts.items() if counted.get(int(index)) in ids}
    for (_, index, _), ids in attempts.items():
        if index in is_whole and counted[int(index)] not in ids:
            for trace_id in ids:
                client.set_trace_tag(trace_id, LOST_TAG, "its outcome has not come home: the evaluation was killed")
