"""Settlement of operations that were in hand: what an attempt has shown of each, for what waits and for the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_mlflow_async.export.operations import Operation, RunOperation
from dspy_mlflow_async.export.queue.overflow import not_shown
from dspy_mlflow_async.export.spool import codec
from dspy_mlflow_async.export.write.errors import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dspy_mlflow_async.export.queue.overflow import Overflow
    from dspy_mlflow_async.export.queue.pending import Pending, PendingOperations
    from dspy_mlflow_async.export.spool.disk import Disk
    from dspy_mlflow_async.export.write.errors import Outcome


class Settlement:
    """Finds the operations of entries that somebody has in hand, and notes what becomes of them.

    Args:
        pending: What waits.
        overflow: What brings it to the disk.
        disk: Where its records are.
    """

    def __init__(self, pending: PendingOperations, overflow: Overflow, disk: Disk) -> None:
        self._pending = pending
        self._overflow = overflow
        self._disk = disk

    def held(self, batch: Iterable[Pending]) -> list[tuple[Pending, Operation]]:
        """Return entries with their operations, from the disk if need be, less those that cannot be had any more."""
        return [(entry, operation) for entry in batch if (operation := self._operation_of(entry)) is not None]

    def _operation_of(self, entry: Pending) -> Operation | None:
        operation, reference = entry.operation, entry.reference
        if operation is not None or reference is None:
            return operation
        try:
            operation = self._disk.load(reference)
        except codec.UnreadableError as error:
            self.leave_alone(entry, error)
            return None
        if operation is None:
            self._pending.finish(entry, "dropped")
            self._disk.spool.done([reference], stored=False)
        return operation

    def leave_alone(self, entry: Pending, error: codec.UnreadableError) -> None:  # noqa: ARG002 - for those who report
        """Keep a record on disk that this version cannot read, and wait for it no longer."""
        self._pending.finish(entry, None)

    def settle(self, entry: Pending, outcome: Outcome) -> None:
        """Note what has become of an operation that was in hand; where the store is away, it goes on waiting."""
        operation = outcome.operation
        if outcome.verdict is Verdict.STORED:
            self._pending.note_success(entry)
            self._pending.finish(entry, "stored")
            self._disk.forget(operation, stored=True)
        elif outcome.verdict is Verdict.AWAY:
            return
        elif self._overflow.is_partial(operation):
            if outcome.verdict is Verdict.SUSPECT:
                not_shown(operation)
            self._pending.finish(entry, None)
        elif outcome.verdict is Verdict.SUSPECT and not self._pending.suspect(entry):
            for waiting in self._pending.residents_of(operation.key):
                self._overflow.spill(waiting)
        else:
            self.refuse(entry, outcome)

    def refuse(self, entry: Pending, outcome: Outcome) -> bool:
        """Give up what the store never takes; where there can be no dead letter, its record stays in the spool.

        Returns:
            Whether it is a dead letter.
        """
        operation = outcome.operation
        if isinstance(operation, RunOperation) and operation.write_status is not None:
            operation.write_status.was_refused = True
        is_kept = self._disk.dead_letter(operation, f"{type(outcome.error).__name__}: {outcome.error}")
        if not is_kept and self._overflow.spill(entry):
            self._pending.finish(entry, None)
            return False
        self._pending.finish(entry, "dead" if is_kept else "dropped")
        self._disk.forget(operation, stored=False)
        return is_kept
