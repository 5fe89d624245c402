"""Streams of DSPy, passed to their consumer from a task of their own, so that they may be broken off anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

import anyio
import dspy

from dspy_mlflow_async.requests.scope import Scope

# As many values as DSPy's own stream buffers.
_BUFFER = 16
# Seconds that a consumer which breaks off waits for the program to notice.
_CLOSE_TIMEOUT = 10.0

Values = Callable[[], AsyncGenerator[Any, None]]


class _End(NamedTuple):
    """End of the stream, the last thing in the channel.

    Attributes:
        error: What the stream raised, or None.
    """

    error: BaseException | None


def stream_in(scope: Scope, values: Values, shown: Callable[[Any], Any]) -> AsyncIterator[Any]:
    """Yield the values of a stream whose program runs in ``scope``; the consumer's own code does not.

    Args:
        scope: A scope that has not begun. It begins with the first value that is asked for, and ends with the stream.
        values: Makes the stream, in the scope.
        shown: Returns what to show of the stream's prediction.
    """
    return _from_task(scope, values, shown)


async def _from_task(scope: Scope, values: Values, shown: Callable[[Any], Any]) -> AsyncGenerator[Any, None]:
    if not _is_asyncio():
        async with aclosing(_in_consumer(scope, values, shown)) as taken:
            async for value in taken:
                yield value
        return
    # A stream of DSPy's holds a task group. Closed by another task than it began in, as the garbage collector or a
    # web framework does it, that fails, and closed by its own it cancels what that task does next.
    channel: asyncio.Queue[Any] = asyncio.Queue(_BUFFER)
    scope.enter()
    try:
        task = asyncio.create_task(_pump(scope, values, channel, shown))
    finally:
        scope.leave()
    try:
        while True:
            value = await channel.get()
            if type(value) is _End:
                if value.error is not None:
                    raise value.error
                return
            yield value
    finally:
        if not task.done():
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait({task}, timeout=_CLOSE_TIMEOUT)


def _is_asyncio() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


async def _pump(scope: Scope, values: Values, channel: asyncio.Queue[Any], shown: Callable[[Any], Any]) -> None:
    error: BaseException | None = None
    final: Any = None
    try:
        async with aclosing(values()) as taken:
            async for value in taken:
                if isinstance(value, dspy.Prediction):
                    final = value
                await channel.put(value)
    except BaseException as raised:  # noqa: BLE001 - the consumer raises it
        error = raised
    scope.close(error, shown(final))
    if isinstance(error, asyncio.CancelledError) and channel.full():
        return  # the consumer has gone
    await channel.put(_End(error))


async def _in_consumer(scope: Scope, values: Values, shown: Callable[[Any], Any]) -> AsyncGenerator[Any, None]:
    """Stream without asyncio: in the consumer's task, whose context has the scope until the program has begun."""
    error: BaseException | None = None
    final: Any = None
    taken = values()
    is_first = True
    try:
        while True:
            if is_first:
                scope.enter()
            try:
                value = await anext(taken)
            except StopAsyncIteration:
                return
            finally:
                if is_first:
                    is_first = False
                    scope.leave()
            if isinstance(value, dspy.Prediction):
                final = value
            yield value
    except BaseException as raised:
        error = raised
        raise
    finally:
        scope.close(error, shown(final))
        await taken.aclose()
