"""Overflow from memory to disk: for lack of room, while the store is away, or for good at the end."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from dspy_mlflow_async.export.operations import Operation, TraceOperation

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_mlflow_async.export.queue.pending import Pending, PendingOperations
    from dspy_mlflow_async.export.queue.write_ahead import WriteAhead
    from dspy_mlflow_async.export.spool.disk import Disk


class Overflow:
    """Disk beneath a list of operations that wait.

    Args:
        pending: What waits.
        disk: What it writes to.
        ahead: Earlier copies, which what lies on disk itself makes needless.
        keeps_partial: Whether what is shown of an open trace is worth a place on disk.
    """

    def __init__(
        self, pending: PendingOperations, disk: Disk, ahead: WriteAhead, *, keeps_partial: bool = False
    ) -> None:
        self._pending = pending
        self._disk = disk
        self._ahead = ahead
        self._spilling = threading.Lock()  # held while an operation goes to the disk, so that it goes there once
        self._keeps_partial = keeps_partial

    @property
    def is_full(self) -> bool:
        """Return whether the disk did not take what it was given last."""
        return self._disk.is_full

    def keep_partial(self) -> None:
        """Keep what is shown of open traces from now on: no more of them may come."""
        self._keeps_partial = True

    def is_partial(self, operation: Operation) -> bool:
        """Return whether an operation may be forgotten, since the whole of it will follow."""
        return isinstance(operation, TraceOperation) and operation.stage == "partial" and not self._keeps_partial

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
        if not self._disk.save(operation):
            return False
        self._ahead.discard_superseded(operation)
        if operation.reference is not None:
            self._pending.add_spooled([operation.reference], coming_from="waiting")
        return True

    def spill_all(self) -> None:
        """Bring what waits to the disk; what the disk does not take stays in memory, as far as there is room."""
        self._spill_those(lambda _: True)
        if self._disk.is_full:  # there may be room yet for what is the last to go
            self._spill_those(lambda operation: operation.is_vital)
            self._disk.is_full = True

    def _spill_those(self, are_meant: Callable[[Operation], bool]) -> None:
        self._disk.is_full = False
        batch = self._pending.take_residents()
        try:
            for entry in batch:
                operation = entry.operation
                if operation is None or not are_meant(operation):
                    continue
                is_safe = self.spill(entry)
                if self._disk.is_full:
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
            if not self._disk.save(operation):
                return False
            self._ahead.discard_superseded(operation)
            if operation.reference is not None and not self._pending.spill(entry, operation.reference):
                self._disk.forget(operation, stored=True)  # it has been dealt with meanwhile
            return True

    def close(self) -> None:
        """Bring everything to the disk, whoever has it in hand, and keep nothing in memory from now on."""
        for entry in self._pending.close():
            if not self.spill(entry):
                self._pending.finish(entry, "dropped")


def not_shown(operation: Operation) -> None:
    """Let the spans of a partial operation that is not written be shown again."""
    if isinstance(operation, TraceOperation) and operation.shown is not None:
        operation.shown.clear()
