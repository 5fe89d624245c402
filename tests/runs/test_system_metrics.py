"""System metrics, where the user has asked MLflow for them: each run of ours has its own, from its start to its end."""

import threading
import time

import dspy
import mlflow
import pytest
from mlflow.tracking import fluent
from runtools import Candidates, Program, devset, evaluate, in_threads

import dspy_mlflow_async

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _is_asked_for(monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    yield
    # Ended with the runs, even where the store had no time for them yet.
    deadline = time.monotonic() + 30
    while monitors() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [] == monitors()
    assert {} == fluent.run_id_to_system_metrics_monitor


def monitors():
    return [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]


def take_some_time(question="-0"):
    """Until the store has two samples of the run that is active here, and of the one above it: the first lacks some."""
    if not question.endswith("-0"):
        return
    client = mlflow.tracking.MlflowClient()
    run = mlflow.active_run()
    deadline = time.monotonic() + 60
    while run is not None:
        while len(client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")) < 2:
            assert time.monotonic() < deadline
            threading.Event().wait(0.05)
        parent_id = run.data.tags.get("mlflow.parentRunId")
        run = client.get_run(parent_id) if parent_id else None


def system_metrics(run):
    return {key for key in run.data.metrics if key.startswith("system/")}


def test_of_all_runs_at_once(runs):
    """Evaluations at once, a compile and the evaluation in it, and ``run()``: what ``mlflow.start_run`` gives."""
    with mlflow.start_run(run_name="mlflows"):
        take_some_time()

    def in_a_run():
        with dspy_mlflow_async.run("scope"):
            take_some_time()

    in_threads(
        lambda: evaluate("a", program=Program(take_some_time), metric_key="a"),
        lambda: evaluate("b", program=Program(take_some_time), metric_key="b"),
        lambda: Candidates([("c", 1)], program=lambda: Program(take_some_time)).compile(
            Program(), trainset=devset("t", 1, 1)
        ),
        in_a_run,
    )

    expected = system_metrics(runs.run("mlflows"))
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= expected
    assert [expected] * 6 == [system_metrics(run) for run in runs.runs()]
    assert {"FINISHED"} == {run.info.status for run in runs.runs()}


def test_of_one_that_fails(runs):
    """They end with it."""

    def fail(question):
        take_some_time(question)
        raise ValueError(question)

    with dspy.context(max_errors=1), pytest.raises(Exception, match="cancelled"):
        evaluate("a", program=Program(fail))

    run = runs.run("eval")
    assert "FAILED" == run.info.status
    assert system_metrics(run)


def test_not_asked_for(runs, monkeypatch):
    """Then there are none."""
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    seen = []
    evaluate("a", program=Program(lambda question: seen.append(monitors())))

    assert seen
    assert [] == [monitor for each in seen for monitor in each]
    assert set() == system_metrics(runs.run("eval"))


def test_without_psutil(runs, monkeypatch, caplog):
    """The run is there, and a line says why they are not."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    evaluate("a")

    run = runs.run("eval")
    assert ("FINISHED", set()) == (run.info.status, system_metrics(run))
    assert ["psutil" in record.getMessage() for record in caplog.records if "System metrics" in record.getMessage()]
