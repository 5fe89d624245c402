"""The core over a real MLflow server: runs, artifacts, comparison, budget and resume by HTTP."""

import json

import mlflow
import pytest
from small import examples, is_right

import dspy_mlflow_async
from dspy_mlflow_async import evaluate_all
from echo import Chain
from mlflow_server import mlflow_server


@pytest.fixture
def server(tmp_path, _empty_store, store_uri):
    database = tmp_path / "server.db"
    database.write_bytes(_empty_store.read_bytes())
    with mlflow_server(tmp_path, f"sqlite:///{database}") as server:
        mlflow.set_tracking_uri(server.uri)
        yield server
        mlflow.set_tracking_uri(store_uri)


@pytest.mark.long
def test_stop_and_resume(server, monkeypatch):
    """What a budget has left out is run by a resume, in the same runs."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", mlflow.create_experiment("evaluations"))
    dspy_mlflow_async.autolog(silent=True)
    options = {"devset": examples(size=6), "metric": is_right, "display_progress": False, "max_concurrency": 2}
    stopped = evaluate_all({"one": Chain(), "two": Chain()}, max_tokens=100, **options)
    resumed = evaluate_all({"one": Chain(), "two": Chain()}, resume=stopped.run_id, **options)
    dspy_mlflow_async.flush()
    runs = {run.info.run_name: run for run in mlflow.search_runs(output_format="list")}
    table = json.loads(mlflow.artifacts.load_text(f"runs:/{resumed['one'].run_id}/result_table.json"))

    assert stopped.not_run
    assert {"one": 100.0, "two": 100.0} == {name: case.score for name, case in resumed.items()}
    assert {"evaluate_all": "FINISHED", "one": "FINISHED", "two": "FINISHED"} == {
        name: run.info.status for name, run in runs.items()
    }
    assert 6 == len(table["data"])
    assert 12 == len(mlflow.search_traces(return_type="list", max_results=100))
