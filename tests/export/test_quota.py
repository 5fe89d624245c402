"""What a spool may take of the disk, and what goes when it is full; what must not lie there; what must stay."""

import logging
import os
import time
from types import SimpleNamespace

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import Feedback, Metric
from stores import call, wait_until

from dspy_mlflow_async import export
from dspy_mlflow_async.export.operations import RunOperation, TraceUpdate
from dspy_mlflow_async.export.spool import codec
from dspy_mlflow_async.export.spool.format import done_offsets, frame, scan
from dspy_mlflow_async.export.spool.paths import make_folder, segments_of
from dspy_mlflow_async.export.spool.quota import Quota, SpoolFullError

NOWHERE = "http://127.0.0.1:9"


def fail(text):
    """A trace that ends in an error; gives its id."""
    root = mlflow.start_span_no_context("failing", inputs={"question": text})
    root.record_exception(ValueError("no"))
    root.end()
    return root.trace_id


def spooled_ids(folder):
    return {codec.peek(payload)[0] for path in segments_of(folder) for _, payload in scan(path.read_bytes())}


def size_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def test_the_last_fifth_is_for_what_goes_last(tmp_path):
    """Ordinary records fill four fifths of the bound, vital ones the rest; then nothing more is taken."""
    quota = Quota(tmp_path, 1000)
    quota.take(800, is_vital=False)
    with pytest.raises(SpoolFullError, match="max_spool_bytes, 1,000"):
        quota.take(1, is_vital=False)
    quota.take(200, is_vital=True)

    with pytest.raises(SpoolFullError):
        quota.take(1, is_vital=True)


def test_others_who_write_to_the_folder_count(tmp_path, monkeypatch):
    """What other processes have written, and taken away, is seen within a second."""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    quota = Quota(tmp_path, 1000)
    quota.take(100, is_vital=False)
    (tmp_path / "theirs.seg").write_bytes(b"x" * 750)
    quota.take(100, is_vital=False)
    now += 1.0
    with pytest.raises(SpoolFullError):
        quota.take(100, is_vital=False)
    (tmp_path / "theirs.seg").unlink()
    now += 1.0

    quota.take(100, is_vital=False)


