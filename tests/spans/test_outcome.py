"""How a call ended, and what is told of its exception."""

import asyncio
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
