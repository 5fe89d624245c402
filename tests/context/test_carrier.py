"""The carrier takes chosen variables, and only those, to other threads and tasks, any number of times."""

import asyncio
import concurrent.futures
import inspect
import threading
from contextvars import ContextVar, copy_context

import pytest

from dspy_mlflow_async.context.carrier import Carrier
from echo import TIMEOUT

CARRIED = ContextVar("carried", default="default")
LEFT = ContextVar("left", default="default")


@pytest.fixture(autouse=True)
def _fresh():
    """Each test in a context of its own."""
    CARRIED.set("default")
    LEFT.set("default")


def seen():
    """The values here."""
    return CARRIED.get(), LEFT.get()


def test_run_sets_and_restores():
    """The function sees the carried values; afterwards everything is as before."""
    CARRIED.set("then")
    carrier = Carrier({CARRIED: CARRIED.get()})
    CARRIED.set("now")
    LEFT.set("mine")

    assert ("then", "mine") == carrier.run(seen)
    assert ("now", "mine") == seen()


def test_arguments_and_results_pass():
    """Positional and keyword arguments, whatever their names."""
    carrier = Carrier({CARRIED: CARRIED.get()})

    assert ((1, 2), {"function": 3, "self": 4}) == carrier.run(
        lambda *args, **kwargs: (args, kwargs), 1, 2, function=3, self=4
    )


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exceptions_pass_and_restore(error):
    """Whatever is raised passes, and everything is as before."""
    CARRIED.set("then")
    carrier = Carrier({CARRIED: CARRIED.get()})
    CARRIED.set("now")

    def fail():
        raise error

    with pytest.raises(error):
        carrier.run(fail)
    assert "now" == CARRIED.get()


def test_many_threads_at_once():
    """One carrier serves many threads at the same time; a copied context could be entered by one only."""
    CARRIED.set("then")
    carrier = Carrier({CARRIED: CARRIED.get()})
    gate = threading.Barrier(8, timeout=TIMEOUT)

    def look():
        gate.wait()
        return seen()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(carrier.run, look) for _ in range(8)]
        assert [("then", "default")] * 8 == [future.result(TIMEOUT) for future in futures]


def test_what_the_function_sets_does_not_leak():
    """A worker's next item sees nothing of what the one before has set."""
    carrier = Carrier({CARRIED: CARRIED.get()})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(carrier.run, CARRIED.set, "leak").result(TIMEOUT)
        assert ("default", "default") == pool.submit(seen).result(TIMEOUT)


def test_bind_keeps_what_a_function_is():
    """Name, docstring and signature stay; a coroutine function stays one."""

    def named(first, second=2):
        """Said."""

    async def coroutine():
        return CARRIED.get()

    bound = Carrier({CARRIED: CARRIED.get()}).bind(named)
    assert ("named", "Said.") == (bound.__name__, bound.__doc__)
    assert inspect.signature(named) == inspect.signature(bound)
    assert inspect.iscoroutinefunction(Carrier({CARRIED: CARRIED.get()}).bind(coroutine))


def test_bind_takes_callables_without_a_name():
    """Objects with ``__call__`` and partials work too."""

    class Callable:
        def __call__(self):
            return CARRIED.get()

    CARRIED.set("then")
    bound = Carrier({CARRIED: CARRIED.get()}).bind(Callable())
    CARRIED.set("now")

    assert "then" == bound()


async def test_a_bound_coroutine_holds_over_its_awaits():
    """The values hold in the coroutine and what it starts, and nowhere else."""
    CARRIED.set("then")

    async def coroutine():
        await asyncio.sleep(0)
        return CARRIED.get(), await asyncio.create_task(inner())

    async def inner():
        return CARRIED.get()

    bound = Carrier({CARRIED: CARRIED.get()}).bind(coroutine)
    CARRIED.set("now")

    assert ("then", "then") == await bound()
    assert "now" == CARRIED.get()
    assert [("then", "then")] * 3 == await asyncio.gather(bound(), bound(), bound())


async def test_a_bound_coroutine_that_is_cancelled():
    """It restores what was there, and the cancellation passes."""
    CARRIED.set("then")
    after = []

    async def coroutine():
        await asyncio.Event().wait()

    bound = Carrier({CARRIED: CARRIED.get()}).bind(coroutine)
    CARRIED.set("now")

    async def task():
        try:
            await bound()
        finally:
            after.append(CARRIED.get())

    running = asyncio.create_task(task())
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert ["now"] == after


def test_a_bound_coroutine_closed_in_another_context():
    """Closing it elsewhere does not raise, as ``Token.reset`` would."""

    class Forever:
        def __await__(self):
            yield

    async def coroutine():
        await Forever()

    started = Carrier({CARRIED: CARRIED.get()}).bind(coroutine)()
    copy_context().run(started.send, None)
    copy_context().run(started.close)


# --- what runs later than the call --------------------------------------------------------------------------------


def bound_then(function):
    """``function`` bound where ``CARRIED`` is "then"."""
    CARRIED.set("then")
    bound = Carrier({CARRIED: CARRIED.get()}).bind(function)
    CARRIED.set("now")
    return bound


async def test_a_function_that_returns_a_coroutine():
    """A lambda over ``acall``, and an object whose ``__call__`` is async."""

    async def coroutine():
        await asyncio.sleep(0)
        return CARRIED.get()

    class Callable:
        async def __call__(self):
            return await coroutine()

    assert "then" == await bound_then(lambda *_: coroutine())()
    assert "then" == await bound_then(Callable())()
    assert "now" == CARRIED.get()


def test_a_generator():
    """Each step sees the carried values, whoever takes them their own; values go both ways, and so do exceptions."""
    closed = []

    def generator():
        try:
            got = yield CARRIED.get()
            try:
                yield got, CARRIED.get()
            except ValueError:
                yield "caught", CARRIED.get()
        finally:
            closed.append(CARRIED.get())
        return "result"

    steps = bound_then(generator)()
    assert ["then", "now"] == [next(steps), CARRIED.get()]
    assert ("sent", "then") == steps.send("sent")
    assert ("caught", "then") == steps.throw(ValueError())
    with pytest.raises(StopIteration, match="result"):
        next(steps)
    early = bound_then(generator)()
    next(early)
    early.close()

    assert ["then", "then"] == closed
    assert "now" == CARRIED.get()


async def test_an_async_generator():
    """As a generator, also when it is left early."""
    closed = []

    async def generator():
        try:
            for _ in range(3):
                await asyncio.sleep(0)
                try:
                    yield CARRIED.get()
                except ValueError:
                    yield "caught"
        finally:
            closed.append(CARRIED.get())

    assert ["then"] * 3 == [value async for value in bound_then(generator)()]
    early = bound_then(generator)()
    await anext(early)
    assert "caught" == await early.athrow(ValueError())
    await early.aclose()

    assert ["then", "then"] == closed
    assert "now" == CARRIED.get()
