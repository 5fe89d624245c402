"""Rows reach a database by few statements, and what is reckoned of a trace is what MLflow reckons."""

import json
import random

import hypothesis.strategies as st
import mlflow
import pytest
import sqlalchemy
from hypothesis import given, settings
from mlflow.entities import Span, Trace, TraceData, TraceInfo, TraceState
from mlflow.entities.trace_location import TraceLocation
from mlflow.tracing import utils as tracing_utils
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, Status, StatusCode
from packaging.version import Version
from stores import TOKENS

from dspy_mlflow_async.export.write.many_rows import insert_rows
from dspy_mlflow_async.seams import mlflow_traces
from dspy_mlflow_async.seams.mlflow_span_text import add_sizes, record_of, text_of
from dspy_mlflow_async.seams.mlflow_trace_tables import (
    analytics_columns,
    analytics_columns_from_metadata,
    sanitize_attributes,
    sanitized,
)

BEFORE_3_18 = Version(mlflow.__version__).release < (3, 18)  # from there on MLflow takes no layer from JSON in JSON

TABLE = sqlalchemy.Table(
    "some rows",
    sqlalchemy.MetaData(),
    sqlalchemy.Column("order", sqlalchemy.BigInteger, primary_key=True),
    sqlalchemy.Column("some text", sqlalchemy.Text),
    sqlalchemy.Column("number", sqlalchemy.Float(precision=53)),
    sqlalchemy.Column("data", sqlalchemy.JSON),
    sqlalchemy.Column("is_it", sqlalchemy.Boolean),
    sqlalchemy.Column("given", sqlalchemy.String(10), default="by default"),
)
VALUES = {
    "some text": st.none() | st.text(),
    "number": st.none() | st.floats(allow_nan=False),
    "data": st.none() | st.dictionaries(st.text(), st.integers() | st.text()),
    "is_it": st.none() | st.booleans(),
    "given": st.text(max_size=10),
}


@given(rows=st.lists(st.fixed_dictionaries(VALUES), min_size=1, max_size=150), without=st.booleans())
@settings(max_examples=40, deadline=None)
def test_rows_are_those_that_sqlalchemy_inserts(rows, without):
    """Values of all types, NULL, names that need quotes, and a default of the table's, as SQLAlchemy would."""
    rows = [{"order": place} | row for place, row in enumerate(rows)]
    if without:
        rows = [{name: value for name, value in row.items() if name != "given"} for row in rows]
    found = []
    for insert in (insert_rows, lambda connection, table, some: connection.execute(sqlalchemy.insert(table), some)):
        engine = sqlalchemy.create_engine("sqlite://")
        with engine.begin() as connection:
            TABLE.create(connection)
            insert(connection, TABLE, rows)
            found.append(connection.execute(sqlalchemy.text('SELECT * FROM "some rows" ORDER BY "order"')).all())
        engine.dispose()

    assert found[0] == found[1]
    assert len(rows) == len(found[0])


def test_hundreds_of_rows_take_few_statements():
    """Each lets go of the interpreter once; 500 rows by `executemany` did so 500 times."""
    engine = sqlalchemy.create_engine("sqlite://")
    statements = []
    rows = [{"order": n, "some text": "x", "number": 1.0, "data": {}, "is_it": True, "given": "g"} for n in range(500)]
    with engine.begin() as connection:
        TABLE.create(connection)
        sqlalchemy.event.listen(connection, "before_cursor_execute", lambda *event: statements.append(event[-1]))
        insert_rows(connection, TABLE, rows)
    engine.dispose()

    assert len(statements) <= 13
    assert not any(statements)  # executemany


def test_a_row_without_a_column_is_no_row():
    """It is refused, and nothing is written in its place."""
    engine = sqlalchemy.create_engine("sqlite://")
    with engine.begin() as connection:
        TABLE.create(connection)
        with pytest.raises(KeyError):
            insert_rows(connection, TABLE, [{"order": 1, "given": "a"}, {"order": 2}])
    engine.dispose()


TEXT = st.text(max_size=300)


@given(
    metadata=st.dictionaries(TEXT, TEXT, max_size=4),
    tags=st.dictionaries(TEXT, TEXT, max_size=3),
    previews=st.tuples(st.none() | TEXT, st.none() | TEXT, st.none() | TEXT),
    times=st.tuples(st.integers(0, 2_000_000_000_000), st.none() | st.integers(0, 10**7)),
    state=st.sampled_from(list(TraceState)),
)
@settings(max_examples=200, deadline=None)
def test_sizes_are_mlflows_whatever_a_trace_holds(metadata, tags, previews, times, state):
    """Any texts, among them those that MLflow cuts, and all that a trace may lack."""
    spans = [span_of(1, None)]

    def info():
        return TraceInfo(
            trace_id="tr-1",
            trace_location=TraceLocation.from_experiment_id("7"),
            request_time=times[0],
            execution_duration=times[1],
            state=state,
            request_preview=previews[0],
            response_preview=previews[1],
            client_request_id=previews[2],
            trace_metadata={key.replace("\ud800", ""): value for key, value in metadata.items()},
            tags=dict(tags),
        )

    mine, theirs = info(), info()
    add_sizes(mine, spans, list(map(text_of, spans)))
    tracing_utils.add_size_stats_to_trace_metadata(Trace(theirs, TraceData(spans)))

    assert theirs.trace_metadata == mine.trace_metadata


