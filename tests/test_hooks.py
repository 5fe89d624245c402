"""The patches: what they do while they are on, and that everything is its own again when they are undone."""

import concurrent.futures
import threading
from contextvars import ContextVar

import pytest

from dspy_mlflow_async.context.carrier import Carrier
from dspy_mlflow_async.hooks import patch_all_threads
from echo import TIMEOUT

PLACE = ContextVar("place", default="nowhere")


@pytest.fixture(autouse=True)
def _fresh():
    PLACE.set("nowhere")


def capture():
    """A carrier of this test's variable."""
    return Carrier({PLACE: PLACE.get()})


def in_thread():
    """What a plain thread sees."""
    seen = []
    thread = threading.Thread(target=lambda: seen.append(PLACE.get()))
    thread.start()
    thread.join(TIMEOUT)
    return seen[0]


def in_pool():
    """What a plain pool's thread sees."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(PLACE.get).result(TIMEOUT)


def in_subclass():
    """What a thread sees whose class overrides ``run``."""
    seen = []

    class Subclass(threading.Thread):
        def run(self):
            seen.append(PLACE.get())

    thread = Subclass()
    thread.start()
    thread.join(TIMEOUT)
    return seen[0]


@pytest.mark.parametrize("look", [in_thread, in_pool, in_subclass])
def test_before_during_and_after(look):
    """Off, threads see nothing; on, the place they were started in; undone, nothing again."""
    PLACE.set("here")
    assert "nowhere" == look()

    undo = patch_all_threads(capture)
    try:
        assert "here" == look()
    finally:
        undo()

    assert "nowhere" == look()
    assert "_started" not in vars(threading.Thread)


def test_the_undo_restores_the_very_functions():
    """Undone, the functions are the same objects as before."""
    before = threading.Thread.start, concurrent.futures.ThreadPoolExecutor.submit
    undo = patch_all_threads(capture)
    assert before != (threading.Thread.start, concurrent.futures.ThreadPoolExecutor.submit)
    undo()

    assert before == (threading.Thread.start, concurrent.futures.ThreadPoolExecutor.submit)


def test_a_pools_thread_is_clean_between_items():
    """Each item has the place of its own ``submit``, in whichever thread."""
    undo = patch_all_threads(capture)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            seen = []
            for place in ("a", "b"):
                PLACE.set(place)
                seen.append(pool.submit(PLACE.get).result(TIMEOUT))
            assert ["a", "b"] == seen
    finally:
        undo()


@pytest.mark.parametrize("place", ["here", None])
def test_a_pools_thread_keeps_nothing_of_its_first_item(place):
    """An item that carries nothing sees nothing, in a thread that was started for another one."""
    undo = patch_all_threads(lambda: Carrier({PLACE: PLACE.get()}) if PLACE.get() != "nowhere" else None)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            PLACE.set("first")
            assert "first" == pool.submit(PLACE.get).result(TIMEOUT)
            PLACE.set(place or "nowhere")
            assert (place or "nowhere") == pool.submit(PLACE.get).result(TIMEOUT)
        finally:
            undo()
        assert "nowhere" == pool.submit(PLACE.get).result(TIMEOUT)


def test_threads_started_under_the_patch_and_running_after_it():
    """A thread that began under the patch keeps its place when the patch is gone."""
    go_on, seen = threading.Event(), []

    def look():
        assert go_on.wait(TIMEOUT)
        seen.append(PLACE.get())

    PLACE.set("here")
    undo = patch_all_threads(capture)
    thread = threading.Thread(target=look)
    thread.start()
    undo()
    go_on.set()
    thread.join(TIMEOUT)

    assert ["here"] == seen


def test_a_thread_can_be_started_once_only():
    """Starting twice raises, as without the patch."""
    undo = patch_all_threads(capture)
    try:
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join(TIMEOUT)
        with pytest.raises(RuntimeError):
            thread.start()
    finally:
        undo()


def test_timers_and_named_daemons():
    """Subclasses with state of their own, such as ``threading.Timer``, work."""
    seen, done = [], threading.Event()

    def look():
        seen.append((PLACE.get(), threading.current_thread().name, threading.current_thread().daemon))
        done.set()

    undo = patch_all_threads(capture)
    try:
        PLACE.set("here")
        timer = threading.Timer(0, look)
        timer.name, timer.daemon = "timer", True
        timer.start()
        assert done.wait(TIMEOUT)
        timer.join(TIMEOUT)
    finally:
        undo()

    assert [("here", "timer", True)] == seen
