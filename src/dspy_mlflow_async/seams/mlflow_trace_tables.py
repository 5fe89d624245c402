"""Tables in which MLflow's SQL store keeps traces: their columns, what MLflow makes of a trace for them, and trials.

For the export room, in the writer's thread, where a SQL store is open: it imports what that has imported. Checked on
mlflow 3.12.0 to 3.18.0. Another shape of the tables is found out, and then nobody writes to them but MLflow.
"""

from __future__ import annotations

import copy
import enum
import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.litellm_prices import cost_of_tokens
from dspy_mlflow_async.seams.mlflow_span_text import read
from dspy_mlflow_async.seams.mlflow_store import finalizes, shared_view, write_session
from dspy_mlflow_async.seams.patching import over

__all__ = [
    "TraceTables",
    "Translation",
    "UnknownTablesError",
    "analytics_columns",
    "assessment_columns",
    "cost_of",
    "model_dimension",
    "sanitized",
    "total_cost",
    "trace_tables",
    "translated",
    "translation_of",
    "unquoted",
]

_STORE = "mlflow.store.tracking.sqlalchemy_store"
_MODELS = "mlflow.store.tracking.dbmodels.models"
_ANALYTICS = "mlflow.store.tracking.utils.trace_analytics"
_TRANSLATION = "mlflow.tracing.otel.translation"
_UTILS = "mlflow.tracing.utils"

SqlAlchemyStore: Any = taken(f"{_STORE}:SqlAlchemyStore")
SqlAssessments: Any = taken(f"{_MODELS}:SqlAssessments")
SqlExperiment: Any = taken(f"{_MODELS}:SqlExperiment")
_try_parse_json_string: Any = taken(f"{_STORE}:_try_parse_json_string")
translation: Any = taken("mlflow.tracing.otel:translation")
translate_span_when_storing: Any = taken(f"{_TRANSLATION}:translate_span_when_storing")
sanitize_attributes: Any = taken(f"{_TRANSLATION}:sanitize_attributes")
update_cost: Any = taken(f"{_TRANSLATION}:update_cost")
dump_span_attribute_value: Any = taken(f"{_UTILS}:dump_span_attribute_value")
# From mlflow 3.15 on.
SpanAggregationNode: Any = taken(f"{_UTILS}:SpanAggregationNode")
aggregate_cost_from_span_nodes: Any = taken(f"{_UTILS}:aggregate_cost_from_span_nodes")
# From mlflow 3.17 on.
analytics_columns_from_metadata: Any = taken(f"{_ANALYTICS}:analytics_columns_from_metadata")
bounded_model_dimension: Any = taken(f"{_ANALYTICS}:bounded_model_dimension")
rollups_enabled: Any = taken("mlflow.store.tracking.utils.sql_trace_rollups:rollups_enabled", lambda: False)

_ARTIFACT_LOCATION = "mlflow.artifactLocation"
_DIALECTS = ("sqlite", "postgresql")
# By our names: MLflow's model of a table, its column with the trace's id, and the columns that are in all versions.
_TABLES = {
    "info": (
        taken(f"{_MODELS}:SqlTraceInfo"),
        "request_id",
        (
            "request_id experiment_id timestamp_ms execution_time_ms status client_request_id request_preview "
            "response_preview"
        ),
    ),
    "tags": (taken(f"{_MODELS}:SqlTraceTag"), "request_id", "request_id key value"),
    "metadata": (taken(f"{_MODELS}:SqlTraceMetadata"), "request_id", "request_id key value"),
    "metrics": (taken(f"{_MODELS}:SqlTraceMetrics"), "request_id", "request_id key value"),
    "spans": (
        taken(f"{_MODELS}:SqlSpan"),
        "trace_id",
        (
            "trace_id experiment_id span_id parent_span_id name type status start_time_unix_nano end_time_unix_nano "
            "duration_ns content"
        ),
    ),
    "span_metrics": (taken(f"{_MODELS}:SqlSpanMetrics"), "trace_id", "trace_id span_id key value"),
    "assessments": (
        SqlAssessments,
        "trace_id",
        (
            "assessment_id trace_id name assessment_type value error created_timestamp last_updated_timestamp "
            "source_type source_id run_id span_id rationale overrides valid assessment_metadata"
        ),
    ),
}
# Totals, the session and models have columns from mlflow 3.17 on; before, they are metadata, metrics and JSON.
_IN_COLUMNS = {
    "info": "trace_name session_id input_tokens output_tokens total_tokens cache_read_input_tokens "
    "cache_creation_input_tokens cache_creation_input_tokens_above_1hr input_cost output_cost total_cost",
    "spans": "input_cost output_cost total_cost model_name model_provider",
    "assessments": "experiment_id trace_timestamp_ms aggregate_value is_numeric_value",
}
_NO_ANALYTICS: dict[str, Any] = dict.fromkeys(_IN_COLUMNS["info"].split()[1:])
_BEFORE = {"spans": "dimension_attributes"}
_GENERATION = "db_payload_generation"  # from mlflow 3.13 on


