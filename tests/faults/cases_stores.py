"""Stores that fail: servers that answer nonsense, databases that are cut off, disks that are full or read-only."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import sqlalchemy
from postgres import Postgres, programs
from stores import Page, Proxy

from faults.audit import connect
from faults.harness import SkippedError, ask, case
from slow_store import slow_store

SPANS, TRACES = b"/v1/traces", b"/mlflow/traces"
ANSWERS = {
    "404, a page": Page(404),
    "404, JSON of a proxy": Page(404, b'{"detail": "Not Found"}', "application/json"),
    "400, a page": Page(400),
    "500": Page(500, b'{"detail": "proxy"}', "application/json"),
    "503": Page(503),
    "200 with {}": Page(200, b"{}", "application/json"),
    "200 with {} for spans": Page(200, b"{}", "application/json", path=SPANS),
    "200 with a page": Page(200),
    "200, empty, for traces": Page(200, b"", "", path=TRACES),
    "hangs up half-way": "hang up",
    "request cut half-way": "cut",
}


@case
def answers(bench):
    """What stands before the server answers in its place for a while, or loses its answers."""
    for name, fault in ANSWERS.items():
        with contextlib.closing(Proxy(bench.server_port)) as proxy:
            place = bench.server(f"server: {name}", before=proxy.uri)
            turns = [["well", 3, 60], ["ill", 10, 2], ["well again", 3, 60]]
            child = bench.start(place, "programs.in_turns", turns=turns, feedback="score")
            faults = [None, fault, None]
            for (word, _, _), each in zip(turns, faults, strict=True):
                child.meet(word)
                proxy.fault = each
                child.go()
            flushed, stats = child.end()
            row = bench.audit(place, said=[stats], feedback=["score"], faults=_unless(flushed, [True, False, True]))
        yield row


def _unless(flushed, expected):
    """A fault unless `flush()` said each time what it had to, or something where either will do (None)."""
    wrong = [pair for pair in zip(flushed, expected, strict=True) if pair[1] is not None and pair[0] != pair[1]]
    return [f"flush() returned {flushed}, not {expected}"] if wrong else []


@case
def refusal(bench):
    """MLflow itself refuses: a deleted experiment. What it refuses is brought back when the experiment is."""
    place = bench.server("MLflow refuses")
    child = bench.start(place, "programs.in_turns", turns=[["there", 3, 60], ["deleted", 5, 60]])
    child.meet("there")
    child.go()
    child.meet("deleted")
    ask(bench.server_uri, "experiments/delete", experiment_id=place.experiment_id)
    child.go()
    _, stats = child.end()
    yield bench.audit(place, said=[stats], may=("stored", "dead"))
    ask(bench.server_uri, "experiments/restore", experiment_id=place.experiment_id)
    faults = bench.replay(place, "--dead-letters", "--yes")
    row = bench.audit(place, faults=faults, note="after replay --dead-letters")
    yield dataclasses.replace(row, case="MLflow refuses, then takes")


@case
def quota(bench):
    """The store is away until the spool is at its bound: what exceeds it is counted, the rest arrives."""
    for mode in ("thread", "process"):
        with slow_store(bench.server_uri) as store:
            place = bench.server(f"spool at its bound, {mode}", before=store.uri)
            options = {"export": mode, "max_spool_bytes": 1_500_000, "max_waiting_bytes": 1}
            turns = [["well", 3, 60], ["away", 100, 2], ["back", 3, 90]]
            child = bench.start(place, "programs.in_turns", turns=turns, text="@x " + "y" * 3000, options=options)
            for word, _, _ in turns:
                child.meet(word)
                store.is_away = word == "away"
                child.go()
            flushed, stats = child.end()
            faults = _unless(flushed, [True, False, True])
            if not 10 <= stats["dropped"] <= 90:
                faults.append(f"{stats['dropped']} dropped of 100: the bound was not what was tried")
            row = bench.audit(place, said=[stats], may=("stored", "dropped"), faults=faults)
        yield row


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of its own, where we may mount one; gives a function that changes its size."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", folder]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        raise SkippedError("only root may mount a small tmpfs here")

    def resize(new):
        subprocess.run(["mount", "-o", f"remount,size={new}", folder], check=True)  # noqa: S607

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # noqa: S607


@case
def full(bench):
    """The disk of a sqlite store is full, and has room again later."""
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    resize = bench.enter(small_disk(folder, "64m"))
    place = bench.sqlite("disk of the store full", folder)
    turns = [["room", 3, 60], ["full", 30, 2], ["room again", 3, 90]]
    child = bench.start(place, "programs.in_turns", turns=turns, text="@x " + "y" * 20_000)
    child.meet("room")
    child.go()
    child.meet("full")
    used = shutil.disk_usage(folder).used
    resize(used + 2**16)
    child.go()
    child.meet("room again")
    resize("64m")
    child.go()
    flushed, stats = child.end()
    yield bench.audit(place, said=[stats], faults=_unless(flushed, [True, False, True]))


@case
def read_only(bench):
    """A sqlite database that may only be read when the program begins, and later may be written."""
    prefix = _without_the_rights_of_root()
    for mode in ("thread", "process"):
        folder = Path(tempfile.mkdtemp(dir=bench.folder))
        place = bench.sqlite(f"read-only database, {mode}", folder)
        database = folder / "store.db"
        _let_write(database, may=False)
        turns = [["read-only", 10, 2], ["writable", 3, 90], ["read-only again", 10, 2], ["writable again", 3, 90]]
        child = bench.start(place, "programs.in_turns", prefix=prefix, turns=turns, options={"export": mode})
        for word, _, _ in turns:
            child.meet(word)
            _let_write(database, may=word.startswith("writable"))
            child.go()
        flushed, stats = child.end(240)
        # An open connection may go on writing: what the second time brings is the file system's to say.
        yield bench.audit(place, said=[stats], faults=_unless(flushed, [False, True, None, True]))


def _let_write(database, *, may):
    database.chmod(0o644 if may else 0o444)
    database.parent.chmod(0o755 if may else 0o555)


def _without_the_rights_of_root():
    """A command that runs another without root's right to write to what is read-only."""
    if os.geteuid() != 0:
        return ()
    command = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    if shutil.which("setpriv") is None or subprocess.run([*command, "true"], check=False).returncode != 0:
        raise SkippedError("root may write to everything, and setpriv cannot take that right here")
    return command


