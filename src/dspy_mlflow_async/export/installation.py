"""Installation of the pipeline in MLflow and its removal, with the functions that everybody calls."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dspy_mlflow_async.export import shutdown as process_exit
from dspy_mlflow_async.export import worker_processes
from dspy_mlflow_async.export.assemble import gc_deferred
from dspy_mlflow_async.export.assemble.span_processor import (
    RetiringProcessor,
    WholeTraceExporter,
    WholeTraceProcessor,
    processors,
)
from dspy_mlflow_async.export.counters import ExportStats, TraceCounters
from dspy_mlflow_async.export.options import ExportOptions
from dspy_mlflow_async.export.queue.pipeline import Pipeline
from dspy_mlflow_async.export.write import fork_gate
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.seams import mlflow_http, mlflow_processor, mlflow_store, mlflow_traces
from dspy_mlflow_async.seams.mlflow_by_id import patch_by_id
from dspy_mlflow_async.seams.mlflow_prices import patch_prices
from dspy_mlflow_async.seams.mlflow_remote_traces import remote_traces
from dspy_mlflow_async.seams.patching import Undo, together

if TYPE_CHECKING:
    from mlflow.entities import Assessment

_lock = threading.RLock()
_pipeline: Pipeline | None = None
_installed: Undo | None = None  # of all that is patched
_closing: list[tuple[Pipeline, threading.Thread]] = []  # what was replaced or undone, until it has come to its end
_retiring: Pipeline | None = None  # what was undone while traces were open in it
_undo_for_writers: Undo | None = None  # of what bounds MLflow's requests and prices spans, while anybody writes
_pause = threading.Event()  # never set: a wait on it is a pause
_LOOK = 0.05  # seconds between two looks whether a trace is still open
counters = TraceCounters()  # one for the process, whatever is installed


def pipeline() -> Pipeline:
    """Return the pipeline of this process; made with the default options if nobody has installed one."""
    global _pipeline  # noqa: PLW0603 - one per process, like MLflow's provider
    with _lock:
        if _pipeline is None and _retiring is not None:
            return _retiring
        if _pipeline is None:
            _pipeline = Pipeline(ExportOptions(), counters)
        return _pipeline


def installed() -> Pipeline | None:
    """Return the pipeline that takes spans now: the one that is installed, or one that was undone with traces open."""
    return _pipeline or _retiring


def closing() -> list[tuple[Pipeline, threading.Thread]]:
    """Return the pipelines that were replaced or undone and have not come to their end, each with its thread."""
    return [(pipeline, thread) for pipeline, thread in list(_closing) if thread.is_alive()]


def install(options: ExportOptions, housekeeping: Callable[[], None] | None = None) -> Undo:
    """Let every trace of MLflow go through this pipeline, those that are open now included.

    A second call replaces the options of the first.

    Args:
        options: How traces travel.
        housekeeping: Called by a background thread about once a second, and before each flush.

    Returns:
        The undo: MLflow's own exporter takes the next spans, and what is on its way goes on in the background.
        Undoing twice does nothing, nor does undoing what has been replaced.
    """
    global _pipeline, _installed, _undo_for_writers  # noqa: PLW0603
    with _lock:
        old = _pipeline or _take_retiring()
        mine = Pipeline(options, counters, housekeeping)
        worker_processes.hear_of_celery()
        if old is not None:
            _close(old, successor=mine)
        _pipeline = mine
        _undo_for_writers = _undo_for_writers or together(mlflow_http.bound_http(), patch_prices())
        if _installed is None:
            _installed = together(
                mlflow_processor.patch_processor_factory(_make_processor),
                patch_by_id(_OnTheirWay()),
                process_exit.on_signals(_leave, options.exit_timeout + 5),
                gc_deferred.watch(),
            )
        for processor, _ in mlflow_processor.replace_processors(_ours_for):
            _take_over(processor)
        mine.start()

    def undo() -> None:
        global _pipeline, _installed
        with _lock:
            if _pipeline is not mine or _installed is None:
                return
            undo_all, _installed, _pipeline = _installed, None, None
            undo_all()
            _retire(mine)

    return undo


def _retire(mine: Pipeline) -> None:
    """Give MLflow its own exporter back. What began under ours stays ours until it is stored."""
    global _retiring  # noqa: PLW0603
    if mine.has_open():
        _retiring = mine
        mlflow_processor.replace_processors(lambda processor: _retiring_for(processor, mine))
        threading.Thread(target=_retire_later, args=(mine,), name="dspy-mlflow-async-undo", daemon=True).start()
        return
    mlflow_processor.replace_processors(_theirs_for)
    thread = _close(mine)
    threading.Thread(target=_restore_after, args=(thread,), name="dspy-mlflow-async-undo", daemon=True).start()


def _retire_later(mine: Pipeline) -> None:
    global _retiring  # noqa: PLW0603
    while mine.has_open() and _retiring is mine:
        _pause.wait(_LOOK)
    with _lock:
        if _retiring is not mine:  # ours is back, and has taken over what was open
            return
        _retiring = None
        mlflow_processor.replace_processors(_theirs_for)
        thread = _close(mine)
    _restore_after(thread)


def _restore_after(thread: threading.Thread) -> None:
    """Restore MLflow's own requests and prices, once nobody writes any more."""
    global _undo_for_writers
    thread.join()
    with _lock:
        if _installed is None and _retiring is None and _undo_for_writers is not None:
            undo, _undo_for_writers = _undo_for_writers, None
            undo()


