"""Local copy of a case's records on disk: each is there the moment its example has ended.

The store gets them in batches, some time later. A process that is killed in between has lost nothing for a resume on
the same machine.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

from dspy_mlflow_async.export.options import spool_root
from dspy_mlflow_async.export.spool.paths import open_file, read_file, why_refused

logger = logging.getLogger("dspy_mlflow_async")


class LocalCopy:
    """A file beside the spools, to which records are appended; it goes when the store has all of them.

    Args:
        run_id: The run of the case.
    """

    def __init__(self, run_id: str) -> None:
        self._path = _path(run_id)
        self._file: int | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if (reason := why_refused(self._path.parent)) is not None:
                raise PermissionError(errno.EPERM, reason)
            self._file = open_file(self._path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.write(self._file, b"\n")  # after a line that a killed process has left half written
        except OSError as error:
            logger.warning("Finished examples are not kept in %s until they are stored: %s", self._path.parent, error)

    def add(self, record: str) -> None:
        """Append a record; a write to the page cache outlives the process, though not the machine."""
        if self._file is None:
            return
        try:
            os.write(self._file, record.encode() + b"\n")
        except OSError as error:
            logger.warning("Finished examples are no longer kept in %s: %s", self._path, error)
            self.close(is_stored=False)

    def close(self, *, is_stored: bool) -> None:
        """Close the file, and delete it if the store has all records."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if is_stored:
            with contextlib.suppress(OSError):
                self._path.unlink()


def read(run_id: str) -> list[str]:
    """Return the records of a case that an earlier process has left on this machine, the last one perhaps cut off."""
    path = _path(run_id)
    if why_refused(path.parent) is not None:
        return []
    try:
        return read_file(path).decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def _path(run_id: str) -> Path:
    return spool_root() / "evaluations" / f"{run_id}.jsonl"
