"""Test helpers: capture traces without a server, and turn one into a nested literal to compare with."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlflow.entities import Assessment, Span, Trace

from dspy_mlflow_async import export
from dspy_mlflow_async.seams.mlflow_in_memory import memory_provider
from dspy_mlflow_async.seams.patching import patch

__all__ = ["capture_traces", "tree"]

_FIELDS = frozenset({"inputs", "outputs", "span_type"})


@contextlib.contextmanager
def capture_traces() -> Iterator[list[Trace]]:
    """Keep the traces of this block in memory: no server, no store, no disk, no waiting.

    All traces of the process count, whichever thread or task makes them; nothing is sent to MLflow's tracking store
    meanwhile. ::

        with capture_traces() as traces:
            program(question="...")

        assert ("Predict.forward", [...]) == tree(traces[0])

    Yields:
        A list to which each trace is added when its last span has ended, in that order. An evaluation's feedback is
        added to its trace when the metric has returned.
    """
    traces: list[Trace] = []

    def hold(trace_id: str) -> None:
        """Do nothing: nothing is written here, so nothing waits."""

    def release(
        trace_id: str,
        *,
        assessments: Sequence[Assessment] = (),
        metadata: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        for trace in [trace for trace in traces if trace.info.trace_id == trace_id]:
            for assessment in map(copy.copy, assessments):
                assessment.trace_id = trace_id
                trace.info.assessments.append(assessment)
            trace.info.trace_metadata.update(metadata or {})
            trace.info.tags.update(tags or {})

    undo = patch(export, hold=hold, release=release)
    try:
        with memory_provider(traces.append):
            yield traces
    finally:
        undo()


def tree(trace: Trace, *details: str | Callable[[Span], Any], sort: bool = False) -> tuple[Any, ...]:
    """Return the spans of a trace as nested tuples: name, details, children.

    Without details, a predictor gives ``("Predict.forward", [("ChatAdapter.format", []), ...])``; with
    ``tree(trace, "outcome")`` each tuple is ``(name, outcome, children)``.

    Args:
        trace: A trace from ``capture_traces``, ``mlflow.get_trace`` or ``mlflow.search_traces``.
        details: What else to show of each span. ``"inputs"``, ``"outputs"``, ``"span_type"`` and ``"status"`` (the
            code, such as ``"OK"``) are the span's own; any other text is an attribute's key (``"outcome"``,
            ``"cache_hit"``), None where the span has it not; a function is called with the span.
        sort: Order siblings by their details, and only those with equal details in the order in which they began;
            for calls that run at the same time.

    Returns:
        The tuple of the root.

    Raises:
        ValueError: If the spans are not one tree: none, several roots, or a span whose parent is not in the trace.
    """
    spans = sorted(trace.data.spans, key=lambda span: span.start_time_ns)
    known = {span.span_id for span in spans}
    roots = [span for span in spans if span.parent_id not in known]
    if len(roots) != 1:
        names = ", ".join(span.name for span in roots) or "none"
        raise ValueError(f"trace {trace.info.trace_id} is not one tree, its roots are: {names}")
    children: dict[str | None, list[Span]] = defaultdict(list)
    for span in spans:
        children[span.parent_id].append(span)

    def node(span: Span) -> tuple[Any, ...]:
        below = [node(child) for child in children[span.span_id]]
        if sort:
            below.sort(key=lambda child: repr(child[1:-1]))
        return (span.name, *(_detail(span, detail) for detail in details), below)

    return node(roots[0])


def _detail(span: Span, detail: str | Callable[[Span], Any]) -> Any:
    if callable(detail):
        return detail(span)
    if detail == "status":
        return span.status.status_code.value
    return getattr(span, detail) if detail in _FIELDS else span.get_attribute(detail)