def _take_retiring() -> Pipeline | None:
    """Take the pipeline that has been undone and has open traces, to go on in another."""
    global _retiring
    retiring, _retiring = _retiring, None
    return retiring


def _close(old: Pipeline, successor: Pipeline | None = None) -> threading.Thread:
    thread = old.close(successor)
    _closing[:] = [*closing(), (old, thread)]
    return thread


def _make_processor(tracking_uri: str, original: Callable[[str], Any]) -> Any:
    """Make what MLflow's provider gets: our processor, but for Databricks MLflow's own."""
    current = _pipeline
    if current is None or mlflow_store.is_databricks_uri(mlflow_store.resolve_tracking_uri(tracking_uri)):
        return original(tracking_uri)
    return _new_processor(tracking_uri, current)


def _new_processor(tracking_uri: str | None, current: Pipeline) -> WholeTraceProcessor:
    return WholeTraceProcessor(
        WholeTraceExporter(tracking_uri, current), export_metrics=mlflow_processor.exports_metrics()
    )


def _ours_for(processor: Any) -> Any | None:
    current = pipeline()
    if isinstance(processor, WholeTraceProcessor) or mlflow_processor.is_replaceable(processor):
        return _new_processor(mlflow_processor.tracking_uri_of(processor), current)
    return None


def _retiring_for(processor: Any, mine: Pipeline) -> Any | None:
    theirs = _theirs_for(processor)
    if theirs is None:
        return None
    exporter = WholeTraceExporter(processor.span_exporter.uri, mine, theirs)
    return RetiringProcessor(exporter, theirs, export_metrics=mlflow_processor.exports_metrics())


def _theirs_for(processor: Any) -> Any | None:
    if isinstance(processor, RetiringProcessor):
        return processor.theirs
    if isinstance(processor, WholeTraceProcessor):
        return mlflow_processor.original_processor(processor.span_exporter.uri)
    return None


@guarded
def _take_over(processor: Any) -> None:
    """Stop a processor of MLflow's, and care for the roots it has put off."""
    if isinstance(processor, RetiringProcessor):
        processor = processor.theirs
    if isinstance(processor, WholeTraceProcessor):
        return
    current = pipeline()
    exporter = WholeTraceExporter(mlflow_processor.tracking_uri_of(processor), current)
    for root in mlflow_processor.retire(processor):
        exporter.take(root, None)


