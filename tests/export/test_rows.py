"""Complete new traces go to a SQL store as rows, once it is proved that those are MLflow's; all others as ever."""

import contextlib
import json
import sqlite3
import threading

import mlflow
import pytest
from mlflow.entities import AssessmentSource, Feedback, LiveSpan, Span, Trace, TraceData, TraceInfo, TraceState
from mlflow.entities.trace_location import TraceLocation
from mlflow.store.tracking import sqlalchemy_store
from mlflow.tracing import utils as tracing_utils
from mlflow.tracing.client import TracingClient
from packaging.version import Version
from stores import TOKENS, call

from dspy_mlflow_async import export
from dspy_mlflow_async.export.operations import TraceOperation
from dspy_mlflow_async.export.write import prepare
from dspy_mlflow_async.export.write.errors import Verdict
from dspy_mlflow_async.export.write.row_writer import RowWriter, row_writer
from dspy_mlflow_async.export.write.writer import Writer
from dspy_mlflow_async.seams import mlflow_span_text, mlflow_store
from dspy_mlflow_async.seams.mlflow_trace_tables import TraceTables, Translation, translation_of
from rows.compare import compare, two_files
from rows.corpus import twin

KINDS = {
    *("trace", "usage", "usage of its own", "cost", "cost of its own", "session", "error", "events or links"),
    *("times of spans", "letters beyond ASCII", "assessment: feedback", "assessment: expectation"),
}
if Version(mlflow.__version__).release < (3, 18):  # from there on MLflow takes no layer from JSON in JSON
    KINDS.add("JSON in JSON")


@pytest.fixture
def store(_empty_store, tmp_path):
    """The URI of a store of the test's own."""
    path = tmp_path / "store.db"
    path.write_bytes(_empty_store.read_bytes())
    return f"sqlite:///{path}"


def count(uri, table="trace_info"):
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as connection:
        return connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608 - a name of ours


def write(uri, items, **options):
    return [outcome.verdict for outcome in Writer(uri, **options).write([twin(item) for item in items])]


def test_the_rows_are_those_of_mlflow(traces, store, tmp_path):
    """Two stores, one written by MLflow and one by rows, are the same in every column of every table."""
    result = compare(traces, *two_files(store.removeprefix("sqlite:///"), tmp_path))

    assert [] == result.differences
    assert KINDS <= set(result.proved)
    assert ("JSON in JSON" in KINDS) == ("JSON in JSON" in result.proved)
    assert {} == result.refused
    assert 0.7 * result.traces < result.as_rows < result.traces  # what MLflow translates is left to it


def test_texts_and_sizes_are_those_of_mlflow(traces):
    """The text of a span, and the statistics of a trace's sizes, are what MLflow makes of a dict of each span."""
    for item in map(twin, traces):
        texts = [record.text for record in prepare.prepare(item)]
        own = {key: item.info.trace_metadata[key] for key in ("mlflow.trace.sizeStats", "mlflow.trace.sizeBytes")}
        for key in own:
            del item.info.trace_metadata[key]
        tracing_utils.add_size_stats_to_trace_metadata(Trace(item.info, TraceData(list(item.spans))))

        expected = [
            json.dumps(span.to_dict(), cls=tracing_utils.TraceJSONEncoder, ensure_ascii=False) for span in item.spans
        ]
        assert expected == texts
        assert own == {key: item.info.trace_metadata[key] for key in own}
    assert mlflow_span_text.adds_same_sizes()


def test_spans_become_immutable_when_somebody_asks(sqlite, monkeypatch):
    """Rows need no immutable span; whoever reads the spans of a prepared trace finds them immutable."""
    made, immutable = [], LiveSpan.to_immutable_span
    monkeypatch.setattr(LiveSpan, "to_immutable_span", lambda span: made.append(span) or immutable(span))
    for _ in range(2):  # the first one is tried out
        made.clear()
        call()
        assert export.flush(60)
    assert [] == made or not mlflow_store.finalizes()  # there are no rows in MLflow 3.11
    made.clear()
    live = mlflow.start_span_no_context("later")
    live.end()
    operation = TraceOperation(key=live.trace_id, info=info_of(live), spans=[live], experiment_id="0")
    (record,) = prepare.prepare(operation)

    assert [] == made
    assert record.span is live
    assert [Span] == list(map(type, operation.spans)) == [type(operation.spans[0])]
    assert [live] == made


