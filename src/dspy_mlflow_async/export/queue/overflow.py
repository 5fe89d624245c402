"""Overflow from memory to disk: ahead of writing, for lack of room, or for good at the end."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from dspy_mlflow_async.export.operations import Operation, TraceOperation
from dspy_mlflow_async.export.spool.disk import Disk

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_mlflow_async.export.operations import Reference
    from dspy_mlflow_async.export.queue.pending import Pending, PendingOperations
    from dspy_mlflow_async.export.spool.segments import Spool


class Overflow:
    """Disk beneath a list of operations that wait.

    Attributes:
        disk: What it writes to.
        copies: Where copies go of what is not ready to be written; the same disk, unless a child drains that.
        keeps_partial: Whether what is shown of an open trace is worth a place on disk.
    """

    def __init__(self, pending: PendingOperations, spool: Spool, copies: Spool | None = None) -> None:
        self._pending = pending
        self._spilling = threading.Lock()  # held while an operation goes to the disk, so that it goes there once
        self.disk = Disk(spool)
        self.copies = self.disk if copies is None else Disk(copies)
        self.keeps_partial = copies is not None

    def is_partial(self, operation: Operation) -> bool:
        """Return whether an operation may be forgotten, since the whole of it will follow."""
        return isinstance(operation, TraceOperation) and operation.stage == "partial" and not self.keeps_partial

    def put(self, operation: Operation) -> None:
        """Let an operation wait on disk, for which there is no room in memory; what the disk does not take is lost."""
        if self.is_partial(operation):
            not_shown(operation)
        elif not self.try_put(operation):
            self._pending.drop(operation)

    def try_put(self, operation: Operation) -> bool:
        """Let an operation wait on disk.

        Returns:
            Whether the disk took it.
        """
        if not self.disk.save(operation):
            return False
        self._discard_superseded(operation)
        if operation.reference is not None:
            self._pending.add_spooled([operation.reference], coming_from="waiting")
        return True

    def write_ahead(self, operation: Operation, *, is_wanted: bool, durable: bool) -> None:
        """Keep a copy on disk of an operation that waits in memory, and discard the earlier one that it supersedes.

        Args:
            operation: The operation.
            is_wanted: Whether there shall be a copy; else the earlier one goes alone.
            durable: Return only when the copy would survive a power cut, and warn where there can be none.
        """
        if self.is_partial(operation):
            return
        if not is_wanted or self.disk.save(operation, durable=durable, is_needed=durable):
            self._discard_superseded(operation)

    def _discard_superseded(self, operation: Operation) -> None:
        if operation.supersedes is not None:
            self.discard_copy(operation.supersedes)
            operation.supersedes = None

    def copy(self, operation: Operation, *, durable: bool) -> Reference | None:
        """Keep a copy on disk of what is not ready to be written yet.

        Returns:
            Where it lies, for the operation that will supersede it; None if it could not be written.
        """
        return operation.reference if self.copies.save(operation, durable=durable) else None

    def discard_copy(self, reference: Reference) -> None:
        """Forget a copy that nothing supersedes any more, and take it off the disk: it may have been sampled out."""
        self.copies.spool.erase(reference)

    def spill_all(self) -> None:
        """Bring what waits to the disk; what the disk does not take stays in memory, as far as there is room."""
        self._spill_those(lambda _: True)
        if self.disk.is_full:  # there may be room yet for what is the last to go
            self._spill_those(lambda operation: operation.is_vital)
            self.disk.is_full = True

    def _spill_those(self, are_meant: Callable[[Operation], bool]) -> None:
        self.disk.is_full = False
        batch = self._pending.take_residents()
        try:
            for entry in batch:
                operation = entry.operation
                if operation is None or not are_meant(operation):
                    continue
                is_safe = self.spill(entry)
                if self.disk.is_full:
                    return
                if not is_safe:  # nobody can ever write it down
                    self._pending.finish(entry, "dropped")
        finally:
            self._pending.release(batch)

    def spill(self, entry: Pending) -> bool:
        """Bring an operation from memory to the disk, in whoever's hands it is.

        Returns:
            Whether nothing is lost without the memory.
        """
        with self._spilling:
            operation = entry.operation
            if operation is None:
                return True
            if self.is_partial(operation):
                not_shown(operation)
                self._pending.finish(entry, None)
                return True
            if not self.disk.save(operation):
                return False
            self._discard_superseded(operation)
            if operation.reference is not None and not self._pending.spill(entry, operation.reference):
                self.disk.forget(operation, stored=True)  # it has been dealt with meanwhile
            return True

    def close(self) -> None:
        """Bring everything to the disk, whoever has it in hand, and keep nothing in memory from now on."""
        for entry in self._pending.close():
            if not self.spill(entry):
                self._pending.finish(entry, "dropped")
        for disk in {self.disk, self.copies}:
            disk.close()

    def after_fork(self) -> None:
        """Leave what is on disk and what is locked to the parent, in a forked child."""
        for disk in {self.disk, self.copies}:
            disk.spool.after_fork()


def not_shown(operation: Operation) -> None:
    """Let the spans of a partial operation that is not written be shown again."""
    if isinstance(operation, TraceOperation) and operation.shown is not None:
        operation.shown.clear()
