"""Operations on runs: together where somebody waits for them, one by one where one is to blame, never out of order."""

import threading

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from dspy_mlflow_async import export
from dspy_mlflow_async.export.operations import RunOperation
from dspy_mlflow_async.export.write import run_operations
from dspy_mlflow_async.export.write.errors import Verdict
from dspy_mlflow_async.export.write.run_operations import write_runs


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
    urgent = sqlite.queue.synchronous.writer
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
    assert 0 == sqlite.queue.pending.spooled == sum(info.records for info in export.spools())


def test_what_worked_is_not_written_again(client, run_id, sqlite, monkeypatch):
    """The artifacts are away: values that were logged before them are done with, and the end waits."""
    batches, log_batch = [], MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *args: batches.append(1) or log_batch(*args))

    def away(*_):
        raise ConnectionError("away")

    items = [
        RunOperation(key=run_id, size=0, status="FINISHED", end_time_ms=99),
        RunOperation(key=run_id, size=0, path="a.json", content=b"{}"),
        *(RunOperation(key=run_id, size=0, metrics=[Metric("m", 1.0, 1, step)]) for step in range(3)),
    ]
    with monkeypatch.context() as failing:
        failing.setattr(MlflowClient, "log_artifacts", away)
        outcomes = write_runs(sqlite.uri, items, [], lambda *_: None)
    left = [outcome.operation for outcome in outcomes if outcome.verdict is not Verdict.STORED]
    assert [Verdict.STORED] * 3 + [Verdict.AWAY] * 2 == [outcome.verdict for outcome in outcomes]
    assert "RUNNING" == client.get_run(run_id).info.status

    assert {Verdict.STORED} == {outcome.verdict for outcome in write_runs(sqlite.uri, left, [], lambda *_: None)}
    assert [1] == batches
    assert "FINISHED" == client.get_run(run_id).info.status


def test_nothing_overtakes_what_must_be_tried_again(client, run_id, sqlite, monkeypatch):
    """The last word on a tag is the one that was logged last, also where an earlier one fails for no clear reason."""
    log_batch = MlflowClient.log_batch

    def fail_for_some(self, run_id, metrics, params, tags):
        if len(tags) > 1 or tags[0].value == "old":  # together, and then by itself
            raise ValueError("no reason")
        log_batch(self, run_id, metrics, params, tags)

    items = [
        RunOperation(key=run_id, size=0, tags=[RunTag("other", "1")]),
        RunOperation(key=run_id, size=0, tags=[RunTag("tag", "old")]),
        RunOperation(key=run_id, size=0, tags=[RunTag("tag", "new")]),
        RunOperation(key=run_id, size=0, status="FINISHED", end_time_ms=99),
    ]
    with monkeypatch.context() as failing:
        failing.setattr(MlflowClient, "log_batch", fail_for_some)
        outcomes = write_runs(sqlite.uri, items, [], lambda *_: None)
    assert [Verdict.STORED, *[Verdict.SUSPECT] * 3] == [outcome.verdict for outcome in outcomes]
    run = client.get_run(run_id)
    assert ("RUNNING", "1", None) == (run.info.status, run.data.tags["other"], run.data.tags.get("tag"))

    write_runs(sqlite.uri, items[1:], [], lambda *_: None)
    run = client.get_run(run_id)
    assert ("FINISHED", "new") == (run.info.status, run.data.tags["tag"])


def test_an_interrupted_caller_gives_back_what_he_has_taken(client, run_id, sqlite, monkeypatch):
    """Ctrl-C while a caller writes: the writer does it instead."""

    def interrupted(_):
        raise KeyboardInterrupt

    sqlite.stop_writing()
    writer = export.run_writer(None)
    writer.log(run_id, metrics=[Metric("m", 1.0, 1, 0)])
    monkeypatch.setattr(sqlite.queue.synchronous.writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sqlite.queue.synchronous.write_waiting(run_id, 5.0)
    sqlite.write_again()
    assert export.flush(30)
    assert {"m": 1.0} == client.get_run(run_id).data.metrics


def test_a_store_that_cannot_be_opened(run_id, sqlite, monkeypatch):
    """It is opened with the first operation, and may be away by then: each item has its outcome."""

    def away(_uri):
        raise ConnectionError("away")

    monkeypatch.setattr(run_operations.mlflow_store, "client_of", away)
    items = [RunOperation(key=key, size=0, metrics=[Metric("m", 1.0, 1, 0)]) for key in (run_id, "another run")]
    assert [Verdict.AWAY] * 2 == [outcome.verdict for outcome in sqlite.queue.writer.write(items)]
