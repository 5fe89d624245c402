"""Synchronous writes, in the thread of a caller who waits, ahead of all that waits in the background."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from dspy_mlflow_async.export.write.errors import Verdict
from dspy_mlflow_async.export.write.writer import Writer

if TYPE_CHECKING:
    from dspy_mlflow_async.export.operations import Operation
    from dspy_mlflow_async.export.queue.availability import Availability
    from dspy_mlflow_async.export.queue.pending import Pending, PendingOperations
    from dspy_mlflow_async.export.write.errors import Outcome

# A caller who waits for one operation waits no longer than this for an answer.
_SECONDS = 10.0
_SETTLED = frozenset({Verdict.STORED, Verdict.REFUSED})


class Queue(Protocol):
    """Queue as a synchronous writer sees it."""

    uri: str
    pending: PendingOperations
    availability: Availability

    def put(self, operation: Operation) -> None:
        """Take an operation."""

    def settle(self, entry: Pending, outcome: Outcome) -> None:
        """Apply the result of an operation that was in hand."""

    def take_back(self, entries: list[Pending]) -> None:
        """Queue what could not be brought to the store."""

    def hasten(self) -> None:
        """Write what waits without lingering."""

    def wait_for_progress(self, seconds: float) -> None:
        """Wait until something was written, at most so long."""


class SynchronousWriter:
    """Brings to the store what a caller waits for; what does not work now is left to the queue."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._writer = Writer(queue.uri, request_seconds=_SECONDS, may_try_rows=False)

    def write_now(self, operation: Operation) -> bool:
        """Write an operation, behind what waits of the same trace or run; what does not work now is queued.

        Returns:
            Whether it is stored.
        """
        queue = self._queue
        entry = queue.pending.add_taken(operation) if queue.availability.may_wait() else None
        if entry is None:  # what has ended of it was shown while it was open, or the store is away
            queue.put(operation)
            return self.write_waiting(operation.key, _SECONDS)
        return self._write([entry])

    def write_waiting(self, key: str, timeout: float) -> bool:
        """Write what waits of one trace or run; the rest waits on.

        Args:
            key: The trace or the run.
            timeout: Seconds to wait for what others are writing of it just now.

        Returns:
            Whether nothing of it waits any more, and all that was written here is stored.
        """
        batch = self._take(key, time.monotonic() + timeout) if self._queue.availability.may_wait() else None
        return batch is not None and (not batch or self._write(batch))

    def _write(self, batch: list[Pending]) -> bool:
        queue, begun = self._queue, time.monotonic()
        held = [(entry, operation) for entry in batch if (operation := entry.operation) is not None]
        entries = {id(operation): entry for entry, operation in held}
        left = list(batch)
        try:
            outcomes = self._writer.write([operation for _, operation in held])
            for outcome in outcomes:
                if outcome.verdict in _SETTLED:
                    entry = entries[id(outcome.operation)]
                    queue.settle(entry, outcome)
                    left.remove(entry)
        finally:  # after an interrupt, too: the background takes up what is left
            queue.take_back(left)
        if left:
            queue.availability.note_wait(begun)
        return all(outcome.verdict is Verdict.STORED for outcome in outcomes)

    def _take(self, key: str, deadline: float) -> list[Pending] | None:
        """Take what waits of a trace or run; None where others have it, and keep it."""
        queue = self._queue
        availability = queue.availability
        attempts = availability.attempts
        while True:
            batch = queue.pending.take_all_of(key)
            if batch is not None:
                return batch
            left = deadline - time.monotonic()
            if left <= 0 or availability.failures or availability.away_at > attempts or not availability.may_wait():
                return None
            queue.hasten()
            queue.wait_for_progress(min(left, 0.05))
