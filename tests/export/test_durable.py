"""`durable=True`: what a caller has been told is safe survives a power cut, on a slow disk too."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from stores import call, wait_until
from test_spool import PROGRAM, place, read, start  # noqa: F401 - `place` is a fixture

from dspy_mlflow_async import export
from dspy_mlflow_async.export.spool import group_sync, segments

SYNC_SECONDS = 0.05


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that takes its time; gives what it was asked to sync."""
    synced, sync = [], segments._sync_file

    def slow_sync(handle):
        threading.Event().wait(SYNC_SECONDS)
        sync(handle)
        synced.append(handle)

    monkeypatch.setattr(segments, "_sync_file", slow_sync)
    return synced


def test_a_slow_disk(make, slow_disk):
    """A call costs one sync, or two if one is under way; those that wait at the same time share it."""
    installed = make(durable=True)

    def timed(_):
        begun = time.monotonic()
        return call(), time.monotonic() - begun

    with ThreadPoolExecutor(16) as pool:
        ids, seconds = zip(*pool.map(timed, range(160)), strict=True)

    assert SYNC_SECONDS <= min(seconds)
    assert 10 <= len(slow_disk) <= 80
    assert export.flush(100)
    traces = installed.read()
    assert set(ids) == set(traces)
    assert {4} == {len(trace.data.spans) for trace in traces.values()}
    assert export.ExportStats(started=160, ended=160, stored=160) == export.stats()
    assert 0 == sum(info.records for info in export.spools())


def test_nobody_waits_for_a_sync_that_began_after_his_own(tmp_path, monkeypatch):
    """While a newcomer syncs, all those return whose records an earlier sync has made safe."""
    written = segments.Spool(tmp_path / "spool", "uri")
    sync, begun = segments._sync_file, []
    go = [threading.Event() for _ in range(3)]

    def slow_sync(handle):
        begun.append(1)
        assert go[min(len(begun), len(go)) - 1].wait(30)
        sync(handle)

    monkeypatch.setattr(segments, "_sync_file", slow_sync)

    def put(key):
        written.put(b"{}", key=key, counted=1, durable=True)

    with ThreadPoolExecutor(16) as pool:
        first = pool.submit(put, "first")
        wait_until(lambda: len(begun) == 1)
        second = [pool.submit(put, f"second {number}") for number in range(10)]
        wait_until(lambda: written._live and 11 in map(len, written._live.values()))
        go[0].set()
        wait_until(lambda: len(begun) == 2)
        third = [pool.submit(put, f"third {number}") for number in range(4)]
        wait_until(lambda: 15 in map(len, written._live.values()))
        go[1].set()
        wait_until(lambda: len(begun) == 3)
        for future in (first, *second):
            future.result(10)
        assert not any(future.done() for future in third)
        go[2].set()
    written.close()


def test_who_waits_while_a_segment_is_closed(tmp_path, monkeypatch):
    """The sync of the full segment, which another caller makes, is waited for like any other."""
    written = segments.Spool(tmp_path / "spool", "uri")
    reference = written.put(b"{}", key="first", counted=1)
    handle, end = written._handle, written._written
    sync, begun, go = segments._sync_file, threading.Event(), threading.Event()

    def slow_sync(handle):
        begun.set()
        assert go.wait(30)
        sync(handle)

    monkeypatch.setattr(segments, "_sync_file", slow_sync)
    with ThreadPoolExecutor(2) as pool:
        closing = pool.submit(written.close)
        assert begun.wait(30)
        waiting = pool.submit(written._sync_to, reference.segment, handle, end)
        wait_until(lambda: waiting.done() or written._syncs._changed._waiters)
        assert not waiting.done()
        go.set()
        waiting.result(10)
        closing.result(10)


def test_an_interrupted_sync_is_anothers_turn():
    """Ctrl-C in the one who syncs leaves nobody waiting for ever."""
    group, synced = group_sync.GroupSync(), []

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        group.until(lambda: bool(synced), interrupted)
    with pytest.raises(KeyboardInterrupt), group.turn():
        raise KeyboardInterrupt
    group.until(lambda: bool(synced), lambda: synced.append(1))
    assert [1] == synced


def test_many_callers_share_few_syncs(tmp_path, slow_disk):
    """Each waits for the sync under way and for the next one, and so 64 of them need no more than one of them does."""
    written = segments.Spool(tmp_path / "spool", "uri")
    waited = []

    def put_some(_):
        for _ in range(8):
            before = len(slow_disk)
            written.put(b"{}", key="key", counted=1, durable=True)
            waited.append(len(slow_disk) - before)

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(put_some, range(64)))
    assert len(slow_disk) <= 3 * 8
    assert sorted(waited)[len(waited) * 95 // 100] <= 3
    written.close()


# Notes what a power cut would leave: of a file as many bytes as it had when it was last synced, of a folder the names.
DISK = """
import json, os, stat, threading

def noting(sync, syncs=[]):
    def synced(handle):
        found = os.fstat(handle)
        is_folder = stat.S_ISDIR(found.st_mode)
        if not is_folder:
            syncs.append(handle)
            if len(syncs) > 40:  # what is being synced now never gets there
                os.write(journal, b"hangs\\n")
                threading.Event().wait()
        left = {entry.name: entry.inode() for entry in os.scandir(handle)} if is_folder else found.st_size
        sync(handle)
        os.write(journal, json.dumps([found.st_ino, left]).encode() + b"\\n")
    return synced

journal = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.fsync, os.fdatasync = noting(os.fsync), noting(os.fdatasync)
"""


def cut_power(folder, left):
    """Bring a folder to what is left on the disk, by inode; gives the number of bytes that were lost."""
    names = left.get(folder.stat().st_ino, {})
    lost = 0
    for path in list(folder.iterdir()):
        if path.name not in names:
            path.rename(folder.parent / f"lost-{path.name}-{path.stat().st_ino}")
        elif path.is_dir():
            lost += cut_power(path, left)
        else:
            kept = left.get(path.stat().st_ino, 0)
            lost += path.stat().st_size - kept
            os.truncate(path, kept)
    return lost


def test_a_power_cut(place, tmp_path, tmp_path_factory):  # noqa: F811
    """What was synced is what replay sends: all that callers were told is safe, and nothing torn."""
    body = """
def work():
    while True: os.write(1, call().encode() + b"\\n")
for _ in range(4): threading.Thread(target=work).start()
"""
    away = "http://127.0.0.1:9"
    journal = tmp_path_factory.mktemp("disk") / "journal"
    program = DISK + PROGRAM.replace("print(call(), flush=True)", "")
    process = start(body, away, place[1], "durable", program=program, JOURNAL=str(journal))
    try:
        wait_until(lambda: journal.exists() and b"hangs\n" in journal.read_bytes(), 60)
    finally:
        process.kill()
    told = process.communicate(timeout=30)[0].split()
    left = dict(json.loads(line) for line in journal.read_text().splitlines() if line != "hangs")
    lost = cut_power(tmp_path, left)

    (info,) = export.spools()
    assert away == info.tracking_uri
    assert 0 < lost
    assert (0, 0) == (info.damaged, info.dead)
    summary = export.replay(tracking_uri=place[0], folder=info.folder)
    traces = read(*place)
    assert 40 <= len(told) == len(set(told))
    assert set(told) <= set(traces)
    assert summary.traces == len(traces) <= len(told) + 4  # at most those whose callers had not been told yet
    assert {2} == {len(trace.data.spans) for trace in traces.values()}
