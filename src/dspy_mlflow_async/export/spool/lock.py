"""File locks that end with the process that holds them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, Any

from dspy_mlflow_async.export.spool.folder import open_file


class Lock:
    """File lock that belongs to this open file, not to the process; it ends with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: IO[Any] | None = None

    def acquire(self) -> bool:
        """Take the lock, unless somebody has it."""
        handle = os.fdopen(open_file(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            return False
        self._handle = handle
        return True

    def note(self, text: str) -> None:
        """Write something into the file, in place of what was there, for others to read."""
        if self._handle is not None:
            self._handle.truncate(0)
            self._handle.write(text.encode())
            self._handle.flush()

    def release(self) -> None:
        """Give it back."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None
