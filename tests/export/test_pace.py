"""The writer keeps pace with a program that never pauses, and takes its time beside one that does."""

import os

from stores import call, wait_until

from dspy_mlflow_async import export
from dspy_mlflow_async.export.queue.worker import Worker


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
