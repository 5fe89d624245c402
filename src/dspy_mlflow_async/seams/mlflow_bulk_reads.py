"""Rows of a SQL store, read in bulk: MLflow's client takes milliseconds a trace, and a hundred thousand are to be read.

Nothing here writes. What MLflow keeps in columns of its own in newer versions (session, tokens) is looked for in both
places. Checked on mlflow 3.11.1 and 3.17.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mlflow.tracking._tracking_service.utils import _get_store

from dspy_mlflow_async.seams.listed import taken

_MODELS = "mlflow.store.tracking.dbmodels.models"
_tables: dict[str, Any] = {
    name: getattr(taken(f"{_MODELS}:{name}"), "__table__", None)
    for name in ("SqlTraceInfo", "SqlSpan", "SqlTraceTag", "SqlTraceMetadata", "SqlAssessments")
}
TOKEN_USAGE, SESSION, SOURCE_RUN = "mlflow.trace.tokenUsage", "mlflow.trace.session", "mlflow.sourceRun"
_LOCATION, _IN_STORE = "mlflow.trace.spansLocation", "TRACKING_STORE"
_TOKENS = ("input_tokens", "output_tokens", "total_tokens")
# MLflow's own notes, the same or of no use in every trace; the previews of what the root's span has.
_UNREAD = (
    *("mlflow.trace.sizeStats", "mlflow.trace.sizeBytes", "mlflow.trace.infoFinalized", "mlflow.trace_schema.version"),
    *("mlflow.traceInputs", "mlflow.traceOutputs", "mlflow.source.type", "mlflow.source.git.commit"),
    *("mlflow.source.git.branch", "mlflow.artifactLocation"),
)


class SpanRow(NamedTuple):
    """One stored span.

    Attributes:
        span_id: MLflow's id.
        parent_id: That of its parent, or None.
        name: Its name.
        kind: One of ``mlflow.entities.SpanType``, or None.
        start_ns: When it began, in nanoseconds since the epoch.
        end_ns: When it ended, or None.
        content: JSON text of all of it.
    """

    span_id: str
    parent_id: str | None
    name: str
    kind: str | None
    start_ns: int
    end_ns: int | None
    content: str


class AssessmentRow(NamedTuple):
    """One stored assessment: who said what of a trace."""

    name: str
    kind: str  # feedback, expectation, issue
    value: Any
    error: bool
    source_type: str
    source_id: str | None
    rationale: str | None
    run_id: str | None
    span_id: str | None


class TraceRow(NamedTuple):
    """One stored trace with all that belongs to it.

    Attributes:
        trace_id: MLflow's id.
        experiment_id: That of its experiment.
        start_ms: When it began, in milliseconds since the epoch.
        duration_ms: How long it took, or None.
        state: ``OK``, ``ERROR``, ``IN_PROGRESS`` or ``STATE_UNSPECIFIED``.
        request_id: The client's id of the request, or None.
        metadata: What was said when it began, the run that it was made under among it.
        tags: What may be changed.
        tokens: Its totals by MLflow's keys; empty where none are stored.
        assessments: What was said of it.
        spans: Its spans, in no order; None where the tracking store does not have them, or no longer, in archives.
    """

    trace_id: str
    experiment_id: str
    start_ms: int
    duration_ms: int | None
    state: str
    request_id: str | None
    metadata: Mapping[str, str]
    tags: Mapping[str, str]
    tokens: Mapping[str, int]
    assessments: Sequence[AssessmentRow]
    spans: Sequence[SpanRow] | None


def has_rows(tracking_uri: str) -> bool:
    """Return whether traces of this store can be read as rows: it is a SQL store whose tables are as we know them."""
    return all(table is not None for table in _tables.values()) and hasattr(_get_store(tracking_uri), "engine")


def count_traces(tracking_uri: str, experiment_ids: Sequence[str], since_ms: int = 0) -> int:
    """Return how many traces these experiments have since then."""
    from sqlalchemy import func, select

    info = _tables["SqlTraceInfo"].c
    query = select(func.count()).where(info.experiment_id.in_(map(int, experiment_ids)), info.timestamp_ms >= since_ms)
    with _get_store(tracking_uri).engine.connect() as connection:
        return int(connection.execute(query).scalar_one())


def traces_with_attribute(
    tracking_uri: str, experiment_ids: Sequence[str], name: str, value: str, *, since_ms: int = 0
) -> list[tuple[int, str]]:
    """Return when these traces began, in milliseconds, and their ids: those that have a span with this attribute.

    Args:
        tracking_uri: The store, for which ``has_rows``.
        experiment_ids: Which experiments.
        name: The attribute's name.
        value: Its value, a text of letters and digits.
        since_ms: Leave out what began before, in milliseconds since the epoch.
    """
    from sqlalchemy import or_, select

    info, span = _tables["SqlTraceInfo"].c, _tables["SqlSpan"].c
    # A backslash stands where "_" does: in some databases it is none in a pattern.
    texts = [span.content.like(f'%"{name}":{space}"_"{value}_""%') for space in ("", " ")]
    query = (
        select(info.timestamp_ms, info.request_id)
        .where(info.experiment_id.in_(map(int, experiment_ids)), info.timestamp_ms >= since_ms)
        .where(info.request_id.in_(select(span.trace_id).where(or_(*texts))))
        .order_by(info.timestamp_ms, info.request_id)
    )
    with _get_store(tracking_uri).engine.connect() as connection:
        return [(int(begun), str(trace_id)) for begun, trace_id in connection.execute(query)]


def read_rows(
    tracking_uri: str,
    experiment_ids: Sequence[str] = (),
    *,
    since_ms: int = 0,
    trace_ids: Sequence[str] | None = None,
    batch: int = 250,
) -> Iterator[TraceRow]:
    """Yield traces, oldest first, with no more than a batch of them in memory.

    Args:
        tracking_uri: The store, for which ``has_rows``.
        experiment_ids: Which experiments.
        since_ms: Leave out what began before, in milliseconds since the epoch.
        trace_ids: Read these alone, in whatever experiment, at most a batch at once.
        batch: How many traces are read at once.
    """
    from sqlalchemy import or_, select

    table = _tables["SqlTraceInfo"]
    info = table.c
    engine = _get_store(tracking_uri).engine
    names = [name for name in _INFO if name in info]
    query = select(*(info[name] for name in names)).order_by(info.timestamp_ms, info.request_id).limit(batch)
    if trace_ids is not None:
        for begin in range(0, len(trace_ids), batch):
            with engine.connect() as connection:
                wanted = list(trace_ids[begin : begin + batch])
                yield from _whole(connection, names, query.where(info.request_id.in_(wanted)))
        return
    query = query.where(info.experiment_id.in_(map(int, experiment_ids)), info.timestamp_ms >= since_ms)
    last: tuple[int, str] | None = None
    while True:
        page = query
        if last is not None:
            is_later = or_(info.timestamp_ms > last[0], (info.timestamp_ms == last[0]) & (info.request_id > last[1]))
            page = query.where(info.timestamp_ms >= last[0], is_later)
        # A connection for each page: nobody who writes waits for one who reads on.
        with engine.connect() as connection:
            found = _whole(connection, names, page)
        yield from found
        if len(found) < batch:
            return
        last = found[-1].start_ms, found[-1].trace_id


def _whole(connection: Any, names: Sequence[str], query: Any) -> list[TraceRow]:
    infos = [dict(zip(names, values, strict=True)) for values in _rows(connection, query)]
    ids = [info["request_id"] for info in infos]
    spans: dict[str, list[SpanRow]] = {each: [] for each in ids}
    tags: dict[str, dict[str, str]] = {each: {} for each in ids}
    metadata: dict[str, dict[str, str]] = {each: {} for each in ids}
    assessments: dict[str, list[AssessmentRow]] = {}
    for values in _select(connection, "SqlSpan", "trace_id", ids, _SPAN):
        spans[values[0]].append(SpanRow(*values[1:]))
    for table, into in (("SqlTraceTag", tags), ("SqlTraceMetadata", metadata)):
        for trace_id, key, value in _select(connection, table, "request_id", ids, ("key", "value"), _UNREAD):
            into[trace_id][key] = value or ""
    for trace_id, *said, is_valid in _select(connection, "SqlAssessments", "trace_id", ids, _ASSESSMENT):
        if is_valid:
            assessments.setdefault(trace_id, []).append(_assessment(*said))
    return [
        _trace(info, spans[each], tags[each], metadata[each], assessments)
        for each, info in zip(ids, infos, strict=True)
    ]


_INFO = (
    *("request_id", "experiment_id", "timestamp_ms", "execution_time_ms", "status", "client_request_id"),
    *("session_id", "trace_name", *_TOKENS),
)
_SPAN = ("span_id", "parent_span_id", "name", "type", "start_time_unix_nano", "end_time_unix_nano", "content")
_ASSESSMENT = (
    *("name", "assessment_type", "value", "error", "source_type", "source_id", "rationale", "run_id", "span_id"),
    "valid",
)


def _select(
    connection: Any, table: str, key: str, ids: Sequence[str], names: Sequence[str], unread: Sequence[str] = ()
) -> Sequence[Any]:
    from sqlalchemy import select

    columns = _tables[table].c
    query = select(columns[key], *(columns[name] for name in names)).where(columns[key].in_(ids))
    if unread:
        query = query.where(columns.key.not_in(unread))
    return _rows(connection, query)


def _rows(connection: Any, query: Any) -> Sequence[Any]:
    """Return what a query finds, as the database's driver gives it: SQLAlchemy's rows cost as much as the database."""
    found: Sequence[Any] = connection.execute(query).cursor.fetchall()
    return found


def _assessment(
    name: str, kind: str, value: str, error: str | None, source_type: str, source_id: str | None, *rest: str | None
) -> AssessmentRow:
    return AssessmentRow(name, kind, json.loads(value), bool(error), source_type, source_id, *rest)


def _trace(
    info: Any,
    spans: list[SpanRow],
    tags: dict[str, str],
    metadata: dict[str, str],
    assessments: Mapping[str, list[AssessmentRow]],
) -> TraceRow:
    if (session := info.get("session_id")) is not None:
        metadata[SESSION] = session
    if (name := info.get("trace_name")) is not None:
        tags["mlflow.traceName"] = name
    tokens = {key: info[key] for key in _TOKENS if info.get(key) is not None}
    if not tokens and TOKEN_USAGE in metadata:
        tokens = json.loads(metadata[TOKEN_USAGE])
    return TraceRow(
        info["request_id"],
        str(info["experiment_id"]),
        info["timestamp_ms"],
        info["execution_time_ms"],
        info["status"],
        info["client_request_id"],
        metadata,
        tags,
        tokens,
        assessments.get(info["request_id"], ()),
        spans if all(each.content for each in spans) and (spans or tags.get(_LOCATION) == _IN_STORE) else None,
    )
