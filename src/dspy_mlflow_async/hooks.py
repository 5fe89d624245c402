"""Patches of DSPy and Python's threads that are in place while there is a tracer."""

from __future__ import annotations

import concurrent.futures
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from dspy_mlflow_async import propagation
from dspy_mlflow_async.context import frame as frames
from dspy_mlflow_async.context.carrier import Carrier
from dspy_mlflow_async.runs.compile import pool_ended
from dspy_mlflow_async.runs.evaluation import watch_items
from dspy_mlflow_async.seams.dspy import ParallelExecutor
from dspy_mlflow_async.seams.dspy_arguments import patch_arguments
from dspy_mlflow_async.seams.dspy_call_ids import patch_call_ids
from dspy_mlflow_async.seams.dspy_dispatch import patch_handlers
from dspy_mlflow_async.seams.mlflow_remote_traces import patch_headers
from dspy_mlflow_async.seams.patching import Patches, Undo, patch, together


def _patch_workers() -> Undo:
    if ParallelExecutor is None:
        return lambda: None
    return patch_worker_pool(ParallelExecutor, _prepare_items, pool_ended)


class _Hooks:
    """All patches, and the tracers that need them. ``lock`` guards both; no hot path takes it.

    Attributes:
        carries_always: Whether every thread of the process takes up the tracing context, as the user wished.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_on = False  # whether ``autolog`` is
        self.carries_always = False
        self._tracers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._open_compiles = 0
        self._patches = Patches()

    def update(self) -> None:
        """Put in the patches that are needed now, and take out the others."""
        is_needed = self.is_on or any(tracer.is_on for tracer in self._tracers)
        for name, put_in in (
            ("workers", _patch_workers),
            ("handlers", patch_handlers),
            ("arguments", patch_arguments),
            ("call ids", patch_call_ids),
            ("headers", lambda: patch_headers(propagation.headers_sent)),
        ):
            self._patches.set(name, put_in, is_needed=is_needed)
        self._patches.set(
            "threads",
            lambda: patch_all_threads(_carrier_for_thread),
            is_needed=is_needed and (self.carries_always or self._open_compiles > 0),
        )

    def add(self, tracer: Any) -> None:
        with self.lock:
            self._tracers.add(tracer)

    def remove(self, tracer: Any) -> None:
        with self.lock:
            self._tracers.discard(tracer)

    def count_compiles(self, change: int) -> None:
        with self.lock:
            self._open_compiles = max(0, self._open_compiles + change)  # a start may be interrupted before it counts
            self.update()


_hooks = _Hooks()


def switch(*, is_on: bool, carries_always: bool = False) -> None:
    """Follow ``autolog``: put the patches in, or take them out unless a tracer of somebody's own needs them.

    Args:
        is_on: Whether ``autolog`` is on.
        carries_always: Whether every thread and pool of the process takes up the context of the code that starts it.
    """
    with _hooks.lock:
        _hooks.is_on, _hooks.carries_always = is_on, carries_always
        _hooks.update()


def serve(tracer: Any) -> None:
    """Keep the patches in for as long as ``tracer`` lives, or at least until the next ``switch``.

    Args:
        tracer: A ``TracingCallback``, which may be used without ``autolog``; it needs nothing while ``is_on`` is false.
    """
    with _hooks.lock:
        _hooks.add(tracer)
        _hooks.update()


def dismiss(tracer: Any) -> None:
    """Take the patches out that nobody else needs: ``tracer`` has done its work, whoever still holds it."""
    with _hooks.lock:
        _hooks.remove(tracer)
        _hooks.update()


def compile_began() -> None:
    """Let also threads that an optimizer starts by itself take up the tracing context, until ``compile_ended``.

    Some evaluate their candidates so, and what they start belongs to the compile: its runs, its suppressed traces.
    """
    _hooks.count_compiles(+1)


def compile_ended() -> None:
    """Undo one ``compile_began``."""
    _hooks.count_compiles(-1)


def _prepare_items(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that DSPy's worker threads run in place of ``function``."""
    return propagation.capture().bind(watch_items(function))


def _carrier_for_thread() -> Carrier | None:
    """Return the carrier that a thread which is started here takes along, or None for nothing."""
    frame = frames.current()
    is_compiling = frame is not None and frame.compile is not None
    return propagation.capture() if is_compiling or _hooks.carries_always else None


# --- the pools and threads ---


Capture = Callable[[], Carrier | None]
Prepare = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Here(threading.local):
    """Thread-local state: whether this thread is inside of ``submit``."""

    is_submitting = False


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

    return patch(executor, execute=execute)


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

    return together(
        patch(threading.Thread, start=carrying_start),
        patch(concurrent.futures.ThreadPoolExecutor, submit=carrying_submit),
    )
