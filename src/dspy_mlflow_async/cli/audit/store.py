"""Reader of one store for an audit: experiments, runs and traces, by its tables or by MLflow's client."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from dspy_mlflow_async.reachability import missing_store
from dspy_mlflow_async.seams import mlflow_artifact_reads, mlflow_bulk_reads
from dspy_mlflow_async.seams.mlflow_bulk_reads import SOURCE_RUN, AssessmentRow, SpanRow, TraceRow
from dspy_mlflow_async.seams.mlflow_store import client_of

PARENT = "mlflow.parentRunId"
METRIC_TAG, SIZE_TAG, OPTIMIZER_TAG = "dspy.metric", "dspy.devset_size", "dspy.optimizer"
PROGRAM_TAG = "dspy.program_hash"
_PAGE, _TRACES_PER_PAGE = 1000, 100


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Facts of a run that an audit needs.

    Attributes:
        run: Its id.
        experiment_id: Its experiment's.
        name: Its name.
        status: MLflow's.
        start_ms: When it began, in milliseconds since the epoch.
        end_ms: When it ended, or None.
        parent_id: The run above it, or None.
        metric: The name of an evaluation's metric, where the tracer says it.
        size: How many examples an evaluation has, where the tracer says it.
        optimizer: The optimizer of a compile, where the tracer says it.
        metrics: The keys of its metrics.
        artifact_uri: Where its artifacts are.
    """

    run_id: str
    experiment_id: str
    name: str
    status: str
    start_ms: int
    end_ms: int | None
    parent_id: str | None
    metric: str | None
    size: int | None
    optimizer: str | None
    metrics: tuple[str, ...]
    artifact_uri: str

    @classmethod
    def of(cls, run: Any) -> RunFacts:
        """Return what is needed of MLflow's run."""
        tags, info = run.data.tags, run.info
        size = tags.get(SIZE_TAG, "")
        return cls(
            info.run_id,
            info.experiment_id,
            info.run_name or info.run_id,
            info.status,
            info.start_time or 0,
            info.end_time or None,
            tags.get(PARENT),
            tags.get(METRIC_TAG),
            int(size) if size.isdigit() else None,
            tags.get(OPTIMIZER_TAG),
            tuple(sorted(run.data.metrics)),
            info.artifact_uri,
        )

    @property
    def is_evaluation(self) -> bool:
        """Return whether it may be an evaluation's: only then is its result table looked for."""
        return self.metric is not None or "eval" in self.metrics


