"""Disk access of the queue: saves operations, loads them, and dead-letters what the store refuses."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from dspy_mlflow_async.export.spool import codec, dead_letters
from dspy_mlflow_async.export.write import prepare

if TYPE_CHECKING:
    from dspy_mlflow_async.export.operations import Operation, Reference
    from dspy_mlflow_async.export.spool.segments import Spool

logger = logging.getLogger("dspy_mlflow_async")


class Disk:
    """Moves operations in and out of one spool. A disk that does not work is an answer, never an error."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.is_full = False  # whether the disk did not take what it was given last
        self._is_warned = False
        self._is_warned_of_others = False

    def save(self, operation: Operation, *, sync: bool = False, is_needed: bool = True) -> bool:
        """Write an operation, unless it is there already.

        Args:
            operation: What to write.
            sync: Return only when it would survive a power cut.
            is_needed: Whether anything is lost where the disk does not take it; else nobody is warned.

        Returns:
            Whether it is in the spool now.
        """
        if operation.reference is None:
            try:
                payload = _encode(operation)
            except Exception as error:  # noqa: BLE001 - the user's values decide what it is
                logger.warning("dspy-mlflow-async: %s cannot be kept on disk: %s", operation.key, error)
                return False
            try:
                operation.reference = self.spool.put(
                    payload, key=operation.key, counted=operation.counted, sync=sync, is_vital=operation.is_vital
                )
                self.is_full = False
            except OSError as error:
                self.is_full = True
                if is_needed and not self._is_warned:
                    self._is_warned = True
                    logger.warning(
                        "dspy-mlflow-async: cannot write to the spool %s (%s: %s); what the memory cannot hold "
                        "will be lost, see stats().dropped.",
                        self.spool.folder,
                        type(error).__name__,
                        error,
                    )
                return False
        return True

    def load(self, reference: Reference) -> Operation | None:
        """Load the operation at ``reference``; None, with a warning, if the disk has lost it.

        Raises:
            UnreadableError: If it is whole, but not for this version to read; there is a warning of the first.
        """
        payload = self.spool.read(reference)
        if payload is None:
            logger.warning("dspy-mlflow-async: a record in %s is damaged, and lost", reference.segment)
            return None
        try:
            operation = codec.decode(payload)
        except Exception as error:  # its checksum is right: another version wrote it so
            if not self._is_warned_of_others:
                self._is_warned_of_others = True
                logger.warning("dspy-mlflow-async: left alone in %s: %s", self.spool.folder, error)
            raise codec.UnreadableError(f"{type(error).__name__}: {error}") from error
        operation.reference, operation.counted = reference, reference.counted
        return operation

    def dead_letter(self, operation: Operation, reason: str) -> bool:
        """Keep what the store refuses among the dead letters.

        Returns:
            Whether the disk took it.
        """
        try:
            dead_letters.append(self.spool.folder, self.spool.uri, _encode(operation), reason)
        except Exception:  # noqa: BLE001 - a full disk: nothing is left to try
            logger.warning(
                "dspy-mlflow-async: the store refuses %s, and no dead letter can be written: %s", operation.key, reason
            )
            return False
        logger.warning(
            "dspy-mlflow-async: the store refuses %s; kept in %s: %s",
            operation.key,
            self.spool.folder / "dead.letters",
            reason,
        )
        return True

    def close(self) -> None:
        """Give up the segments, so that others may send what is in them."""
        with contextlib.suppress(OSError):
            self.spool.close()

    def forget(self, operation: Operation, *, stored: bool) -> None:
        """Forget an operation that is done with: whatever the spool has of it may go."""
        references = [reference for reference in (operation.reference, operation.supersedes) if reference is not None]
        if references:
            self.spool.done(references, stored=stored)


def _encode(operation: Operation) -> bytes:
    try:
        return codec.encode(operation)
    except Exception:  # noqa: BLE001 - text that no database takes: the store would get it repaired, too
        prepare.prepare(operation)
        return codec.encode(operation)
