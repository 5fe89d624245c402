"""The first call opens no store: nobody but the writer does, and what only the store can tell waits in the queue."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import dspy
import mlflow
import pytest
from mlflow.tracing.trace_manager import InMemoryTraceManager

import dspy_mlflow_async
from dspy_mlflow_async import export
from dspy_mlflow_async.export import installation
from dspy_mlflow_async.export.spool import codec

HERE = Path(__file__).parent
MOST = 0.5  # seconds; opening a store takes 1.4 s of CPU, and minutes where that is in vain
MOST_TO_SWITCH_OFF = 5.0  # with MLflow's own exporter put back, which would open the store


@pytest.fixture
def silent_server():
    """An address where a connection is made, and nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["healthy", "unopenable", "unreachable", "silent"])
@pytest.mark.long
def test_the_first_call_does_not_stop_the_loop(tmp_path, kind, request):
    """Whatever the store is like: neither the call nor the loop nor the end of it waits, and the trace is safe."""
    (tmp_path / "file.txt").write_text("no folder")
    uri = {
        "healthy": f"sqlite:///{tmp_path / 'new.db'}",
        "unopenable": f"sqlite:///{tmp_path / 'file.txt' / 'new.db'}",
        "unreachable": "http://127.0.0.1:9",
    }.get(kind) or request.getfixturevalue("silent_server")
    environment = os.environ | {
        "PYTHONPATH": f"{HERE}:{HERE.parent}",
        "MLFLOW_EXPERIMENT_NAME": "by its name",
    }
    program = subprocess.run(
        [sys.executable, str(HERE / "first_call.py"), str(tmp_path), uri],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert program.returncode == 0, program.stderr
    answer = json.loads((tmp_path / "answer.json").read_text())

    assert answer["call"] < MOST
    assert answer["gap"] < MOST
    assert answer["off"] < MOST_TO_SWITCH_OFF
    assert answer["last"].startswith("tr-")
    assert answer["safe"] == 1
    if kind == "healthy":
        assert answer["stored"]
        assert answer["experiment"] == "by its name"


def test_an_experiment_by_name_is_looked_up_when_the_trace_is_written(store_uri, monkeypatch):
    """It is made if it is not there, and the next trace bears its id from the start."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "not there yet")
    dspy_mlflow_async.autolog(silent=True)
    predict = dspy.Predict("question -> answer")

    predict(question="@one")
    assert export.flush(30)
    first = mlflow.get_last_active_trace_id()
    with mlflow.start_span("second") as span, InMemoryTraceManager.get_instance().get_trace(span.trace_id) as trace:
        begun_in = trace.info.experiment_id
    assert export.flush(30)

    experiment = mlflow.get_experiment_by_name("not there yet")
    assert begun_in == experiment.experiment_id
    found = mlflow.search_traces(locations=[experiment.experiment_id], return_type="list")
    assert {first, span.trace_id} == {trace.info.trace_id for trace in found}
    assert all(trace.info.experiment_id == experiment.experiment_id for trace in found)


def test_an_experiment_by_name_may_wait_on_disk(store_uri, monkeypatch):
    """A trace whose experiment nobody knows yet keeps its name, and finds it from there."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "known to the spool")
    dspy_mlflow_async.autolog(silent=True)
    queue = installation.pipeline().queue(store_uri)
    queue.worker.is_paused = True
    dspy.Predict("question -> answer")(question="@one")
    (entry,) = queue.pending.take_residents()
    item = entry.operation
    queue.pending.finish(entry, None)
    queue.worker.is_paused = False
    queue.put(codec.decode(codec.encode(item)))

    assert export.flush(30)
    experiment = mlflow.get_experiment_by_name("known to the spool")
    found = mlflow.search_traces(locations=[experiment.experiment_id], return_type="list")
    assert [item.key] == [trace.info.trace_id for trace in found]
