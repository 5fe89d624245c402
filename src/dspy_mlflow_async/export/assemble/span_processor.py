"""Span processor and exporter for MLflow's provider, with whole traces instead of single spans."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.trace.export import SpanExportResult

from dspy_mlflow_async.export.assemble import gc_deferred
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.seams import mlflow_processor, mlflow_traces
from dspy_mlflow_async.seams.mlflow_live import register

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span

    from dspy_mlflow_async.export.assemble.open_trace import OpenTrace
    from dspy_mlflow_async.export.queue.pipeline import Pipeline

# All that exist, so that a forked child can renew their locks.
processors: weakref.WeakSet[WholeTraceProcessor] = weakref.WeakSet()


class Queue:
    """Queue that MLflow's flush functions and exit handlers find as ``exporter._async_queue``.

    Args:
        pipeline: Ours.
        theirs: MLflow's processor that takes what ours does not, or None.
    """

    def __init__(self, pipeline: Pipeline, theirs: Any | None = None) -> None:
        self._pipeline = pipeline
        self._theirs = theirs

    def flush(self, terminate: bool = False) -> None:
        """Wait until every trace that has ended is stored, or is safe on disk because the store is away."""
        self._pipeline.current().flush(None)
        if self._theirs is not None:
            mlflow_processor.flush(self._theirs, terminate=terminate)

    def activate(self) -> None:
        """Do nothing: MLflow's queue starts threads here; ours start when there is something to do."""

    def is_active(self) -> bool:
        """Return True: MLflow's exit handler flushes an active queue; ours has its own."""
        return True