def info_of(span):
    """A trace that is not known to anybody."""
    return TraceInfo(
        trace_id=span.trace_id,
        trace_location=TraceLocation.from_experiment_id("0"),
        request_time=1,
        execution_duration=1,
        state=TraceState.OK,
    )


def test_a_trial_leaves_nothing(traces, store):
    """Both ways are undone, and nothing is written before somebody asks for it."""
    prepared = [twin(item) for item in traces]
    for item in prepared:
        prepare.prepare(item)
    writer = RowWriter()
    writer.try_out(mlflow_store.tracing_client(store).store, prepared)

    assert "trace" in writer.proved
    assert [0] * 4 == [count(store, table) for table in ("trace_info", "trace_tags", "spans", "assessments")]


def test_what_callers_make_is_written_as_rows(sqlite):
    """The first traces are tried out in the writer's thread, and all of them are stored once."""
    ids = [call() for _ in range(5)]

    assert export.flush(60)
    assert set(ids) == set(sqlite.read())
    assert {"trace", "usage"} <= row_writer(sqlite.uri).proved


def test_no_caller_waits_for_a_trial(sqlite, monkeypatch):
    """What is written in the thread of a caller is written by MLflow, until the writer's thread has tried rows out."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    tried = []
    monkeypatch.setattr(TraceTables, "trial_of_store", lambda *_: tried.append(threading.current_thread()))
    fresh = RowWriter()
    monkeypatch.setattr("dspy_mlflow_async.export.write.writer.row_writer", lambda _uri: fresh)

    trace_id = call()

    assert {trace_id} == set(sqlite.read())
    assert [] == tried


@pytest.mark.parametrize("where", ["an attribute", "a row"])
def test_what_a_later_mlflow_does_otherwise_is_left_to_it(traces, store, monkeypatch, where):
    """A store that writes something else than our rows is found out before any of them is written."""
    translate, log_spans = (
        sqlalchemy_store.translate_span_when_storing,
        sqlalchemy_store.SqlAlchemyStore._log_spans_once,
    )

    def translate_more(span):
        found = translate(span)
        found["attributes"]["mlflow.new"] = '"x"'
        return found

    def log_more(self, location, spans, tracking_uri=None):
        log_spans(self, location, spans, tracking_uri=tracking_uri)
        with self.ManagedSessionMaker(read_only=False) as session:
            for trace_id in {span.trace_id for span in spans}:
                session.merge(sqlalchemy_store.SqlTraceTag(request_id=trace_id, key="new", value="x"))

    if where == "an attribute":
        monkeypatch.setattr(sqlalchemy_store, "translate_span_when_storing", translate_more)
    else:
        monkeypatch.setattr(sqlalchemy_store.SqlAlchemyStore, "_log_spans_once", log_more)
    plain = [item for item in traces if item.info.tags["mlflow.traceName"] == "ReAct.forward"]
    verdicts = write(store, plain)

    assert {Verdict.STORED} == set(verdicts)
    rows = row_writer(store)
    assert set() == rows.proved
    assert {"content of spans differ" if where == "an attribute" else "tags have"} == {
        reason[: len("tags have")] if where == "a row" else reason for reason in rows.refused.values()
    }
    assert len(plain) == count(store)


def test_another_column_is_found_out(traces, store):
    """Where the database has a column that we do not know, MLflow writes, and the reason names it."""
    with contextlib.closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as connection:
        connection.execute("ALTER TABLE spans ADD COLUMN weight INTEGER")

    assert {Verdict.STORED} == set(write(store, traces[:3]))
    assert "spans has other columns: weight" == row_writer(store).reason
    assert (False, "MLflow's functions write all traces, since spans has other columns: weight") == export.explain_rows(
        store
    )


def test_another_table_is_found_out(traces, store, monkeypatch):
    """Where MLflow keeps sums of each day, or anything else beside a trace, it writes itself."""
    monkeypatch.setenv("MLFLOW_SQL_TRACE_ROLLUPS_ENABLED", "true")

    assert {Verdict.STORED} == set(write(store, traces[:3]))
    assert set() == row_writer(store).proved


def test_a_trace_that_is_there_is_not_doubled(traces, store):
    """After an answer that was lost, or where a part was shown before, MLflow completes what is there."""
    first = twin(traces[0])
    first.stage, first.spans = "partial", list(first.spans)[:1]
    shown = write(store, [first])
    again = [write(store, traces[:4]) for _ in range(2)]

    assert {Verdict.STORED} == {*shown, *again[0], *again[1]}
    assert 4 == count(store)
    assert sum(len(item.spans) for item in traces[:4]) == count(store, "spans")
    assert "trace" in row_writer(store).proved


def test_one_trace_does_not_keep_the_others_from_the_store(sqlite):
    """What the database refuses in a batch of rows is found by MLflow's way, and the rest is stored, whole."""
    call()
    assert export.flush(60)
    sqlite.stop_writing()
    ids = [call() for _ in range(3)]
    source = AssessmentSource(source_type="CODE", source_id="x")
    with mlflow.start_span("bad") as span:
        span.set_inputs("x")
        export.hold(span.trace_id)
    # No database has a name for that: it is refused wherever it stands.
    export.release(span.trace_id, assessments=[Feedback(name=None, value=1.0, source=source)])
    sqlite.write_again()

    export.flush(20)
    assert {4} == {len(sqlite.read()[trace_id].data.spans) for trace_id in ids}
    assert span.trace_id not in sqlite.read()
    assert 4 == export.stats().stored


