"""Writing of complete new traces to a SQL store as rows, in one transaction, once that is proved to be MLflow's way."""

from __future__ import annotations

import copy
import functools
import logging
import operator
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from dspy_mlflow_async.export.operations import TraceOperation
from dspy_mlflow_async.export.write import prepare
from dspy_mlflow_async.export.write.batches import by_experiment
from dspy_mlflow_async.export.write.errors import Verdict, classify
from dspy_mlflow_async.export.write.prepare import Records
from dspy_mlflow_async.seams import mlflow_store, mlflow_traces

if TYPE_CHECKING:
    from dspy_mlflow_async.export.write.rows import TraceRows
    from dspy_mlflow_async.seams.mlflow_span_text import SpanRecord
    from dspy_mlflow_async.seams.mlflow_trace_tables import TraceTables

logger = logging.getLogger("dspy_mlflow_async")

# A trial holds the lock of the database: few traces, and few spans of each.
_TRIALS_PER_BATCH = 4
_TRACES_PER_TRIAL = 3
_SPANS_PER_TRACE = 64
# How often a trial may fail for something else than a difference before it is given up.
_ATTEMPTS = 5


class RowWriter:
    """Writer of rows to one SQL store.

    A trial writes some traces by MLflow's functions and by rows, each in a transaction that is undone, and compares
    what either has left in the tables. There is one for each kind of trace, see `TraceRows`, before the first of it is
    written as rows; whatever is not proved is MLflow's to write.

    Attributes:
        reason: Why nothing is written as rows; None where that is not so, or not known yet.
        proved: The kinds whose rows are MLflow's.
        refused: The others that were tried, with what was different.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.proved: set[str] = set()
        self.refused: dict[str, str] = {}
        self._tables: TraceTables | None = None
        self._failed = 0

    def write(
        self,
        store: Any,
        operations: Sequence[Any],
        records: Records,
        *,
        may_try: bool,
        between_traces: Callable[[], None] = lambda: None,
    ) -> dict[int, str]:
        """Write those of the operations that are traces of kinds which are proved, and not there yet.

        Args:
            store: MLflow's store.
            operations: Operations on traces, prepared.
            records: The facts of their spans, by the `id` of an operation, where they are there already.
            may_try: Whether trials may be made now, which take a moment.
            between_traces: Called before the rows of each are made.

        Returns:
            By the `id` of each operation that is stored: where its artifacts go. All the others are as they were.

        Raises:
            Exception: As the store raises it. Then nothing is written.
        """
        tables = self._known(store) if may_try else self._tables
        if tables is None or tables.keeps_more:
            return {}
        made = []
        for operation in operations:
            between_traces()
            if (rows := self._rows(tables, operation, records.get(id(operation)))) is not None:
                made.append(rows)
        if may_try:
            self._prove(tables, made)
        ready = [rows for rows in made if rows.kinds <= self.proved]
        if not ready:
            return {}
        with tables.session() as session:
            return _insert(tables, session, ready)

    def try_out(self, store: Any, operations: Sequence[TraceOperation]) -> None:
        """Make the trials that these traces ask for, and write nothing."""
        tables = self._known(store)
        if tables is not None:
            made = [rows for operation in operations if (rows := self._rows(tables, operation, None)) is not None]
            self._prove(tables, made)

    def _known(self, store: Any) -> TraceTables | None:
        if not mlflow_store.is_sql(store):
            self.reason = "it is no SQL store"
        elif self._tables is None and self.reason is None:
            # Only where a SQL store is open: it needs SQLAlchemy.
            from dspy_mlflow_async.seams.mlflow_trace_tables import UnknownTablesError, trace_tables

            try:
                self._tables = trace_tables(store)
            except UnknownTablesError as error:
                self.reason = str(error)
                logger.info("dspy-mlflow-async: traces are not written as rows: %s", error)
            except Exception as error:  # noqa: BLE001 - the store may be away: another batch asks again
                self._note_failure(error)
        return self._tables

    def _rows(self, tables: TraceTables, operation: Any, records: list[SpanRecord] | None) -> TraceRows | None:
        from dspy_mlflow_async.export.write.rows import rows_of

        if not isinstance(operation, TraceOperation):
            return None
        try:
            return rows_of(tables, operation, records)
        except Exception:  # noqa: BLE001 - what is odd in whatever way is for MLflow
            return None

    # --- trials ---

    def _prove(self, tables: TraceTables, made: Sequence[TraceRows]) -> None:
        for _ in range(_TRIALS_PER_BATCH):
            unknown = [rows for rows in made if not rows.kinds <= self.proved and not rows.kinds & self.refused.keys()]
            if not unknown:
                return
            first = min(unknown, key=lambda rows: (len(rows.kinds - self.proved), len(rows.operation.spans)))
            alike = [rows for rows in unknown if rows.kinds <= self.proved | first.kinds]
            sample = [self._cut(tables, rows) for rows in alike[:_TRACES_PER_TRIAL]]
            if not self._try(tables, [rows for rows in sample if rows is not None], first.kinds - self.proved):
                return

    def _cut(self, tables: TraceTables, rows: TraceRows) -> TraceRows | None:
        """Return a trace with no more spans than a trial may have."""
        if len(rows.operation.spans) <= _SPANS_PER_TRACE:
            return rows
        operation = copy.copy(rows.operation)
        operation.spans = list(operation.spans)[:_SPANS_PER_TRACE]
        return self._rows(tables, operation, None)

    def _try(self, tables: TraceTables, sample: Sequence[TraceRows], kinds: Collection[str]) -> bool:
        """Make a trial, and return whether another is worth it now."""
        found = {kind for rows in sample for kind in rows.kinds}
        if not found >= set(kinds):  # what was asked for is beyond the cut: MLflow writes such traces
            self.refused.update(dict.fromkeys(set(kinds) - found, "it is not in the first spans"))
            return True
        try:
            difference = _difference(tables, sample)
        except Exception as error:  # noqa: BLE001 - judged
            return self._note_failure(error)
        if difference is None:
            self.proved |= found
        else:
            self.refused.update(dict.fromkeys(found - self.proved, difference))
            logger.info("dspy-mlflow-async: %s: written by MLflow, for %s", ", ".join(sorted(kinds)), difference)
        return True

    def _note_failure(self, error: Exception) -> bool:
        if classify(error) is not Verdict.AWAY:
            self._failed += 1
            if self._failed >= _ATTEMPTS:
                self.reason, self._tables = f"it could not be tried out ({type(error).__name__})", None
        return False


@functools.cache
def row_writer(uri: str) -> RowWriter:  # noqa: ARG001 - the key
    """Return the writer of rows to a store, one for the process."""
    return RowWriter()


def explain(uri: str, traces: Sequence[Any] = ()) -> tuple[bool, str]:
    """Say whether complete new traces are written to a SQL store as rows, and why.

    Args:
        uri: The store, which is there.
        traces: Traces to try out on it, in transactions that are undone; without any, what this process has found.
    """
    writer = row_writer(uri)
    if traces:
        client = mlflow_store.tracing_client(uri)
        writer.try_out(client.store, _operations(traces, mlflow_store.first_experiment(client.store)))
    if writer.reason is not None:
        return False, f"MLflow's functions write all traces, since {writer.reason}"
    refused = "".join(f"; MLflow's write those with {kind}, since {why}" for kind, why in writer.refused.items())
    if not writer.proved:
        return not refused, refused.removeprefix(
            "; "
        ) or "no trace has been tried out yet: MLflow's functions write them"
    kinds = ", ".join(sorted(writer.proved))
    return not refused, f"complete new traces are written as rows, which are MLflow's own ({kinds}){refused}"


def _operations(traces: Sequence[Any], experiment_id: str) -> list[TraceOperation]:
    """Return operations that would write these traces into an experiment."""
    operations = []
    for trace in traces:
        operation = TraceOperation(
            key=trace.info.trace_id, info=copy.copy(trace.info), spans=trace.data.spans, experiment_id=experiment_id
        )
        operation.info = _own_info(operation)
        mlflow_traces.move_to_experiment(operation, experiment_id)
        prepare.prepare(operation)
        operations.append(operation)
    return operations


def _insert(tables: TraceTables, session: Any, made: Sequence[TraceRows]) -> dict[int, str]:
    """Insert the rows of traces that are new; returns where the artifacts of each go, by the `id` of its operation."""
    from dspy_mlflow_async.export.write.many_rows import insert_rows  # it needs SQLAlchemy, as an open store does

    one = made[0].operation.key
    locations = tables.artifact_locations(session, {rows.operation.info.experiment_id for rows in made}, one)
    present = tables.present(session, [rows.operation.info.trace_id for rows in made])
    stored: dict[int, str] = {}
    rows_by_table: dict[str, list[dict[str, Any]]] = {}
    for rows in made:
        trace_id, location = rows.operation.info.trace_id, locations.get(rows.operation.info.experiment_id)
        if location is None or trace_id in present:
            continue
        place = stored[id(rows.operation)] = location.replace(one, trace_id)
        for name, some in rows.tables.items():
            rows_by_table.setdefault(name, []).extend(some)
        rows_by_table["tags"].append(tables.artifact_tag(trace_id, place))
    if stored:  # a database finds its place faster for what has the same key; those of a trace stay in their order
        rows_by_table["metadata"].sort(key=operator.itemgetter("key"))
    connection = session.connection()
    for table, own in tables.ordered(rows_by_table):
        insert_rows(connection, table, own)
    return stored


def _difference(tables: TraceTables, sample: Sequence[TraceRows]) -> str | None:
    """Write a sample both ways, undo both, and say where they differ; None where they do not. No value is told."""
    operations = [rows.operation for rows in sample]
    theirs = tables.trial_of_store([_own_info(operation) for operation in operations], dict(by_experiment(operations)))
    ids = [operation.info.trace_id for operation in operations]
    try:
        mine = tables.trial(lambda session: _insert(tables, session, sample), ids)
    except Exception as error:
        if classify(error) is Verdict.AWAY:
            raise
        return f"rows are refused ({type(error.__cause__ or error).__name__})"
    for name, rows in theirs.items():
        if len(rows) != len(mine[name]):
            return f"{name} have {len(mine[name])} rows in place of {len(rows)}"
        for expected, row in zip(rows, mine[name], strict=True):
            if odd := sorted(column for column in expected if expected[column] != row[column]):
                return f"{', '.join(odd)} of {name} differ"
    return None


def _own_info(operation: TraceOperation) -> Any:
    info = copy.copy(operation.info)
    info.trace_metadata, info.tags = dict(info.trace_metadata), dict(info.tags)
    info.assessments = list(map(copy.copy, info.assessments))
    return info
