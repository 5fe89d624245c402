"""Processes that are killed: the program itself, the child that writes for it, a notebook's kernel."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import time

import sqlalchemy

from faults.audit import Row, connect, read_tables
from faults.harness import TESTS, case, needs, wait_until


@case
def kill(bench):
    """Programs with `durable=True` are killed at random moments: both export modes, both kinds of store."""
    for mode, store in itertools.product(("thread", "process"), ("sqlite", "server")):
        place = getattr(bench, store)(f"kill -9, {mode}, {store}")
        rounds = bench.rounds(2)
        chance = random.Random(place.case)  # noqa: S311 - no secret
        for number in range(rounds):
            bench.say(f"{place.case}: {number + 1} of {rounds}")
            size = place.ledger.path.stat().st_size
            wanted = int(10 ** chance.uniform(0, 5))  # bytes of the ledger: a call has 83
            child = bench.start(place, "programs.forever", options={"export": mode, "durable": True})
            _wait_for_growth(child, place, size + wanted)
            time.sleep(chance.random() / 20)  # the moment is a matter of chance, and shall be
            child.kill()
        yield _after_kills(bench, place, f"{rounds} kills")


def _wait_for_growth(child, place, size):
    def has_come():
        assert child.process.poll() is None, child.last_words()
        return place.ledger.path.stat().st_size >= size

    wait_until(has_come, 120)


def _after_kills(bench, place, note):
    """The row after a replay, which must bring everything; it must be on disk before, too."""
    before = bench.audit(place, may=("stored", "spooled"))
    faults = [f"before replay: {problem}" for problem in before.problems]
    faults += bench.replay(place)
    return bench.audit(place, note=f"{note}; {before.spooled} were in the spool", faults=faults)


@case
def drain(bench):
    """The child process that writes to the store is killed again and again while the program works."""
    place = bench.sqlite("drain child killed")
    rounds = bench.rounds(3)
    child = bench.start(place, "programs.until_told", options={"export": "process"})
    child.meet("working")
    chance = random.Random(1)  # noqa: S311 - no secret
    killed = set()
    for number in range(rounds):
        bench.say(f"{number + 1} of {rounds}")
        wait_until(lambda: any(each.pid not in killed for each in child.children()), 120)
        time.sleep(chance.random() * 2.5)  # in its imports, in its first write, at rest
        for each in child.children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL)
                killed.add(each.pid)
    child.go()
    is_flushed, stats = child.end(240)
    yield bench.audit(place, said=[stats], note=f"{len(killed)} kills", faults=_unless(is_flushed))


@case
def workers(bench):
    """Of an evaluation on two worker processes these are killed, then the program; a resume ends it. Both stores."""
    for store in ("sqlite", "server"):
        place = getattr(bench, store)(f"workers killed, {store}")
        size, rounds = bench.size(60, 2_000), bench.rounds(1, long=20)
        notes, parent = place.folder / "judged", None
        notes.touch()
        for number in range(rounds):
            bench.say(f"{place.case}: {number + 1} of {rounds}")
            child = bench.start(place, "programs.on_workers", size=size, notes=str(notes), resume=parent)
            _wait_for_judged(child, notes, number * size // (rounds + 1) + 5)
            victims = [each for each in child.children() if "remote.processes" in " ".join(each.cmdline())]
            assert len(victims) == 2, [each.cmdline() for each in child.children()]
            victims[number % 2].kill()
            _wait_for_judged(child, notes, (number + 1) * size // (rounds + 1))
            child.kill()
            parent = parent or _first_run(place)
        child = bench.start(place, "programs.on_workers", size=size, notes=str(notes), resume=parent)
        given, _ = child.end(600)
        faults = bench.replay(place)
        row = _row_of_evaluation(place, size, given, faults)
        note = f"killed: {rounds} of the workers, {rounds} times the program"
        yield dataclasses.replace(row, note=note, seconds=bench.seconds)


def _wait_for_judged(child, notes, count):
    def has_come():
        assert child.process.poll() is None, child.last_words()
        return notes.stat().st_size >= count

    wait_until(has_come, 180)


def _first_run(place):
    """The run of the whole comparison: it is made first."""
    with connect(place.database) as connection:
        query = "SELECT run_uuid FROM runs WHERE experiment_id = :id ORDER BY start_time, run_uuid"
        runs = connection.execute(sqlalchemy.text(query), {"id": int(place.experiment_id)}).scalars().all()
        parents = "SELECT value FROM tags WHERE key = 'mlflow.parentRunId'"
        known = set(connection.execute(sqlalchemy.text(parents)).scalars())
    return next((run for run in runs if run in known), runs[0])


def _row_of_evaluation(place, size, given, faults):
    """Each example counts once: its trace is whole and has its feedback; what else there is is marked as lost."""
    found = read_tables(place.database, place.experiment_id)
    with connect(place.database) as connection:
        query = "SELECT request_id FROM trace_tags WHERE key = 'dspy_mlflow_async.lost'"
        lost = set(connection.execute(sqlalchemy.text(query)).scalars())
    ids = given["ids"]
    whole = {each for each in ids if each in found and found[each].spans == 4 and not found[each].orphans}
    whole = {each for each in whole if found[each].feedback["NotesRight"] == 1}
    told = [given["status"], given["score"], given["examples"], given["errors"]]
    faults = [*faults, *([] if told == ["finished", 100.0, size, 0] else [f"the evaluation says {told}"])]
    faults += [f"{len(lost & set(ids))} that count are marked as lost"] if lost & set(ids) else []
    return Row(
        place.case,
        made=size,
        stored=len(whole),
        lost=len(set(ids) - whole),
        doubled=len(ids) - len(set(ids)) + len(set(found) - set(ids) - lost),
        faults=tuple(faults),
    )


def _unless(is_flushed):
    return [] if is_flushed else ["flush() returned False"]


_KERNEL = """
import sys; sys.path.insert(0, {tests!r})
from faults import programs
from faults.child import Program
program = Program({order!r})
"""
_CELL = """
import asyncio
for _ in range(5):
    program.call()
    await asyncio.gather(*(program.acall() for _ in range(3)))
