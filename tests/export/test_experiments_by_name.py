"""An experiment that is known by its name alone: made once, and asked of the store by nobody but the writer."""

import os
import threading

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, RESOURCE_ALREADY_EXISTS
from opentelemetry import metrics
from requests import sessions
from stores import call

from dspy_mlflow_async import export
from dspy_mlflow_async.seams import mlflow_experiment


class Overtaken:
    """A client of a store in which another process makes the experiment between the look and the making."""

    def __init__(self, uri):
        self._client = mlflow.MlflowClient(uri)

    def get_experiment_by_name(self, name):
        return self._client.get_experiment_by_name(name)

    def create_experiment(self, name):
        self._client.create_experiment(name)
        return self._client.create_experiment(name)


def test_an_experiment_that_another_process_makes_first(store_uri):
    """Its id is that of the other's; nothing is refused."""
    name = f"theirs-{os.urandom(4).hex()}"

    found = mlflow_experiment.look_up(Overtaken(store_uri), name)

    assert found == mlflow.MlflowClient(store_uri).get_experiment_by_name(name).experiment_id


def test_any_other_refusal_is_one(store_uri):
    """What the store says else about making it is told."""

    class Refusing(Overtaken):
        def create_experiment(self, name):
            raise MlflowException("no", error_code=PERMISSION_DENIED)

    with pytest.raises(MlflowException, match="no"):
        mlflow_experiment.look_up(Refusing(store_uri), f"mine-{os.urandom(4).hex()}")
    assert RESOURCE_ALREADY_EXISTS != PERMISSION_DENIED


@pytest.fixture
def metrics_to_nowhere(monkeypatch):
    """OpenTelemetry's metrics, for a server that is away, until the test is over: their thread is of the process."""
    for name, value in {
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:9/v1/metrics",
        "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT": "1",  # seconds, for its last attempts
        "OTEL_METRIC_EXPORT_INTERVAL": "3600000",
    }.items():
        monkeypatch.setenv(name, value)
    yield
    metrics.get_meter_provider().shutdown()


def test_metrics_ask_no_store_in_the_callers_thread(make, metrics_to_nowhere, monkeypatch):
    """With OpenTelemetry's metrics on and a server that is away, a span's end sends no request, and loses no trace."""
    asked, send = [], sessions.Session.send

    def note(self, request, **kwargs):
        if threading.current_thread() is threading.main_thread() and ":9/api" in request.url:
            asked.append(request.url)
        return send(self, request, **kwargs)

    monkeypatch.setattr(sessions.Session, "send", note)
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    monkeypatch.setattr(mlflow, "create_experiment", lambda name: "1")
    make("http://127.0.0.1:9")
    mlflow.tracing.reset()  # also the destination, so that the name counts
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "by-name")
    before = export.stats().started
    call()

    assert [] == asked
    assert before + 1 == export.stats().started
