"""Runs that a test can read, and a spool of its own."""

import mlflow
import pytest


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    """Spools and artifacts of a test are its own."""
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(tmp_path / "spool"))


@pytest.fixture
def experiment(request, store_uri, tmp_path, monkeypatch):
    """A fresh experiment, the active one while the test runs."""
    experiment_id = mlflow.create_experiment(
        f"{request.node.nodeid}-{id(request)}", artifact_location=(tmp_path / "artifacts").as_uri()
    )
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment_id)
    return experiment_id


@pytest.fixture
def runs(experiment):
    """A function that gives the experiment's runs by name."""

    def read():
        found = mlflow.search_runs([experiment], output_format="list")
        assert len(found) == len({run.info.run_name for run in found})
        return {run.info.run_name: run for run in found}

    return read
