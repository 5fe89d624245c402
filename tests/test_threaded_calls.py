"""Calls in threads: whoever stops waiting, the answer is somebody's, once."""

import asyncio
import signal
import threading

import pytest

from dspy_mlflow_async.workers import call_or_discard, call_with_timeout, in_thread, run_uninterrupted
from echo import TIMEOUT


class Slow:
    """A call that ends when it is told to.

    Attributes:
        begun: Set when it has begun.
        discarded: What came to nobody, and why.
    """

    def __init__(self):
        self.begun, self._go_on = threading.Event(), threading.Event()
        self.discarded, self._was_discarded = [], threading.Event()

    def __call__(self):
        self.begun.set()
        assert self._go_on.wait(TIMEOUT)
        return "answer"

    def go_on(self):
        self._go_on.set()

    def discard(self, answer, why):
        self.discarded.append((answer, type(why)))
        self._was_discarded.set()

    def is_discarded(self):
        return self._was_discarded.wait(TIMEOUT)


def test_an_answer_in_time():
    """It is returned, and what is raised is raised."""
    assert 3 == call_with_timeout(lambda: 1 + 2, TIMEOUT)
    with pytest.raises(ZeroDivisionError):
        call_with_timeout(lambda: 1 / 0, TIMEOUT)


def test_an_answer_that_comes_too_late():
    """Who waits gets a timeout, and the answer goes where it is cleaned up."""
    slow = Slow()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
        call_with_timeout(slow, 0.01, slow.discard)
    assert [] == slow.discarded
    slow.go_on()

    assert slow.is_discarded()
    assert [("answer", TimeoutError)] == slow.discarded


@pytest.fixture
def interrupt_once():
    """Make Ctrl-C an interrupt the first time, and nothing after it."""
    are_to_come = [KeyboardInterrupt()]

    def interrupt(*_):
        if are_to_come:
            raise are_to_come.pop()

    before = signal.signal(signal.SIGINT, interrupt)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_waiting(interrupt_once):
    """Ctrl-C passes at once, and the answer goes where it is cleaned up."""
    slow, has_passed = Slow(), threading.Event()

    def interrupt():
        assert slow.begun.wait(TIMEOUT)
        # Python sleeps through a signal that comes between its last look for one and the sleep itself.
        while not has_passed.wait(0.01):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call_with_timeout(slow, TIMEOUT, slow.discard)
    finally:
        has_passed.set()
        thread.join(TIMEOUT)
    slow.go_on()

    assert slow.is_discarded()
    assert [("answer", KeyboardInterrupt)] == slow.discarded


async def test_what_is_opened_for_a_cancelled_task():
    """It is discarded as soon as it is there."""
    slow = Slow()
    task = asyncio.create_task(call_or_discard(slow, slow.discard))
    assert await in_thread(slow.begun.wait, TIMEOUT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [] == slow.discarded
    slow.go_on()

    assert await in_thread(slow.is_discarded)
    assert [("answer", asyncio.CancelledError)] == slow.discarded


async def test_what_is_not_opened_for_a_cancelled_task():
    """A call that no thread has taken up is not made."""
    slow = Slow()
    task = asyncio.create_task(call_or_discard(slow, slow.discard))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert not slow.begun.is_set()


async def test_uninterrupted_work_of_a_task_that_is_cancelled_twice():
    """It is done once and to its end; then the cancellation is raised."""
    slow, calls = Slow(), []
    task = asyncio.create_task(run_uninterrupted(lambda: calls.append(slow())))
    assert await in_thread(slow.begun.wait, TIMEOUT)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    slow.go_on()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert ["answer"] == calls
