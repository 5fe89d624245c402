"""Patches of DSPy and Python's threads that are in place while there is a tracer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from dspy_mlflow_async import propagation
from dspy_mlflow_async.context import frame as frames
from dspy_mlflow_async.context.carrier import Carrier
from dspy_mlflow_async.context.threads import Undo, patch_all_threads, patch_worker_pool
from dspy_mlflow_async.runs.compile import pool_ended
from dspy_mlflow_async.runs.evaluation import watch_items
from dspy_mlflow_async.seams.dspy import ParallelExecutor
from dspy_mlflow_async.seams.dspy_arguments import patch_arguments
from dspy_mlflow_async.seams.dspy_dispatch import patch_handlers


class _Patch:
    """One patch, put in and taken out as its need comes and goes. Its owner's lock guards it."""

    def __init__(self, patch: Callable[[], Undo]) -> None:
        self._patch = patch
        self._undo: Undo | None = None

    def set(self, *, is_needed: bool) -> None:
        if is_needed and self._undo is None:
            self._undo = self._patch()
        elif not is_needed and self._undo is not None:
            undo, self._undo = self._undo, None
            undo()


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
        self._calls = (
            _Patch(_patch_workers),
            _Patch(patch_handlers),
            _Patch(patch_arguments),
        )
        self._threads = _Patch(lambda: patch_all_threads(_carrier_for_thread))

    def update(self) -> None:
        """Put in the patches that are needed now, and take out the others."""
        is_needed = self.is_on or any(tracer.is_on for tracer in self._tracers)
        for patch in self._calls:
            patch.set(is_needed=is_needed)
        self._threads.set(is_needed=is_needed and (self.carries_always or self._open_compiles > 0))

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
