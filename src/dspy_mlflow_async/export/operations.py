"""Operations that wait in a queue: one on a store each, with what it takes to repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlflow.entities import Assessment, TraceInfo


@dataclass(frozen=True, slots=True)
class Reference:
    """Place of a record in the spool.

    Attributes:
        segment: The file.
        offset: Where its line begins, in bytes.
        length: How many bytes its line has.
        key: The trace or the run it belongs to.
        counted: What of the counters it carries, a ``Counted``.
    """

    segment: Path
    offset: int
    length: int
    key: str = ""
    counted: int = 0


@dataclass(slots=True, kw_only=True)
class Operation:
    """One operation on a store. Those with the same ``key`` (a trace id, a run id) are written in the order they came.

    Attributes:
        key: The trace or the run it belongs to.
        size: About how many bytes it holds.
        counted: What of the counters it carries, a ``Counted``.
        reference: Where it lies in the spool, if it does.
        supersedes: An earlier copy in the spool that this makes needless.
    """

    key: str
    size: int = 1000
    counted: int = 0
    reference: Reference | None = None
    supersedes: Reference | None = None

    @property
    def is_vital(self) -> bool:
        """Return whether it is among the last to go when the disk is full: evaluation results, traces with errors."""
        return False


@dataclass(slots=True, kw_only=True)
class TraceOperation(Operation):
    """A trace, or what of it is new.

    Attributes:
        info: What ``start_trace`` is given; of a late operation, what has been added to it.
        spans: Live spans from the caller, or immutable ones once ``prepared``.
        stage: "whole", "partial" (still open, so that it can be watched) or "late" (spans after the fact).
        experiment_id: Where the spans go.
        prepared: Whether spans are immutable and clean, and the metadata complete.
        shown: Of a partial operation, the ids of all that is shown so far; emptied where it is not written after all.
        is_shared: Whether other processes add spans to the trace: its totals are then those of what the store has.
    """

    info: TraceInfo
    spans: Sequence[Any]
    experiment_id: str | None
    stage: Literal["whole", "partial", "late"] = "whole"
    prompts: Sequence[Any] = ()
    workspace: str | None = None
    prepared: bool = False
    shown: set[str] | None = None
    is_shared: bool = False

    @property
    def is_vital(self) -> bool:
        """Return whether the trace has failed."""
        return self.info.state.value == "ERROR"


@dataclass(slots=True, kw_only=True)
class SpansOperation(Operation):
    """Spans of a trace that another process owns (distributed tracing, a forked child)."""

    spans: Sequence[Any]
    experiment_id: str | None
    workspace: str | None = None
    prepared: bool = False


@dataclass(slots=True, kw_only=True)
class TraceUpdate(Operation):
    """Annotations of a trace that came after it was written."""

    assessments: Sequence[Assessment] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    workspace: str | None = None

    @property
    def is_vital(self) -> bool:
        """Return True for feedback: somebody has judged the trace."""
        return True


@dataclass(slots=True)
class WriteStatus:
    """Outcome so far of the operations on a run.

    Attributes:
        was_refused: Whether the store has refused one of them.
    """

    was_refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """Attributes that a run is created with, whenever that is.

    Attributes:
        name: Its name; None for one that MLflow makes up.
        experiment_id: Its experiment, where that is known.
        experiment_name: The name of its experiment, where that must be looked up.
        tags: Its tags. The parent's may be a stand-in id.
        start_time_ms: Milliseconds since the epoch.
    """

    name: str | None
    experiment_id: str | None
    experiment_name: str | None
    tags: dict[str, str]
    start_time_ms: int


@dataclass(slots=True, kw_only=True)
class RunOperation(Operation):
    """One operation on a run: its creation, a batch of values, an artifact, or its end.

    Attributes:
        creation: What the run is created with; the key is then its stand-in id.
        datasets: MLflow's ``DatasetInput``s.
        write_status: Told what becomes of it, while this process has it in memory.
    """

    creation: Creation | None = None
    metrics: Sequence[Any] = ()
    params: Sequence[Any] = ()
    tags: Sequence[Any] = ()
    datasets: Sequence[Any] = ()
    path: str | None = None
    content: bytes = b""
    status: str | None = None
    end_time_ms: int | None = None
    workspace: str | None = None
    write_status: WriteStatus | None = None

    @property
    def is_vital(self) -> bool:
        """Return True: it may carry what an evaluation or a compile has found out."""
        return True

    def __post_init__(self) -> None:
        """Refuse an artifact's path that leads out of the run, as a damaged or forged record may have one."""
        if self.path is not None:
            path = PurePosixPath(self.path)
            if path.is_absolute() or ".." in path.parts or not path.name or {"\\", "\0"} & set(self.path):
                raise ValueError(f"an artifact cannot be called {self.path!r}")
