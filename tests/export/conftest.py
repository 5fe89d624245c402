"""The pipeline, installed for one test, and stores to write to."""

import threading
import time
import weakref

import mlflow
import pytest
from mlflow.entities.trace_location import MlflowExperimentLocation
from stores import Installed, Proxy, wait_until

from dspy_mlflow_async import export
from dspy_mlflow_async.export import installation as installing
from mlflow_server import mlflow_server
from rows.corpus import SAMPLE, collect


@pytest.fixture(autouse=True)
def spool_dir(tmp_path, monkeypatch):
    """Every test has a spool of its own."""
    folder = tmp_path / "spool"
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(folder))
    return folder


_stuck = weakref.WeakSet()


def settle():
    """Wait for pipelines of earlier tests, which count in the same books: a writer may outlive its pipeline's end."""
    wait_until(lambda: not installing.closing(), 30)
    current = installing.installed()
    writers = {thread for thread in threading.enumerate() if thread.name == "dspy-mlflow-async-writer"}
    for thread in writers - {queue.worker.thread for queue in (current.queues.values() if current else ())} - {*_stuck}:
        thread.join(30)
        if thread.is_alive():  # in a request to a server that does not answer, of an earlier file's test
            _stuck.add(thread)


@pytest.fixture
def make(store_uri, request):
    """Install the pipeline with the given options, for a new experiment of the given store."""
    undos = []

    def make(uri=None, **options):
        uri = uri or store_uri
        mlflow.set_tracking_uri(uri)
        experiment_id = mlflow.create_experiment(f"{request.node.name}-{time.time_ns()}")
        mlflow.tracing.set_destination(MlflowExperimentLocation(experiment_id))
        settle()
        installing.counters.reset()
        undo = export.install(export.ExportOptions(**options))
        undos.append(undo)
        return Installed(uri, experiment_id, undo)

    before = mlflow.get_tracking_uri()
    yield make
    for undo in reversed(undos):
        undo()
    mlflow.tracing.reset()
    mlflow.set_tracking_uri(before)
    settle()


@pytest.fixture
def sqlite(make):
    """The default pipeline, writing to a sqlite file."""
    return make()


@pytest.fixture(scope="module")
def traces(_empty_store, tmp_path_factory):
    """Operations on traces of many kinds, as the writer gets them."""
    path = tmp_path_factory.mktemp("collected") / "store.db"
    path.write_bytes(_empty_store.read_bytes())
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    try:
        yield collect(SAMPLE)
    finally:
        mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def server(tmp_path_factory, _empty_store):
    """One server for the module; tests that kill it start it again."""
    folder = tmp_path_factory.mktemp("server")
    database = folder / "server.db"
    database.write_bytes(_empty_store.read_bytes())
    with mlflow_server(folder, f"sqlite:///{database}") as server:
        yield server


@pytest.fixture
def proxy(server):
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def kept_proxy(server):
    """One that keeps connections open, as servers do."""
    proxy = Proxy(server.port, keeps_open=True)
    yield proxy
    proxy.close()