def test_the_last_of_the_disk_is_never_taken(tmp_path, monkeypatch):
    """Of a disk of 100 kB with 5,100 bytes free a hundred may be taken, by whatever record."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=5100, f_blocks=100_000, f_frsize=1))
    quota = Quota(tmp_path, 10**9)
    quota.take(100, is_vital=False)

    with pytest.raises(SpoolFullError, match="the last 5% of the disk"):
        quota.take(1, is_vital=True)


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_a_spool_is_bounded_and_what_matters_goes_last(make, mode, caplog):
    """A long outage fills the spool to its bound and no further; failed traces and results are still taken then."""
    bound = 400_000
    installed = make(uri_for_outage(), mode=mode, max_spool_bytes=bound, max_waiting_bytes=1)
    with caplog.at_level(logging.WARNING, "dspy_mlflow_async"):
        for _ in range(60):
            call(text="x" * 10_000)
        failed = [fail("x" * 1000) for _ in range(5)]
        installed.queue.put(RunOperation(key="run", metrics=[Metric("score", 1.0, 1, 0)]))
        installed.queue.put(TraceUpdate(key="judged", assessments=[Feedback(name="score", value=1.0)]))
        folder = installed.queue.spool.folder
        wait_until(lambda: {*failed, "run", "judged"} <= spooled_ids(folder), 30)
        wait_until(lambda: not export.stats().waiting, 30)
    stats = export.stats()

    assert size_of(folder) <= bound
    assert stats.dropped > 10
    assert 65 == stats.started == stats.spooled + stats.dropped + stats.waiting
    assert 1 == sum("max_spool_bytes" in record.getMessage() for record in caplog.records)


def uri_for_outage():
    mlflow.set_tracking_uri(NOWHERE)
    return NOWHERE


@pytest.fixture(autouse=True)
def _experiments_without_a_store(monkeypatch):
    """`make` creates an experiment; where there is no store, an id does."""
    create = mlflow.create_experiment

    def create_experiment(name):
        return "1" if mlflow.get_tracking_uri() == NOWHERE else create(name)

    monkeypatch.setattr(mlflow, "create_experiment", create_experiment)


def test_a_process_whose_spool_takes_nothing_writes_by_itself(make, spool_dir, caplog):
    """With ``export="process"`` and no spool to write to, traces reach a store that is well; it is said once."""
    spool_dir.parent.mkdir(exist_ok=True)
    spool_dir.write_text("in the place of the folder")
    with caplog.at_level(logging.WARNING, "dspy_mlflow_async"):
        installed = make(mode="process")
        ids = [call() for _ in range(5)]
        assert export.flush(60)
        ids += [call() for _ in range(5)]
        assert export.flush(60)

    assert dict.fromkeys(ids, 4) == {key: len(t.data.spans) for key, t in installed.read().items()}
    assert export.ExportStats(started=10, ended=10, stored=10) == export.stats()
    assert 1 == sum("written to the store from a thread" in record.getMessage() for record in caplog.records)


def test_a_process_goes_back_to_its_spool(make, spool_dir):
    """Once the spool can be written, the child brings the traces again."""
    spool_dir.parent.mkdir(exist_ok=True)
    spool_dir.write_text("in the place of the folder")
    installed = make(mode="process")
    ids = [call()]
    assert export.flush(60)
    assert installed.queue.child.pid is None
    spool_dir.unlink()
    ids += [call()]

    assert export.flush(100)
    assert installed.queue.child.pid is not None
    assert set(ids) == set(installed.read())


@pytest.mark.parametrize("change", [{"v": 99}, {"kind": "unknown"}, {"assessments": [{"unknown": 1}]}])
def test_an_intact_record_that_cannot_be_decoded_is_kept(make, spool_dir, change, caplog):
    """A process that sends what others left leaves alone what it cannot read, word for word."""
    installed = make()
    folder = installed.queue.spool.folder
    make_folder(folder, installed.queue.spool.uri)
    record = codec.loads(codec.encode(TraceUpdate(key="tr-1", tags={"a": "b"})))
    line = frame(codec.dumps(record | change))
    segment = folder / "00000000000000000001-1-abc.seg"
    segment.write_bytes(line)
    with caplog.at_level(logging.WARNING, "dspy_mlflow_async"):
        call()
        assert export.flush(60)  # which adopts what lies there
        assert export.flush(60)

    assert line == segment.read_bytes()
    assert {} == done_offsets(segment)
    assert ["left alone" in record.getMessage() for record in caplog.records] == [True]


def test_what_was_sampled_out_leaves_the_disk(make):
    """A durable copy of a trace that waited for a child is erased when the trace is left out; others stay."""
    installed = make(durable=True)
    token = export.KEEPS.set(lambda root: b"keep" in str(root.attributes).encode())
    traces = {}
    for text in ("keep me", "hush hush"):
        root = mlflow.start_span_no_context("root", inputs={"question": text})
        child = mlflow.start_span_no_context("child", parent_span=root)
        root.end()
        traces[text] = child
    export.KEEPS.reset(token)
    folder = installed.queue.spool.folder

    def on_disk(text):
        return any(text in path.read_bytes() for path in folder.iterdir())

    assert on_disk(b"hush hush")
    assert on_disk(b"keep me")
    traces["hush hush"].end()
    assert not on_disk(b"hush hush")
    assert on_disk(b"keep me")
    (info,) = export.spools()
    assert (1, 0) == (info.records, info.damaged)
    traces["keep me"].end()
    assert export.flush(60)
    assert 1 == len(installed.read())


@given(st.text(max_size=300), st.integers(0, 1))
def test_a_line_says_what_it_belongs_to_without_being_decoded(key, counted):
    """What is peeked is what is decoded, whatever the key."""
    assert (key, counted) == codec.peek(codec.encode(RunOperation(key=key, counted=counted)))
