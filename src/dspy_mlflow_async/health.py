"""Health of the tracer: counts of the traces of this process by state, and a way to wait until they are stored."""

from __future__ import annotations

from dataclasses import dataclass, field

from dspy_mlflow_async import export, guard
from dspy_mlflow_async.requests.incoming_traceparent import CallerCounts, caller_counts
from dspy_mlflow_async.spans.tracer import end_abandoned


@dataclass(frozen=True, slots=True)
class Stats(export.ExportStats):
    """Counts of the traces of this process, by where they are now.

    ``started`` is always ``stored + waiting + spooled + dead + dropped + sampled_out + open``; ``in_progress`` are
    those of the open ones that can be seen in the store, with what has ended of them.

    Attributes:
        internal_errors: Errors of the tracer's own that it has swallowed.
        callers: Requests to services of this process that came with a ``traceparent`` header.
    """

    internal_errors: int = 0
    callers: CallerCounts = field(default_factory=CallerCounts)


def stats() -> Stats:
    """Count the traces of this process by where they are now."""
    counted = export.stats()
    fields = {name: getattr(counted, name) for name in export.ExportStats.__dataclass_fields__}
    return Stats(**fields, internal_errors=guard.internal_errors(), callers=caller_counts())


def flush(timeout: float | None = None) -> bool:
    """Write every trace that has ended, and wait until it is stored.

    Traces that are still open are written with the spans that have ended, in state ``IN_PROGRESS``, unless they may
    yet be left out by ``sample``; the whole of each follows when it ends. How many there are, ``stats().open`` says.

    Args:
        timeout: Seconds to wait; None waits until the store has taken everything or proves to be away.

    Returns:
        True when all that had ended is stored: whole traces, and the ended spans of open ones. It does not say that
        nothing is open, and what comes during the call is not waited for.

    Raises:
        TypeError: For a timeout that is no number.
        ValueError: For one below 0.
    """
    if timeout is not None:
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise TypeError(f"timeout must be a number of seconds, not {timeout!r}")
        if not timeout >= 0:
            raise ValueError(f"timeout must be 0 or more seconds, not {timeout!r}")
    end_abandoned()
    return export.flush(timeout)


def secure(timeout: float) -> bool:
    """Store every trace that has ended, and bring to the disk what is not stored in time.

    For a process that is about to end; see ``export.secure``.
    """
    end_abandoned()
    return export.secure(timeout)
