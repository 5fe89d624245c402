"""Evaluations and compiles that begin while the store is away or slow: their runs come late, and whole."""

import contextlib
import sqlite3
import subprocess
import sys
import threading
import time

import anyio
import mlflow
import pytest
from runtools import TIMEOUT, Candidates, Program, Store, devset, evaluate, exact, in_threads, markers
from test_store_failure import flush_all, server, store_at  # noqa: F401 - a fixture

import dspy_mlflow_async
from dspy_mlflow_async import aevaluate_all
from dspy_mlflow_async.export import runs as store_runs
from dspy_mlflow_async.export.write import late_runs
from dspy_mlflow_async.runs import selection
from echo import feedback_on
from slow_store import slow_store

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("mlflow server")]


@pytest.fixture
def proxy(server, monkeypatch, tmp_path):  # noqa: F811 - a fixture
    """The server behind a proxy, with our tracer on, and its store."""
    with slow_store(server.uri) as slow, store_at(slow.uri, monkeypatch, tmp_path) as store:
        yield slow, store
        slow.is_away = False


def check_whole(store, name="eval", score=50.0, count=2):
    """Assert that the run of ``name`` has all that an evaluation logs."""
    run = store.run(name)
    assert ("FINISHED", score) == (run.info.status, run.data.metrics["eval"])
    assert ["model.json", "program.mmd", "program.svg", "result_table.json"] == store.artifacts(run)
    assert {"lm_params", "Program.answer.signature.instructions"} <= set(run.data.params)
    assert "exact" == run.data.tags["dspy.metric"]
    assert count == len(store.table(run))
    return run


@pytest.mark.long
def test_away_at_the_start_and_back_in_the_middle(proxy):
    """The run is created when the store is back; it keeps its name, its start and its end, and gets its traces."""
    slow, store = proxy
    times = []

    def during(question):
        times.append(time.time() * 1000)
        slow.is_away = slow.is_away and not question.endswith("-1")

    slow.is_away = True
    before = time.time() * 1000
    evaluate("a", program=Program(during))
    after = time.time() * 1000
    flush_all()

    run = check_whole(store)
    assert before - 1 <= run.info.start_time <= times[0]
    assert times[-1] - 1 <= run.info.end_time <= after
    assert {"eval": markers("a", 2)} == store.traces_by_run()
    assert [1, 1] == [len(feedback_on(trace)) for trace in store.traces()]


def test_several_at_once_while_it_is_away(proxy):
    """Each has its own run and its own traces, when the store is back after they have ended."""
    slow, store = proxy
    slow.is_away = True
    in_threads(*(lambda name=name: evaluate(name, metric_key=name) for name in "abc"))
    slow.is_away = False
    flush_all()

    for name in "abc":
        check_whole(store, name)
    assert {name: markers(name, 2) for name in "abc"} == store.traces_by_run()


def test_a_compile_with_children(proxy):
    """Parent, children and steps are those of a store that was there."""
    slow, store = proxy
    slow.is_away = True
    Candidates([(name, right) for right, name in enumerate("abcd")]).compile(Program(), trainset=devset("t", 1, 1))
    slow.is_away = False
    flush_all()

    ((_, status, children),) = store.tree()
    assert "FINISHED" == status
    assert [(f"eval_{step}", "FINISHED", []) for step in range(4)] == sorted(children)
    (parent,) = (run for run in store.runs() if "mlflow.parentRunId" not in run.data.tags)
    assert [(0, 0.0), (1, 25.0), (2, 50.0), (3, 75.0)] == store.series(parent, "eval")
    assert {"best_model.json", "scores.png", "trainset.json"} <= set(store.artifacts(parent))


def test_an_answer_that_was_lost(proxy):
    """The server has created the run, and nobody heard of it: there is one run all the same."""
    slow, store = proxy
    slow.loses = "/runs/create"

    def during(question):
        slow.loses = None

    evaluate("a", program=Program(during))
    flush_all()

    assert [("eval", "FINISHED", [])] == store.tree()
    check_whole(store)