class Store:
    """The part of a store that is looked at.

    Args:
        uri: The resolved tracking URI.
        experiments: Ids or names; none for all.
        since_ms: Traces and runs that began before are left out.
        run_id: With one, it and the runs below it alone, with their traces.

    Raises:
        ValueError: Where there is no such store, no such experiment, or no such run.
    """

    def __init__(self, uri: str, experiments: Sequence[str] = (), since_ms: int = 0, run_id: str | None = None) -> None:
        if (problem := missing_store(uri)) is not None:  # for callers in Python; a command has asked before
            raise ValueError(problem)
        self.uri = uri
        self.since_ms = since_ms
        self.client = client_of(uri)
        self._has_rows = mlflow_bulk_reads.has_rows(uri)
        self.experiment_ids = self._experiments(experiments)
        self._others: dict[str, RunFacts | None] = {}
        self._only: set[str] | None = None
        if run_id is not None:
            self.experiment_ids = [self._run(run_id).info.experiment_id]
        self.runs = {facts.run_id: facts for facts in self._read_runs()}
        if run_id is not None:
            self._only = self._below(run_id)
            self.runs = {key: facts for key, facts in self.runs.items() if key in self._only}

    def _experiments(self, wanted: Sequence[str]) -> list[str]:
        if not wanted:
            found: list[str] = []
            token = None
            while True:
                page = self.client.search_experiments(max_results=_PAGE, page_token=token)
                found += [each.experiment_id for each in page]
                token = page.token
                if not token:
                    return found
        ids = []
        for name in wanted:
            experiment = self.client.get_experiment_by_name(name)
            if experiment is None:
                try:
                    experiment = self.client.get_experiment(name)
                except MlflowException:
                    raise ValueError(f"there is no experiment {name!r}") from None
            ids.append(experiment.experiment_id)
        return ids

    def _run(self, run_id: str) -> Any:
        try:
            return self.client.get_run(run_id)
        except MlflowException:
            raise ValueError(f"there is no run {run_id!r}") from None

    def _read_runs(self) -> Iterator[RunFacts]:
        query = f"attributes.start_time >= {self.since_ms}" if self.since_ms else ""
        for experiment_id in self.experiment_ids:
            token = None
            while True:
                page = self.client.search_runs(
                    [experiment_id], query, ViewType.ACTIVE_ONLY, max_results=_PAGE, page_token=token
                )
                yield from map(RunFacts.of, page)
                token = page.token
                if not token:
                    break

    def _below(self, run_id: str) -> set[str]:
        found, waiting = set[str](), [run_id]
        while waiting:
            found.add(waiting.pop())
            waiting += [k for k, facts in self.runs.items() if facts.parent_id in found and k not in found]
        return found

    def find_run(self, run_id: str) -> RunFacts | None:
        """Return a run, wherever it is and whether it was deleted or not; None where there is none."""
        if run_id in self.runs:
            return self.runs[run_id]
        if run_id not in self._others:
            try:
                self._others[run_id] = RunFacts.of(self.client.get_run(run_id))
            except MlflowException:
                self._others[run_id] = None
        return self._others[run_id]

    def count(self) -> int | None:
        """Return how many traces there are to look at; None where nobody can say at once."""
        if not self._has_rows or self._only is not None:
            return None
        return mlflow_bulk_reads.count_traces(self.uri, self.experiment_ids, self.since_ms)

    def traces(self) -> Iterator[TraceRow]:
        """Yield the traces, oldest first, a batch in memory at a time."""
        rows = (
            mlflow_bulk_reads.read_rows(self.uri, self.experiment_ids, since_ms=self.since_ms)
            if self._has_rows
            else self._read_by_client()
        )
        for row in rows:
            if self._only is not None and row.metadata.get(SOURCE_RUN) not in self._only:
                continue
            yield row if row.spans is not None else self._with_spans(row)

    def traces_by_id(self, ids: Sequence[str]) -> Iterator[TraceRow]:
        """Yield those of these traces that are there, in whatever experiment."""
        if self._has_rows:
            yield from mlflow_bulk_reads.read_rows(self.uri, trace_ids=ids)
            return
        for trace_id in ids:
            with contextlib.suppress(MlflowException):
                yield _row(self.client.get_trace(trace_id))

    def result_table(self, facts: RunFacts) -> list[dict[str, Any]] | None:
        """Return the rows of an evaluation's result table, or None where it has none."""
        content = mlflow_artifact_reads.read(_Located(facts), "result_table.json")
        if content is None:
            return None
        table = json.loads(content)
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]

    def document(self, facts: RunFacts, path: str) -> bytes | None:
        """Return an artifact of a run, or None where it has none."""
        return mlflow_artifact_reads.read(_Located(facts), path)

    def runs_of_program(self, program_hash: str) -> set[str]:
        """Return the runs that have evaluated a program, and those of compiles that have returned it, by our tag."""
        found, token = set[str](), None
        query = f"tags.`{PROGRAM_TAG}` = '{program_hash}'"
        while True:
            page = self.client.search_runs(self.experiment_ids, query, max_results=_PAGE, page_token=token)
            found |= {run.info.run_id for run in page}
            token = page.token
            if not token:
                return found

    def traces_with_program(self, program_hash: str) -> list[tuple[int, str]]:
        """Return the traces in which a predictor of this hash was called, oldest first, with when they began in ms."""
        if self._has_rows:
            return mlflow_bulk_reads.traces_with_attribute(
                self.uri, self.experiment_ids, "program_hash", program_hash, since_ms=self.since_ms
            )
        found = []
        for experiment_id in self.experiment_ids:
            query = f"span.attributes.program_hash LIKE '%{program_hash}%'"
            if self.since_ms:
                query += f" AND attributes.timestamp_ms >= {self.since_ms}"
            token = None
            while True:
                page = self.client.search_traces(
                    locations=[experiment_id],
                    filter_string=query,
                    max_results=_TRACES_PER_PAGE,
                    include_spans=False,
                    page_token=token,
                )
                found += [(trace.info.request_time, trace.info.trace_id) for trace in page]
                token = page.token
                if not token:
                    break
        return sorted(found)

    def _with_spans(self, row: TraceRow) -> TraceRow:
        """Read the spans that a store keeps as an artifact."""
        try:
            return row._replace(spans=_row(self.client.get_trace(row.trace_id)).spans)
        except (MlflowException, OSError):
            return row._replace(spans=())

    def _read_by_client(self) -> Iterator[TraceRow]:
        query = f"attributes.timestamp_ms >= {self.since_ms}" if self.since_ms else None
        for experiment_id in self.experiment_ids:
            token = None
            while True:
                try:
                    page = self.client.search_traces(
                        locations=[experiment_id],
                        filter_string=query,
                        max_results=_TRACES_PER_PAGE,
                        order_by=["timestamp_ms ASC"],
                        page_token=token,
                    )
                except MlflowException:  # a store without traces
                    return
                yield from map(_row, page)
                token = page.token
                if not token:
                    break


@dataclass(frozen=True, slots=True)
class _Located:
    """A run as ``mlflow_artifact_reads`` asks for it."""

    info: RunFacts


def _row(trace: Any) -> TraceRow:
    """Return MLflow's trace as a row."""
    info = trace.info
    return TraceRow(
        info.trace_id,
        str(info.experiment_id),
        info.request_time,
        info.execution_duration,
        str(getattr(info.state, "value", info.state)),
        info.client_request_id,
        dict(info.trace_metadata),
        dict(info.tags),
        dict(info.token_usage or {}),
        [_assessment(each) for each in info.assessments or ()],
        [_span(span) for span in trace.data.spans],
    )


def _assessment(said: Any) -> AssessmentRow:
    source = said.source
    expectation = getattr(said, "expectation", None)
    return AssessmentRow(
        said.name,
        "expectation" if expectation is not None else "feedback",
        getattr(said, "value", None),
        getattr(said, "error", None) is not None,
        str(source.source_type),
        source.source_id,
        said.rationale,
        said.run_id,
        said.span_id,
    )


def _span(span: Any) -> SpanRow:
    content = span.to_dict()
    return SpanRow(
        span.span_id,
        span.parent_id,
        span.name,
        span.span_type,
        span.start_time_ns,
        span.end_time_ns,
        json.dumps(content),
    )
