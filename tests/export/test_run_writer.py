"""Operations on runs: together where somebody waits for them, one by one where one is to blame, never out of order."""

import threading

import mlflow
import pytest
from mlflow.entities import Metric, Param, RunTag

from dspy_mlflow_async import export


@pytest.fixture
def client(sqlite):
    return mlflow.tracking.MlflowClient(sqlite.uri)


@pytest.fixture
def run_id(sqlite, client):
    return client.create_run(sqlite.experiment_id).info.run_id


@pytest.fixture
def held_up(sqlite, monkeypatch):
    """What says that a caller is writing, and what lets it go on."""
    writing, go = threading.Event(), threading.Event()
    urgent = sqlite.queue._urgent_writer
    write = urgent.write

    def slow_write(items):
        writing.set()
        assert go.wait(30)
        return write(items)

    monkeypatch.setattr(urgent, "write", slow_write)
    return writing, go


def test_one_that_is_refused_takes_no_other_along(client, run_id):
    """A param that has another value is refused; what was logged beside it is stored, and the caller is told."""
    client.log_param(run_id, "a", "1")
    writer = export.run_writer(None)
    writer.log(run_id, params=[Param("a", "2")])
    writer.log(run_id, metrics=[Metric("m", 1.0, 1, 0)])
    writer.artifact(run_id, "folder/a.json", b"{}")
    writer.end(run_id, "FINISHED", 99)

    assert not writer.settle(run_id)
    run = client.get_run(run_id)
    assert ({"a": "1"}, {"m": 1.0}, "FINISHED") == (run.data.params, run.data.metrics, run.info.status)
    assert ["folder"] == [each.path for each in client.list_artifacts(run_id)]


def test_more_than_one_request_takes(client, run_id):
    """1,000 metrics, 250 params and 250 tags, the last word on a tag among them."""
    writer = export.run_writer(None)
    writer.log(
        run_id,
        metrics=[Metric(f"m{n}", n, 1, 0) for n in range(1000)],
        params=[Param(f"p{n}", "1") for n in range(250)],
        tags=[RunTag(f"t{n}", "1") for n in range(250)],
    )
    writer.log(run_id, tags=[RunTag("t0", "2")])

    assert writer.settle(run_id)
    data = client.get_run(run_id).data
    assert (1000, 250) == (len(data.metrics), len(data.params))
    assert ("2", "1") == (data.tags["t0"], data.tags["t249"])


def test_what_comes_while_it_is_written(sqlite, client, run_id, held_up):
    """It is written after that, by whomever; a flush waits for both."""
    writing, go = held_up
    writer = export.run_writer(None)
    writer.log(run_id, tags=[RunTag("t", "1")])
    thread = threading.Thread(target=writer.settle, args=(run_id,))
    thread.start()
    assert writing.wait(30)
    writer.log(run_id, tags=[RunTag("t", "2")])
    writer.end(run_id, "KILLED", 99)
    assert not export.flush(0.5)
    assert not writer.settle(run_id, 0.1)
    go.set()
    thread.join(30)

    assert export.flush(30)
    run = client.get_run(run_id)
    assert ("2", "KILLED") == (run.data.tags["t"], run.info.status)


def test_the_process_ends_while_it_is_written(sqlite, client, run_id, held_up):
    """What is in the hands of a caller is kept on disk, unless the store proves to have it."""
    writing, go = held_up
    writer = export.run_writer(None)
    writer.end(run_id, "FINISHED", 99)
    thread = threading.Thread(target=writer.settle, args=(run_id,))
    thread.start()
    assert writing.wait(30)
    saved = sqlite.queue.save_everything()
    go.set()
    thread.join(30)

    assert 1 == saved
    assert "FINISHED" == client.get_run(run_id).info.status
    assert 0 == len(sqlite.queue.backlog) == sum(info.records for info in export.spools())