@pytest.mark.long
def test_fluent_calls_inside(proxy):
    """``mlflow.active_run()`` is there while the run is pending; once the store is back a fluent call goes to it."""
    slow, store = proxy
    seen = []

    def during(question):
        seen.append(mlflow.active_run().info.run_id)
        if question.endswith("-1"):
            slow.is_away = False
            dspy_mlflow_async.flush(TIMEOUT)
            mlflow.log_metric("mine", 7)
            with mlflow.start_run(run_name="inner", nested=True):
                pass

    slow.is_away = True
    evaluate("a", program=Program(during))
    flush_all()

    assert late_runs.is_stand_in(seen[0])
    assert [("eval", "FINISHED", [("inner", "FINISHED", [])])] == store.tree()
    assert 7.0 == check_whole(store).data.metrics["mine"]


@pytest.mark.long
def test_another_process_creates_it(proxy):
    """With ``export="process"`` the child creates the run; a fluent call waits for it, and finds it."""
    slow, store = proxy
    dspy_mlflow_async.autolog(log_evals=True, silent=True, export="process")

    def during(question):
        if question.endswith("-1"):
            slow.is_away = False
            dspy_mlflow_async.flush(TIMEOUT)
            mlflow.log_metric("mine", 7)

    slow.is_away = True
    evaluate("a", program=Program(during))
    flush_all()

    assert [("eval", "FINISHED", [])] == store.tree()
    assert 7.0 == check_whole(store).data.metrics["mine"]
    assert {"eval": markers("a", 2)} == store.traces_by_run()


def test_a_run_that_was_made_for_this_process(proxy, monkeypatch):
    """The run of ``MLFLOW_RUN_ID`` is logged into, though it could not be looked at when the evaluation began."""
    slow, store = proxy
    made = mlflow.MlflowClient().create_run(store.experiment_id, run_name="made")
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    slow.is_away = True
    evaluate("a")
    slow.is_away = False
    flush_all()

    (run,) = store.runs()
    assert (made.info.run_id, "FINISHED", 50.0) == (run.info.run_id, run.info.status, run.data.metrics["eval"])
    assert [made.info.run_id] * 2 == [trace.info.trace_metadata["mlflow.sourceRun"] for trace in store.traces()]


def test_the_experiment_is_looked_up_later(proxy, monkeypatch):
    """An experiment that is known by its name alone is found, or made, when the run is created, for its child, too."""
    slow, _ = proxy
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name := f"late{time.time_ns()}")
    slow.is_away = True
    parent = selection.create("outer")
    child = selection.create("inner", parent=parent.run)
    for handle in (child, parent):
        selection.close(handle, "FINISHED")
    slow.is_away = False
    flush_all()

    experiment = mlflow.get_experiment_by_name(name)
    assert [("outer", "FINISHED", [("inner", "FINISHED", [])])] == Store(experiment.experiment_id).tree()


@pytest.mark.long
def test_evaluate_all(proxy):
    """The parent, its cases and the comparison arrive late, and the run can be resumed by either id."""
    slow, store = proxy
    cases = {"a": Program(), "b": Program()}

    def evaluate_all(**options):
        return anyio.run(
            lambda: aevaluate_all(cases, devset=devset("a", 1, 2), metric=exact, display_progress=False, **options)
        )

    slow.is_away = True
    comparison = evaluate_all()
    slow.is_away = False
    flush_all()

    assert late_runs.is_stand_in(comparison.run_id)
    ((name, status, children),) = store.tree()
    assert ("evaluate_all", "FINISHED") == (name, status)
    assert [("a", "FINISHED", []), ("b", "FINISHED", [])] == sorted(children)
    for name in "ab":
        assert 50.0 == store.run(name).data.metrics["eval"]
    assert [50.0, 50.0] == [case.score for case in evaluate_all(resume=comparison.run_id).cases]


