"""The one context variable: immutable frames, entered and left by value. Plain strings are all it takes to test."""

import asyncio
import contextvars
import gc
import threading
import weakref

import pytest

from dspy_mlflow_async.context import frame
from echo import TIMEOUT


def ids():
    """The call ids of this context, innermost first."""
    return [each.call_id for each in frame.ancestors()]


def test_a_context_begins_empty():
    """No frame is current, and there are no ancestors."""
    assert frame.current() is None
    assert [] == ids()


def test_enter_and_leave():
    """Frames nest, and leaving gives back the frame that ended."""
    frame.enter("a", "span a")
    inner = frame.enter("b", "span b")

    assert ["b", "a"] == ids()
    assert inner is frame.current()
    assert "span b" == frame.leave("b").scope
    assert ["a"] == ids()
    assert "span a" == frame.leave("a").scope
    assert [] == ids()


def test_leaving_twice_does_nothing():
    """The second end finds no frame, and changes nothing."""
    frame.enter("a")
    frame.enter("b")
    frame.leave("b")

    assert frame.leave("b") is None
    assert ["a"] == ids()
    frame.leave("a")


def test_leaving_what_never_began_does_nothing():
    """An end of a foreign call finds no frame."""
    frame.enter("a")

    assert frame.leave("foreign") is None
    assert ["a"] == ids()
    frame.leave("a")


def test_leaving_an_outer_call_leaves_what_it_contains():
    """A call whose inner calls were never ended (a handler that was left out) is not followed by them."""
    frame.enter("a")
    frame.enter("b")
    frame.enter("c")
    frame.leave("a")

    assert [] == ids()
    assert frame.leave("c") is None


def test_a_frame_cannot_be_changed():
    """Copied contexts share frames, so none can be changed."""
    entered = frame.enter("a")
    with pytest.raises(AttributeError):
        entered.scope = "other"
    frame.leave("a")


@pytest.mark.parametrize("name", ["evaluation", "compile", "request"])
def test_what_holds_around_a_call_is_inherited(name):
    """Evaluation, compile and request hold for all calls inside, unless a call begins one of its own."""
    frame.enter("a", **{name: "outer"})
    frame.enter("b")
    assert "outer" == getattr(frame.current(), name)

    frame.enter("c", **{name: "inner"})
    assert "inner" == getattr(frame.current(), name)
    frame.leave("c")
    assert "outer" == getattr(frame.current(), name)
    frame.leave("a")


def test_a_new_evaluation_begins_without_an_example():
    """The example belongs to its evaluation: a nested evaluation has none until one begins."""
    frame.enter("a", evaluation="outer", example="first")
    assert "first" == frame.enter("b").example
    assert frame.enter("c", evaluation="inner").example is None
    frame.leave("a")


def test_a_copied_context_goes_its_own_way():
    """What a copy enters and leaves, the original never sees, and the other way round."""
    frame.enter("a")
    copied = contextvars.copy_context()
    copied.run(frame.enter, "b")
    frame.leave("a")

    assert [] == ids()
    assert ["b", "a"] == copied.run(ids)
    assert "b" == copied.run(frame.leave, "b").call_id
    assert ["a"] == copied.run(ids)


async def test_a_call_may_end_in_another_task():
    """No ``Token`` is kept: the end in another task does not raise, and ends the call there only."""
    frame.enter("a")

    async def end():
        return frame.leave("a"), ids()

    ended, there = await asyncio.create_task(end())

    assert ("a", []) == (ended.call_id, there)
    assert ["a"] == ids()
    frame.leave("a")


def test_a_new_thread_inherits_nothing():
    """Python's threads begin empty."""
    frame.enter("a")
    seen = []
    thread = threading.Thread(target=lambda: seen.extend(ids()))
    thread.start()
    thread.join(TIMEOUT)
    frame.leave("a")

    assert [] == seen


def test_a_left_frame_is_free():
    """When the last context lets a frame go, what it held is collected."""

    class Scope:
        pass

    scope = Scope()
    gone = weakref.ref(scope)
    frame.enter("a", scope)
    frame.leave("a")
    del scope
    gc.collect()

    assert gone() is None


def test_a_dropped_context_frees_its_frames():
    """A copied context that is dropped with frames in it frees them: nobody can end those calls any more."""

    class Scope:
        pass

    scope = Scope()
    gone = weakref.ref(scope)
    copied = contextvars.copy_context()
    copied.run(frame.enter, "a", scope)
    del scope, copied
    gc.collect()

    assert gone() is None


def test_deep_nesting():
    """A thousand frames are walked, not recursed."""
    for n in range(1000):
        frame.enter(str(n))
    assert 1000 == len(ids())
    assert "0" == frame.leave("0").call_id
    assert [] == ids()
