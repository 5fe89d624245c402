"""Calls in threads: with a timeout, for async code that may be cancelled meanwhile, and several at once."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, Literal, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

_Answer = TypeVar("_Answer")
_Item = TypeVar("_Item")

# Told what has been returned to nobody, and the timeout, interrupt or cancellation for which nobody waited any more.
Discard = Callable[[_Answer, BaseException], None]

# As many calls of sync programs may wait for their LM at once in one event loop. Threads start when they are needed.
MAX_THREADS = 1_000

_limiter: RunVar[anyio.CapacityLimiter] = RunVar("dspy_mlflow_async_threads")


class _Call(Generic[_Answer]):
    """Call that is made once, in a thread, and that its caller may leave. ``lock`` guards whose the answer is."""

    def __init__(self, function: Callable[[], _Answer]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._state: Literal["waiting", "running", "over"] = "waiting"
        self._over = threading.Event()
        self._answers: list[_Answer] = []
        self._error: BaseException | None = None
        self._then: Callable[[], None] | None = None

    def run(self) -> None:
        """Make the call, in this thread; where another makes it, wait for that."""
        with self._lock:
            is_ours = self._state == "waiting"
            if is_ours:
                self._state = "running"
        if not is_ours:
            self._over.wait()
            return
        try:
            self._answers.append(self._function())
        except BaseException as error:  # noqa: BLE001 - handed to the one who waits
            self._error = error
        finally:
            with self._lock:
                self._state, then = "over", self._then
            self._over.set()
            if then is not None:
                then()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the call, at most so long, and return whether it is over."""
        return self._over.wait(seconds)

    def result(self) -> _Answer:
        """Return what the call has returned, or raise what it has raised. To be asked once it is over."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # lest it and this frame keep each other alive
        return self._answers[0]

    def leave(self, then: Callable[[], None]) -> Literal["waiting", "running", "over"]:
        """Wait for it no longer: if it has not begun it never will, and if it runs ``then`` is called at its end.

        Returns:
            Which of that it was.
        """
        with self._lock:
            state = self._state
            if state == "waiting":
                self._state = "over"
                self._over.set()
            elif state == "running":
                self._then = then
            return state

    def discard(self, discard: Discard[_Answer] | None, why: BaseException) -> None:
        """Hand on what it has returned, if anything."""
        if discard is not None and self._answers:
            with contextlib.suppress(Exception):  # nobody waits, so nobody can be told
                discard(self._answers[0], why)


def call_with_timeout(
    function: Callable[[], _Answer], seconds: float, discard: Discard[_Answer] | None = None
) -> _Answer:
    """Call ``function`` in a thread of its own and a copy of this context.

    Args:
        function: What to call.
        seconds: How long to wait for it. The thread does not hold up the end of the process either.
        discard: Called with an answer that comes too late, in that thread, or comes just when this is interrupted.

    Raises:
        TimeoutError: Where there is no answer in time.
        BaseException: What ``function`` raised.
    """
    call = _Call(function)
    context = contextvars.copy_context()
    try:  # an interrupt may come at any line
        threading.Thread(target=context.run, args=(call.run,), name="dspy-mlflow-async-ask", daemon=True).start()
        is_over = call.wait(seconds)
    except BaseException as error:
        why = error
        if call.leave(lambda: call.discard(discard, why)) == "over":
            call.discard(discard, why)
        raise
    if not is_over:
        late = TimeoutError(f"no answer within {seconds:g} s")
        if call.leave(lambda: call.discard(discard, late)) != "over":
            raise late
    return call.result()


# --- for async code -----------------------------------------------------------------------------------------------


async def run_uninterrupted(function: Callable[..., _Answer], *args: Any) -> _Answer:
    """Call ``function`` in a thread and wait for its end; a cancellation is raised only then.

    A shield of anyio's keeps out its own scopes alone: asyncio's ``task.cancel()``, as ``wait_for`` and Ctrl-C use it,
    goes through, and leaves behind a thread that nobody waits for.

    Raises:
        BaseException: What ``function`` raised, or the cancellation.
    """
    call, cancellation = _Call(functools.partial(function, *args)), None
    with anyio.CancelScope(shield=True):
        while True:
            try:
                await anyio.to_thread.run_sync(call.run)  # a second thread waits for the first, if that has begun
                break
            except anyio.get_cancelled_exc_class() as error:
                cancellation = error
    answer = call.result()
    if cancellation is not None:
        raise cancellation
    return answer


async def call_or_discard(function: Callable[[], _Answer], discard: Discard[_Answer]) -> _Answer:
    """Call ``function``, which opens something, in a thread.

    Args:
        function: What to call.
        discard: Called, in a thread, with what has been opened when this was cancelled: now, or as soon as it is there.

    Raises:
        BaseException: What ``function`` raised, or the cancellation.
    """
    call = _Call(function)
    try:
        await anyio.to_thread.run_sync(call.run)
    except BaseException as error:
        why = error
        if call.leave(lambda: call.discard(discard, why)) == "over":
            await run_uninterrupted(call.discard, discard, why)
        raise
    return call.result()


async def in_thread(function: Callable[..., _Answer], *args: Any, **kwargs: Any) -> _Answer:
    """Call a sync function in one of many worker threads of our own, in a copy of this context.

    A caller that is cancelled goes at once, and the thread on to its end, as with ``dspy.asyncify``; but nobody waits
    for DSPy's eight.
    """
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(MAX_THREADS)
        _limiter.set(limiter)
    return await anyio.to_thread.run_sync(
        functools.partial(function, *args, **kwargs), abandon_on_cancel=True, limiter=limiter
    )


class Threads:
    """Worker threads that may outlive the call that started them: Python cannot stop them, so they keep their slots.

    They are of one piece of work, an example. It belongs to one event loop, so it needs no lock.
    """

    def __init__(self) -> None:
        self._running = 0
        self._then: list[Callable[[], None]] = []

    @property
    def are_running(self) -> bool:
        """True if one is at work, perhaps after its example."""
        return self._running > 0

    def when_over(self, function: Callable[[], None]) -> None:
        """Call ``function`` in the event loop once none is at work: now, or later."""
        if self.are_running:
            self._then.append(function)
        else:
            function()

    async def run(self, function: Callable[[], _Answer], limiter: anyio.CapacityLimiter) -> _Answer:
        """Call ``function`` in a thread and return its result.

        Should this be cancelled, the thread goes on unheeded, and keeps its place in ``limiter``.
        """
        borrower, call, into_loop = object(), _Call(function), way_into_loop()
        await limiter.acquire_on_behalf_of(borrower)
        self._running += 1

        def is_over() -> None:
            limiter.release_on_behalf_of(borrower)
            self._running -= 1
            if not self.are_running:
                then, self._then = self._then, []
                for each in then:
                    each()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and all that it limited
                into_loop(is_over)

        try:
            await anyio.to_thread.run_sync(call.run, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(math.inf))
            return call.result()
        finally:
            if call.leave(tell) != "running":
                is_over()


def way_into_loop() -> Callable[[Callable[[], None]], Any]:
    """Return a function by which a thread has functions called in this event loop, without waiting for them."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio

        return trio.lowlevel.current_trio_token().run_sync_soon


# --- several at once ----------------------------------------------------------------------------------------------


def map_concurrently(work: Callable[[_Item], bool], items: Iterable[_Item], lanes: int) -> None:
    """Call ``work`` for each item, in this thread and in others beside it, each in a copy of this context.

    The threads end with the call: none is kept, and none is there after a fork.

    Args:
        work: Raises nothing, and says whether to go on. Once it says no, nothing further is begun.
        items: What to call it with.
        lanes: How many calls are made at once at the most.
    """
    waiting = deque(items)

    def lane() -> None:
        while waiting:
            try:
                item = waiting.popleft()
            except IndexError:  # another lane was faster
                return
            if not work(item):
                waiting.clear()

    beside: list[threading.Thread] = []
    try:
        for _ in range(min(lanes, len(waiting)) - 1):
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(lane,), name="dspy-mlflow-async-request", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter shuts down
                break
            beside.append(thread)
        lane()
    finally:
        waiting.clear()
        for thread in beside:
            thread.join()
