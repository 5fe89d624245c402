"""Quota of a spool: the share of a disk that it may take."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from pathlib import Path

# Whoever fills the rest of a disk takes the whole machine down.
_FREE_SHARE = 0.05
# What is kept back for evaluations' results and for traces with errors.
_RESERVED_SHARE = 0.2
_MEASURE_EVERY = 1.0  # seconds


class SpoolFullError(OSError):
    """Error of a spool that may not grow."""

    def __init__(self, reason: str, folder: Path) -> None:
        super().__init__(errno.EDQUOT, reason, str(folder))


class Quota:
    """Bound on the bytes of one spool, all processes that write to it together. Safe for threads.

    The folder is measured once a second at most; in between, what this process writes is added up.

    Args:
        folder: The spool.
        max_bytes: How many bytes its files may have.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._measured_at = float("-inf")  # monotonic
        self._size = 0
        self._free = 0  # bytes that this may still take of the disk

    def take(self, length: int, *, is_vital: bool) -> None:
        """Count bytes that are about to be written.

        Args:
            length: How many.
            is_vital: Whether they are the last to go: then the reserve is theirs.

        Raises:
            SpoolFullError: If there is no room for them.
        """
        with self._lock:
            if time.monotonic() - self._measured_at >= _MEASURE_EVERY:
                self._measure()
            bound = self._max_bytes if is_vital else int(self._max_bytes * (1 - _RESERVED_SHARE))
            if self._size + length > bound:
                raise SpoolFullError(f"it has reached max_spool_bytes, {self._max_bytes:,}", self._folder)
            if length > self._free:
                raise SpoolFullError(f"the last {_FREE_SHARE:.0%} of the disk are not for it", self._folder)
            self._size += length
            self._free -= length

    def _measure(self) -> None:
        self._measured_at = time.monotonic()
        self._size = 0
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # gone meanwhile
                    self._size += entry.stat(follow_symlinks=False).st_size
        existing = next(folder for folder in (self._folder, *self._folder.parents) if folder.exists())
        disk = os.statvfs(existing)
        self._free = int((disk.f_bavail - disk.f_blocks * _FREE_SHARE) * disk.f_frsize)

    def after_fork(self) -> None:
        """Make a new lock, in a forked child."""
        self._lock = threading.Lock()