def flush(timeout: float | None = None) -> bool:
    """Write every trace that has ended, and what has ended of those that are open, and wait until it is stored.

    Args:
        timeout: Seconds to wait; None waits until the store has taken everything or proves to be away.

    Returns:
        True when all of it is stored; what comes during the call is not waited for.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    with _lock:
        current, on_their_way = installed(), closing()
    is_stored = True
    for replaced, thread in on_their_way:
        thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        is_stored = is_stored and replaced.is_empty()
    if current is not None:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        is_stored = current.flush(left) and is_stored
    return is_stored


def take_over() -> None:
    """Queue what ended processes have left on the disk for the stores of this one, ahead of the next ``flush``."""
    current = _pipeline
    if current is not None:
        current.take_over(of_all=True)


def secure(timeout: float) -> bool:
    """Store what has ended, and bring to the disk what is not stored in time. For a process that is about to end.

    Args:
        timeout: Seconds to wait for the store.

    Returns:
        True when everything is stored. Else the writing has stopped: what comes later is kept on disk at the end.
    """
    if flush(timeout):
        return True
    with _lock:
        current = installed()
    if current is not None:
        process_exit.save(current)
    return False


def stats() -> ExportStats:
    """Return the counters of this process's traces."""
    current, counted = _pipeline, counters.stats()
    return counted if current is None else replace(counted, in_progress=current.assembler.count_shown())


@guarded
def share(trace_id: str, *, is_kept: bool) -> None:
    """Note that another process adds spans of its own to a trace: its totals are those of what the store has of it.

    Args:
        trace_id: MLflow's id, ``tr-...``.
        is_kept: Whether it is stored however it ends, whatever ``sample`` says.
    """
    pipeline().current().assembler.share(trace_id, is_kept=is_kept)


@guarded
def hold(trace_id: str) -> None:
    """Keep a trace from being written before it is released: something is still to be said about it.

    Args:
        trace_id: MLflow's id, ``tr-...``. Held twice, it must be released twice.
    """
    pipeline().current().assembler.hold(trace_id)


@guarded
def release(
    trace_id: str,
    *,
    assessments: Sequence[Assessment] = (),
    metadata: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Let a held trace be written, together with what is said about it here.

    If it is written already, this follows it, in order and with the same care.

    Args:
        trace_id: MLflow's id, ``tr-...``.
        assessments: Feedback and expectations; they get an id of their own where they have none.
        metadata: Trace metadata to add.
        tags: Trace tags to add.
    """
    pipeline().current().assembler.release(trace_id, assessments, metadata or {}, tags or {})


class _OnTheirWay:
    """Access to the pipeline's traces that users name to MLflow by id, see ``seams.mlflow_by_id``."""

    @guarded
    def note(self, uri: str, trace_id: str, assessment: Assessment) -> Assessment | None:
        """Take an assessment along with a trace that is not handed on yet."""
        return pipeline().current().assembler.note(uri, trace_id, assessment)

    @guarded
    def ensure_stored(self, trace_id: str) -> None:
        """Bring a trace to the store."""
        pipeline().current().store(trace_id)

    @guarded
    def ensure_all_stored(self, uri: str) -> None:
        """Bring what waits for a store there; what is held or open stays so."""
        pipeline().current().store_waiting(uri)


def count_sampled() -> None:
    """Count a trace that was left out before its first span."""
    counters.leave_out()


def _leave() -> None:
    # Without the lock: a signal may have come to the thread that holds it.
    current = installed()
    options = current.options if current is not None else ExportOptions()
    process_exit.leave(current, list(_closing), options.exit_timeout)


process_exit.at_exit(_leave)


def _before_fork() -> None:
    fork_gate.writes.close()
    _lock.acquire()
    mlflow_traces.manager_lock().acquire()


def _after_fork_in_parent() -> None:
    if _pipeline is not None:
        _pipeline.has_forked = True
    mlflow_traces.manager_lock().release()
    _lock.release()
    fork_gate.writes.open()


def _after_fork_in_child() -> None:
    mlflow_traces.manager_lock().release()
    _lock.release()
    fork_gate.writes.reset()
    remote_traces.after_fork()
    _closing.clear()
    for processor in list(processors):
        mlflow_processor.reset_processor_locks(processor)
    current, retiring = installed(), _take_retiring()
    if current is not None:
        for uri in current.queues:
            mlflow_store.abandon_connections(uri)
        gc_deferred.waiting.clear()  # the parent's
        current.after_fork()
        current.is_closed = current is retiring  # the parent ends what is open there
        if _installed is not None:
            current.start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
