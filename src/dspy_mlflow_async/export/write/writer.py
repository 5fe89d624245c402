"""Writes operations to one MLflow store: for a trace `start_trace` first, then the spans of the whole batch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

from mlflow.entities import Trace, TraceData
from mlflow.entities.trace_state import TraceState
from mlflow.tracing.constant import TraceMetadataKey

from dspy_mlflow_async.export.operations import Operation, RunOperation, SpansOperation, TraceOperation, TraceUpdate
from dspy_mlflow_async.export.write import fork_gate, late_runs, prepare
from dspy_mlflow_async.export.write.batches import by_experiment, by_request, grouped, is_late, is_shared
from dspy_mlflow_async.export.write.errors import Outcome, Verdict, blocked_by, cannot_write_now, classify, is_away
from dspy_mlflow_async.export.write.prepare import Records
from dspy_mlflow_async.export.write.row_writer import row_writer
from dspy_mlflow_async.export.write.run_operations import write_runs
from dspy_mlflow_async.export.write.whole_traces import WholeTraces
from dspy_mlflow_async.seams import mlflow_experiment, mlflow_http, mlflow_store, mlflow_traces
from dspy_mlflow_async.seams.mlflow_call_span import attachments_of
from dspy_mlflow_async.workers import map_concurrently

# Bounds of one request to a server. MLflow's own default (120 s, 7 retries) would hold up everything behind it.
_REQUEST_SECONDS = 30.0
# Traces that are started at once on a server. MLflow's exporter makes all of its requests in ten threads.
_LANES = 4
# As often as another process may write the totals of a trace between our look at them and our write, in a row.
_MOST_CORRECTIONS = 10
_ARTIFACT_LOCATION = "mlflow.artifactLocation"  # the store adds it by itself, and does not like to get it twice


class Writer:
    """Writer to the store of one tracking URI. Safe for threads: all it keeps is what it has learnt of the store.

    Attributes:
        uri: The tracking URI, resolved.
        takes_batches: Whether the store takes spans of many traces together; None while it has not said.
        takes_spans: Whether it keeps spans at all; else they go with the artifacts.
    """

    def __init__(
        self,
        uri: str,
        *,
        request_seconds: float = _REQUEST_SECONDS,
        may_try_rows: bool = True,
        between_traces: Callable[[], None] = lambda: None,
    ) -> None:
        self.uri = uri
        self._between_traces = between_traces
        self._request_seconds = request_seconds
        self._client: mlflow_store.TracingClient | None = None
        self.takes_batches: bool | None = None
        self.takes_spans = True
        self._may_try_rows = may_try_rows  # not in the thread of a caller
        self._has_rows_refused = False  # by the store, as being away
        # Only connections to a database must not be copied in the middle of something.
        self._is_server = uri.startswith(("http:", "https:"))
        self._gate = contextlib.nullcontext() if self._is_server else fork_gate.writes
        self._lanes = _LANES if self._is_server else 1
        self._whole = WholeTraces()

    @property
    def client(self) -> mlflow_store.TracingClient:
        """MLflow's client, made when it is first needed, in the thread that may wait for it."""
        if self._client is None:
            self._client = mlflow_store.tracing_client(self.uri)  # creates the tables of a new SQL store
        return self._client

    def write(self, operations: Sequence[Operation]) -> list[Outcome]:
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
            for group in grouped(operations):
                if fork_gate.is_over.is_set():
                    outcomes += [Outcome(operation, Verdict.AWAY) for operation in group]
                    continue
                waiting = [blocked_by(operation, outcomes) for operation in group]
                todo = [operation for operation, outcome in zip(group, waiting, strict=True) if outcome is None]
                outcomes += [outcome for outcome in waiting if outcome is not None]
                if todo:
                    outcomes += self._write_group(todo, statuses)
            if not self._is_server and any(o.error is not None and cannot_write_now(o.error) for o in outcomes):
                mlflow_store.renew_connections(self.uri)
        return outcomes

    def _write_group(self, operations: Sequence[Any], statuses: list[mlflow_http.Status]) -> list[Outcome]:
        if isinstance(operations[0], RunOperation):
            return write_runs(self.uri, operations, statuses, self._link)
        if isinstance(operations[0], TraceUpdate):
            return self._one_by_one(operations, self._write_follow_up, statuses)
        return self._write_traces(operations, statuses)

    # --- traces ---

    def _write_traces(self, operations: Sequence[Any], statuses: list[mlflow_http.Status]) -> list[Outcome]:
        good: list[Any] = []
        bad: list[Outcome] = []
        records: Records = {}
        for operation in operations:
            self._between_traces()
            try:
                if (made := prepare.prepare(operation)) is not None:
                    records[id(operation)] = made
            except Exception as error:  # noqa: BLE001 - one trace must not keep the others from the store
                bad.append(Outcome(operation, Verdict.SUSPECT, error))
                continue
            try:
                statuses.clear()
                if mlflow_experiment.is_stand_in(operation.experiment_id):
                    client = mlflow_store.client_of(self.uri)
                    with mlflow_store.workspace_scope(operation.workspace):
                        found = mlflow_experiment.real_experiment_id(
                            client, operation.experiment_id, operation.workspace
                        )
                    mlflow_traces.move_to_experiment(operation, found)
                if late_runs.has_stand_in(operation):
                    late_runs.name_run(mlflow_store.client_of(self.uri), operation.info.trace_metadata)
                good.append(operation)
            except Exception as error:  # noqa: BLE001 - the store decides what it raises; `classify` says what it means
                bad.append(Outcome(operation, classify(error, statuses), error))
        if not good:
            return bad
        return bad + [self._linked(outcome, statuses) for outcome in self._store_traces(good, records, statuses)]

    def _linked(self, outcome: Outcome, statuses: list[mlflow_http.Status]) -> Outcome:
        """Return the outcome of a trace, with its run where that was created while it was stored."""
        operation: Any = outcome.operation
        if outcome.verdict is not Verdict.STORED or not late_runs.has_stand_in(operation):
            return outcome
        statuses.clear()
        try:
            late_runs.link_since(mlflow_store.client_of(self.uri), operation, self._link)
        except Exception as error:  # noqa: BLE001 - judged
            return Outcome(operation, classify(error, statuses), error)
        return outcome

    def _store_traces(self, good: Sequence[Any], records: Records, statuses: list[mlflow_http.Status]) -> list[Outcome]:
        statuses.clear()
        try:
            if self.takes_batches is None:
                self.takes_batches = self._ask_for_batches(statuses)
        except Exception as error:  # noqa: BLE001 - the store decides what it raises; `classify` says what it means
            return [Outcome(operation, classify(error, statuses), error) for operation in good]
        if not self.takes_batches:
            return self._one_by_one(good, self._write_spans_first, statuses)
        if self._is_server and self.takes_spans:
            return self._send_whole(good, statuses)
        if self._is_server or not self.takes_spans:
            return self._starts_then_spans(good, statuses)
        shared = [operation for operation in good if is_shared(operation)]
        outcomes, left = self._write_rows([operation for operation in good if not is_shared(operation)], records)
        outcomes += self._starts_then_spans(shared, statuses) if shared else ()
        if left and self._all_at_once(left):
            return [*outcomes, *(Outcome(operation, Verdict.STORED) for operation in left)]
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

    def _write_rows(self, operations: Sequence[Any], records: Records) -> tuple[list[Outcome], list[Any]]:
        """Write complete new traces as rows.

        Returns:
            The outcomes, and the operations that are left for MLflow.
        """
        if self._has_rows_refused:  # MLflow has its turn, in case that rows are to blame
            self._has_rows_refused = False
            return [], list(operations)
        try:
            store = self.client.store
            places = row_writer(self.uri).write(
                store, operations, records, may_try=self._may_try_rows, between_traces=self._between_traces
            )
        except Exception as error:  # noqa: BLE001 - what is wrong will show when written by MLflow
            if classify(error) is not Verdict.AWAY:
                return [], list(operations)
            self._has_rows_refused = True
            return [Outcome(operation, Verdict.AWAY, error) for operation in operations], []
        stored = [operation for operation in operations if id(operation) in places]
        for operation in stored:
            if operation.prompts or mlflow_traces.has_attachments(operation.spans):
                info = copy.copy(operation.info)
                info.tags = {**info.tags, _ARTIFACT_LOCATION: places[id(operation)]}
                self._finish(operation, info)
        left = [operation for operation in operations if id(operation) not in places]
        return [Outcome(operation, Verdict.STORED) for operation in stored], left

    def _all_at_once(self, operations: Sequence[Any]) -> bool:
        """Write the whole batch in one SQL transaction.

        Returns:
            False where that is not possible, or did not work; then nothing is written.
        """
        if any(operation.workspace or is_late(operation) for operation in operations):
            return False
        returned = []
        try:
            with mlflow_store.one_transaction(self.client) as store:
                if store is None:
                    return False
                returned = [
                    (operation, store.start_trace(operation.info))
                    for operation in operations
                    if isinstance(operation, TraceOperation)
                ]
                for experiment_id, spans in by_experiment(operations):
                    store.log_spans(experiment_id, spans)
        except Exception:  # noqa: BLE001 - what is wrong will show when written one by one
            return False
        for operation, info in returned:
            self._finish(operation, info)
        return True

    def _send_whole(self, operations: Sequence[Any], statuses: list[mlflow_http.Status]) -> list[Outcome]:
        """Send whole traces together to a server that takes them, and the rest as every server takes it."""
        outcomes = self._whole.write(self.client, operations, statuses)
        for outcome in outcomes:
            operation: Any = outcome.operation
            if outcome.verdict is Verdict.STORED and operation.prompts:
                with mlflow_store.workspace_scope(operation.workspace):
                    self._finish(operation, operation.info)
        decided = {id(outcome.operation) for outcome in outcomes}
        left = [operation for operation in operations if id(operation) not in decided]
        if left and (away := next((o for o in outcomes if o.verdict is Verdict.AWAY), None)) is not None:
            return outcomes + [Outcome(operation, Verdict.AWAY, away.error) for operation in left]
        return outcomes + (self._starts_then_spans(left, statuses) if left else [])

    def _starts_then_spans(self, operations: Sequence[Any], statuses: list[mlflow_http.Status]) -> list[Outcome]:
        outcomes, infos = self._start_all(operations)
        indexes = {id(operation): index for index, operation in enumerate(operations)}
        for group in by_request([operation for index, operation in enumerate(operations) if index not in outcomes]):
            started = [infos.get(indexes[id(operation)]) for operation in group]
            for operation, outcome in zip(group, self._log_group(group, started, statuses), strict=True):
                outcomes[indexes[id(operation)]] = outcome
        return [outcomes[index] for index in range(len(operations))]

    def _start_all(self, operations: Sequence[Any]) -> tuple[dict[int, Outcome], dict[int, Any]]:
        """Start the traces among these operations.

        Returns:
            By index: what became of those that cannot go on, and the stored traces of those that were started.
        """
        outcomes: dict[int, Outcome] = {}
        infos: dict[int, Any] = {}

        def start(index: int) -> bool:
            if fork_gate.is_over.is_set():
                return False
            operation = operations[index]
            with mlflow_http.limited_http(self._request_seconds) as statuses:
                try:
                    with mlflow_store.workspace_scope(operation.workspace):
                        infos[index] = self._start(operation)
                except Exception as error:  # noqa: BLE001 - judged
                    outcomes[index] = Outcome(operation, classify(error, statuses), error)
                    return outcomes[index].verdict is not Verdict.AWAY
            return True

        begun = [
            i
            for i, operation in enumerate(operations)
            if isinstance(operation, TraceOperation) and not is_late(operation)
        ]
        map_concurrently(start, begun, self._lanes)
        away = next((outcome for outcome in outcomes.values() if outcome.verdict is Verdict.AWAY), None)
        rest, error = (begun, None) if away is None else (range(len(operations)), away.error)
        for index in rest:
            if index not in infos:  # nor an outcome, where something else than an error has ended a lane
                outcomes.setdefault(index, Outcome(operations[index], Verdict.AWAY, error))
        return outcomes, infos

    def _start(self, operation: TraceOperation) -> Any:
        """Start a trace, and return it as it is stored, or as it was sent where nobody asks for more."""
        reads_answer = not self.takes_spans or mlflow_traces.has_attachments(operation.spans)
        return mlflow_store.start_trace(self.client, operation.info, reads_answer=reads_answer)

    def _log_group(
        self, operations: Sequence[Any], infos: Sequence[Any], statuses: list[mlflow_http.Status]
    ) -> list[Outcome]:
        statuses.clear()
        try:
            with mlflow_store.workspace_scope(operations[0].workspace):
                self._log_spans(
                    operations[0].experiment_id,
                    [span for operation in operations for span in mlflow_traces.as_given(operation.spans)],
                )
        except Exception as error:  # noqa: BLE001 - judged
            verdict = classify(error, statuses)
            if len(operations) == 1 or verdict is Verdict.AWAY:
                return [Outcome(operation, verdict, error) for operation in operations]
            return [  # one of them is to blame
                outcome
                for operation, info in zip(operations, infos, strict=True)
                for outcome in self._log_group([operation], [info], statuses)
            ]
        # Where several have spans of one trace.
        last = {operation.key: index for index, operation in enumerate(operations)}
        return [
            self._completed(operation, info, statuses, is_last=last[operation.key] == index)
            for index, (operation, info) in enumerate(zip(operations, infos, strict=True))
        ]

    def _completed(self, operation: Any, info: Any, statuses: list[mlflow_http.Status], *, is_last: bool) -> Outcome:
        statuses.clear()
        try:
            with mlflow_store.workspace_scope(operation.workspace):
                if is_late(operation):
                    self._correct_totals(operation)
                elif is_shared(operation) and is_last:
                    self._agree_on_totals(operation)
                if isinstance(operation, TraceOperation) and not is_late(operation):
                    if not self.takes_spans and operation.stage == "whole":
                        if _ARTIFACT_LOCATION not in info.tags:  # started before the store said what it takes
                            info = self._stored_info(operation.key)
                        mlflow_store.upload_spans_as_artifact(self.client, info, TraceData(list(operation.spans)))
                    self._finish(operation, info)
        except Exception as error:  # noqa: BLE001 - judged
            return Outcome(operation, classify(error, statuses), error)
        return Outcome(operation, Verdict.STORED)

    def _write_spans_first(self, operation: Any) -> None:
        """Write spans before the trace, for stores that add the tokens of spans: the trace must have the last word."""
        self._log_spans(operation.experiment_id, operation.spans)
        if is_late(operation):
            self._correct_totals(operation)
        elif isinstance(operation, TraceOperation):
            info = self._start_with_all_assessments(operation.info)
            if not self.takes_spans and operation.stage == "whole":
                mlflow_store.upload_spans_as_artifact(self.client, info, TraceData(list(operation.spans)))
            self._finish(operation, info)
        if is_shared(operation):
            self._agree_on_totals(operation)

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
        if not (self.takes_spans and spans):
            return
        try:
            mlflow_store.log_spans(self.client, experiment_id or "0", spans)
        except Exception as error:
            if not mlflow_store.is_unsupported(error):
                raise
            self.takes_spans = False

    def _finish(self, operation: TraceOperation, info: Any) -> None:
        """Do what MLflow does after storing; failures here do not undo that, and MLflow logs them no differently."""
        if operation.stage != "whole":
            return
        attachments: dict[str, Any] = {}
        for span in mlflow_traces.as_given(operation.spans):
            attachments.update(attachments_of(span))
        with contextlib.suppress(Exception):
            if attachments:
                mlflow_store.upload_attachments(self.client, info, attachments)
        with contextlib.suppress(Exception):
            if operation.prompts:
                mlflow_store.link_prompts(self.client, operation.key, operation.prompts)

    def _correct_totals(self, operation: TraceOperation) -> None:
        """Correct the totals of a trace after late spans, from all of its spans."""
        info = self._stored_info(operation.key)
        if self.takes_spans:
            trace = self._stored_trace(operation.key)
        else:
            trace = self.client.get_trace(operation.key)
            known = {span.span_id for span in operation.spans}
            spans = [span for span in trace.data.spans if span.span_id not in known]
            trace = Trace(info, TraceData([*spans, *operation.spans]))
            mlflow_store.upload_spans_as_artifact(self.client, info, trace.data)
        prepare.total(info, trace.data.spans)
        mlflow_traces.complete_metadata(Trace(info, trace.data))
        info.trace_metadata.update(operation.info.trace_metadata)
        info.tags.update(operation.info.tags)
        self._restart(info)

    def _agree_on_totals(self, operation: TraceOperation | SpansOperation) -> None:
        """Give a trace of several processes the totals of all its spans that are stored.

        Whoever adds spans to it comes here afterwards, and goes on until the totals are those of the spans: so the last
        one to write them has seen all spans that were there, and who adds more will look again. While its root is open
        nothing is to be done: the process that has it comes here when that has ended.
        """
        if isinstance(operation, TraceOperation):
            if operation.stage != "whole":
                return
        elif not self.takes_spans:  # nor are they there
            return
        for _ in range(_MOST_CORRECTIONS):
            stored = self._stored_info(operation.key)
            if stored.state is TraceState.IN_PROGRESS:
                return
            spans = self._stored_trace(operation.key).data.spans if self.takes_spans else operation.spans
            info = copy.copy(stored)
            info.trace_metadata = dict(stored.trace_metadata)
            prepare.total(info, spans)
            mlflow_traces.complete_metadata(Trace(info, TraceData(list(spans))))
            if prepare.totals_of(info) == prepare.totals_of(stored):
                return
            if self.takes_batches:  # nothing else: somebody may be adding to it. Older stores take back what they miss.
                known = info.trace_metadata
                info.trace_metadata = {key: known[key] for key in prepare.TOTALS if key in known}
                info.tags = {}
            self._restart(info)

    # --- what is said about a trace later, and runs ---

    def _one_by_one(self, operations: Sequence[Any], write: Any, statuses: list[mlflow_http.Status]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for operation in operations:
            if (waiting := blocked_by(operation, outcomes)) is not None:
                outcomes.append(waiting)
                continue
            statuses.clear()
            try:
                with mlflow_store.workspace_scope(operation.workspace):
                    write(operation)
                outcomes.append(Outcome(operation, Verdict.STORED))
            except Exception as error:  # noqa: BLE001 - judged
                outcomes.append(Outcome(operation, classify(error, statuses), error))
        return outcomes

    def _write_follow_up(self, operation: TraceUpdate) -> None:
        prepare.prepare(operation)
        if late_runs.has_stand_in(operation):
            late_runs.name_run(mlflow_store.client_of(self.uri), operation.metadata)
        if operation.metadata:  # only `start_trace` can set it; it leaves alone what it is not given
            info = self._stored_info(operation.key)
            info.trace_metadata.update(operation.metadata)
            self._restart(info)
        for assessment in operation.assessments:
            try:
                self.client.store.create_assessment(assessment)
            except Exception:  # noqa: PERF203 - one that is there already does not matter
                if not self._has_assessment(operation.key, assessment.assessment_id):
                    raise
        for key, value in operation.tags.items():
            self.client.store.set_trace_tag(operation.key, key, value)

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
        if self.takes_batches:
            info.assessments = []  # kept by the store; older ones would drop what they are not given
        self.client.start_trace(info)
