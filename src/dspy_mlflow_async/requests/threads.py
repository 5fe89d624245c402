"""Worker threads for sync programs in async services: many, and of our own, so that nobody waits for DSPy's eight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

# As many calls of sync programs may wait for their LM at once in one event loop. Threads start when they are needed.
MAX_THREADS = 1_000

_limiter: RunVar[anyio.CapacityLimiter] = RunVar("dspy_mlflow_async_threads")


async def in_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a sync function in a worker thread, in a copy of this context.

    A caller that is cancelled goes at once, and the thread on to its end, as with ``dspy.asyncify``.
    """
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(MAX_THREADS)
        _limiter.set(limiter)
    return await anyio.to_thread.run_sync(
        functools.partial(function, *args, **kwargs), abandon_on_cancel=True, limiter=limiter
    )