ODD_TEXT = st.text(st.sampled_from('%s"\\{[ é\x7f\N{GRINNING FACE}\n'), max_size=8)
ODD_VALUES = ODD_TEXT | st.integers() | st.booleans() | st.lists(st.text(max_size=3), max_size=2).map(tuple)


@given(
    name=ODD_TEXT,
    attributes=st.dictionaries(ODD_TEXT, ODD_TEXT | ODD_VALUES, max_size=4),
    message=st.none() | ODD_TEXT,
    parent=st.none() | st.just(7),
)
@settings(max_examples=300, deadline=None)
def test_text_of_a_span_is_mlflows_whatever_it_holds(name, attributes, message, parent):
    """Letters that a template, JSON or MLflow treats in a way of their own, and values that are no text."""
    span = span_of(3, parent, name=name, more=attributes, status=Status(StatusCode.ERROR, message))

    expected = json.dumps(span.to_dict(), cls=tracing_utils.TraceJSONEncoder, ensure_ascii=False)
    assert expected == text_of(span)
    assert expected == record_of(span).text


@given(attributes=st.dictionaries(st.text(max_size=3), ODD_TEXT | ODD_TEXT.map(json.dumps) | ODD_VALUES, max_size=4))
@settings(max_examples=300, deadline=None)
def test_json_in_json_is_found_as_mlflow_finds_it(attributes):
    """Whether a layer is taken from a value is MLflow's to say; what it leaves alone is not copied."""
    found = sanitized(attributes)

    assert (sanitize_attributes(dict(attributes)) if BEFORE_3_18 else attributes) == found
    assert (found is attributes) == (found == attributes)


@pytest.mark.skipif(analytics_columns_from_metadata is None, reason="MLflow has no such columns before 3.17")
@given(
    usage=st.none()
    | st.dictionaries(
        st.sampled_from(["input_tokens", "output_tokens", "cache_read_input_tokens", "session_id", "other"]),
        st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats(0, 9) | st.just("7"),
    ),
    more=st.sampled_from([{}, {"mlflow.trace.session": "s"}, {"mlflow.trace.cost": '{"total_cost": 1}'}]),
)
@settings(max_examples=200, deadline=None)
def test_columns_of_totals_are_mlflows(usage, more):
    """Counts that are plain are taken as they are, and MLflow says what becomes of any others."""
    metadata = more | ({} if usage is None else {"mlflow.trace.tokenUsage": json.dumps(usage)})
    columns = analytics_columns(metadata)

    expected = analytics_columns_from_metadata(metadata)
    assert expected == {key: columns[key] for key in expected}
    assert not any(value for key, value in columns.items() if key not in expected)


def span_of(number, parent, usage=None, *, name=None, more=None, status=None):
    """A span that has ended, with usage or not."""

    def context(span_id):
        return SpanContext(trace_id=5, span_id=span_id, is_remote=False)

    attributes = {"mlflow.traceRequestId": '"tr-1"', "mlflow.spanType": '"LLM"', **(more or {})}
    if usage is not None:
        attributes[TOKENS] = json.dumps(usage)
    return Span(
        ReadableSpan(
            name=f"span {number}" if name is None else name,
            context=context(number),
            parent=None if parent is None else context(parent),
            resource=Resource({}),
            attributes=attributes,
            status=status or Status(StatusCode.UNSET),
            start_time=number,
            end_time=number + 1,
        )
    )


USAGE = st.none() | st.fixed_dictionaries(
    {"input_tokens": st.integers(0, 9), "output_tokens": st.integers(0, 9), "total_tokens": st.integers(0, 20)},
    optional={"cache_read_input_tokens": st.integers(0, 5)},
)


@given(usages=st.lists(USAGE, min_size=1, max_size=8), seed=st.integers(0, 10**6), orphans=st.booleans())
@settings(max_examples=300, deadline=None)
def test_usage_of_a_trace_is_mlflows_sum(usages, seed, orphans):
    """Any tree, with one root or several, whichever of its spans bear usage."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    spans = []
    for number, usage in enumerate(usages, 1):
        parent = None if number == 1 else chance.randrange(1, number)
        if orphans and number > 1 and chance.random() < 0.3:
            parent = chance.choice([None, 99])
        spans.append(span_of(number, parent, usage))
    chance.shuffle(spans)

    assert tracing_utils.aggregate_usage_from_spans(spans) == mlflow_traces.usage_of_trace(spans)
