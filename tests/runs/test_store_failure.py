"""A store that is away, dies or hangs while evaluations run, and the core part against a real server over HTTP."""

import contextlib
import logging
import re
import socket
import sqlite3
import threading
import time

import dspy
import mlflow
import pytest
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking import fluent
from runtools import TIMEOUT, Candidates, Program, Store, devset, evaluate, flush, in_threads, markers

import dspy_mlflow_async
from dspy_mlflow_async.export import runs as store_runs
from dspy_mlflow_async.runs import selection
from echo import feedback_on
from mlflow_server import mlflow_server
from slow_store import slow_store

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("mlflow server")]
BOUND = 45.0  # seconds that a store may cost an evaluation here: its own bounds are 5 s and 10 s, the machine is shared


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(folder, f"sqlite:///{folder / 'server.db'}") as server:
        yield server


@contextlib.contextmanager
def store_at(uri, monkeypatch, tmp_path, experiment_id=None):
    """Make ``uri`` MLflow's store, with our tracer on."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(tmp_path / "spool"))
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.tracing.reset()
    if experiment_id is None:
        experiment_id = mlflow.create_experiment(f"e{time.time_ns()}")
    monkeypatch.setattr(fluent, "_active_experiment_id", experiment_id)
    dspy_mlflow_async.autolog(log_evals=True, log_compiles=True, silent=True)
    try:
        yield Store(experiment_id)
    finally:
        dspy_mlflow_async.autolog(disable=True)
        mlflow.set_tracking_uri(before)
        mlflow.tracing.reset()


@pytest.fixture
def http(server, monkeypatch, tmp_path):
    """The real server, with our tracer on."""
    with store_at(server.uri, monkeypatch, tmp_path) as store:
        yield store


# --- the core part over HTTP --------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_evaluation_over_http(http):
    """Score, table, artifacts, traces and feedback, through the server."""
    evaluate("a", 1, 2, num_threads=2)

    run = http.run("eval")
    assert [("eval", "FINISHED", [])] == http.tree()
    assert 50.0 == run.data.metrics["eval"]
    assert ["model.json", "program.mmd", "program.svg", "result_table.json"] == http.artifacts(run)
    assert markers("a", 2) == [row["pred_answer"] for row in http.table(run)]
    assert {"eval": markers("a", 2)} == http.traces_by_run()
    assert [["exact"], ["exact"]] == [[each.name for each in feedback_on(trace)] for trace in http.traces()]


def test_evaluations_and_a_compile_at_once_over_http(http):
    """In threads, each its own run."""
    in_threads(
        lambda: evaluate("a", metric_key="a"),
        lambda: evaluate("b", 2, 2, metric_key="b"),
        lambda: Candidates([("c", 1), ("d", 2)]).compile(Program(), trainset=devset("t", 1, 1)),
    )

    tree = http.tree()
    assert [("a", "FINISHED", []), ("b", "FINISHED", [])] == [node for node in tree if node[0] in {"a", "b"}]
    ((_, status, children),) = [node for node in tree if node[0] not in {"a", "b"}]
    assert ("FINISHED", [("eval_0", "FINISHED", []), ("eval_1", "FINISHED", [])]) == (status, children)
    assert {"a": markers("a", 2), "b": markers("b", 2)} == http.traces_by_run()


def test_active_runs_over_http(http):
    """``with mlflow.start_run()`` and ``run()`` with fluent calls in DSPy's workers."""
    with mlflow.start_run(run_name="mine"):
        dspy.Parallel(num_threads=2, disable_progress_bar=True)(
            [(lambda question: mlflow.log_metric(question[1:], 1), example) for example in devset("a", 0, 2)]
        )
        with dspy_mlflow_async.run("inner"):
            mlflow.log_param("x", 1)

    assert [("mine", "FINISHED", [("inner", "FINISHED", [])])] == http.tree()
    assert {"a-0": 1.0, "a-1": 1.0} == http.run("mine").data.metrics


# --- slow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_in_run", [False, True])
@pytest.mark.long
def test_a_slow_server(server, monkeypatch, tmp_path, is_in_run):
    """An evaluation asks few things of it, and what it has logged can be read as soon as it is over."""
    with (
        slow_store(server.uri) as slow,
        store_at(slow.uri, monkeypatch, tmp_path) as store,
        contextlib.ExitStack() as block,
    ):
        evaluate("w", metric_key="warm")  # imports what it needs
        flush()  # on a busy machine some of it is sent later
        if is_in_run:
            block.enter_context(mlflow.start_run())
        slow.delay = 0.2
        slow.requests.clear()
        _, _, seconds = result_of(lambda: evaluate("a", 1, 4))
        requests = slow.of_runs()
        slow.delay = 0.0
        (run,) = mlflow.search_runs([store.experiment_id], "tags.mlflow.runName != 'warm'", output_format="list")
        assert ("RUNNING" if is_in_run else "FINISHED") == run.info.status
        assert 25.0 == run.data.metrics["eval"]
        assert {"lm_params", "Program.answer.signature.instructions"} <= set(run.data.params)
        assert "exact" == run.data.tags["dspy.metric"]
        assert {"model.json", "result_table.json"} <= {*store.artifacts(run)}
        flush()
        assert ["model.json", "program.mmd", "program.svg", "result_table.json"] == store.artifacts(run)

    # Creation, values, where artifacts go, two of them, MLflow's "View run", the end; or what the user's run has.
    # The program's pictures come later, while nobody waits.
    requests = [each for each in requests if "/program." not in each]
    assert len(requests) <= 8
    assert seconds < 0.2 * len(requests) + 3


