"""Processes that a module's tests share: importing DSPy and MLflow takes each of them seconds."""

import concurrent.futures
import multiprocessing

import mlflow
import pytest


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Two spawned processes, with a spool of their own."""
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(tmp_path_factory.mktemp("spool")))
        with concurrent.futures.ProcessPoolExecutor(2, context) as started:
            yield started


@pytest.fixture
def experiment(request, store_uri, monkeypatch):
    """A fresh experiment, the active one while the test runs."""
    experiment_id = mlflow.create_experiment(f"{request.node.nodeid}-{id(request)}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment_id)
    return experiment_id
