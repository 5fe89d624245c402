"""The writer keeps pace with a program that never pauses, and takes its time beside one that does."""

import os
import threading
import time

import dspy
import pytest
from stores import call, wait_until

from dspy_mlflow_async import TracingCallback, export
from dspy_mlflow_async.export.queue.turns import Turns
from dspy_mlflow_async.export.queue.worker import Worker
from dspy_mlflow_async.export.write.writer import Writer
from dspy_mlflow_async.seams.mlflow_packed_spans import PackedSpans
from echo import TIMEOUT, EchoLM


def test_a_writer_that_falls_behind_does_not_rest(sqlite, monkeypatch):
    """What a program that never pauses would put off it pays as it goes; after a burst the writer takes its time."""
    worker = sqlite.queue.worker
    waiting = []
    rest = Worker.rest

    def noted(self, seconds):
        if self is worker:
            waiting.append(export.stats().waiting)
            seconds = 0
        rest(self, seconds)

    worker.is_paused = True
    monkeypatch.setattr(Worker, "rest", noted)
    for _ in range(400):
        call(children=0)
    worker.is_paused = False
    worker.wake()
    wait_until(lambda: not export.stats().waiting, 60)

    lingered, *rested = waiting
    assert lingered > 300
    assert rested
    assert max(rested) < 256


def test_what_comes_one_by_one_is_written_together(sqlite, monkeypatch):
    """Less than a batch waits for more: a transaction for each of the traces costs several times as much."""
    worker, rest, write = sqlite.queue.worker, Worker.rest, Writer.write
    steps = {name: threading.Semaphore(0) for name in ("rests", "rested", "writes", "written")}
    batches, rests = [], []

    def step(begun, over):
        steps[begun].release()
        assert steps[over].acquire(timeout=TIMEOUT)

    def rest_when_told(self, seconds):
        if self is worker:
            rests.append(seconds)
            step("rests", "rested")
            seconds = 0
        rest(self, seconds)

    def write_when_told(self, operations):
        batches.append(len(operations))
        step("writes", "written")
        return write(self, operations)

    monkeypatch.setattr(Worker, "rest", rest_when_told)
    monkeypatch.setattr(Writer, "write", write_when_told)
    call(children=0)
    assert steps["rests"].acquire(timeout=TIMEOUT)
    steps["rested"].release()
    assert steps["writes"].acquire(timeout=TIMEOUT)
    call(children=0)
    steps["written"].release()
    assert steps["rests"].acquire(timeout=TIMEOUT)
    for _ in range(5):
        call(children=0)
    steps["rested"].release()
    for name in ("written", "rested"):
        steps[name].release(100)
    wait_until(lambda: not export.stats().waiting, TIMEOUT)

    assert [1, 6] == batches
    assert rests[0] == rests[1]  # as long as for the first, and not as short as the batch


def test_the_further_behind_a_writer_is_the_longer_are_its_turns(sqlite, monkeypatch):
    """Among many callers it has the interpreter seldom: at one pace for all it fell behind for good."""
    turns = []
    monkeypatch.setattr(Turns, "give", lambda _, seconds: turns.append(seconds))
    sqlite.queue.worker.is_paused = True
    for _ in range(255):
        call(children=0)
    assert not turns

    for _ in range(512):
        call(children=0)
    sqlite.queue.worker.is_paused = False

    assert sorted(turns) == turns
    assert 2 * turns[0] == turns[-1]


@pytest.fixture
def busy():
    """Start a worker that is at work until the event is set."""
    begun, over = threading.Event(), threading.Event()

    def work():
        begun.set()
        over.wait(TIMEOUT)

    worker = Worker(work, lambda: None)
    worker.turns.give(TIMEOUT)  # it has not begun
    worker.hurry()
    worker.start()
    assert begun.wait(TIMEOUT)
    yield worker, over
    over.set()
    worker.stop()


def test_a_turn_ends_when_the_writer_rests(busy):
    """Nobody waits for a writer that has nothing to do."""
    worker, over = busy
    worker.turns.note_progress(needed=TIMEOUT)
    given = threading.Thread(target=worker.turns.give, args=(TIMEOUT,))
    given.start()
    over.set()
    given.join(TIMEOUT / 2)

    assert not given.is_alive()


