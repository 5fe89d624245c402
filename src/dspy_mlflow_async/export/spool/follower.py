"""Follower of segments of other processes: those of the dead, and, for a draining child, of its living parent."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dspy_mlflow_async.export.operations import Reference
from dspy_mlflow_async.export.spool import codec
from dspy_mlflow_async.export.spool.format import done_offsets, frame, mark_done, scan
from dspy_mlflow_async.export.spool.paths import SHARED, Lock, read_file, remove, segments_of

# Read no more at once than this beyond the last whole record.
_CHUNK = 8 * 2**20


@dataclass(slots=True)
class _Followed:
    lock: Lock | None  # ours if its writer is gone
    position: int = 0
    done: dict[int, bool] = field(default_factory=dict)
    left: int = 0
    damaged: int = 0


class SegmentFollower:
    """Follows what others have left in a spool, record by record.

    Args:
        folder: The spool.
        counts: Whether the records count as traces of this process.
        follows_living: Whether to follow segments that a living process shares with us, too.
    """

    def __init__(self, folder: Path, *, counts: bool, follows_living: bool) -> None:
        self._folder = folder
        self._counts = counts
        self._follows_living = follows_living
        self._followed: dict[Path, _Followed] = {}
        self._lock = threading.RLock()  # the writer's thread reads, whoever ends the process closes
        self._damaged = 0  # in segments that are gone

    def __contains__(self, segment: Path) -> bool:
        return segment in self._followed

    @property
    def damaged(self) -> int:
        """Number of stretches that could not be read so far."""
        with self._lock:
            return self._damaged + sum(followed.damaged for followed in self._followed.values())

    def poll(self, is_mine: Callable[[Path], bool]) -> list[Reference]:
        """Return the records that have come since the last time, oldest first.

        Args:
            is_mine: Whether a segment is one that this process writes itself, and not to be followed.
        """
        found: list[Reference] = []
        with self._lock:
            for segment in segments_of(self._folder):
                if not is_mine(segment):
                    found += self._poll_one(segment)
            for segment in list(self._followed):
                self._let_go(segment)
        return found

    def _poll_one(self, segment: Path) -> list[Reference]:
        followed = self._followed.get(segment)
        if followed is None or followed.lock is None:
            lock: Lock | None = Lock(segment)
            try:
                if lock is not None and not lock.acquire():
                    lock = None
            except OSError:
                return []
            if lock is None and not (self._follows_living and segment.name.endswith(SHARED)):
                return []
            if followed is None:
                followed = self._followed[segment] = _Followed(lock, done=done_offsets(segment))
            followed.lock = lock
        return self._read(segment, followed)

    def _read(self, segment: Path, followed: _Followed) -> list[Reference]:
        try:
            data = read_file(segment, followed.position)
        except OSError:
            return []
        found = []
        base = followed.position
        for offset, payload in scan(data):
            if payload is None:
                if b"\n" not in data[offset:]:
                    if followed.lock is not None:  # nobody will complete it
                        followed.damaged += 1
                        followed.position = base + len(data)
                    break
                followed.damaged += 1
                followed.position = base + data.index(b"\n", offset) + 1
                continue
            length = len(frame(payload)) if len(payload) < _CHUNK else len(payload) + 32
            followed.position = min(base + offset + length, base + len(data))
            if base + offset in followed.done:
                continue
            followed.left += 1
            key, counted = codec.peek(payload)
            found.append(Reference(segment, base + offset, length, key, counted if self._counts else 0))
        return found

    def done(self, segment: Path, offsets: list[int], *, stored: bool) -> None:
        """Note that records are done with."""
        with contextlib.suppress(OSError):  # then they are sent twice, which the store does not mind
            mark_done(segment, offsets, stored=stored)
        with self._lock:
            if followed := self._followed.get(segment):
                followed.left -= len(offsets)
                self._let_go(segment)

    def _let_go(self, segment: Path) -> None:
        """Delete a segment of the dead in which nothing is left; keep what nobody could read."""
        followed = self._followed[segment]
        if not segment.exists():
            del self._followed[segment]
        elif followed.lock is not None and not followed.left and followed.position >= segment.stat().st_size:
            if followed.damaged:
                self._damaged += followed.damaged
                with contextlib.suppress(OSError):
                    segment.rename(segment.with_suffix(".damaged"))
            remove(segment)
            followed.lock.release()
            del self._followed[segment]

    def close(self) -> None:
        """Give back all locks."""
        with self._lock:
            for followed in self._followed.values():
                if followed.lock is not None:
                    followed.lock.release()
            self._followed.clear()