@case
def postgresql(bench):
    """PostgreSQL: text that it does not take, and connections that it drops again and again."""
    bin_folder = programs()
    if bin_folder is None:
        raise SkippedError("no PostgreSQL server on this machine")
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    postgres = Postgres(folder, bin_folder)
    postgres.start()
    bench.enter(contextlib.closing(_Stopping(postgres)))
    place = bench.database("PostgreSQL, NUL in text", postgres.uri)
    child = bench.start(place, "programs.in_turns", turns=[["go", 20, 90]], text="@x a\0b")
    child.meet("go")
    child.go()
    flushed, stats = child.end()
    yield bench.audit(place, said=[stats], faults=_unless(flushed, [True]))

    place = bench.database("PostgreSQL, read-only for a while", postgres.uri)
    _let_postgresql_write(postgres, may=False)
    child = bench.start(place, "programs.in_turns", turns=[["read-only", 10, 2], ["writable", 3, 90]])
    child.meet("read-only")
    child.go()
    child.meet("writable")
    _let_postgresql_write(postgres, may=True)
    child.go()
    flushed, stats = child.end()
    yield bench.audit(place, said=[stats], faults=_unless(flushed, [False, True]))

    place = bench.database("PostgreSQL, connections dropped", postgres.uri)
    child = bench.start(place, "programs.until_told")
    child.meet("working")
    dropped, rounds = 0, bench.rounds(10)
    for number in range(rounds):
        bench.say(f"{place.case}: {number + 1} of {rounds}")
        threading.Event().wait(0.3)
        with connect(postgres.uri) as connection:
            dropped += len(connection.execute(sqlalchemy.text(_DROP)).all())
    child.go()
    is_flushed, stats = child.end()
    faults = _unless([is_flushed], [True]) + ([] if dropped else ["no connection was there to be dropped"])
    yield bench.audit(place, said=[stats], note=f"{dropped} connections dropped", faults=faults)


def _let_postgresql_write(postgres, *, may):
    """For connections that are opened from now on, as those to a standby."""
    with connect(postgres.uri) as connection:
        connection.execute(sqlalchemy.text("SET TRANSACTION READ WRITE"))
        value = "off" if may else "on"
        connection.execute(sqlalchemy.text(f"ALTER DATABASE postgres SET default_transaction_read_only = {value}"))


_DROP = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"""


class _Stopping:
    def __init__(self, postgres):
        self.close = postgres.stop
