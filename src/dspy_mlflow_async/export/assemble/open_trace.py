"""State of one trace in flight, with the annotations to add before it is handed on."""

from __future__ import annotations

import copy
import threading
import time
from typing import TYPE_CHECKING, Any

from dspy_mlflow_async.export.assemble.sampling import KEEPS
from dspy_mlflow_async.seams import mlflow_traces

if TYPE_CHECKING:
    from mlflow.entities import Assessment

    from dspy_mlflow_async.export.operations import Reference


class Annotations:
    """Annotations that callers of ``release`` gave a trace that is not handed on yet."""

    __slots__ = ("assessments", "metadata", "tags")

    def __init__(self) -> None:
        self.assessments: list[Assessment] = []
        self.metadata: dict[str, str] = {}
        self.tags: dict[str, str] = {}


class OpenTrace:
    """State of one trace in flight. Its lock is held for bookkeeping alone, never for work."""

    __slots__ = (
        "began",
        "ended_at",
        "inherited",
        "is_discarded",
        "is_handed_on",
        "is_late",
        "is_sync",
        "keeps",
        "lock",
        "open_ids",
        "otel_id",
        "safe_copy",
        "showing",
        "shown",
        "shown_at",
        "trace",
        "trace_id",
        "uri",
        "workspace",
    )

    def __init__(self, otel_id: int, trace: Any, uri: str, workspace: str | None) -> None:
        self.otel_id = otel_id
        self.trace = trace
        self.trace_id: str = trace.info.trace_id
        self.uri = uri
        self.workspace = workspace
        self.lock = threading.Lock()
        self.began = self.shown_at = time.monotonic()
        self.shown: set[str] | None = None  # what partial writes bring to the store: the trace's id, and of spans
        self.showing = threading.Lock()  # held while a partial write is queued: the whole comes after it
        self.ended_at: float | None = None  # monotonic; set when the root ends
        self.open_ids: set[str] = set()  # children still open after the root's end
        self.is_handed_on = False
        self.is_sync = False
        self.is_late = False  # handed on before, and open again for spans that began after that
        self.safe_copy: Reference | None = None  # on disk while the trace waits, with `durable`
        self.inherited: frozenset[str] | None = None  # spans that the parent process owns, after a fork
        self.keeps = KEEPS.get()
        self.is_discarded = False


def named(assessment: Assessment, trace_id: str) -> Assessment:
    """Copy an assessment, with an id of its own, by which the store recognises it when it is sent twice."""
    assessment = copy.copy(assessment)
    assessment.trace_id = trace_id
    assessment.assessment_id = assessment.assessment_id or mlflow_traces.generate_assessment_id()
    return assessment
