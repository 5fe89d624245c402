"""`durable=True`: what a caller has been told is safe survives a power cut, on a slow disk too."""

import json
import os
import threading
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor

import pytest
from stores import call, wait_until
from test_spool import PROGRAM, place, read, start  # noqa: F401 - `place` is a fixture

from dspy_mlflow_async import export
from dspy_mlflow_async.export.spool import segments


class SlowDisk:
    """A disk whose syncs end when they are told to.

    Attributes:
        begun: How many syncs have begun.
    """

    def __init__(self, sync):
        self.begun = 0
        self._sync = sync
        self._go = threading.Semaphore(0)

    def __call__(self, handle):
        self.begun += 1
        assert self._go.acquire(timeout=30)
        self._sync(handle)

    def go(self, syncs=1):
        self._go.release(syncs)


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that takes its time."""
    disk = SlowDisk(segments.sync_file)
    monkeypatch.setattr(segments, "sync_file", disk)
    return disk


def have_written(spool, records):
    """Wait until a spool has this many records, and those who wrote them are about to wait for a sync."""
    folder = spool.folder
    wait_until(lambda: records == sum(path.read_bytes().count(b"\n") for path in folder.glob("*.seg")))
    spool.written()  # whoever has just written has let go of the lock


def test_a_slow_disk(make, slow_disk):
    """A call costs one sync, or two if one is under way; those that wait at the same time share it."""
    installed = make(durable=True)
    installed.stop_writing()
    ids, rounds, callers = [], 10, 16
    with ThreadPoolExecutor(callers) as pool:
        for number in range(rounds):
            first = pool.submit(call)
            wait_until(lambda syncs=2 * number + 1: syncs == slow_disk.begun)
            others = [pool.submit(call) for _ in range(callers - 1)]
            have_written(installed.queue.spool, callers * (number + 1))
            assert not any(future.done() for future in (first, *others))
            slow_disk.go()
            ids.append(first.result(30))
            assert not any(future.done() for future in others)
            slow_disk.go()
            ids.extend(future.result(30) for future in others)

    assert 2 * rounds == slow_disk.begun
    slow_disk.go(1000)
    installed.write_again()
    assert export.flush(100)
    traces = installed.read()
    assert set(ids) == set(traces)
    assert {4} == {len(trace.data.spans) for trace in traces.values()}
    assert export.ExportStats(started=160, ended=160, stored=160) == export.stats()
    assert 0 == sum(info.records for info in export.spools())


def test_nobody_waits_for_a_sync_that_began_after_his_own(tmp_path, slow_disk):
    """While a newcomer syncs, all those return whose records an earlier sync has made safe."""
    written = segments.Spool(tmp_path / "spool", "uri")

    def put(key):
        written.put(b"{}", key=key, counted=1, sync=True)

    with ThreadPoolExecutor(16) as pool:
        first = pool.submit(put, "first")
        wait_until(lambda: 1 == slow_disk.begun)
        second = [pool.submit(put, f"second {number}") for number in range(10)]
        have_written(written, 11)
        slow_disk.go()
        wait_until(lambda: 2 == slow_disk.begun)
        third = [pool.submit(put, f"third {number}") for number in range(4)]
        have_written(written, 15)
        slow_disk.go()
        wait_until(lambda: 3 == slow_disk.begun)
        for future in (first, *second):
            future.result(10)
        assert not any(future.done() for future in third)
        slow_disk.go(1000)
    written.close()


def test_who_waits_while_a_segment_is_closed(tmp_path, slow_disk):
    """The sync of the full segment, which another caller makes, is waited for like any other."""
    written = segments.Spool(tmp_path / "spool", "uri")
    reference = written.put(b"{}", key="first", counted=1)
    with ThreadPoolExecutor(2) as pool:
        closing = pool.submit(written.close)
        wait_until(lambda: 1 == slow_disk.begun)
        waiting = pool.submit(written.sync, reference)
        with pytest.raises(futures.TimeoutError):
            waiting.result(0.2)
        slow_disk.go()
        waiting.result(30)
        closing.result(30)

    assert 1 == slow_disk.begun


def test_an_interrupted_sync_is_anothers_turn():
    """Ctrl-C in the one who syncs leaves nobody waiting for ever."""
    group, synced = segments.GroupSync(), []

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

    def put(key):
        written.put(b"{}", key=key, counted=1, sync=True)

    with ThreadPoolExecutor(64) as pool:
        for number in range(8):
            first = pool.submit(put, "first")
            wait_until(lambda syncs=2 * number + 1: syncs == slow_disk.begun)
            others = [pool.submit(put, "other") for _ in range(63)]
            have_written(written, 64 * (number + 1))
            slow_disk.go(2)
            for future in (first, *others):
                future.result(30)

    assert 2 * 8 == slow_disk.begun
    slow_disk.go(1000)
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