class WholeTraceExporter(mlflow_processor.SpanExporter):
    """Hands ended spans to the assembler; without a pipeline it is MLflow's exporter, writing in the caller."""

    def __init__(self, tracking_uri: str | None, pipeline: Pipeline, theirs: Any | None = None) -> None:
        super().__init__(tracking_uri, Queue(pipeline, theirs))
        self.pipeline = pipeline

    # MLflow's says None, against OpenTelemetry
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Take ended spans, roots and children in any order."""
        if self.pipeline.is_closed:
            super().export(spans)
            return SpanExportResult.SUCCESS
        for span in spans:
            self.take(span, None)
        return SpanExportResult.SUCCESS

    def take(self, span: ReadableSpan, processor: WholeTraceProcessor | None) -> None:
        """Take one ended span.

        Args:
            span: As OpenTelemetry hands it over, with its end time.
            processor: Where the span comes from; None where somebody calls the exporter directly.
        """
        assembler = self.pipeline.assembler
        if not mlflow_traces.is_root(span):
            assembler.child_ended(span, self.uri)
            return
        otel_id = mlflow_traces.trace_number_of(span)
        entry = assembler.entries.get(otel_id)
        if entry is None:  # begun before we were installed, or exported twice
            trace_id = mlflow_traces.trace_id_of(otel_id)
            trace = mlflow_traces.peek_trace(trace_id) if trace_id else None
            if trace is None:
                return
            entry = assembler.trace_started(otel_id, trace, self.uri)
        if entry.inherited is not None:
            assembler.complete(entry, force=True)
        elif entry.ended_at is None:
            if processor is not None:
                mlflow_processor.finish_root(processor, entry.trace, span)
            assembler.root_ended(entry, is_sync=mlflow_traces.is_evaluating() or not mlflow_traces.wants_async())

    def shutdown(self) -> None:
        """Put a provider away; its traces stay in flight, for others may still end in them."""


class WholeTraceProcessor(mlflow_processor.SpanProcessor):
    """MLflow's processor, less its work for each span: totals are computed when the trace is written."""

    span_exporter: WholeTraceExporter

    def __init__(self, exporter: WholeTraceExporter, *, export_metrics: bool) -> None:
        super().__init__(span_exporter=exporter, export_metrics=export_metrics)
        self._pipeline = exporter.pipeline
        self._may_take_calls = type(self) is WholeTraceProcessor and not self.records_metrics
        processors.add(self)

    @property
    def asks_store(self) -> bool:
        """Return whether MLflow's exporter writes the traces; for ours, the writer asks."""
        return self._pipeline.is_closed

    def trace_started(self, root: Span, trace: Any) -> None:
        """Follow a trace that has begun."""
        if not self._pipeline.is_closed:
            self._follow(root, trace)

    @guarded
    def _follow(self, root: Span, trace: Any) -> None:
        self._pipeline.assembler.trace_started(mlflow_traces.trace_number_of(root), trace, self.span_exporter.uri)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Take a span that began."""
        if self._pipeline.is_closed:
            super().on_start(span, parent_context)
        elif span.parent is None:
            self._root_started(span)
        else:
            self._child_started(span, parent_context)

    @property
    def takes_calls(self) -> bool:
        """Return whether spans of calls may begin and end here without the SDK's tracer."""
        return self._may_take_calls and not self._pipeline.is_closed

    def call_started(self, span: Any) -> LiveSpan | None:
        """Take the span of a call that began without the SDK's tracer, and return MLflow's span of it."""
        above = span.above
        if above is None:
            return self._root_started(span)
        entry = above.trace if mlflow_traces.is_call(above) else None
        if entry is None or not entry.is_open or self._pipeline.assembler.may_be_evicted(entry):
            return self._child_started(span, None)
        span.trace = entry
        return self._joined(span, entry)

    def _root_started(self, span: Any) -> LiveSpan | None:
        trace = self.start_trace(span)
        if trace is None:
            return None
        if mlflow_traces.is_call(span):
            span.trace = self._pipeline.assembler.entries.get(span.trace_number)
        return register(span, trace.info.trace_id, trace)

    def _child_started(self, span: Any, parent_context: Context | None) -> LiveSpan | None:
        assembler, otel_id = self._pipeline.assembler, mlflow_traces.trace_number_of(span)
        entry = assembler.entries.get(otel_id)
        if entry is None or assembler.may_be_evicted(entry):
            self._before_child(span)
            entry = assembler.entries.get(otel_id)
        if entry is None:  # a trace that was begun before us, or in another process
            super().on_start(span, parent_context)
            return None
        return self._joined(span, entry)

    def _joined(self, span: Any, entry: OpenTrace) -> LiveSpan:
        live = register(span, entry.identity.trace_id, entry.trace)
        if entry.ended_at is not None:  # meanwhile, too
            self._pipeline.assembler.child_started(entry.identity.otel_id, mlflow_traces.number_of(span))
        return live

    @guarded
    def _before_child(self, span: Span) -> None:
        self._pipeline.assembler.before_child(mlflow_traces.trace_number_of(span))

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span that ended."""
        if gc_deferred.is_running_here():
            gc_deferred.put_off(self._end, span)
            return
        if gc_deferred.waiting:
            gc_deferred.take_up()
        self._end(span)

    def call_ended(self, span: Any) -> None:
        """Take the span of a call that ended; it was sampled. While its root is open there is nothing to do."""
        entry, span.trace = span.trace, None  # what waits keeps no more than it needs
        if entry is None or span.above is None or not entry.is_open or self._pipeline.is_closed:
            self.on_end(span)

    def _end(self, span: ReadableSpan) -> None:
        if self._pipeline.is_closed:
            super().on_end(span)
            return
        if self.records_metrics:
            self._count_for_metrics(span)
        self._take(span)

    @guarded
    def _count_for_metrics(self, span: ReadableSpan) -> None:
        self.record_metrics(span)

    @guarded
    def _take(self, span: ReadableSpan) -> None:
        if mlflow_traces.is_sampled(span):
            self.span_exporter.take(span, self)


class RetiringProcessor(WholeTraceProcessor):
    """Ends the traces that began under ours, and leaves all else to MLflow's own processor.

    It stands in the provider from ``autolog(disable=True)`` in the middle of calls until the last of them has ended, or
    until ours is back.

    Args:
        exporter: Of the pipeline that has the open traces.
        theirs: MLflow's own processor.
        export_metrics: As for ``WholeTraceProcessor``.
    """

    def __init__(self, exporter: WholeTraceExporter, theirs: Any, *, export_metrics: bool) -> None:
        super().__init__(exporter, export_metrics=export_metrics)
        self.theirs = theirs

    def _is_ours(self, span: ReadableSpan) -> bool:
        return not self._pipeline.is_closed and span.context.trace_id in self._pipeline.assembler.entries

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Take a span that began, of one of our open traces or not."""
        if span.parent is not None and self._is_ours(span):
            super().on_start(span, parent_context)
        else:
            self.theirs.on_start(span, parent_context)

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span that ended."""
        if self._is_ours(span):
            super().on_end(span)
        else:
            self.theirs.on_end(span)

    def shutdown(self) -> None:
        """Put the provider away."""
        self.theirs.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Flush MLflow's own processor; ours is flushed by its queue."""
        return bool(self.theirs.force_flush(timeout_millis))
