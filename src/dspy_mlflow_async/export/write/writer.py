"""Writes operations to one MLflow store: for a trace `start_trace` first, then the spans of the whole batch."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Sequence
from typing import Any

from mlflow.entities import Trace, TraceData
from mlflow.entities.trace_state import TraceState
from mlflow.tracing.constant import TraceMetadataKey, TraceSizeStatsKey

from dspy_mlflow_async.export.operations import Operation, RunOperation, SpansOperation, TraceOperation, TraceUpdate
from dspy_mlflow_async.export.write import fork_gate, late_runs, prepare
from dspy_mlflow_async.export.write.batches import by_experiment, grouped, is_late, is_shared
from dspy_mlflow_async.export.write.errors import Outcome, Verdict, blocked_by, cannot_write_now, classify, is_away
from dspy_mlflow_async.export.write.row_writer import row_writer
from dspy_mlflow_async.export.write.run_operations import write_runs
from dspy_mlflow_async.seams import mlflow_experiment, mlflow_http, mlflow_store, mlflow_traces
from dspy_mlflow_async.workers import map_concurrently

# Bounds of one request to a server. MLflow's own default (120 s, 7 retries) would hold up everything behind it.
_REQUEST_SECONDS = 30.0
# Traces that are started at once on a server. MLflow's exporter makes all of its requests in ten threads.
_LANES = 4
# As often as another process may write the totals of a trace between our look at them and our write, in a row.
_MOST_CORRECTIONS = 10
_TOTALS = (
    TraceMetadataKey.TOKEN_USAGE,
    TraceMetadataKey.COST,
    TraceMetadataKey.SIZE_STATS,
    TraceMetadataKey.SIZE_BYTES,
)
_ARTIFACT_LOCATION = "mlflow.artifactLocation"  # the store adds it by itself, and does not like to get it twice


class Writer:
    """Writer to the store of one tracking URI. Safe for threads: all it keeps is what it has learnt of the store."""

    def __init__(self, uri: str, *, request_seconds: float = _REQUEST_SECONDS, may_try_rows: bool = True) -> None:
        self.uri = uri
        self._request_seconds = request_seconds
        self._client: mlflow_store.TracingClient | None = None
        self._takes_batches: bool | None = None
        self._takes_spans = True
        self._may_try_rows = may_try_rows  # not in the thread of a caller
        self._has_rows_refused = False  # by the store, as being away
        # Only connections to a database must not be copied in the middle of something.
        self._is_server = uri.startswith(("http:", "https:"))
        self._gate = contextlib.nullcontext() if self._is_server else fork_gate.writes
        self._lanes = _LANES if self._is_server else 1

    @property
    def client(self) -> mlflow_store.TracingClient:
        """MLflow's client, made when it is first needed, in the thread that may wait for it."""
        if self._client is None:
            self._client = mlflow_store.tracing_client(self.uri)  # creates the tables of a new SQL store
        return self._client

    def write(self, items: Sequence[Operation]) -> list[Outcome]:
        """Write operations in order.

        Once the store is found to be away nothing further is tried.

        Returns:
            An outcome for each operation.
        """
        outcomes: list[Outcome] = []
        with (
            self._gate,
            mlflow_http.suppressed_instrumentation(),
            mlflow_http.limited_http(self._request_seconds) as statuses,
        ):
            for group in grouped(items):
                if fork_gate.is_over.is_set():
                    outcomes += [Outcome(item, Verdict.AWAY) for item in group]
                    continue
                waiting = [blocked_by(item, outcomes) for item in group]
                todo = [item for item, outcome in zip(group, waiting, strict=True) if outcome is None]
                outcomes += [outcome for outcome in waiting if outcome is not None]
                if todo:
                    outcomes += self._write_group(todo, statuses)
            if not self._is_server and any(o.error is not None and cannot_write_now(o.error) for o in outcomes):
                mlflow_store.renew_connections(self.uri)
        return outcomes

    def _write_group(self, items: Sequence[Any], statuses: list[mlflow_http.Status]) -> list[Outcome]:
        if isinstance(items[0], RunOperation):
            return write_runs(self.uri, items, statuses, self._link)
        if isinstance(items[0], TraceUpdate):
            return self._one_by_one(items, self._write_follow_up, statuses)
        return self._write_traces(items, statuses)

    # --- traces ---

    def _write_traces(self, items: Sequence[Any], statuses: list[mlflow_http.Status]) -> list[Outcome]:
        good: list[Any] = []
        bad: list[Outcome] = []
        texts: dict[int, list[str]] = {}  # of spans, by the `id` of an operation
        for item in items:
            try:
                if (made := prepare.prepare(item)) is not None:
                    texts[id(item)] = made
            except Exception as error:  # noqa: BLE001 - one trace must not keep the others from the store
                bad.append(Outcome(item, Verdict.SUSPECT, error))
                continue
            try:
                statuses.clear()
                if mlflow_experiment.is_stand_in(item.experiment_id):
                    client = mlflow_store.client_of(self.uri)
                    with mlflow_store.workspace_scope(item.workspace):
                        found = mlflow_experiment.real_experiment_id(client, item.experiment_id, item.workspace)
                    mlflow_traces.move_to_experiment(item, found)
                if late_runs.has_stand_in(item):
                    late_runs.name_run(mlflow_store.client_of(self.uri), item.info.trace_metadata)
                good.append(item)
            except Exception as error:  # noqa: BLE001 - the store decides what it raises; `classify` says what it means
                bad.append(Outcome(item, classify(error, statuses), error))
        if not good:
            return bad
        return bad + [self._linked(outcome, statuses) for outcome in self._store_traces(good, texts, statuses)]

    def _linked(self, outcome: Outcome, statuses: list[mlflow_http.Status]) -> Outcome:
        """Return the outcome of a trace, with its run where that was created while it was stored."""
        item: Any = outcome.item
        if outcome.verdict is not Verdict.STORED or not late_runs.has_stand_in(item):
            return outcome
        statuses.clear()
        try:
            late_runs.link_since(mlflow_store.client_of(self.uri), item, self._link)
        except Exception as error:  # noqa: BLE001 - judged
            return Outcome(item, classify(error, statuses), error)
        return outcome

    def _store_traces(
        self, good: Sequence[Any], texts: dict[int, list[str]], statuses: list[mlflow_http.Status]
    ) -> list[Outcome]:
        statuses.clear()
        try:
            if self._takes_batches is None:
                self._takes_batches = self._ask_for_batches(statuses)
        except Exception as error:  # noqa: BLE001 - the store decides what it raises; `classify` says what it means
            return [Outcome(item, classify(error, statuses), error) for item in good]
        if not self._takes_batches:
            return self._one_by_one(good, self._write_spans_first, statuses)
        if self._is_server or not self._takes_spans:
            return self._starts_then_spans(good, statuses)
        shared = [item for item in good if is_shared(item)]
        outcomes, left = self._write_rows([item for item in good if not is_shared(item)], texts)
        outcomes += self._starts_then_spans(shared, statuses) if shared else ()
        if left and self._all_at_once(left):
            return [*outcomes, *(Outcome(item, Verdict.STORED) for item in left)]
        return [*outcomes, *(self._starts_then_spans(left, statuses) if left else ())]

    def _ask_for_batches(self, statuses: Sequence[mlflow_http.Status]) -> bool:
        """Return whether the store takes spans of many traces together.

        Raises:
            ConnectionError: Where a server is away: what it takes is asked when it is back.
        """
        answer = mlflow_store.supports_span_batches(self.client)
        if answer is None and (not statuses or is_away(statuses[-1])):
            host = self.uri.rpartition("@")[2]  # without a password
            raise ConnectionError(f"the MLflow server at {host} does not tell its version")
        return bool(answer)

    def _write_rows(self, items: Sequence[Any], texts: dict[int, list[str]]) -> tuple[list[Outcome], list[Any]]:
        """Write complete new traces as rows.

        Returns:
            The outcomes, and the operations that are left for MLflow.
        """
        if self._has_rows_refused:  # MLflow has its turn, in case that rows are to blame
            self._has_rows_refused = False
            return [], list(items)
        try:
            store = self.client.store
            places = row_writer(self.uri).write(store, items, texts, may_try=self._may_try_rows)
        except Exception as error:  # noqa: BLE001 - what is wrong will show when written by MLflow
            if classify(error) is not Verdict.AWAY:
                return [], list(items)
            self._has_rows_refused = True
            return [Outcome(item, Verdict.AWAY, error) for item in items], []
        stored = [item for item in items if id(item) in places]
        for item in stored:
            info = copy.copy(item.info)
            info.tags = {**info.tags, _ARTIFACT_LOCATION: places[id(item)]}
            self._finish(item, info)
        return [Outcome(item, Verdict.STORED) for item in stored], [item for item in items if id(item) not in places]

    def _all_at_once(self, items: Sequence[Any]) -> bool:
        """Write the whole batch in one SQL transaction.

        Returns:
            False where that is not possible, or did not work; then nothing is written.
        """
        if any(item.workspace or is_late(item) for item in items):
            return False
        returned = []
        try:
            with mlflow_store.one_transaction(self.client) as store:
                if store is None:
                    return False
                returned = [(item, store.start_trace(item.info)) for item in items if isinstance(item, TraceOperation)]
                for experiment_id, spans in by_experiment(items):
                    store.log_spans(experiment_id, spans)
        except Exception:  # noqa: BLE001 - what is wrong will show when written one by one
            return False
        for item, info in returned:
            self._finish(item, info)
        return True

    def _starts_then_spans(self, items: Sequence[Any], statuses: list[mlflow_http.Status]) -> list[Outcome]:
        outcomes, infos = self._start_all(items)
        groups: dict[tuple[str | None, str | None], list[int]] = {}
        for index, item in enumerate(items):
            if index not in outcomes:
                groups.setdefault((item.experiment_id, item.workspace), []).append(index)
        for indexes in groups.values():
            for index, outcome in zip(
                indexes,
                self._log_group([items[i] for i in indexes], [infos.get(i) for i in indexes], statuses),
                strict=True,
            ):
                outcomes[index] = outcome
        return [outcomes[index] for index in range(len(items))]

    def _start_all(self, items: Sequence[Any]) -> tuple[dict[int, Outcome], dict[int, Any]]:
        """Start the traces among these operations.

        Returns:
            By index: what became of those that cannot go on, and the stored traces of those that were started.
        """
        outcomes: dict[int, Outcome] = {}
        infos: dict[int, Any] = {}

        def start(index: int) -> bool:
            if fork_gate.is_over.is_set():
                return False
            item = items[index]
            with mlflow_http.limited_http(self._request_seconds) as statuses:
                try:
                    with mlflow_store.workspace_scope(item.workspace):
                        infos[index] = self._start(item)
                except Exception as error:  # noqa: BLE001 - judged
                    outcomes[index] = Outcome(item, classify(error, statuses), error)
                    return outcomes[index].verdict is not Verdict.AWAY
            return True

        begun = [i for i, item in enumerate(items) if isinstance(item, TraceOperation) and not is_late(item)]
        map_concurrently(start, begun, self._lanes)
        away = next((outcome for outcome in outcomes.values() if outcome.verdict is Verdict.AWAY), None)
        rest, error = (begun, None) if away is None else (range(len(items)), away.error)
        for index in rest:
            if index not in infos:  # nor an outcome, where something else than an error has ended a lane
                outcomes.setdefault(index, Outcome(items[index], Verdict.AWAY, error))
        return outcomes, infos

    def _start(self, item: TraceOperation) -> Any:
        """Start a trace, and return it as it is stored, or as it was sent where nobody asks for more."""
        has_files = not self._takes_spans or any(span._attachments for span in item.spans)
        return mlflow_store.start_trace(self.client, item.info, reads_answer=has_files)

    def _log_group(
        self, items: Sequence[Any], infos: Sequence[Any], statuses: list[mlflow_http.Status]
    ) -> list[Outcome]:
        statuses.clear()
        try:
            with mlflow_store.workspace_scope(items[0].workspace):
                self._log_spans(items[0].experiment_id, [span for item in items for span in item.spans])
        except Exception as error:  # noqa: BLE001 - judged
            verdict = classify(error, statuses)
            if len(items) == 1 or verdict is Verdict.AWAY:
                return [Outcome(item, verdict, error) for item in items]
            return [  # one of them is to blame
                outcome
                for item, info in zip(items, infos, strict=True)
                for outcome in self._log_group([item], [info], statuses)
            ]
        last = {item.key: index for index, item in enumerate(items)}  # where several have spans of one trace
        return [
            self._completed(item, info, statuses, is_last=last[item.key] == index)
            for index, (item, info) in enumerate(zip(items, infos, strict=True))
        ]

    def _completed(self, item: Any, info: Any, statuses: list[mlflow_http.Status], *, is_last: bool) -> Outcome:
        statuses.clear()
        try:
            with mlflow_store.workspace_scope(item.workspace):
                if is_late(item):
                    self._correct_totals(item)
                elif is_shared(item) and is_last:
                    self._agree_on_totals(item)
                if isinstance(item, TraceOperation) and not is_late(item):
                    if not self._takes_spans and item.stage == "whole":
                        if _ARTIFACT_LOCATION not in info.tags:  # started before the store said what it takes
                            info = self._stored_info(item.key)
                        mlflow_store.upload_spans_as_artifact(self.client, info, TraceData(list(item.spans)))
                    self._finish(item, info)
        except Exception as error:  # noqa: BLE001 - judged
            return Outcome(item, classify(error, statuses), error)
        return Outcome(item, Verdict.STORED)

    def _write_spans_first(self, item: Any) -> None:
        """Write spans before the trace, for stores that add the tokens of spans: the trace must have the last word."""
        self._log_spans(item.experiment_id, item.spans)
        if is_late(item):
            self._correct_totals(item)
        elif isinstance(item, TraceOperation):
            info = self._start_with_all_assessments(item.info)
            if not self._takes_spans and item.stage == "whole":
                mlflow_store.upload_spans_as_artifact(self.client, info, TraceData(list(item.spans)))
            self._finish(item, info)
        if is_shared(item):
            self._agree_on_totals(item)

    def _start_with_all_assessments(self, info: Any) -> Any:
        """Start a trace that may be there already: MLflow 3.11 then fails unless it is given the stored assessments."""
        try:
            return self.client.start_trace(info)
        except Exception:
            given = {assessment.assessment_id for assessment in info.assessments}
            stored = [a for a in self._stored_info(info.trace_id).assessments if a.assessment_id not in given]
            if not stored:
                raise
            info.assessments = [*info.assessments, *stored]
            return self.client.start_trace(info)

    def _log_spans(self, experiment_id: str | None, spans: Sequence[Any]) -> None:
        if not (self._takes_spans and spans):
            return
        try:
            self.client.log_spans(experiment_id or "0", list(spans))
        except Exception as error:
            if not mlflow_store.is_unsupported(error):
                raise
            self._takes_spans = False

    def _finish(self, item: TraceOperation, info: Any) -> None:
        """Do what MLflow does after storing; failures here do not undo that, and MLflow logs them no differently."""
        if item.stage != "whole":
            return
        attachments: dict[str, Any] = {}
        for span in item.spans:
            attachments.update(span._attachments)
        with contextlib.suppress(Exception):
            if attachments:
                mlflow_store.upload_attachments(self.client, info, attachments)
        with contextlib.suppress(Exception):
            if item.prompts:
                mlflow_store.link_prompts(self.client, item.key, item.prompts)

    def _correct_totals(self, item: TraceOperation) -> None:
        """Correct the totals of a trace after late spans, from all of its spans."""
        info = self._stored_info(item.key)
        if self._takes_spans:
            trace = self._stored_trace(item.key)
        else:
            trace = self.client.get_trace(item.key)
            known = {span.span_id for span in item.spans}
            spans = [span for span in trace.data.spans if span.span_id not in known]
            trace = Trace(info, TraceData([*spans, *item.spans]))
            mlflow_store.upload_spans_as_artifact(self.client, info, trace.data)
        prepare.total(info, trace.data.spans)
        mlflow_traces.complete_metadata(Trace(info, trace.data))
        info.trace_metadata.update(item.info.trace_metadata)
        info.tags.update(item.info.tags)
        self._restart(info)

    def _agree_on_totals(self, item: TraceOperation | SpansOperation) -> None:
        """Give a trace of several processes the totals of all its spans that are stored.

        Whoever adds spans to it comes here afterwards, and goes on until the totals are those of the spans: so the last
        one to write them has seen all spans that were there, and who adds more will look again. While its root is open
        nothing is to be done: the process that has it comes here when that has ended.
        """
        if isinstance(item, TraceOperation):
            if item.stage != "whole":
                return
        elif not self._takes_spans:  # nor are they there
            return
        for _ in range(_MOST_CORRECTIONS):
            stored = self._stored_info(item.key)
            if stored.state is TraceState.IN_PROGRESS:
                return
            spans = self._stored_trace(item.key).data.spans if self._takes_spans else item.spans
            info = copy.copy(stored)
            info.trace_metadata = dict(stored.trace_metadata)
            prepare.total(info, spans)
            mlflow_traces.complete_metadata(Trace(info, TraceData(list(spans))))
            if _totals(info) == _totals(stored):
                return
            # Nothing else is written: somebody may be saying something about the trace at this moment.
            info.trace_metadata = {key: info.trace_metadata[key] for key in _TOTALS if key in info.trace_metadata}
            info.tags = {}
            self._restart(info)

    # --- what is said about a trace later, and runs ---

    def _one_by_one(self, items: Sequence[Any], write: Any, statuses: list[mlflow_http.Status]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for item in items:
            if (waiting := blocked_by(item, outcomes)) is not None:
                outcomes.append(waiting)
                continue
            statuses.clear()
            try:
                with mlflow_store.workspace_scope(item.workspace):
                    write(item)
                outcomes.append(Outcome(item, Verdict.STORED))
            except Exception as error:  # noqa: BLE001 - judged
                outcomes.append(Outcome(item, classify(error, statuses), error))
        return outcomes

    def _write_follow_up(self, item: TraceUpdate) -> None:
        prepare.prepare(item)
        if late_runs.has_stand_in(item):
            late_runs.name_run(mlflow_store.client_of(self.uri), item.metadata)
        if item.metadata:  # only `start_trace` can set it; it leaves alone what it is not given
            info = self._stored_info(item.key)
            info.trace_metadata.update(item.metadata)
            self._restart(info)
        for assessment in item.assessments:
            try:
                self.client.store.create_assessment(assessment)
            except Exception:  # noqa: PERF203 - one that is there already does not matter
                if not self._has_assessment(item.key, assessment.assessment_id):
                    raise
        for key, value in item.tags.items():
            self.client.store.set_trace_tag(item.key, key, value)

    def _link(self, trace_id: str, run_id: str) -> None:
        """Give a trace its run, which came after it."""
        self._write_follow_up(TraceUpdate(key=trace_id, metadata={TraceMetadataKey.SOURCE_RUN: run_id}))

    def _has_assessment(self, trace_id: str, assessment_id: str | None) -> bool:
        try:
            return self.client.store.get_assessment(trace_id, assessment_id) is not None
        except Exception:  # noqa: BLE001 - then the first error is the one to report
            return False

    def _stored_info(self, trace_id: str) -> Any:
        # `client.get_trace_info` would look into the trace manager first.
        return copy.copy(self.client.store.get_trace_info(trace_id))

    def _stored_trace(self, trace_id: str) -> Trace:
        store = self.client.store
        with contextlib.suppress(NotImplementedError):
            trace: Trace = store.get_trace(trace_id, allow_partial=True)
            return trace
        traces: list[Trace] = store.batch_get_traces([trace_id])
        return traces[0]

    def _restart(self, info: Any) -> None:
        info.tags = {key: value for key, value in info.tags.items() if key != _ARTIFACT_LOCATION}
        if self._takes_batches:
            info.assessments = []  # kept by the store; older ones would drop what they are not given
        self.client.start_trace(info)


def _totals(info: Any) -> list[Any]:
    """Return the usage, the cost and the number of spans that a trace tells, whatever a store makes of their texts."""
    usage, cost, sizes = (json.loads(info.trace_metadata.get(key) or "{}") for key in _TOTALS[:3])
    return [usage, cost, sizes.get(TraceSizeStatsKey.NUM_SPANS)]