def test_a_store_that_is_away_has_nothing_of_a_batch(traces, store):
    """Where the database takes nothing now, no row is left behind; the next attempt is MLflow's, then rows again."""
    few = [item for item in traces if item.info.tags["mlflow.traceName"] == "ReAct.forward"]
    writer = Writer(store)
    assert [Verdict.STORED] == [outcome.verdict for outcome in writer.write([twin(few[0])])]
    engine = mlflow_store.TracingClient(store).store.engine
    with contextlib.ExitStack() as stack:  # all that rest in the pool: the next write takes one of them
        for connection in [stack.enter_context(engine.connect()) for _ in range(engine.pool.checkedin())]:
            connection.exec_driver_sql("PRAGMA query_only = ON")

    verdicts = [[outcome.verdict for outcome in writer.write(list(map(twin, few[1:])))] for _ in range(2)]
    assert [Verdict.AWAY] * len(few[1:]) == verdicts[0]
    assert [Verdict.STORED] * len(few[1:]) == verdicts[1]
    assert len(few) == count(store)
    assert row_writer(store).reason is None


@pytest.mark.parametrize(
    ("names", "outcome"),
    [
        (("mlflow.traceRequestId", "mlflow.spanType", "mlflow.spanLogLevel"), Translation.NONE),
        (("mlflow.spanType", "mlflow.spanInputs", "mlflow.spanOutputs", "note"), Translation.UNLESS_MODEL),
        (("mlflow.spanType", "mlflow.spanInputs", TOKENS, "mlflow.llm.model"), Translation.PRICED),
        (("openinference.span.kind", "input.value"), Translation.OTHER),
        (("gen_ai.request.model", "gen_ai.usage.input_tokens"), Translation.OTHER),
        (("traceloop.entity.input",), Translation.OTHER),
        (("gen_ai.prompt.0.content",), Translation.OTHER),
        (("session.id",), Translation.OTHER),
        (("user.id",), Translation.OTHER),
        (("mlflow.traceTag.mine",), Translation.OTHER),
    ],
)
def test_attributes_that_mlflow_maps_are_left_to_it(names, outcome):
    """Whether it does is asked of MLflow's own translation, once for each set of names."""
    assert outcome is translation_of(names, '"UNKNOWN"')


def test_a_replaced_store_is_read_as_ever(sqlite):
    """What was written as rows is found by MLflow's searches: by text, by feedback and by name."""
    ids = [call(text=f"needle {number}") for number in range(3)]
    assert export.flush(60)
    found = TracingClient(sqlite.uri).search_traces(
        locations=[sqlite.experiment_id], filter_string="trace.text LIKE '%needle 1%'"
    )

    assert [ids[1]] == [trace.info.trace_id for trace in found]