def test_nobody_waits_long_for_a_writer_that_does_not_get_on(busy):
    """A store that is locked, or slow, is nothing that the interpreter would help with."""
    worker, _ = busy
    began = time.monotonic()
    for _ in range(200):
        worker.turns.give(0.05)

    assert time.monotonic() - began < 5  # of 10


def test_callers_give_what_a_batch_takes_of_the_processor(busy):
    """A batch that takes long, and little of the processor, waits for a disk or for other processes."""
    worker, _ = busy
    for _ in range(20):  # batches
        worker.turns.note_progress(needed=0.01)
        began = time.monotonic()
        for _ in range(20):
            worker.turns.give(0.01)

        assert time.monotonic() - began < 0.1  # of 0.2


def test_what_a_batch_takes_of_the_processor_is_noted(sqlite, monkeypatch):
    """The time that it waits for the store is none of it."""
    notes, write = [], Writer.write

    def write_slowly(self, operations):
        threading.Event().wait(1)
        return write(self, operations)

    monkeypatch.setattr(Turns, "note_progress", lambda _, needed: notes.append(needed))
    call()
    assert export.flush(60)
    monkeypatch.setattr(Writer, "write", write_slowly)
    notes.clear()
    call()
    assert export.flush(60)

    assert 0 < max(notes) < 0.5


@pytest.mark.parametrize(("waiting", "lets_go"), [(20, True), (300, False)])
def test_a_writer_that_keeps_pace_lets_callers_on(sqlite, monkeypatch, waiting, lets_go):
    """Between two traces, of which it makes rows in two steps; one that is behind goes on."""
    gone = []
    sqlite.stop_writing()
    for _ in range(waiting):
        call(children=0)
    monkeypatch.setattr(Turns, "let_go", lambda _: gone.append(export.stats().waiting))
    sqlite.write_again()
    sqlite.queue.worker.wake()
    wait_until(lambda: not export.stats().waiting, 60)

    if lets_go:
        assert 2 * waiting == len(gone)
    else:
        assert max(gone, default=0) < 256


def test_a_writer_that_somebody_waits_for_goes_on(sqlite, monkeypatch):
    """Who flushes, or the end of the process, has nothing else to do with the interpreter."""
    gone = []
    sqlite.stop_writing()
    for _ in range(20):
        call(children=0)
    monkeypatch.setattr(Turns, "let_go", gone.append)
    sqlite.write_again()
    assert export.flush(60)

    assert [] == gone
    assert 20 == len(sqlite.read())


def test_what_waits_is_packed(sqlite):
    """A call that waits leaves little for the garbage collector to look at, and is stored with all of its spans."""
    sqlite.stop_writing()
    program = dspy.Predict("question -> answer")
    with dspy.context(lm=EchoLM(), callbacks=[TracingCallback()]):
        program(question="@a")
    waiting = sqlite.queue.pending.take_residents()

    assert [PackedSpans] == [type(entry.operation.spans) for entry in waiting]
    sqlite.queue.pending.release(waiting)
    sqlite.write_again()
    assert export.flush(60)
    (trace,) = sqlite.read().values()
    assert {"Predict.forward", "ChatAdapter.format", "EchoLM.__call__", "ChatAdapter.parse"} == {
        span.name for span in trace.data.spans
    }


def test_a_program_that_never_pauses_does_not_starve_the_writer(sqlite):
    """It lets go of the interpreter for a microsecond now and then, as DSPy does when it makes an id with `os.urandom`.

    A thread that waits for the interpreter then begins to wait anew each time. On a machine with nothing else to do the
    writer stored none of some thousand traces, until the program paused.
    """
    call()
    assert export.flush(60)

    for _ in range(1_500):
        call(children=0)
        for _ in range(8):
            os.urandom(16)
            sum(range(2_000))

    assert export.stats().waiting < 750
    assert export.flush(60)
    assert 1_501 == export.stats().stored == len(sqlite.read())
