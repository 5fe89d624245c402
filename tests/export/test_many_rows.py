"""Rows reach a database by few statements, and what is reckoned of a trace is what MLflow reckons."""

import json
import random

import hypothesis.strategies as st
import pytest
import sqlalchemy
from hypothesis import given, settings
from mlflow.entities import Span, Trace, TraceData, TraceInfo, TraceState
from mlflow.entities.trace_location import TraceLocation
from mlflow.tracing import utils as tracing_utils
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext
from stores import TOKENS

from dspy_mlflow_async.export.write.many_rows import insert_rows
from dspy_mlflow_async.seams import mlflow_traces
from dspy_mlflow_async.seams.mlflow_span_text import add_sizes, text_of

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


def span_of(number, parent, usage=None):
    """A span that has ended, with usage or not."""

    def context(span_id):
        return SpanContext(trace_id=5, span_id=span_id, is_remote=False)

    attributes = {"mlflow.traceRequestId": '"tr-1"', "mlflow.spanType": '"LLM"'}
    if usage is not None:
        attributes[TOKENS] = json.dumps(usage)
    return Span(
        ReadableSpan(
            name=f"span {number}",
            context=context(number),
            parent=None if parent is None else context(parent),
            resource=Resource({}),
            attributes=attributes,
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
