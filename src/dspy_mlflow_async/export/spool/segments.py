"""Record format and segments on disk: one folder per tracking URI, checksummed lines, and notes of what is done with.

The format is described in ``docs/export.md``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dspy_mlflow_async.export.operations import Reference
from dspy_mlflow_async.export.spool.folder import make_folder, open_file, read_file, sync_folder, why_refused
from dspy_mlflow_async.export.spool.group_sync import GroupSync

if TYPE_CHECKING:
    from dspy_mlflow_async.export.spool.follower import SegmentFollower
    from dspy_mlflow_async.export.spool.quota import Quota

_LINE = re.compile(rb"([0-9a-f]{8}) (\d{1,15}) ")
_TEXT = re.compile(rb"[^\n]")  # newlines alone are what has been erased
_DONE = re.compile(rb"(\d{1,15} [sd]) ([0-9a-f]{8})\n")
# A segment that has grown this large is closed; it disappears when all of its records are done with.
_SEGMENT_BYTES = 16 * 2**20
# One of this size goes away as soon as nothing in it is needed, even if more could be written to it.
_SEGMENT_BYTES_IF_EMPTY = 2**20
# The name of a segment that a draining child may read while its process still writes it.
SHARED = "-shared.seg"
# macOS has no fdatasync.
sync_file = getattr(os, "fdatasync", os.fsync)


def frame(payload: bytes) -> bytes:
    """Frame a payload as one line: checksum, length, payload."""
    return b"%08x %d %s\n" % (zlib.crc32(payload), len(payload), payload)


def scan(data: bytes) -> Iterator[tuple[int, bytes | None]]:
    """Read the records of a segment.

    Yields:
        Offset and payload; the payload is None for a damaged stretch (flipped bits, a torn end).
    """
    position = 0
    while (begin := _TEXT.search(data, position)) is not None:
        position = begin.start()
        match = _LINE.match(data, position)
        if match:
            start, end = match.end(), match.end() + int(match[2])
            payload = data[start:end]
            if end <= len(data) and zlib.crc32(payload) == int(match[1], 16):
                yield position, payload
                position = end + 1  # whatever the byte for the line's end has become
                continue
        yield position, None
        newline = data.find(b"\n", position)
        if newline < 0:
            return
        position = newline + 1


def done_offsets(segment: Path) -> dict[int, bool]:
    """Return the offsets in a segment that are done with, and whether their record is stored (else it is dead).

    A line that is damaged counts as not written: then a record is sent twice, which the store does not mind.
    """
    return read_notes(segment, 0)[0]


def read_notes(segment: Path, start: int) -> tuple[dict[int, bool], int]:
    """Read the same as `done_offsets` from a position of the notes on, and return the position behind them, too."""
    try:
        data = read_file(segment.with_suffix(".done"), start)
    except OSError:
        return {}, start
    done = {}
    for match in _DONE.finditer(data):
        if zlib.crc32(match[1]) == int(match[2], 16):
            offset, flag = match[1].split()
            done[int(offset)] = flag == b"s"
    return done, start + data.rfind(b"\n") + 1


def mark_done(segment: Path, offsets: list[int], *, stored: bool = True) -> None:
    """Note that records are done with: stored, or moved to the dead letters. Appending is atomic.

    Raises:
        OSError: If the disk is full.
    """
    notes = [b"%d %s" % (offset, b"s" if stored else b"d") for offset in offsets]
    handle = open_file(segment.with_suffix(".done"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, b"".join(b"%s %08x\n" % (note, zlib.crc32(note)) for note in notes))
    finally:
        os.close(handle)
    if not segment.exists():  # removed meanwhile
        remove(segment)


class Spool:
    """Spool of one tracking URI, as one process writes it. Safe for threads."""

    def __init__(
        self,
        folder: Path,
        uri: str,
        *,
        is_shared: bool = False,
        tail: SegmentFollower | None = None,
        quota: Quota | None = None,
    ) -> None:
        self.folder = folder
        self.uri = uri
        self.quota = quota  # None for no bound
        self.tail = tail  # segments of others whose records we bring to the store
        self._suffix = SHARED if is_shared else ".seg"
        self._append = threading.Lock()
        self._syncs = GroupSync()
        self._segment: Path | None = None
        self._handle = -1
        self._written = self._synced = 0
        self._is_name_safe = False  # whether a power cut would leave the current segment its name
        self._unsynced: set[Path] = set()  # segments that could not be synced when they were closed
        self._live: dict[Path, set[int]] = {}  # our segments, and where those of their records lie that are needed
        self._full: dict[Path, int] = {}  # handles of those that take no more; open, since that is what locks them

    def put(self, payload: bytes, *, key: str, counted: int, durable: bool = False, is_vital: bool = True) -> Reference:
        """Append a record.

        Args:
            payload: The record, encoded.
            key: What it belongs to; kept with the reference.
            counted: How many traces it carries; kept with the reference.
            durable: Return only when it would survive a power cut, as after ``sync``.
            is_vital: Whether the reserve of the quota is for it, too.

        Raises:
            OSError: If the disk or the quota is full, or the folder cannot be written.
        """
        line = frame(payload)
        if self.quota is not None:
            self.quota.take(len(line), is_vital=is_vital)
        with self._append:
            if self._handle < 0 or self._written >= _SEGMENT_BYTES:
                self._open_segment()
            segment, offset = self._segment, self._written
            assert segment is not None  # noqa: S101 - for the type checker
            self._write(self._handle, line, offset)
            self._written = offset + len(line)
            self._live.setdefault(segment, set()).add(offset)
        reference = Reference(segment, offset, len(line), key, counted)
        if durable:
            self.sync(reference)
        return reference

    def _write(self, handle: int, line: bytes, offset: int) -> None:
        written = 0
        try:
            while written < len(line):
                written += os.write(handle, memoryview(line)[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, offset)  # half a record would be a damaged one
            raise

    def sync(self, reference: Reference) -> None:
        """Return only when a record would survive a power cut. Callers that wait at the same time share one sync.

        Raises:
            OSError: If the disk is broken.
        """
        segment, end = reference.segment, reference.offset + reference.length

        def is_safe() -> bool:
            if segment in self._unsynced:
                raise OSError(errno.EIO, "could not be synced", str(segment))
            return segment != self._segment or self._synced >= end  # or synced when it was closed, in a turn of its own

        def sync() -> None:
            reached = self._written
            self._sync_with_name(self._handle)  # of the record's segment, which is retired in a turn of its own alone
            self._synced = reached

        self._syncs.until(is_safe, sync)

    def _sync_with_name(self, handle: int) -> None:
        """Sync the current segment, and once its name in the folder."""
        sync_file(handle)
        if not self._is_name_safe:
            sync_folder(self.folder)
            self._is_name_safe = True

    def _open_segment(self) -> None:
        self._retire_segment()
        make_folder(self.folder, self.uri)
        # Records are sent in the order of the segments' names, also when the clock goes backwards.
        stamp = max([time.time_ns(), *(begun(path) + 1 for path in segments(self.folder)[-1:])])
        name = f"{stamp:020d}-{os.getpid()}-{secrets.token_hex(3)}{self._suffix}"
        segment = self.folder / name
        nameless = segment.with_suffix(".new")  # nobody looks at it before it is locked
        handle = open_file(nameless, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        fcntl.flock(handle, fcntl.LOCK_EX)  # says that its writer lives
        nameless.rename(segment)
        self._segment, self._handle, self._written, self._synced = segment, handle, 0, 0
        self._is_name_safe = False

    def close(self) -> None:
        """Sync and give up all segments, adopted ones too, so that others may drain them."""
        with self._append:
            self._retire_segment()
            for handle in self._full.values():
                os.close(handle)
            self._full.clear()
        if self.tail is not None:
            self.tail.close()

    def _retire_segment(self) -> None:
        """Close the current segment to writes. It stays locked, and so ours, while its records are not done with."""
        with self._syncs.turn():  # nobody syncs a handle that is closed, or is another file's by then
            segment, handle = self._segment, self._handle
            if segment is None:
                return
            is_needed = bool(self._live.get(segment))
            try:
                if is_needed:
                    self._sync_with_name(handle)
            except OSError:
                self._unsynced.add(segment)  # whoever waits for the sync of a record in it is told
            self._handle, self._segment = -1, None  # to those who wait, all of it is synced now
            if is_needed:
                self._full[segment] = handle
                return
            os.close(handle)
        remove(segment)
        self._live.pop(segment, None)

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
        for segment, offsets in by_segment.items():
            if self.tail is not None and segment in self.tail:
                self.tail.done(segment, offsets, stored=stored)
                continue
            with self._append:
                is_gone = self.is_mine(segment) and self._is_gone_without(segment, offsets)
            if not (is_gone or noted):
                with contextlib.suppress(OSError):  # then it is sent twice, which the store does not mind
                    mark_done(segment, offsets, stored=stored)

    def _is_gone_without(self, segment: Path, offsets: list[int]) -> bool:
        """Take records off a segment of ours; where no other is needed, its bytes go. Called with the lock."""
        needed = self._live.get(segment, set())
        needed.difference_update(offsets)
        if needed:
            return False
        if segment == self._segment:
            if self._written < _SEGMENT_BYTES_IF_EMPTY:
                return False
            self._retire_segment()
        self._live.pop(segment, None)
        if segment in self._full:
            os.close(self._full.pop(segment))
        remove(segment)
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
        return [] if self.tail is None else self.tail.poll(self.is_mine)

    def written(self) -> list[Path]:
        """Return the segments of this object in which something is still needed."""
        with self._append:
            return list(self._live)

    def is_mine(self, segment: Path) -> bool:
        """Return whether this object has written the segment, and it is still needed."""
        return segment == self._segment or segment in self._live

    def after_fork(self) -> None:
        """Leave the parent's segment to the parent, in a forked child."""
        self._append, self._syncs = threading.Lock(), GroupSync()
        if self.quota is not None:
            self.quota.after_fork()
        for handle in (*self._full.values(), self._handle):
            if handle >= 0:
                os.close(handle)  # flock belongs to the open file, which the parent still has
        self._segment, self._handle, self._written, self._live, self._full = None, -1, 0, {}, {}


def remove(segment: Path) -> None:
    """Delete a segment whose records are all done with."""
    for path in (segment, segment.with_suffix(".done")):
        with contextlib.suppress(OSError):
            path.unlink()


def begun(segment: Path) -> int:
    """Return when a segment was begun, nanoseconds since the epoch."""
    stamp = segment.name.partition("-")[0]
    return int(stamp) if stamp.isdecimal() else 0


def segments(folder: Path) -> list[Path]:
    """Return the segments of a spool, oldest first; none of a folder that is not this user's alone."""
    if why_refused(folder) is not None:
        return []
    try:
        return sorted(path for path in folder.glob("*.seg") if not path.is_symlink())
    except OSError:
        return []
