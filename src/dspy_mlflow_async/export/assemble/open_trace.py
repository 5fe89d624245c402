"""State of one trace in flight, with the annotations to add before it is handed on."""

from __future__ import annotations

import copy
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dspy_mlflow_async.export.assemble.sampling import KEEPS, Keeps
from dspy_mlflow_async.seams import mlflow_traces

if TYPE_CHECKING:
    from mlflow.entities import Assessment

    from dspy_mlflow_async.export.operations import Reference


# A trace whose root nobody ended is stored as it is and forgotten, after as long as MLflow's cache keeps it.
ABANDONED_AFTER = 3600.0


class Annotations:
    """Annotations that callers of ``release`` gave a trace that is not handed on yet."""

    __slots__ = ("assessments", "metadata", "tags")

    def __init__(self) -> None:
        self.assessments: list[Assessment] = []
        self.metadata: dict[str, str] = {}
        self.tags: dict[str, str] = {}


class TraceIdentity(NamedTuple):
    """Names of a trace, and its store.

    Attributes:
        otel_id: OpenTelemetry's id.
        trace_id: MLflow's id.
        uri: The tracking URI.
        workspace: The workspace there, if it has several.
    """

    otel_id: int
    trace_id: str
    uri: str
    workspace: str | None


class OpenChildren:
    """Children that are still open after the root's end. The lock is held for bookkeeping alone, never for work.

    Attributes:
        ids: Those of them that this process has.
        are_elsewhere: Whether other processes add children of their own.
    """

    __slots__ = ("are_elsewhere", "ids", "lock")

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.are_elsewhere = False
        self.lock = threading.Lock()

    def started(self, span_id: str) -> None:
        """Note that one began."""
        with self.lock:
            self.ids.add(span_id)

    def ended(self, span_id: str) -> bool:
        """Note that one ended, and return whether none is open."""
        with self.lock:
            self.ids.discard(span_id)
            return not self.ids


class PartialView:
    """View of a trace that is still open, in the store.

    Attributes:
        ids: What partial writes bring there: the trace's id, and of spans. None before the first.
        at: When it was looked at last, monotonic.
        lock: Held while a partial write is queued: the whole comes after it.
    """

    __slots__ = ("at", "ids", "lock")

    def __init__(self, at: float) -> None:
        self.ids: set[str] | None = None
        self.at = at
        self.lock = threading.Lock()


class SamplingDecision:
    """Decision on whether a trace is stored.

    Attributes:
        keeps: The rule that decides at its end; None where there is none any more.
        is_discarded: Whether it is left out.
    """

    __slots__ = ("is_discarded", "keeps")

    def __init__(self, keeps: Keeps | None) -> None:
        self.keeps = keeps
        self.is_discarded = False


class OpenTrace:
    """State of one trace in flight.

    Attributes:
        identity: Which it is.
        trace: MLflow's trace in memory.
        began: When, monotonic.
        ended_at: When its root ended.
        children: Which children that has left open.
        partial: What is shown of it meanwhile.
        sampling: Whether it is stored.
        is_handed_on: Whether it is on its way to the store, or MLflow's again.
        is_sync: Whether its caller waits for the store.
        is_late: Whether it was handed on before, and is open again for spans that began after that.
        safe_copy: Where it lies on disk while it waits, with ``durable``.
        inherited: Spans that the parent process owns, after a fork.
    """

    __slots__ = (
        "began",
        "children",
        "ended_at",
        "identity",
        "inherited",
        "is_handed_on",
        "is_late",
        "is_sync",
        "partial",
        "safe_copy",
        "sampling",
        "trace",
    )

    def __init__(self, identity: TraceIdentity, trace: Any) -> None:
        self.identity = identity
        self.trace = trace
        self.began = time.monotonic()
        self.ended_at: float | None = None
        self.children = OpenChildren()
        self.partial = PartialView(self.began)
        self.sampling = SamplingDecision(KEEPS.get())
        self.is_handed_on = self.is_sync = self.is_late = False
        self.safe_copy: Reference | None = None
        self.inherited: frozenset[str] | None = None

    @property
    def is_open(self) -> bool:
        """Return whether its root is open, in this process."""
        return self.ended_at is None and self.inherited is None and not self.is_handed_on


def named(assessment: Assessment, trace_id: str) -> Assessment:
    """Copy an assessment, with an id of its own, by which the store recognises it when it is sent twice."""
    assessment = copy.copy(assessment)
    assessment.trace_id = trace_id
    assessment.assessment_id = assessment.assessment_id or mlflow_traces.generate_assessment_id()
    return assessment
