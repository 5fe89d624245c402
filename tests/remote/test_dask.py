"""Dask for real, on this machine: evaluations on the processes of a cluster, through its own executor."""

import os
import sys

import dspy
import elsewhere
import mlflow
import pytest
from elsewhere_examples import Where, is_right

from dspy_mlflow_async import autolog, evaluate_all, flush, propagate, request
from dspy_mlflow_async.remote import Executor

distributed = pytest.importorskip("distributed")
pytestmark = [pytest.mark.timeout(500), pytest.mark.filterwarnings("ignore")]  # Dask's own


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A cluster of two processes."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(tmp_path / "spool"))
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None, local_directory=str(tmp_path)
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_dask_evaluates(experiment, client):
    """Scores, tokens, traces and feedback are those of an evaluation in this process."""
    autolog(silent=True)
    devset = [dspy.Example(question=f"@e-{n}", answer=f"@e-{n}").with_inputs("question") for n in range(12)]
    workers = Executor(client.get_executor(pure=False))
    here, there = (
        evaluate_all({"one": Where()}, devset=devset, metric=is_right, workers=each, display_progress=False)
        for each in (None, workers)
    )
    assert flush(60)
    traces = mlflow.search_traces(locations=[experiment], return_type="list")
    of_run = [each for each in traces if each.info.trace_metadata["mlflow.sourceRun"] == there["one"].run_id]

    assert (here["one"].score, here["one"].input_tokens) == (there["one"].score, there["one"].input_tokens)
    assert 12 == len(of_run)
    assert all(any(a.name == "is_right" and a.value is True for a in each.info.assessments) for each in of_run)
    assert 12 == sum(report.examples for report in there.workers)
    assert str(os.getpid()) not in {report.process.rpartition(":")[2] for report in there.workers}


def test_usage_comes_home_from_dasks_tasks(experiment, client):
    """Functions and coroutine functions as tasks: results stay what they are over there, and their tokens come home."""
    autolog(silent=True)
    with request() as did, mlflow.start_span("outer"):
        answered = client.submit(propagate(dspy.Predict("question -> answer")), question="@a-0", pure=False)
        kind = client.submit(elsewhere.kind_of, answered)
        asked = client.submit(propagate(elsewhere.ask_async), "@b-0", pure=False)
        called = client.submit(elsewhere.predict_in_task, propagate(dspy.Predict("question -> answer")), "@c-0")
        results = answered.result(120).answer, kind.result(120), asked.result(120), called.result(120)

    assert ("@a-0", "Prediction", "@b-0", "@c-0") == results
    assert (3, 3 * 14) == (len(did.lm_calls), did.usage["total_tokens"])


def test_usage_of_a_task_that_fails_comes_home(experiment, client):
    """A task that raises has used its tokens all the same."""
    autolog(silent=True)
    with request() as did, mlflow.start_span("outer"):
        task = client.submit(propagate(elsewhere.ask_and_fail), "@a-0", pure=False)
        with pytest.raises(ValueError, match="no use"):
            task.result(120)

    assert 14 == did.usage["total_tokens"]
