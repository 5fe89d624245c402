"""The pipeline before an `mlflow server` over PostgreSQL, whose rules are stricter than sqlite's."""

import os
import tempfile
import threading

import dspy
import mlflow
import pytest
import sqlalchemy
from mlflow.entities import Feedback, Metric
from postgres import Postgres, install, programs
from stores import call, wait_until

import dspy_mlflow_async
from dspy_mlflow_async import export
from dspy_mlflow_async.cli.audit.auditing import audit
from dspy_mlflow_async.cli.audit.findings import Kind
from dspy_mlflow_async.cli.audit.store import Store
from dspy_mlflow_async.cli.harvest import examples_from_traces
from dspy_mlflow_async.cli.lineage import origin_of
from echo import EchoLM
from mlflow_server import mlflow_server

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("postgresql")]


@pytest.fixture(scope="module")
def postgres():
    """A cluster of this module's own, of the newest PostgreSQL of this machine, which CI must have."""
    bin_folder = programs() or install()
    if bin_folder is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say("no PostgreSQL server on this machine, and none could be installed: install your system's postgresql")
    with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
        postgres = Postgres(folder, bin_folder)
        postgres.start()
        yield postgres
        postgres.stop()


@pytest.fixture(scope="module")
def server(postgres, tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server"), postgres.uri) as server:
        yield server


def arrived(installed, ids):
    traces = installed.read()
    return set(ids) == set(traces) and {4} == {len(trace.data.spans) for trace in traces.values()}


@pytest.mark.long
def test_many_threads_lose_nothing(make, server):
    """Whole traces with right totals, from many callers, and feedback with them."""
    installed = make(uri=server.uri)
    ids = []

    def work():
        for _ in range(15):
            ids.append(call())
            export.release(ids[-1], assessments=[Feedback(name="score", value=1.0)])

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert export.flush(120)
    traces = installed.read()
    assert 240 == len(ids)
    assert set(ids) == set(traces)
    assert {(4, 9, 1)} == {
        (len(trace.data.spans), trace.info.token_usage["total_tokens"], len(trace.info.assessments))
        for trace in traces.values()
    }


def test_text_that_postgresql_does_not_take(make, server):
    """NUL and lone surrogates arrive as replacement characters; in the JSON of a span NUL is an escape, and stays."""
    installed = make(uri=server.uri)
    trace_id = call(text="before\0after \ud800 end")
    export.release(trace_id, assessments=[Feedback(name="score", value="a\0b")], tags={"tag": "c\0d"})

    assert export.flush(60)
    trace = installed.read()[trace_id]
    assert {"answer": "before\0after \ufffd end"} == trace.data.spans[0].outputs
    assert "c\ufffdd" == trace.info.tags["tag"]
    assert ["a\ufffdb"] == [assessment.value for assessment in trace.info.assessments]
    assert (1, 0, 0) == (export.stats().stored, export.stats().dead, export.stats().dropped)


@pytest.mark.long
def test_a_database_that_is_cut_off_in_the_middle(make, server, postgres):
    """The server answers with errors while its database is away; everything is there afterwards, once."""
    installed = make(uri=server.uri)
    ids = [call() for _ in range(5)]
    assert export.flush(60)
    run_id = mlflow.tracking.MlflowClient(server.uri).create_run(installed.experiment_id).info.run_id
    writer = export.run_writer(server.uri)
    postgres.stop()
    try:
        ids += [call() for _ in range(20)]
        writer.log(run_id, metrics=[Metric("score", 2.0, 2, 1)])
        assert not writer.settle(run_id)
        assert not export.flush(10)
        assert (25, 5) == (export.stats().ended, export.stats().stored)
    finally:
        postgres.start()

    wait_until(lambda: export.flush(5) and export.stats().stored == 25, 120)
    assert arrived(installed, ids)
    history = mlflow.tracking.MlflowClient(server.uri).get_metric_history(run_id, "score")
    assert [2.0] == [metric.value for metric in history]


class Twice(dspy.teleprompt.Teleprompter):
    """Evaluates the program as it came, and one with other instructions, which it returns."""

    def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
        changed = student.deepcopy()
        changed.signature = changed.signature.with_instructions("Say it again.")
        for program in (student, changed):
            dspy.Evaluate(devset=trainset, metric=lambda example, prediction: 0.5, num_threads=1)(program)
        return changed


def test_what_reads_a_store_reads_its_tables_and_through_a_server(postgres, server, monkeypatch):
    """``audit`` finds nothing in what we wrote, and a fault that is put in; ``which`` leads to the compile."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(server.uri)
    experiment = mlflow.set_experiment("read").experiment_id
    mlflow.tracing.reset()
    examples = [dspy.Example(question=f"@{n}", answer=f"@{n}").with_inputs("question") for n in range(2)]
    try:
        dspy_mlflow_async.autolog(silent=True, log_evals=True, log_compiles=True)
        dspy.configure(lm=EchoLM())
        compiled = Twice().compile(dspy.Predict("question -> answer"), trainset=examples)
        with dspy_mlflow_async.request(session_id="later") as record:
            compiled(question="@later")
        dspy.Evaluate(devset=examples, metric=lambda example, prediction: 1.0, num_threads=1)(compiled)
        assert dspy_mlflow_async.flush()

        for uri in (server.uri, postgres.uri):
            assert {} == dict(audit(Store(uri, [experiment])).counts)
            origin = origin_of(compiled, experiment=experiment, tracking_uri=uri)
            assert [[(1, 50.0)]] == [
                [(score.step, score.value) for score in each.candidate.scores] for each in origin.candidates
            ]
            assert [100.0] == [each.score for each in origin.evaluations]
            assert record.trace_id == origin.traces[0].trace_id
            assert 3 == len(origin.traces)  # with those of the evaluation
            found = examples_from_traces("question -> answer", experiment=experiment, tracking_uri=uri)
            assert {"@0", "@1", "@later"} == {each.question for each in found}
        engine = sqlalchemy.create_engine(postgres.uri)
        with engine.begin() as connection:
            wrong = "UPDATE spans SET parent_span_id = 'gone' WHERE trace_id = :id AND name = 'ChatAdapter.format'"
            connection.execute(sqlalchemy.text(wrong), {"id": record.trace_id})
        engine.dispose()
        assert {Kind.NO_PARENT: 1} == dict(audit(Store(postgres.uri, [experiment])).counts)
    finally:
        dspy_mlflow_async.autolog(disable=True)
        mlflow.set_tracking_uri(before)
        mlflow.tracing.reset()
