"""Segments of a spool as this process writes them: appended to, synced, and gone when nothing in them is needed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dspy_mlflow_async.export.operations import Reference
from dspy_mlflow_async.export.spool.format import frame, mark_done, scan
from dspy_mlflow_async.export.spool.paths import (
    SHARED,
    begun,
    make_folder,
    open_file,
    read_file,
    remove,
    segments_of,
    sync_folder,
)

if TYPE_CHECKING:
    from dspy_mlflow_async.export.spool.follower import SegmentFollower
    from dspy_mlflow_async.export.spool.quota import Quota

# A segment that has grown this large is closed; it disappears when all of its records are done with.
SEGMENT_BYTES = 16 * 2**20
# One of this size goes away as soon as nothing in it is needed, even if more could be written to it.
SEGMENT_BYTES_IF_EMPTY = 2**20
# macOS has no fdatasync.
sync_file = getattr(os, "fdatasync", os.fsync)


class GroupSync:
    """Turns at one file: one caller syncs for all who wait, so that nobody waits for longer than two slow syncs.

    A lock would do, but whoever waits for it must have it to learn that another's sync was good for them, too, and
    meanwhile the next begins.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_taken = False

    def until(self, is_safe: Callable[[], bool], sync: Callable[[], None]) -> None:
        """Return once ``is_safe``, after a turn of another or one of one's own, in which ``sync`` is called.

        Args:
            is_safe: Whether there is nothing to wait for; asked at first, and when a turn is over. What it raises is
                raised here.
            sync: Makes it so.
        """
        is_mine = False
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._is_taken or is_safe())
                if is_safe():
                    return
                self._is_taken = is_mine = True
            sync()
        finally:  # an interrupt may come at any line
            if is_mine:
                self._release()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Take a turn for something else, in which nobody syncs."""
        is_mine = False
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._is_taken)
                self._is_taken = is_mine = True
            yield
        finally:
            if is_mine:
                self._release()

    def _release(self) -> None:
        with self._changed:
            self._is_taken = False
            self._changed.notify_all()


class _Segment:
    """Segment that this process has begun. It stays open, and so locked and ours, while something in it is needed.

    Attributes:
        path: The file.
        written: Bytes written so far.
        needed: Offsets of the records that are not done with.
        is_full: Whether it takes no more.
        is_unsynced: Whether it could not be synced when it became full.
    """

    def __init__(self, folder: Path, suffix: str) -> None:
        # Records are sent in the order of the segments' names, also when the clock goes backwards.
        stamp = max([time.time_ns(), *(begun(path) + 1 for path in segments_of(folder)[-1:])])
        self.path = folder / f"{stamp:020d}-{os.getpid()}-{secrets.token_hex(3)}{suffix}"
        nameless = self.path.with_suffix(".new")  # nobody looks at it before it is locked
        self._handle = open_file(nameless, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        fcntl.flock(self._handle, fcntl.LOCK_EX)  # says that its writer lives
        nameless.rename(self.path)
        self.written = self._synced = 0
        self.needed: set[int] = set()
        self.is_full = self.is_unsynced = False
        self._is_name_safe = False  # whether a power cut would leave it its name

    def append(self, line: bytes) -> int:
        """Append a line, whole or not at all, and return its offset."""
        offset, written = self.written, 0
        try:
            while written < len(line):
                written += os.write(self._handle, memoryview(line)[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, offset)  # half a record would be a damaged one
            raise
        self.written = offset + len(line)
        self.needed.add(offset)
        return offset

    def is_safe(self, end: int) -> bool:
        """Return whether a power cut leaves what is written up to ``end``.

        Raises:
            OSError: If it does not, and nobody syncs it any more.
        """
        if self.is_unsynced:
            raise OSError(errno.EIO, "could not be synced", str(self.path))
        return self.is_full or self._synced >= end  # the former: synced when it became so

    def sync(self) -> None:
        """Sync it and, once, its name in the folder."""
        reached = self.written
        sync_file(self._handle)
        if not self._is_name_safe:
            sync_folder(self.path.parent)
            self._is_name_safe = True
        self._synced = reached

    def release(self) -> None:
        """Close the file, and with it give back the lock."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class Spool:
    """Spool of one tracking URI, as one process writes it. Safe for threads."""

    def __init__(
        self,
        folder: Path,
        uri: str,
        *,
        is_shared: bool = False,
        follower: SegmentFollower | None = None,
        quota: Quota | None = None,
    ) -> None:
        self.folder = folder
        self.uri = uri
        self.quota = quota  # None for no bound
        self.follower = follower  # segments of others whose records we bring to the store
        self._suffix = SHARED if is_shared else ".seg"
        self._append = threading.Lock()
        self._syncs = GroupSync()
        self._current: _Segment | None = None
        self._mine: dict[Path, _Segment] = {}  # the current one, and those before it that are needed

    def put(self, payload: bytes, *, key: str, counted: int, sync: bool = False, is_vital: bool = True) -> Reference:
        """Append a record.

        Args:
            payload: The record, encoded.
            key: What it belongs to; kept with the reference.
            counted: What of the counters it carries; kept with the reference.
            sync: Return only when it would survive a power cut, as after ``sync``.
            is_vital: Whether the reserve of the quota is for it, too.

        Raises:
            OSError: If the disk or the quota is full, or the folder cannot be written.
        """
        line = frame(payload)
        if self.quota is not None:
            self.quota.take(len(line), is_vital=is_vital)
        with self._append:
            segment = self._current
            if segment is None or segment.written >= SEGMENT_BYTES:
                segment = self._open_segment()
            reference = Reference(segment.path, segment.append(line), len(line), key, counted)
        if sync:
            self.sync(reference)
        return reference

    def sync(self, reference: Reference) -> None:
        """Return only when a record would survive a power cut. Callers that wait at the same time share one sync.

        Raises:
            OSError: If the disk is broken.
        """
        segment = self._mine.get(reference.segment)
        if segment is not None:  # else it is done with
            self._syncs.until(lambda: segment.is_safe(reference.offset + reference.length), segment.sync)

    def _open_segment(self) -> _Segment:
        self._retire_segment()
        make_folder(self.folder, self.uri)
        segment = _Segment(self.folder, self._suffix)
        self._current = self._mine[segment.path] = segment
        return segment

    def close(self) -> None:
        """Sync and give up all segments, adopted ones too, so that others may drain them."""
        with self._append:
            self._retire_segment()
            for segment in self._mine.values():
                segment.release()
        if self.follower is not None:
            self.follower.close()

    def _retire_segment(self) -> None:
        """Close the current segment to writes. It stays locked, and so ours, while its records are not done with."""
        with self._syncs.turn():  # nobody syncs a handle that is closed, or is another file's by then
            segment = self._current
            if segment is None:
                return
            try:
                if segment.needed:
                    segment.sync()
            except OSError:
                segment.is_unsynced = True  # whoever waits for the sync of a record in it is told
            segment.is_full, self._current = True, None  # to those who wait, all of it is synced now
            if segment.needed:
                return
            segment.release()
        self._delete(segment)

    def _delete(self, segment: _Segment) -> None:
        remove(segment.path)
        self._mine.pop(segment.path, None)

    def read(self, reference: Reference) -> bytes | None:
        """Return the payload of a record; None if the disk has lost it."""
        try:
            data = read_file(reference.segment, reference.offset, reference.length)
        except OSError:
            return None
        return next((payload for offset, payload in scan(data) if offset == 0), None)

    def done(self, references: list[Reference], *, stored: bool = True, noted: bool = False) -> None:
        """Note that records are done with; a segment of ours that has no others goes away.

        Args:
            references: The records.
            stored: Whether they are in the store (else among the dead letters).
            noted: Whether somebody else has marked them already.
        """
        by_segment: dict[Path, list[int]] = {}
        for reference in references:
            by_segment.setdefault(reference.segment, []).append(reference.offset)
        for path, offsets in by_segment.items():
            if self.follower is not None and path in self.follower:
                self.follower.done(path, offsets, stored=stored)
                continue
            with self._append:
                segment = self._mine.get(path)
                is_gone = segment is not None and self._is_gone_without(segment, offsets)
            if not (is_gone or noted):
                with contextlib.suppress(OSError):  # then it is sent twice, which the store does not mind
                    mark_done(path, offsets, stored=stored)

    def _is_gone_without(self, segment: _Segment, offsets: list[int]) -> bool:
        """Take records off a segment of ours; where no other is needed, its bytes go. Called with the lock."""
        segment.needed.difference_update(offsets)
        if segment.needed:
            return False
        if segment is self._current:
            if segment.written < SEGMENT_BYTES_IF_EMPTY:
                return False
            self._retire_segment()
            return True
        segment.release()
        self._delete(segment)
        return True

    def erase(self, reference: Reference) -> None:
        """Take the content of a record of ours off the disk, as well as the record: nobody shall ever read it."""
        with contextlib.suppress(OSError):  # the segment is gone already
            handle = open_file(reference.segment, os.O_WRONLY)
            try:
                os.pwrite(handle, b"\n" * reference.length, reference.offset)
            finally:
                os.close(handle)
        self.done([reference])

    def adopt(self) -> list[Reference]:
        """Adopt records of others that are now ours to send."""
        return [] if self.follower is None else self.follower.poll(self.is_mine)

    def written(self) -> list[Path]:
        """Return the segments of this object in which something may still be needed."""
        with self._append:
            return list(self._mine)

    def is_mine(self, segment: Path) -> bool:
        """Return whether this object has written the segment, and it is still needed."""
        return segment in self._mine

    def after_fork(self) -> None:
        """Leave the parent's segments to the parent, in a forked child."""
        self._append, self._syncs = threading.Lock(), GroupSync()
        if self.quota is not None:
            self.quota.after_fork()
        for segment in self._mine.values():
            segment.release()  # flock belongs to the open file, which the parent still has
        self._current, self._mine = None, {}
