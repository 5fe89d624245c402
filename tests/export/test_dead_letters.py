"""What a store has refused for good comes back when somebody asks for it."""

import threading

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import call

from dspy_mlflow_async import export
from dspy_mlflow_async.export.spool import dead_letters
from dspy_mlflow_async.export.spool.format import scan
from dspy_mlflow_async.export.spool.paths import segments_of
from dspy_mlflow_async.seams import mlflow_store


@pytest.fixture
def refused(sqlite):
    """Three traces that the store has refused, since their experiment was deleted, and that it would take now."""
    client = mlflow.MlflowClient(sqlite.uri)
    client.delete_experiment(sqlite.experiment_id)
    ids = [call() for _ in range(3)]
    assert export.flush(100)
    assert 3 == export.stats().dead
    client.restore_experiment(sqlite.experiment_id)
    return sqlite, ids


def test_dead_letters_are_sent_again_when_asked_for(refused):
    """All of them, each whole; then there are none left, and nothing in the spool."""
    sqlite, ids = refused

    assert 0 == export.replay().stored
    summary = export.replay(revive=lambda letter: True)

    assert (3, 3, 0, 0) == (summary.stored, summary.traces, summary.dead, summary.left)
    assert dict.fromkeys(ids, 4) == {key: len(trace.data.spans) for key, trace in sqlite.read().items()}
    assert [] == export.letters()


def test_dead_letters_are_chosen(refused):
    """Those that are not wanted stay, word for word."""
    sqlite, ids = refused
    before = export.letters()

    assert all("must be in the 'active' state" in letter.reason for letter in before)
    assert 0 == export.replay(revive=lambda letter: False).stored
    assert 1 == export.replay(revive=lambda letter: letter == before[1]).stored
    read = sqlite.read()
    assert [ids[1]] == [key for key, trace in read.items() if "mlflow.source.type" in trace.info.trace_metadata]
    # Before MLflow 3.12 spans go first, into a deleted experiment, too.
    assert {*(ids[1:2] if mlflow_store.finalizes() else ids)} == set(read)
    assert [before[0], before[2]] == export.letters()


def test_what_is_refused_again_is_a_dead_letter_again(refused):
    """With the new reason, and once."""
    sqlite, _ = refused
    mlflow.MlflowClient(sqlite.uri).delete_experiment(sqlite.experiment_id)

    assert 3 == export.replay(revive=lambda letter: True).dead
    assert 3 == len(export.letters())


def test_letters_that_come_meanwhile_are_kept(tmp_path):
    """A process may write one at any moment while others are brought back."""
    folder, uri = tmp_path / "spool", "http://a"
    dead_letters.append(folder, uri, b'{"first":1}', "first")
    both = threading.Barrier(2, timeout=20)

    def write():
        both.wait()
        for number in range(300):
            dead_letters.append(folder, uri, b'{"n":%d}' % number, "new")

    writer = threading.Thread(target=write)
    writer.start()
    both.wait()
    revived = sum(dead_letters.revive(folder, uri, lambda letter: True) for _ in range(50))
    writer.join(60)
    left = dead_letters.read(folder)
    records = [payload for segment in segments_of(folder) for _, payload in scan(segment.read_bytes())]

    assert 301 == revived + len(left)
    assert 301 == len({*records, *(letter.record for letter in left)})


@given(st.lists(st.tuples(st.sampled_from(["keep", "take", "damaged"]), st.binary(max_size=30)), max_size=8))
def test_damaged_letters_stay_where_they_are(tmp_path_factory, letters):
    """What cannot be read is nobody's choice: it is left, and so is all else that was not wanted, in its order."""
    folder = tmp_path_factory.mktemp("spool")
    folder.chmod(0o700)
    kept = []
    for number, (what, noise) in enumerate(letters):
        if what == "damaged":
            with (folder / "dead.letters").open("ab") as file:
                file.write(noise.replace(b"\n", b"") + b"\n")
        else:
            dead_letters.append(folder, "http://a", b'{"n":%d}' % number, what)
            kept += [number] if what == "keep" else []
    before = (folder / "dead.letters").read_bytes() if letters else b""

    revived = dead_letters.revive(folder, "http://a", lambda letter: letter.reason == "take")

    assert revived == sum(what == "take" for what, _ in letters)
    after = (folder / "dead.letters").read_bytes()
    assert [b'{"n":%d}' % number for number in kept] == [letter.record for letter in dead_letters.read(folder)]
    lines = iter(before.splitlines(keepends=True))
    assert all(line in lines for line in after.splitlines(keepends=True))