@pytest.mark.long
def test_a_database_that_somebody_locks(store, caplog, monkeypatch):
    """The evaluation waits for it once, in all; when it is free again, everything arrives."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "true")  # else each trace waits, as is asked for
    dspy_mlflow_async.autolog(log_evals=True, silent=True)
    database = sqlite3.connect(
        mlflow.get_tracking_uri().removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False
    )
    with contextlib.closing(database), caplog.at_level(logging.WARNING):
        lock = Program(lambda question: question.endswith("-0") and database.execute("BEGIN EXCLUSIVE"))
        *_, seconds = result_of(lambda: evaluate("a", 1, 4, program=lock))
        database.rollback()
    deadline = time.monotonic() + TIMEOUT
    while not dspy_mlflow_async.flush(10) and time.monotonic() < deadline:
        pass

    assert seconds < store_runs.ASK_SECONDS + 5
    (line,) = said(caplog)
    assert "scored 25.0" in line
    run = store.run("eval")
    assert ("FINISHED", 25.0) == (run.info.status, run.data.metrics["eval"])
    assert ["model.json", "program.mmd", "program.svg", "result_table.json"] == store.artifacts(run)


def flush_all():
    """Flush until everything is stored."""
    deadline = time.monotonic() + TIMEOUT
    while not dspy_mlflow_async.flush(10) and time.monotonic() < deadline:
        pass


# --- away ---------------------------------------------------------------------------------------------------------


def said(caplog):
    """What our logger has said of evaluations."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "dspy_mlflow_async" and "scored" in record.getMessage()
    ]


def result_of(job):
    """What an evaluation gives, and how many seconds it takes."""
    begun = time.monotonic()
    result = job()
    return result.score, [(dict(e), dict(p), s) for e, p, s in result.results], time.monotonic() - begun