@pytest.mark.long
def test_a_cancelled_evaluation(proxy):
    """Cancelled while its run is pending: the run comes, and is KILLED."""
    slow, store = proxy
    has_begun, may_go_on = threading.Event(), threading.Event()

    def during(question):
        has_begun.set()
        may_go_on.wait(TIMEOUT)

    def ask(question):  # in a thread: the loop has to go on, in which it is cancelled
        return Program(during)(question=question)

    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: dspy_mlflow_async.AsyncEvaluate(devset=devset("a", 1, 2), metric=exact).acall(ask))
            await anyio.to_thread.run_sync(has_begun.wait, TIMEOUT)
            group.cancel_scope.cancel()
            may_go_on.set()

    slow.is_away = True
    anyio.run(main)
    slow.is_away = False
    flush_all()

    assert [("eval", "KILLED", [])] == store.tree()


def test_traces_before_their_run(proxy, monkeypatch):
    """A creation that fails for no clear reason is tried again by itself; the traces, stored before it, get the run."""
    slow, store = proxy
    create, failures = late_runs.create, []

    def fail(*arguments):
        if not failures:
            failures.append(arguments)
            raise mlflow.MlflowException("not today")
        return create(*arguments)

    monkeypatch.setattr(late_runs, "create", fail)
    slow.is_away = True
    evaluate("a", program=Program(lambda question: setattr(slow, "is_away", False)))
    flush_all()

    assert failures
    check_whole(store)
    assert {"eval": markers("a", 2)} == store.traces_by_run()
    assert [1, 1] == [len(feedback_on(trace)) for trace in store.traces()]


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import dspy, mlflow, dspy_mlflow_async
from runtools import Program, evaluate
from echo import EchoLM
mlflow.set_tracking_uri({uri!r})
mlflow.tracking.fluent._active_experiment_id = {experiment_id!r}
dspy.configure(lm=EchoLM())
dspy_mlflow_async.autolog(log_evals=True, silent=True, exit_timeout=1)
evaluate("a")
"""


@pytest.mark.long
def test_away_to_the_end_then_replay(server, monkeypatch, tmp_path):  # noqa: F811 - a fixture
    """The process ends while the store is away; ``replay`` creates the run, once, and everything in it."""
    with slow_store(server.uri) as slow, store_at(slow.uri, monkeypatch, tmp_path) as store:
        slow.is_away = True
        script = SCRIPT.format(paths=sys.path, uri=slow.uri, experiment_id=store.experiment_id)
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
        slow.is_away = False
        summary = dspy_mlflow_async.export.replay(tracking_uri=slow.uri)
        again = dspy_mlflow_async.export.replay(tracking_uri=slow.uri)

        assert (0, 0, 0) == (summary.left, summary.dead, again.stored)
        assert [("eval", "FINISHED", [])] == store.tree()
        check_whole(store)
        assert {"eval": markers("a", 2)} == store.traces_by_run()
        assert [1, 1] == [len(feedback_on(trace)) for trace in store.traces()]


def test_a_locked_database(store, monkeypatch):
    """A SQL store that somebody locks while evaluations begin: they have their runs when it is free."""
    monkeypatch.setattr(store_runs, "ASK_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "true")
    dspy_mlflow_async.autolog(log_evals=True, silent=True)
    path = mlflow.get_tracking_uri().removeprefix("sqlite:///")
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    with contextlib.closing(database):
        database.execute("BEGIN EXCLUSIVE")
        in_threads(*(lambda name=name: evaluate(name, metric_key=name) for name in "ab"))
        database.rollback()
    flush_all()

    assert [("a", "FINISHED", []), ("b", "FINISHED", [])] == sorted(store.tree())
    for name in "ab":
        check_whole(store, name)
    assert {name: markers(name, 2) for name in "ab"} == store.traces_by_run()
