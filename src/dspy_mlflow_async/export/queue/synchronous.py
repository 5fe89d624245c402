"""Synchronous writes, in the thread of a caller who waits, ahead of all that waits in the background."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from dspy_mlflow_async.export.write.errors import Verdict

if TYPE_CHECKING:
    from dspy_mlflow_async.export.operations import Operation
    from dspy_mlflow_async.export.queue.availability import Availability
    from dspy_mlflow_async.export.queue.pending import Pending, PendingOperations
    from dspy_mlflow_async.export.queue.settlement import Settlement
    from dspy_mlflow_async.export.queue.worker import Progress
    from dspy_mlflow_async.export.write.writer import Writer

# A caller who waits for one operation waits no longer than this for an answer.
SECONDS = 10.0
_SETTLED = frozenset({Verdict.STORED, Verdict.REFUSED})


class Background(Protocol):
    """Queue as those see it who write ahead of it."""

    def put(self, operation: Operation) -> None:
        """Take an operation."""

    def take_back(self, entries: list[Pending]) -> None:
        """Queue what could not be brought to the store."""

    def hasten(self) -> None:
        """Write what waits without lingering."""


class SynchronousWriter:
    """Brings to the store what a caller waits for; what does not work now is left to the queue.

    Args:
        writer: Writes to the store, and answers within ``SECONDS``.
        pending: What waits.
        settlement: Notes what becomes of what it has taken of that.
        availability: Whether the store is worth a wait.
        progress: Of the queue, where others have in hand what the caller waits for.
        background: The queue, for what does not work now.
    """

    def __init__(
        self,
        writer: Writer,
        pending: PendingOperations,
        settlement: Settlement,
        availability: Availability,
        progress: Progress,
        background: Background,
    ) -> None:
        self.writer = writer
        self._pending = pending
        self._settlement = settlement
        self._availability = availability
        self._progress = progress
        self._background = background

    def write_now(self, operation: Operation) -> bool:
        """Write an operation, behind what waits of the same trace or run; what does not work now is queued.

        Returns:
            Whether it is stored.
        """
        entry = self._pending.add_taken(operation) if self._availability.may_wait() else None
        if entry is None:  # what has ended of it was shown while it was open, or the store is away
            self._background.put(operation)
            return self.write_waiting(operation.key, SECONDS)
        return self._write([entry])

    def write_waiting(self, key: str, timeout: float) -> bool:
        """Write what waits of one trace or run; the rest waits on.

        Args:
            key: The trace or the run.
            timeout: Seconds to wait for what others are writing of it just now.

        Returns:
            Whether nothing of it waits any more, and all that was written here is stored.
        """
        batch = self._take(key, time.monotonic() + timeout) if self._availability.may_wait() else None
        return batch is not None and (not batch or self._write(batch))

    def _write(self, batch: list[Pending]) -> bool:
        begun = time.monotonic()
        held = [(entry, operation) for entry in batch if (operation := entry.operation) is not None]
        entries = {id(operation): entry for entry, operation in held}
        left = list(batch)
        try:
            outcomes = self.writer.write([operation for _, operation in held])
            for outcome in outcomes:
                if outcome.verdict in _SETTLED:
                    entry = entries[id(outcome.operation)]
                    self._settlement.settle(entry, outcome)
                    left.remove(entry)
        finally:  # after an interrupt, too: the background takes up what is left
            self._background.take_back(left)
        if left:
            self._availability.note_wait(begun)
        return all(outcome.verdict is Verdict.STORED for outcome in outcomes)

    def _take(self, key: str, deadline: float) -> list[Pending] | None:
        """Take what waits of a trace or run; None where others have it, and keep it."""
        availability = self._availability
        attempts = availability.attempts
        while True:
            batch = self._pending.take_all_of(key)
            if batch is not None:
                return batch
            left = deadline - time.monotonic()
            if left <= 0 or availability.failures or availability.away_at > attempts or not availability.may_wait():
                return None
            self._background.hasten()
            self._progress.wait(min(left, 0.05))