class UnknownTablesError(Exception):
    """The tables, or what MLflow does with them, are not as we know them; the message says in what."""


@dataclass(frozen=True, slots=True)
class TraceTables:
    """Tables of one store, as we know them.

    Attributes:
        store: MLflow's store.
        tables: SQLAlchemy's tables, by the names in `_TABLES`.
        has_columns: Whether totals, the session and models have columns of their own.
        counts_payloads: Whether writes of spans are counted.
    """

    store: Any
    tables: Mapping[str, Any]
    has_columns: bool
    counts_payloads: bool

    @property
    def keeps_more(self) -> bool:
        """Return whether MLflow is told to keep more than these tables: sums of each day."""
        return bool(rollups_enabled())

    def session(self) -> Any:
        """Return a context with a session, whose transaction is committed at its end."""
        return write_session(self.store)

    def artifact_locations(self, session: Any, experiments: Collection[str], trace_id: str) -> dict[str, str]:
        """Return where a trace's artifacts go, by experiment; without those that are not there or deleted."""
        import sqlalchemy

        table = SqlExperiment.__table__.c
        query = sqlalchemy.select(table.experiment_id, table.lifecycle_stage, table.artifact_location).where(
            table.experiment_id.in_([int(each) for each in experiments])
        )
        return {
            str(found): self.store._get_trace_artifact_location_tag(
                SimpleNamespace(artifact_location=location), trace_id
            ).value
            for found, stage, location in session.execute(query)
            if stage == "active"
        }

    def present(self, session: Any, trace_ids: Collection[str]) -> set[str]:
        """Return those of the traces that are there already."""
        import sqlalchemy

        column = self.tables["info"].c.request_id
        return set(session.execute(sqlalchemy.select(column).where(column.in_(trace_ids))).scalars())

    def ordered(self, rows: Mapping[str, Sequence[dict[str, Any]]]) -> list[tuple[Any, Sequence[dict[str, Any]]]]:
        """Return tables and the rows for each, from those by our names. The trace comes before what refers to it."""
        return [(self.tables[name], rows[name]) for name in _TABLES if rows.get(name)]

    def artifact_tag(self, trace_id: str, location: str) -> dict[str, Any]:
        """Return the row of the tag that says where a trace's artifacts go."""
        return {"request_id": trace_id, "key": _ARTIFACT_LOCATION, "value": location}

    def trial_of_store(self, infos: Sequence[Any], spans: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Let MLflow write traces, look at the rows, and undo it.

        Args:
            infos: What `start_trace` is given.
            spans: What `log_spans` is given, by experiment.

        Raises:
            UnknownTablesError: Where MLflow writes to a table that is not one of these.
        """

        def write(session: Any) -> None:
            view = shared_view(self.store, session)
            for info in infos:
                view.start_trace(info)
            for experiment_id, some in spans.items():
                view.log_spans(experiment_id, some)

        return self.trial(write, [info.trace_id for info in infos])

    def trial(self, write: Callable[[Any], object], trace_ids: Collection[str]) -> dict[str, list[Any]]:
        """Write, look at the rows of these traces, and undo it.

        Raises:
            UnknownTablesError: Where something was written to another table than these.
        """
        import sqlalchemy

        written: set[str] = set()

        def note(_connection: Any, statement: Any, *_: Any) -> None:
            if getattr(statement, "is_dml", False):
                written.add(statement.table.name)

        with self.session() as session:
            try:
                sqlalchemy.event.listen(session.connection(), "before_execute", note)
                write(session)
                session.flush()
                found = {name: self._rows(session, name, trace_ids) for name in self.tables}
            finally:
                session.rollback()
        if unknown := written - {table.name for table in self.tables.values()}:
            raise UnknownTablesError(f"MLflow writes to {', '.join(sorted(unknown))}, too")
        return found

    def _rows(self, session: Any, name: str, trace_ids: Collection[str]) -> list[Any]:
        import sqlalchemy

        table = self.tables[name]
        query = sqlalchemy.select(table).where(table.c[_TABLES[name][1]].in_(trace_ids))
        rows = map(dict, session.connection().execute(query).mappings())
        return sorted(rows, key=lambda row: [str(row[key.name]) for key in table.primary_key])


def trace_tables(store: Any) -> TraceTables:
    """Return the tables of a store.

    Raises:
        UnknownTablesError: Where they are not as we know them, with the reason.
    """
    import sqlalchemy

    if not finalizes():
        raise UnknownTablesError("traces are known from mlflow 3.12 on")
    needed: tuple[Any, ...] = (
        SqlAlchemyStore,
        SqlExperiment,
        _try_parse_json_string,
        dump_span_attribute_value,
        _translate(),
    )
    needed += (update_cost if aggregate_cost_from_span_nodes is None else SpanAggregationNode,)
    if None in (*needed, *(model for model, _, _ in _TABLES.values())):
        raise UnknownTablesError("names of MLflow have gone")
    if type(store) is not SqlAlchemyStore:
        raise UnknownTablesError(f"{type(store).__name__} is not MLflow's store of SQL alone")
    dialect = store.engine.dialect.name
    if dialect not in _DIALECTS:
        raise UnknownTablesError(f"they are not known for {dialect}")
    tables = {name: model.__table__ for name, (model, _, _) in _TABLES.items()}
    has_columns = "session_id" in tables["info"].columns
    if has_columns and None in (analytics_columns_from_metadata, bounded_model_dimension):
        raise UnknownTablesError("names of MLflow have gone")
    inspector = sqlalchemy.inspect(store.engine)
    for name, table in tables.items():
        mine = {*_TABLES[name][2].split(), *(_IN_COLUMNS if has_columns else _BEFORE).get(name, "").split()}
        theirs = {column.name for column in table.columns} - {_GENERATION}
        there = {column["name"] for column in inspector.get_columns(table.name)} - {_GENERATION}
        if odd := {*theirs.symmetric_difference(mine), *there.symmetric_difference(mine)}:
            raise UnknownTablesError(f"{table.name} has other columns: {', '.join(sorted(odd))}")
    return TraceTables(store, tables, has_columns, _GENERATION in tables["info"].columns)


# --- what MLflow makes of a trace -------------------------------------------------------------------------------------


class Translation(enum.Enum):
    """Outcome of MLflow's translation of a span, as far as its attributes' names and its type decide it."""

    NONE = enum.auto()
    UNLESS_MODEL = enum.auto()  # none, unless its inputs or outputs name a model
    PRICED = enum.auto()  # none, but its cost is added where MLflow knows the price
    OTHER = enum.auto()  # for MLflow to say


# What the store itself reads of a span; beside it, the tags of a trace.
_READ_BY_STORE = frozenset({"session.id", "gen_ai.conversation.id", "user.id"})
_TRACE_TAG = "mlflow.traceTag."
_PRICE = (SpanAttributeKey.CHAT_USAGE, SpanAttributeKey.MODEL, SpanAttributeKey.MODEL_PROVIDER)
_NAMES_MODEL = frozenset({SpanAttributeKey.INPUTS, SpanAttributeKey.OUTPUTS})
_SAMPLES = {
    SpanAttributeKey.CHAT_USAGE: '{"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}',
    SpanAttributeKey.INPUTS: '{"a": 1}',
    SpanAttributeKey.OUTPUTS: '{"a": 1}',
}


class _WatchedText(str):
    """Text that calls its ``note`` when it is used for anything but being handed on."""

    __slots__ = ("note",)
    note: Callable[[], None]


def _noting(method: Any) -> Any:
    def noted(self: _WatchedText, *args: Any, **kwargs: Any) -> Any:
        self.note()
        return method(self, *args, **kwargs)

    return noted


for _name in dir(str):
    if (callable(getattr(str, _name)) and not hasattr(object, _name)) or _name in {
        "__eq__",
        "__ne__",
        "__hash__",
        "__str__",
    }:
        setattr(_WatchedText, _name, _noting(getattr(str, _name)))


class _Watched(dict[str, Any]):
    """Attributes that note whose values are looked at, in whatever way."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __iter__(self) -> Any:  # without it `dict(self)` would pass by `__getitem__`
        return super().__iter__()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - this is `get`

    def items(self) -> Any:
        return [(key, self._watched(key, value)) for key, value in super().items()]

    def values(self) -> Any:
        return [value for _, value in self.items()]

    def pop(self, key: str, *default: Any) -> Any:
        self.read.add(key)
        return super().pop(key, *default)

    def _watched(self, key: str, value: Any) -> Any:
        if type(value) is not str:
            self.read.add(key)
            return value
        text = _WatchedText(value)
        text.note = functools.partial(self.read.add, key)
        return text


@functools.lru_cache(maxsize=4096)
def translation_of(names: tuple[str, ...], type_text: Any) -> Translation:
    """Return what MLflow's translation does to a span without events: asked once, with values of ours.

    Args:
        names: The names of its attributes.
        type_text: The attribute with its type.
    """
    if any(name in _READ_BY_STORE or name.startswith(_TRACE_TAG) for name in names):
        return Translation.OTHER
    translate, priced = _translate(), []
    if translate is None:
        return Translation.OTHER
    samples = {name: _SAMPLES.get(name, '"sample"') for name in names}
    if SpanAttributeKey.SPAN_TYPE in samples:
        samples[SpanAttributeKey.SPAN_TYPE] = type_text
    watched = _Watched(samples)
    own = {"calculate_cost_by_model_and_token_usage": lambda *_: priced.append(True), "sanitize_attributes": _same}
    span = SimpleNamespace(to_dict=lambda: {"attributes": watched, "events": []})
    try:
        found = over(translate, translate.__globals__ | own)(span)["attributes"]
    except Exception:  # noqa: BLE001 - a future MLflow may do anything; then it does it itself
        return Translation.OTHER
    read = watched.read - {SpanAttributeKey.SPAN_TYPE}
    if found is not watched or dict.items(watched) != samples.items():
        return Translation.OTHER
    if priced:
        return Translation.PRICED if read <= set(_PRICE) else Translation.OTHER
    if read - _NAMES_MODEL:
        return Translation.OTHER
    return Translation.UNLESS_MODEL if read else Translation.NONE


def _same(attributes: Any) -> Any:
    return attributes


@functools.cache
def _translate() -> FunctionType | None:
    found = translate_span_when_storing
    return found if isinstance(found, FunctionType) and translation is not None else None


@functools.cache
def _sanitizes() -> bool:
    """Return whether one layer is taken from values that are JSON in JSON (before mlflow 3.18)."""
    translate = _translate()
    return translate is not None and "sanitize_attributes" in translate.__code__.co_names


def translated(span: Any) -> dict[str, Any]:
    """Return the attributes that MLflow stores of a span."""
    found: dict[str, Any] = translate_span_when_storing(span)["attributes"]
    return found


def sanitized(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the attributes as MLflow takes them for its translation; the same object where nothing is changed."""
    if not _sanitizes() or not _may_any_be_nested(attributes.values()):
        return attributes
    before = dict(attributes)
    after: dict[str, Any] = sanitize_attributes(before)
    return attributes if after == before else after


def _may_any_be_nested(values: Collection[Any]) -> bool:
    """Return whether any text may be JSON of a text that is JSON of a text, an object or a list."""
    try:
        return any(map(_begins_nested, map(_beginning, values)))
    except TypeError:  # a number, or a list
        return any(_begins_nested(value[:2]) for value in values if isinstance(value, (str, bytes)))


_beginning = operator.itemgetter(slice(2))


@functools.lru_cache(maxsize=1024)
def _begins_nested(beginning: Any) -> bool:
    """Return whether what begins with these two letters may be JSON in JSON."""
    if type(beginning) is not str:
        return isinstance(beginning, bytes)
    return beginning[:1] in _SPACE or (beginning[:1] == '"' and beginning[1:] in _NESTED)


_SPACE = frozenset(" \t\n\r")
_NESTED = frozenset("{[\\ ")


def cost_of(attributes: Mapping[str, Any]) -> str | None:
    """Return the cost that MLflow adds to a priced span, as it writes it; None for a model without a price."""
    usage, model, provider = (attributes.get(key) for key in _PRICE)
    # Looked up each time, since `mlflow_prices` puts its own there; in a server with our store it is MLflow's.
    calculate = translation.calculate_cost_by_model_and_token_usage
    cost = cost_of_tokens(calculate, read(model or ""), read(usage or ""), None if provider is None else read(provider))
    return dump_span_attribute_value(cost) if cost else None


def total_cost(spans: Sequence[tuple[str, str | None, dict[str, Any] | None]]) -> dict[str, float]:
    """Return the cost of a trace, from the id, the parent's id and the cost, if there is one, of each of its spans."""
    if aggregate_cost_from_span_nodes is not None:
        nodes = [SpanAggregationNode(span_id=span, parent_id=parent, data=cost) for span, parent, cost in spans]
        return aggregate_cost_from_span_nodes(nodes) or {}
    total: dict[str, float] = {}
    for _, _, cost in spans:
        if cost:
            total = update_cost(total, cost)
    return total


def unquoted(value: Any) -> Any:
    """Return the text in a JSON text, and anything else as it is."""
    return _try_parse_json_string(value)


@functools.lru_cache(maxsize=1024)
def model_dimension(value: str | None) -> str | None:
    """Return the name of a model or a provider for its column."""
    found: str | None = bounded_model_dimension(_try_parse_json_string(value))
    return found


def analytics_columns(metadata: dict[str, str]) -> dict[str, Any]:
    """Return totals and session by column: None where the metadata say nothing of them."""
    if metadata.keys().isdisjoint(_NOT_USAGE):
        usage = read(metadata.get(TraceMetadataKey.TOKEN_USAGE, "{}"))
        if type(usage) is dict and usage.keys() <= _TOKENS and all(map(_is_count, usage.values())):
            return _NO_ANALYTICS | usage
    return _NO_ANALYTICS | analytics_columns_from_metadata(metadata)


_TOKENS = frozenset(name for name in _NO_ANALYTICS if "tokens" in name)
_NOT_USAGE = frozenset({TraceMetadataKey.TRACE_SESSION, TraceMetadataKey.COST})


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # what a column takes


def assessment_columns(assessment: Any) -> dict[str, Any]:
    """Return the row of an assessment; the columns that repeat what the trace says are for the caller."""
    row = SqlAssessments.from_mlflow_entity(copy.copy(assessment))
    found = {}
    for column in SqlAssessments.__table__.columns:
        value = getattr(row, column.name)
        found[column.name] = column.default.arg if value is None and column.default is not None else value
    return found
