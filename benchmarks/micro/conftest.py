"""What the micro benchmarks share: no network, no telemetry, a tracer that is taken out again."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import dspy
import mlflow
import pytest

import dspy_mlflow_async
from benchmarks.programs import ScriptedLM


@pytest.fixture
def program():
    """One ``dspy.Predict``, with an LM that answers at once."""
    dspy.configure(lm=ScriptedLM(), disable_history=True)
    return dspy.Predict("question -> answer")


@pytest.fixture
def traced(tmp_path, monkeypatch):
    """``autolog()`` on, over an empty sqlite store that has been written to once."""
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(tmp_path / "spool"))
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    dspy_mlflow_async.autolog(silent=True)
    yield
    dspy_mlflow_async.flush()
    dspy_mlflow_async.autolog(disable=True, silent=True)
    mlflow.set_tracking_uri(before)