"""


@case
def jupyter(bench):
    """A notebook's kernel is killed in the middle of a cell and started again."""
    needs("ipykernel", "jupyter_client")
    from jupyter_client.manager import KernelManager

    place = bench.sqlite("Jupyter kernel restarts")
    rounds = bench.rounds(2, long=20)
    order = {
        "uri": place.uri, "experiment_id": place.experiment_id, "folder": str(place.folder),
        "ledger": str(place.ledger.path), "options": {"durable": True},
    }  # fmt: skip
    manager = KernelManager(kernel_name="python3")
    log = bench.enter((place.folder / "stderr").open("wb"))
    manager.start_kernel(env=place.environment, cwd=str(place.folder), stdout=log, stderr=log)
    client = None
    try:
        for number in range(rounds + 1):
            bench.say(f"{number + 1} of {rounds}")
            client = manager.client()
            client.start_channels()
            client.wait_for_ready(timeout=60)
            for cell in (_KERNEL.format(tests=str(TESTS), order=order), _CELL):
                _run(client, cell)
            if number < rounds:
                size = place.ledger.path.stat().st_size
                client.execute("while True: program.call()")
                wait_until(lambda size=size: place.ledger.path.stat().st_size > size + 2_000, 60)
                client.stop_channels()
                manager.restart_kernel(now=True)
        _run(client, "from dspy_mlflow_async import flush; assert flush(60)")
    finally:
        if client is not None:
            client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
    yield _after_kills(bench, place, f"{rounds} restarts")


def _run(client, cell):
    answer = client.execute_interactive(cell, timeout=120, output_hook=lambda _: None, stdin_hook=None)
    assert answer["content"]["status"] == "ok", json.dumps(answer["content"], default=str)[-1500:]