def test_a_server_that_is_down_at_the_start(server, monkeypatch, tmp_path, caplog):
    """Nothing listens: the result is the one without tracing, soon, and one line tells the score."""
    *untraced, _ = result_of(lambda: evaluate("a", 1, 4, num_threads=2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with store_at(f"http://127.0.0.1:{port}", monkeypatch, tmp_path, "0"), caplog.at_level(logging.WARNING):
        *traced, seconds = result_of(lambda: evaluate("a", 1, 4, num_threads=2))
        *again, seconds_again = result_of(lambda: evaluate("a", 1, 4, num_threads=2, metric_key="again"))

    assert untraced == traced == again
    assert seconds < BOUND
    assert seconds_again < 5
    first, second = said(caplog)
    assert re.search(r"'eval' scored 25\.0", first)
    assert re.search(r"'again' scored 25\.0", second)


def test_a_server_that_hangs(monkeypatch, tmp_path, caplog):
    """It takes the connection and says nothing: bounded, and a compile with three evaluations waits once."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(128)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with store_at(uri, monkeypatch, tmp_path, "0"), caplog.at_level(logging.WARNING):
            begun = time.monotonic()
            Candidates([("a", 1), ("b", 2), ("c", 3)]).compile(Program(), trainset=devset("t", 1, 1))
            seconds = time.monotonic() - begun

    assert seconds < BOUND
    assert [25.0, 50.0, 75.0] == [float(re.search(r"scored ([\d.]+)", line)[1]) for line in said(caplog)]


@pytest.mark.long
def test_a_server_that_dies_in_the_middle(monkeypatch, tmp_path, caplog):
    """Killed while the program runs: same result, soon, one line with the score; restarted, everything arrives."""
    with (
        mlflow_server(tmp_path, f"sqlite:///{tmp_path / 'server.db'}") as server,
        store_at(server.uri, monkeypatch, tmp_path) as store,
        caplog.at_level(logging.WARNING),
    ):

        def during(question):
            if question == "@a-1":
                server.kill()

        *traced, seconds = result_of(lambda: evaluate("a", 2, 4, program=Program(during)))
        assert seconds < BOUND
        assert 50.0 == traced[0]
        (line,) = said(caplog)
        assert "scored 50.0" in line

        server.start()
        deadline = time.monotonic() + TIMEOUT
        while not dspy_mlflow_async.flush(10) and time.monotonic() < deadline:
            pass
        run = store.run("eval")
        assert ("FINISHED", 50.0) == (run.info.status, run.data.metrics["eval"])
        assert ["model.json", "program.mmd", "program.svg", "result_table.json"] == store.artifacts(run)
        assert {"eval": markers("a", 4)} == store.traces_by_run()
        assert [1] * 4 == [len(feedback_on(trace)) for trace in store.traces()]


def test_a_run_created_too_late_is_the_evaluations(store, monkeypatch, caplog):
    """The store answers after the bound: the evaluation has gone on, and the run that came late is its run."""
    dspy_mlflow_async.autolog(log_evals=True, silent=True)
    monkeypatch.setattr(store_runs, "ASK_SECONDS", 0.05)
    may_create, is_created = threading.Event(), threading.Event()
    create = selection.export.create_run

    def slow(*arguments):
        may_create.wait(TIMEOUT)
        run = create(*arguments)
        is_created.set()
        return run

    monkeypatch.setattr(selection.export, "create_run", slow)
    result = evaluate("a")
    may_create.set()
    flush_all()
    assert is_created.wait(TIMEOUT)  # the second of two, maybe, which is there for a moment
    deadline = time.monotonic() + TIMEOUT
    while [("eval", "FINISHED", [])] != store.tree() and time.monotonic() < deadline:
        time.sleep(0.02)

    assert 50.0 == result.score
    assert [("eval", "FINISHED", [])] == store.tree()
    assert 50.0 == store.run("eval").data.metrics["eval"]


def test_a_run_created_twice_is_deleted_until_it_is_gone(store, monkeypatch):
    """The late answer comes when the queue has created the run, and the store is too busy to delete one of the two."""
    dspy_mlflow_async.autolog(log_evals=True, silent=True)
    monkeypatch.setattr(store_runs, "ASK_SECONDS", 0.05)
    may_create = threading.Event()
    create, delete = selection.export.create_run, mlflow.MlflowClient.delete_run
    refusals = []

    def slow(*arguments):
        may_create.wait(TIMEOUT)
        return create(*arguments)

    def busy(client, run_id):
        if not refusals:
            refusals.append(run_id)
            raise mlflow.MlflowException("(sqlite3.OperationalError) database is locked")
        return delete(client, run_id)

    monkeypatch.setattr(selection.export, "create_run", slow)
    monkeypatch.setattr(mlflow.MlflowClient, "delete_run", busy)
    evaluate("a")
    flush_all()
    assert [("eval", "FINISHED", [])] == store.tree()
    may_create.set()
    deadline = time.monotonic() + TIMEOUT
    while not refusals and time.monotonic() < deadline:
        time.sleep(0.02)
    flush_all()

    assert 1 == len(refusals)
    assert [("eval", "FINISHED", [])] == store.tree()


@pytest.mark.long
def test_a_store_that_fails_is_asked_again(store, monkeypatch):
    """An error that is no refusal: the run is created a moment later, and the next evaluation has its run at once."""
    dspy_mlflow_async.autolog(log_evals=True, silent=True)
    create = selection.export.create_run

    def fail(*arguments):
        monkeypatch.setattr(selection.export, "create_run", create)
        raise mlflow.MlflowException("not today")

    monkeypatch.setattr(selection.export, "create_run", fail)
    evaluate("a")
    evaluate("b", metric_key="second")
    flush_all()

    assert [("eval", "FINISHED", []), ("second", "FINISHED", [])] == sorted(store.tree())


def test_a_store_that_refuses_is_asked_again(store, monkeypatch, caplog):
    """A refusal: said with the score, and the next evaluation has its run at once."""
    dspy_mlflow_async.autolog(log_evals=True, silent=True)
    create = selection.export.create_run

    def refuse(*arguments):
        monkeypatch.setattr(selection.export, "create_run", create)
        raise mlflow.MlflowException("not today", error_code=INVALID_PARAMETER_VALUE)

    monkeypatch.setattr(selection.export, "create_run", refuse)
    evaluate("a")
    evaluate("b", metric_key="second")

    assert [("second", "FINISHED", [])] == store.tree()
    (line,) = said(caplog)
    assert "scored 50.0" in line
    assert "not today" in line


def test_one_store_away_says_nothing_of_another(store, monkeypatch, tmp_path):
    """After a server that was down, evaluations in a store that is there have their runs."""
    with store_at("http://127.0.0.1:9", monkeypatch, tmp_path, "0"):
        evaluate("a")
    monkeypatch.setattr(fluent, "_active_experiment_id", store.experiment_id)
    dspy_mlflow_async.autolog(log_evals=True, silent=True)
    evaluate("b")
    flush()

    assert [("eval", "FINISHED", [])] == store.tree()
