"""How a call ended, and what is told of its exception."""

import asyncio
import builtins
import concurrent.futures

import pytest

from dspy_mlflow_async.spans.outcome import failure_of


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ValueError("x"), "error"),
        (RuntimeError(), "error"),
        (SystemExit(1), "error"),
        (StopIteration(), "error"),
        (TimeoutError(), "error"),
        (asyncio.CancelledError(), "cancelled"),
        (concurrent.futures.CancelledError(), "cancelled"),
        (KeyboardInterrupt(), "cancelled"),
        (GeneratorExit(), "abandoned"),
    ],
)
def test_outcomes(error, outcome):
    """Cancellation and interrupts are no errors of the program; a closed coroutine was abandoned."""
    assert outcome == failure_of(error).outcome


def group(*errors):
    """A group of exceptions, as a nursery raises it."""
    own = getattr(builtins, "BaseExceptionGroup", None)
    return (own or pytest.importorskip("exceptiongroup").BaseExceptionGroup)("several", errors)


@pytest.mark.parametrize(
    ("errors", "outcome"),
    [
        ([asyncio.CancelledError(), KeyboardInterrupt()], "cancelled"),
        ([asyncio.CancelledError(), GeneratorExit()], "cancelled"),
        ([GeneratorExit(), GeneratorExit()], "abandoned"),
        ([asyncio.CancelledError(), ValueError()], "error"),
        ([ValueError(), KeyError()], "error"),
    ],
)
def test_groups(errors, outcome):
    """A group is cancelled where all that is in it is, however deep it is nested."""
    deep = group(*errors)
    for _ in range(3):
        deep = group(errors[0], deep)

    assert outcome == failure_of(group(*errors)).outcome
    assert outcome == failure_of(deep).outcome


def test_an_exception_that_only_looks_like_a_group():
    """Somebody's own attribute ``exceptions`` makes no group."""

    class OwnError(Exception):
        exceptions = (asyncio.CancelledError(),)

    assert "error" == failure_of(OwnError()).outcome


def test_a_cancelled_nursery():
    """Trio's nursery groups the cancellations of its tasks."""
    trio = pytest.importorskip("trio")
    caught = []

    async def main():
        with trio.move_on_after(0):
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep_forever)
                    await trio.sleep_forever()
            except BaseException as error:
                caught.append(failure_of(error).outcome)
                raise

    trio.run(main)

    assert ["cancelled"] == caught


def test_trio_cancellation():
    """Trio's ``Cancelled`` is a cancellation."""
    trio = pytest.importorskip("trio")
    caught = []

    async def main():
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.sleep_forever()
            except trio.Cancelled as error:
                caught.append(failure_of(error).outcome)
                raise

    trio.run(main)

    assert ["cancelled"] == caught


def test_type_message_and_stacktrace():
    """As Python prints them, causes included."""

    def fail():
        raise ValueError("text") from KeyError("cause")

    with pytest.raises(ValueError, match="text") as caught:
        fail()
    failure = failure_of(caught.value)

    assert ("ValueError", "text") == (failure.type, failure.message)
    assert "KeyError: 'cause'" in failure.stacktrace
    assert failure.stacktrace.endswith("ValueError: text")
    assert "test_type_message_and_stacktrace" in failure.stacktrace


def test_the_message_is_never_empty():
    """An exception without text is named by its type."""
    assert "CancelledError" == failure_of(asyncio.CancelledError()).message


def test_an_exception_that_cannot_be_printed():
    """One whose text raises is named by its type."""

    class UnprintableError(Exception):
        def __str__(self):
            raise RuntimeError("no text")

        __repr__ = __str__

    failure = failure_of(UnprintableError())

    assert ("UnprintableError", "UnprintableError") == (failure.type, failure.message)
    assert failure.stacktrace
