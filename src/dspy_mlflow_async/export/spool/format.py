"""Format of a spool on disk: records as checksummed lines, and notes of which of them are done with.

The format is described in ``docs/export.md``.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from dspy_mlflow_async.export.spool.paths import open_file, read_file, remove

_LINE = re.compile(rb"([0-9a-f]{8}) (\d{1,15}) ")
_TEXT = re.compile(rb"[^\n]")  # newlines alone are what has been erased
_DONE = re.compile(rb"(\d{1,15} [sd]) ([0-9a-f]{8})\n")


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
