"""Assembler of whole traces: hands a trace on when its root and every child have ended, or a bound is over."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from dspy_mlflow_async.export.assemble.open_trace import ABANDONED_AFTER, Annotations, OpenTrace, TraceIdentity
from dspy_mlflow_async.export.assemble.open_trace import named as name_it
from dspy_mlflow_async.export.assemble.recent import RECENT, RecentTraces
from dspy_mlflow_async.export.assemble.sampling import is_kept
from dspy_mlflow_async.export.counters import Counted
from dspy_mlflow_async.export.operations import Operation, SpansOperation, TraceOperation, TraceUpdate
from dspy_mlflow_async.seams import mlflow_experiment, mlflow_store, mlflow_traces
from dspy_mlflow_async.seams.mlflow_remote_traces import remote_traces

if TYPE_CHECKING:
    from mlflow.entities import Assessment
    from opentelemetry.sdk.trace import ReadableSpan

    from dspy_mlflow_async.export.counters import TraceCounters
    from dspy_mlflow_async.export.operations import Reference
    from dspy_mlflow_async.export.options import ExportOptions


# Half of what MLflow's cache of open traces keeps, and of the seconds for which it does.
_CROWD, _LONG = RECENT // 2, ABANDONED_AFTER / 2


class Outlet(Protocol):
    """Destination of assembled traces."""

    def emit(self, uri: str, operation: Operation, is_sync: bool) -> None:
        """Take what is to be written, at once if ``is_sync``."""

    def writes_ahead(self, uri: str) -> bool:
        """Return whether what has ended goes to the disk before anything else."""

    def write_ahead(self, uri: str, operation: Operation) -> Reference | None:
        """Keep a copy of what is not ready to be written."""

    def discard_copy(self, uri: str, reference: Reference) -> None:
        """Forget such a copy."""


class TraceAssembler:
    """Assembles the traces in flight, and gives those that are complete to the outlet.

    Attributes:
        options: How long it waits for what.
        entries: The traces in flight, by OpenTelemetry's id.
        recent: Those that were handed on not long ago.
        lock: Held for holds, and for the step from in flight to handed on.
    """

    def __init__(self, options: ExportOptions, counters: TraceCounters, outlet: Outlet) -> None:
        self.options = options
        self._counters = counters
        self._outlet = outlet
        self.lock = threading.Lock()
        self.entries: dict[int, OpenTrace] = {}
        self._by_trace_id: dict[str, OpenTrace] = {}
        self._holds: dict[str, int] = {}
        self._said: dict[str, Annotations] = {}
        self.recent = RecentTraces()

    # --- spans, in the caller's thread ---

    def trace_started(self, otel_id: int, trace: Any, uri: str) -> OpenTrace:
        """Note that a root span began."""
        identity = TraceIdentity(otel_id, trace.info.trace_id, uri, mlflow_traces.workspace_of(trace))
        entry = self.entries[otel_id] = self._by_trace_id[identity.trace_id] = OpenTrace(identity, trace)
        self._counters.start()
        return entry

    def may_be_evicted(self, entry: OpenTrace) -> bool:
        """Return whether MLflow's cache of open traces (1,000, an hour) may have forgotten this one: it asks slowly."""
        return len(self.entries) > _CROWD or time.monotonic() - entry.began > _LONG

    def before_child(self, otel_id: int) -> None:
        """Make sure that MLflow knows the trace of a child about to begin, evicted or handed on as it may be."""
        entry = self.entries.get(otel_id)
        if entry is None:
            old = self.recent.get(otel_id)
            if mlflow_traces.trace_id_of(otel_id) is not None:
                return
            if old is None:
                remote_traces.known_again(otel_id)
                return
            entry = self._reopen(old)
        elif mlflow_traces.peek_trace(entry.identity.trace_id) is not None:
            return
        mlflow_traces.adopt_trace(otel_id, entry.identity.trace_id, entry.trace)

    def _reopen(self, old: OpenTrace) -> OpenTrace:
        with self.lock:
            if known := self.entries.get(old.identity.otel_id):
                return known
            entry = OpenTrace(old.identity, mlflow_traces.InMemoryTrace(copy.copy(old.trace.info)))
            entry.is_late = True
            entry.is_sync = old.is_sync
            entry.inherited = old.inherited
            entry.children.are_elsewhere = old.children.are_elsewhere
            entry.ended_at = entry.began
            entry.sampling.keeps, entry.sampling.is_discarded = None, old.sampling.is_discarded
            self.entries[old.identity.otel_id] = entry
            self._by_trace_id[entry.identity.trace_id] = entry
            return entry

    def child_started(self, otel_id: int, span_id: int) -> None:
        """Note that a child began; of interest only once its root has ended."""
        entry = self.entries.get(otel_id)
        if entry is not None and entry.ended_at is not None:
            entry.children.started(mlflow_traces.encode_span_id(span_id))

    def child_ended(self, span: ReadableSpan, uri: str) -> None:
        """Note that a child ended. Before its root has ended there is nothing to do."""
        entry = self.entries.get(mlflow_traces.trace_number_of(span))
        if entry is None:
            self._stray_ended(span, uri)
        elif entry.inherited is not None:
            if mlflow_traces.encode_span_id(mlflow_traces.number_of(span)) not in entry.inherited:
                self._emit_span(span, entry.trace, entry.identity.uri, entry.identity.workspace)
        elif entry.ended_at is not None:
            span_id = mlflow_traces.encode_span_id(mlflow_traces.number_of(span))
            if entry.is_late and span_id not in entry.trace.span_dict:  # it began before the trace was handed on
                self._stray_ended(span, uri)
            if entry.children.ended(span_id):
                self.complete(entry)

    def root_ended(self, entry: OpenTrace, *, is_sync: bool) -> None:
        """Hand on the trace whose root ended, or wait for the children that are still open."""
        self._counters.end()
        entry.is_sync = is_sync
        children = entry.children
        with entry.partial.lock, children.lock:
            # From here on a child that ends looks at the open ones; one that ended before is seen as ended below.
            entry.ended_at = time.monotonic()
            children.ids = {span.span_id for span in list(entry.trace.span_dict.values()) if span.end_time_ns is None}
            is_complete = not children.ids
        if is_complete:
            self.complete(entry)
        if not entry.is_handed_on and self._outlet.writes_ahead(entry.identity.uri):
            self._make_safe_copy(entry)

    def _make_safe_copy(self, entry: OpenTrace) -> None:
        """Keep a copy of what has ended: it must survive while it waits for its children or its feedback."""
        reference = self._outlet.write_ahead(entry.identity.uri, self._operation(entry, entry.trace))
        with self.lock:
            is_needless = entry.is_handed_on
            entry.safe_copy = reference
        if is_needless and reference is not None:  # handed on meanwhile
            self._outlet.discard_copy(entry.identity.uri, reference)

    def _operation(self, entry: OpenTrace, trace: Any) -> TraceOperation:
        for index, assessment in enumerate(trace.info.assessments):
            if assessment.assessment_id is None:  # MLflow's own, said while the trace was open
                trace.info.assessments[index] = name_it(assessment, entry.identity.trace_id)
        spans = [span for span in list(trace.span_dict.values()) if span.end_time_ns is not None]
        return TraceOperation(
            key=entry.identity.trace_id,
            size=2000 + mlflow_traces.weigh(spans),
            counted=Counted.NOTHING if entry.is_late else Counted.TRACE,
            supersedes=entry.safe_copy,
            info=trace.info,
            spans=spans,
            experiment_id=mlflow_traces.experiment_of(trace),
            stage="late" if entry.is_late else "whole",
            prompts=trace.prompts,
            workspace=entry.identity.workspace,
            is_shared=entry.children.are_elsewhere,
        )

    def _stray_ended(self, span: ReadableSpan, uri: str) -> None:
        """Take a span that is in no trace in flight: of a remote trace, or one that outlived the bound of its trace."""
        otel_id = mlflow_traces.trace_number_of(span)
        old = self.recent.get(otel_id)
        trace_id = mlflow_traces.trace_id_of(otel_id)
        trace = mlflow_traces.peek_trace(trace_id) if trace_id else remote_traces.known_again(otel_id)
        if old is not None:
            old.children.ended(mlflow_traces.encode_span_id(mlflow_traces.number_of(span)))
            if not old.sampling.is_discarded:
                self._emit_late(old, span)
        elif trace is not None:
            self._emit_span(span, trace, uri, mlflow_traces.workspace_of(trace))

    def _emit_late(self, entry: OpenTrace, span: ReadableSpan) -> None:
        spans = [mlflow_traces.finished_span(span)]
        self._outlet.emit(
            entry.identity.uri,
            TraceOperation(
                key=entry.identity.trace_id,
                size=mlflow_traces.weigh(spans),
                info=copy.copy(entry.trace.info),
                spans=spans,
                experiment_id=mlflow_traces.experiment_of(entry.trace),
                stage="late",
                workspace=entry.identity.workspace,
            ),
            entry.is_sync,
        )

    def _emit_span(self, span: ReadableSpan, trace: Any, uri: str, workspace: str | None) -> None:
        live = trace.span_dict.pop(mlflow_traces.encode_span_id(mlflow_traces.number_of(span)), None)
        spans = [live or mlflow_traces.finished_span(span)]
        self._counters.take_remote_span()
        operation = SpansOperation(
            key=trace.info.trace_id,
            size=mlflow_traces.weigh(spans),
            counted=Counted.REMOTE_SPAN,
            spans=spans,
            workspace=workspace,
            experiment_id=mlflow_traces.experiment_of(trace) or mlflow_experiment.experiment_of_trace(span, uri),
        )
        self._outlet.emit(uri, operation, mlflow_traces.is_evaluating() or not mlflow_traces.wants_async())
        remote_traces.span_ended(mlflow_traces.trace_number_of(span))

    # --- handing on ---

    def complete(self, entry: OpenTrace, *, force: bool = False) -> None:
        """Hand a trace on, unless somebody holds it. Doing so twice does nothing."""
        with entry.partial.lock:  # what is said about it from here on comes after it
            displayed = self._complete(entry, force=force)
        if displayed is not None:  # by the notebook, which may run anything
            mlflow_traces.display(displayed)

    def _complete(self, entry: OpenTrace, *, force: bool) -> Any | None:
        """Hand a trace on, and return it as MLflow displays it, if somebody looks."""
        with self.lock:
            if entry.is_handed_on or (self._holds.get(entry.identity.trace_id) and not force):
                return None
            entry.is_handed_on = True
            self.entries.pop(entry.identity.otel_id, None)
            self._by_trace_id.pop(entry.identity.trace_id, None)
            said = self._said.pop(entry.identity.trace_id, None)
            trace = entry.trace
            # The spans go with the operation; what stays behind must not keep them alive.
            entry.trace = mlflow_traces.InMemoryTrace(mlflow_traces.without_contents(trace.info))
            self.recent.add(entry)
        mlflow_traces.pop_trace(entry.identity.otel_id, entry.identity.trace_id)
        if entry.inherited is not None:
            return None
        if self._discards(entry, trace):
            if entry.safe_copy is not None:
                self._outlet.discard_copy(entry.identity.uri, entry.safe_copy)
            return None
        if said is not None:
            trace.info.assessments = [*trace.info.assessments, *said.assessments]
            trace.info.trace_metadata.update(said.metadata)
            trace.info.tags.update(said.tags)
        operation = self._operation(entry, trace)
        is_displayed = not entry.is_late and mlflow_traces.displays()
        displayed = trace.to_mlflow_trace() if is_displayed else None  # before the writer completes it
        self._outlet.emit(entry.identity.uri, operation, entry.is_sync)
        return displayed

    def _discards(self, entry: OpenTrace, trace: Any) -> bool:
        """Decide on a whole trace, once; later spans of one that was discarded go the same way."""
        sampling = entry.sampling
        if not entry.is_late and sampling.keeps is not None:
            sampling.is_discarded = not is_kept(sampling.keeps, trace)
            if sampling.is_discarded:
                self._counters.move("waiting", "sampled_out")
        sampling.keeps = None
        return sampling.is_discarded

    def tick(self) -> None:
        """Look after what is overdue; about once a second, in the background."""
        now = time.monotonic()
        for entry in list(self.entries.values()):
            if entry.ended_at is not None:
                if now - entry.ended_at >= self.options.children_timeout:
                    self.complete(entry, force=True)
            elif entry.inherited is None and now - entry.partial.at >= self.options.visible_after:
                self._show(entry, now)

    def show_open(self, *, is_end: bool = False) -> int:
        """Store what has ended of all open traces, as far as it is not shown yet.

        Args:
            is_end: Whether the process ends: then also traces that would be sampled by how they end.

        Returns:
            How many open traces are shown.
        """
        count = 0
        for entry in list(self.entries.values()):
            if entry.ended_at is None and entry.inherited is None:
                count += self._show(entry, time.monotonic(), is_end=is_end)
        return count

    def count_shown(self) -> int:
        """Count the open traces that are shown with what has ended of them."""
        return sum(entry.ended_at is None and bool(entry.partial.ids) for entry in list(self.entries.values()))

    def is_any_unshown(self) -> bool:
        """Return whether an open trace was to be shown, and the store did not take it."""
        return any(
            entry.ended_at is None and entry.partial.ids is not None and not entry.partial.ids
            for entry in list(self.entries.values())
        )

    def _show(self, entry: OpenTrace, now: float, *, is_end: bool = False) -> bool:
        """Store what has ended of a trace that is still open; False where it is not shown."""
        entry.partial.at = now
        is_undecided = entry.sampling.keeps is not None and now - entry.began <= ABANDONED_AFTER and not is_end
        if is_undecided:
            return False  # it may yet be left out
        if now - entry.began > ABANDONED_AFTER and mlflow_traces.peek_trace(entry.identity.trace_id) is None:
            self._counters.end()
            self.complete(entry, force=True)
            return False
        with entry.partial.lock:
            if entry.ended_at is not None:  # all of it is on its way, and nothing may come behind that
                return False
            self._emit_fresh(entry)
            return True

    def _emit_fresh(self, entry: OpenTrace) -> None:
        spans = [span for span in list(entry.trace.span_dict.values()) if span.end_time_ns is not None]
        fresh = [span for span in spans if span.span_id not in (entry.partial.ids or ())]
        if entry.partial.ids and not fresh:
            return
        if entry.partial.ids is None:
            entry.partial.ids = set()
        entry.partial.ids.update([entry.identity.trace_id, *(span.span_id for span in fresh)])
        info = entry.trace.info
        info = replace(info, trace_metadata=dict(info.trace_metadata), tags=dict(info.tags), assessments=[])
        operation = TraceOperation(
            key=entry.identity.trace_id,
            size=2000 + mlflow_traces.weigh(fresh),
            info=info,
            spans=fresh,
            stage="partial",
            experiment_id=mlflow_traces.experiment_of(entry.trace),
            workspace=entry.identity.workspace,
            shown=entry.partial.ids,
        )
        self._outlet.emit(entry.identity.uri, operation, False)

    def hand_on_everything(self) -> None:
        """Hand on every trace whose root has ended, with or without its children, held or not."""
        for entry in list(self.entries.values()):
            if entry.ended_at is not None:
                self.complete(entry, force=True)

    # --- holds ---

    def share(self, trace_id: str, *, is_kept: bool) -> None:
        """Note that another process adds spans to a trace that is open, and store it however it ends if it is kept."""
        entry = self._by_trace_id.get(trace_id)
        if entry is not None:
            entry.children.are_elsewhere = True
            if is_kept:
                entry.sampling.keeps = None

    def hold(self, trace_id: str) -> None:
        """Keep this trace from being handed on before it is released as often as it is held."""
        with self.lock:
            self._holds[trace_id] = self._holds.get(trace_id, 0) + 1

    def release(
        self,
        trace_id: str,
        assessments: Sequence[Assessment],
        metadata: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> None:
        """Take back a hold, and say something about the trace."""
        named = [name_it(assessment, trace_id) for assessment in assessments]
        follow_up = old = None
        uri, is_sync = None, False
        with self.lock:
            count = self._holds.get(trace_id, 0) - 1
            if count > 0:
                self._holds[trace_id] = count
            else:
                self._holds.pop(trace_id, None)
            entry = self._by_trace_id.get(trace_id)
            if entry is not None and not entry.is_late:
                said = self._said.setdefault(trace_id, Annotations())
                said.assessments += named
                said.metadata.update(metadata)
                said.tags.update(tags)
            elif named or metadata or tags:
                old = self.recent.named(trace_id)
                if old is not None and old.sampling.is_discarded:
                    return
                uri, is_sync = (old.identity.uri, old.is_sync) if old else (None, False)
                follow_up = TraceUpdate(
                    key=trace_id,
                    size=500 * (1 + len(named)),
                    assessments=named,
                    metadata=dict(metadata),
                    tags=dict(tags),
                    workspace=old.identity.workspace if old else None,
                )
        if follow_up is not None:
            with contextlib.nullcontext() if old is None else old.partial.lock:  # it may be on its way this very moment
                self._outlet.emit(uri or mlflow_store.resolve_tracking_uri(), follow_up, is_sync)
        elif entry is not None and count <= 0:
            with entry.children.lock:
                is_complete = entry.ended_at is not None and not entry.children.ids
            if is_complete:
                self.complete(entry)

    def note(self, uri: str, trace_id: str, assessment: Assessment) -> Assessment | None:
        """Take an assessment along with a trace that is not handed on yet.

        Returns:
            The assessment, with an id of its own; None where there is no such trace on its way to ``uri``.
        """
        with self.lock:
            entry = self._by_trace_id.get(trace_id)
            if entry is None or entry.is_late or entry.inherited is not None or entry.identity.uri != uri:
                return None
            named = name_it(assessment, trace_id)
            self._said.setdefault(trace_id, Annotations()).assessments.append(named)
            return named

    def hand_on(self, trace_id: str) -> None:
        """Hand on a trace whose root has ended, held or not."""
        entry = self._by_trace_id.get(trace_id)
        if entry is not None and entry.ended_at is not None:
            self.complete(entry, force=True)

    # --- the assembler as a whole ---

    def adopt(self, other: TraceAssembler) -> None:
        """Take over everything another assembler has in flight."""
        with other.lock:
            for name in ("entries", "_by_trace_id", "_holds", "_said", "recent"):
                getattr(self, name).update(getattr(other, name))

    def forget_open(self) -> int:
        """Hand open traces back to MLflow.

        Returns:
            How many there were.
        """
        forgotten = [entry for entry in list(self.entries.values()) if entry.ended_at is None]
        for entry in forgotten:
            entry.is_handed_on = True
            self.entries.pop(entry.identity.otel_id, None)
            self._by_trace_id.pop(entry.identity.trace_id, None)
        return len(forgotten)

    def after_fork(self) -> None:
        """Leave what is in flight to the parent, in a forked child; only new spans are ours."""
        self.lock = threading.Lock()
        self._holds.clear()
        self._said.clear()
        self.recent.clear()
        for entry in list(self.entries.values()):
            entry.children.lock, entry.partial.lock = threading.Lock(), threading.Lock()
            entry.inherited = frozenset(entry.trace.span_dict)
