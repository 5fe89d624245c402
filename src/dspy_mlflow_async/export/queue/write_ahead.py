"""Copies on disk of what waits elsewhere, written before anything else: for processes that may end unheard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_mlflow_async.export import worker_processes

if TYPE_CHECKING:
    from dspy_mlflow_async.export.operations import Operation, Reference
    from dspy_mlflow_async.export.options import ExportOptions
    from dspy_mlflow_async.export.spool.disk import Disk


class WriteAhead:
    """Keeps copies on disk of operations that wait in memory, or that are not ready to be written yet.

    Args:
        options: The options, of which it needs ``durable``.
        disk: Where copies go of what waits in memory: they are sent if nobody else does.
        unready: Where those go of what is not ready; the same disk, unless a child drains that.
    """

    def __init__(self, options: ExportOptions, disk: Disk, unready: Disk) -> None:
        self.options = options
        self._disk = disk
        self._unready = unready

    @property
    def is_wanted(self) -> bool:
        """Return whether what has ended goes to the disk before anything else."""
        return self.options.durable or worker_processes.may_end_unheard()

    def write(self, operation: Operation) -> None:
        """Keep a copy of an operation that waits in memory, where that is wanted; it makes an earlier one needless.

        With ``durable`` it returns only when the copy would survive a power cut, and warns where there can be none.
        """
        durable = self.options.durable
        if not self.is_wanted or self._disk.save(operation, sync=durable, is_needed=durable):
            self.discard_superseded(operation)

    def copy(self, operation: Operation) -> Reference | None:
        """Keep a copy of what is not ready to be written yet.

        Returns:
            Where it lies, for the operation that will supersede it; None if it could not be written.
        """
        return operation.reference if self._unready.save(operation, sync=self.options.durable) else None

    def discard(self, reference: Reference) -> None:
        """Forget a copy that nothing supersedes any more, and take it off the disk: it may have been sampled out."""
        self._unready.spool.erase(reference)

    def discard_superseded(self, operation: Operation) -> None:
        """Forget the earlier copy of an operation that lies on disk itself, or needs no copy."""
        if operation.supersedes is not None:
            self.discard(operation.supersedes)
            operation.supersedes = None

    def close(self) -> None:
        """Give up the segments, so that others may send what is in them."""
        for disk in {self._disk, self._unready}:
            disk.close()

    def after_fork(self) -> None:
        """Leave what is on disk to the parent, in a forked child."""
        for disk in {self._disk, self._unready}:
            disk.spool.after_fork()
