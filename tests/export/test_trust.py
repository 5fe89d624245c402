"""What lies in a spool is believed only where this user, and nobody else, can have put it there."""

import contextlib
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Metric
from stores import call, wait_until

from dspy_mlflow_async import export
from dspy_mlflow_async.cli.doctor import checks
from dspy_mlflow_async.cli.doctor.findings import Level
from dspy_mlflow_async.evaluate import local_records
from dspy_mlflow_async.export.operations import RunOperation
from dspy_mlflow_async.export.spool import codec
from dspy_mlflow_async.export.spool.format import frame, mark_done
from dspy_mlflow_async.export.spool.paths import Lock, folder_of, make_folder, read_file

STRANGER = os.geteuid() + 1


@pytest.fixture
def run_id(store_uri):
    mlflow.set_tracking_uri(store_uri)
    client = mlflow.MlflowClient()
    return client.create_run(client.create_experiment(f"trust-{time.time_ns()}")).info.run_id


def plant(root, uri, run_id, name=None):
    """A spool for a store with one record: a metric of a run."""
    place = root / (name or folder_of(root, uri).name)
    make_folder(place, uri)
    payload = codec.encode(RunOperation(key=run_id, metrics=[Metric("planted", 1.0, 1, 0)]))
    (place / "00000000000000000001-1-abc.seg").write_bytes(frame(payload))
    return place


def planted(run_id):
    return "planted" in mlflow.MlflowClient().get_run(run_id).data.metrics


@pytest.fixture
def strange(monkeypatch):
    """From the call on, this process is another user than the one that has made all files there are."""

    def become():
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)

    return become


def test_a_spool_of_ones_own_is_sent(spool_dir, store_uri, run_id):
    """The control: what the tests below plant is sent where nothing is wrong with it."""
    plant(spool_dir, store_uri, run_id)

    assert 1 == export.replay().stored
    assert planted(run_id)


def test_a_spool_that_others_may_write_to_is_not_sent(spool_dir, store_uri, run_id):
    """A folder with a mode that lets others in is refused, and said."""
    place = plant(spool_dir, store_uri, run_id)
    place.chmod(0o770)

    summary = export.replay()

    assert (0, (f"{place}: not used: others may write to it",)) == (summary.stored, summary.errors)
    assert not planted(run_id)
    notes = [finding.text for finding in checks.spool() if finding.level is Level.NOTE]
    assert [f"{place} is not used, since others may write to it; where it is yours, chown and chmod 700 it."] == notes


def test_a_spool_of_another_user_is_not_sent(spool_dir, store_uri, run_id, strange):
    """A folder of somebody else's is refused, also when it is named."""
    place = plant(spool_dir, store_uri, run_id)
    strange()

    for summary in (export.replay(), export.replay(folder=place, tracking_uri=store_uri)):
        assert (0, (f"{place}: not used: it belongs to another user",)) == (summary.stored, summary.errors)
    assert not planted(run_id)


def test_a_link_to_a_spool_is_not_followed(spool_dir, store_uri, run_id, tmp_path):
    """A link in the place of the folder, or of a file in it, is refused."""
    place = plant(spool_dir, store_uri, run_id)
    elsewhere = tmp_path / "elsewhere"
    place.rename(elsewhere)
    place.symlink_to(elsewhere)

    assert (f"{place}: not used: it is a link",) == export.replay().errors

    place.unlink()
    make_folder(place, store_uri)
    (segment,) = elsewhere.glob("*.seg")
    (place / segment.name).symlink_to(segment)

    assert 0 == export.replay().stored
    assert not planted(run_id)
    with pytest.raises(OSError, match="symbolic links"):
        mark_done(place / segment.name, [0]) or read_file(place / segment.name)


def test_a_note_that_names_another_store_is_not_believed(spool_dir, store_uri, run_id):
    """The store stands in the folder's name, too: records are not sent to where a changed note says."""
    place = plant(spool_dir, "http://127.0.0.1:1", run_id)
    (place / "tracking-uri").write_text(store_uri)

    assert (f"{place}: no tracking URI that fits it is known, give one",) == export.replay().errors
    assert not planted(run_id)


def test_a_process_adopts_nothing_of_a_planted_spool(spool_dir, store_uri, run_id, make, strange):
    """A writing process neither sends what a stranger has left nor writes there: it has a folder of its own beside."""
    place = plant(spool_dir, store_uri, run_id)
    strange()
    installed = make(durable=True)
    trace_id = call()

    assert export.flush(60)
    assert trace_id in installed.read()
    assert not planted(run_id)
    assert f"{place.name}-{STRANGER}" == installed.queue.spool.folder.name


@pytest.mark.parametrize("path", ["/etc/cron.d/x", "../x", "a/../../x", "..", "a\\..\\x", "", ".", "a\0b"])
def test_an_artifact_stays_within_its_run(path, spool_dir, store_uri, run_id):
    """A record that names a path elsewhere is not written, and no file appears outside."""
    place = spool_dir / folder_of(spool_dir, store_uri).name
    make_folder(place, store_uri)
    record = codec.encode(RunOperation(key=run_id, path="forged", content=b"x"))
    forged = codec.loads(record)
    forged["path"] = path
    (place / "00000000000000000001-1-abc.seg").write_bytes(frame(codec.dumps(forged)))

    summary = export.replay()

    assert (0, 1) == (summary.stored, summary.left)
    assert "an artifact cannot be called" in summary.errors[0]
    assert [] == mlflow.MlflowClient().list_artifacts(run_id)


def test_all_files_of_a_spool_are_their_owners(spool_dir, make):
    """Whatever the umask, no file or folder of a spool can be read by others."""
    before = os.umask(0)
    try:
        installed = make(mode="process", durable=True)
        call()
        assert export.flush(100)
        Lock(installed.queue.spool.folder / "drain.lock").acquire()
        local_records.LocalCopy("run").add("{}")
    finally:
        os.umask(before)
    paths = [path for path in spool_dir.rglob("*") if path.exists()]

    assert {"drain.lock", "tracking-uri", "run.jsonl"} <= {path.name for path in paths}
    assert {0} == {stat.S_IMODE(path.lstat().st_mode) & 0o077 for path in paths}


def test_finished_examples_of_a_stranger_are_not_resumed(spool_dir, strange):
    """What a resume finds on this machine is this user's own."""
    local_records.LocalCopy("run").add("{}")
    assert "{}" in local_records.read("run")
    strange()

    assert [] == local_records.read("run")


PROGRAM = """
import sys
import mlflow
from dspy_mlflow_async import export

mlflow.set_tracking_uri(sys.argv[1])
export.install(export.ExportOptions(mode="process", exit_timeout=1.0))
with mlflow.start_span("root"):
    pass
export.flush(20)
print("spooled", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="only Linux shows command lines there")
def test_no_command_line_shows_a_password(spool_dir):
    """The store's password stands in no command line of the export process, which every user can read."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("sys.argv[1]", "sys.stdin.readline().strip()")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "DSPY_MLFLOW_ASYNC_STRICT": "0"},
        text=True,
    )
    program.stdin.write("http://ada:s3cret@127.0.0.1:1\n")
    program.stdin.flush()

    try:
        wait_until(
            lambda: any(b"export_process" in line and str(spool_dir).encode() in line for line in commands()), 60
        )
        assert not any(b"s3cret" in line for line in commands())
    finally:
        program.communicate(timeout=60)


def commands():
    """The command lines of all processes of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found.append(path.read_bytes())
    return found
