"""Patches that make a pool or a thread take up the tracing context of the code that gave it its work."""

from __future__ import annotations

import concurrent.futures
import functools
import threading
from collections.abc import Callable
from typing import Any

from dspy_mlflow_async.context.carrier import Carrier

Undo = Callable[[], None]
Capture = Callable[[], Carrier | None]
Prepare = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Here(threading.local):
    """Thread-local state: whether this thread is inside of ``submit``."""

    is_submitting = False


def patch_attribute(owner: Any, name: str, value: Any) -> Undo:
    """Set ``owner.name`` and return the undo, which leaves it alone if somebody else has set it since."""
    original = owner.__dict__[name]
    setattr(owner, name, value)

    def undo() -> None:
        if owner.__dict__.get(name) is value:
            setattr(owner, name, original)

    return undo


def patch_worker_pool(executor: type, prepare: Prepare, ended: Callable[[Any, Any], None]) -> Undo:
    """Make ``executor.execute(function, data)`` run the function that ``prepare`` makes of its own.

    Args:
        executor: DSPy's ``ParallelExecutor``, in which all its worker threads begin.
        prepare: Called once per ``execute``, in the submitter's context.
        ended: Called there with the data and the results of one that has not failed.
    """
    original = executor.execute  # type: ignore[attr-defined]

    @functools.wraps(original)
    def execute(self: Any, function: Callable[..., Any], data: Any) -> Any:
        results = original(self, prepare(function), data)
        ended(data, results)
        return results

    return patch_attribute(executor, "execute", execute)


def patch_all_threads(capture: Capture) -> Undo:
    """Make every ``threading.Thread`` and ``ThreadPoolExecutor`` of the process carry the tracing context.

    Threads take it at ``start``, pools at ``submit``: the same points as OpenTelemetry's threading instrumentor. The
    threads that a pool starts take nothing: they outlive the item that they were started for.

    Args:
        capture: Called at those points, in the submitter's context; None where nothing is to be carried.
    """
    start = threading.Thread.start
    submit: Callable[..., Any] = concurrent.futures.ThreadPoolExecutor.submit
    here = _Here()

    @functools.wraps(start)
    def carrying_start(self: threading.Thread) -> None:
        run, carrier = self.run, None if here.is_submitting else capture()
        if carrier is not None:

            def carried_run() -> None:
                del self.run  # the instance attribute below, lest thread and function keep each other alive
                carrier.run(run)

            self.run = carried_run  # type: ignore[method-assign]
        start(self)

    @functools.wraps(submit)
    def carrying_submit(self: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        carrier = capture()
        if carrier is not None:
            fn = functools.partial(carrier.run, fn)
        before, here.is_submitting = here.is_submitting, True
        try:
            return submit(self, fn, *args, **kwargs)
        finally:
            here.is_submitting = before

    undos = [
        patch_attribute(threading.Thread, "start", carrying_start),
        patch_attribute(concurrent.futures.ThreadPoolExecutor, "submit", carrying_submit),
    ]

    def undo() -> None:
        for each in undos:
            each()

    return undo
