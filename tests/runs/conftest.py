"""Tests of runs read them back from MLflow's store, each from an experiment of its own."""

import pytest
from runtools import NoBar, Store

import dspy_mlflow_async


@pytest.fixture(autouse=True)
def _no_progress_bars(monkeypatch):
    """``tqdm._instances.clear()``, which every Evaluate calls, races with the bars of others: rare KeyErrors."""
    monkeypatch.setattr("tqdm.tqdm", NoBar)


@pytest.fixture
def store(request, store_uri, tmp_path, monkeypatch):
    """The test's own experiment, the active one. No tracer is on yet."""
    with Store.new_experiment(request.node.name, tmp_path, monkeypatch) as opened:
        yield opened


@pytest.fixture
def runs(store):
    """What the test leaves in its experiment, with our ``autolog(log_evals=True, log_compiles=True)`` on."""
    dspy_mlflow_async.autolog(log_evals=True, log_compiles=True, silent=True)
    return store
