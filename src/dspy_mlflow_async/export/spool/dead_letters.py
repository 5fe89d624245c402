"""Dead letters: records that the store has refused for good, with its reasons; and their way back into the spool."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from dspy_mlflow_async.export.spool import codec
from dspy_mlflow_async.export.spool.format import frame, scan
from dspy_mlflow_async.export.spool.paths import make_folder, open_file, read_file, sync_folder, why_refused
from dspy_mlflow_async.export.spool.segments import Spool

_NAME = "dead.letters"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Record that was refused.

    Attributes:
        reason: Why, in the store's words.
        time: When, seconds since the epoch.
        record: The record, as it was in the spool.
    """

    reason: str
    time: float
    record: bytes


def append(folder: Path, uri: str, record: bytes, reason: str) -> None:
    """Write a record to the dead letters of a spool.

    Raises:
        OSError: If the disk is full, or the folder cannot be written.
    """
    make_folder(folder, uri)
    letter = codec.dumps({"reason": reason, "time": time.time(), "record": record.decode()})
    with _locked(folder) as handle:
        os.write(handle, frame(letter))


def read(folder: Path) -> list[DeadLetter]:
    """Return the dead letters of a spool, oldest first; what cannot be read is left out."""
    if why_refused(folder) is not None:
        return []
    try:
        data = read_file(folder / _NAME)
    except OSError:
        return []
    return [letter for _, letter in _letters(data) if letter is not None]


def revive(folder: Path, uri: str, is_wanted: Callable[[DeadLetter], bool]) -> int:
    """Bring dead letters back into the spool, to be sent like everything in it.

    Stopped in the middle, it may leave a record in both places; to send one twice does no harm.

    Args:
        folder: The spool.
        uri: The store that it is for.
        is_wanted: Chooses.

    Returns:
        How many were brought back.

    Raises:
        OSError: If the disk is full, or the folder cannot be written.
    """
    with _locked(folder) as handle:
        data = read_file(folder / _NAME)
        wanted, kept = [], []
        for line, letter in _letters(data):
            if letter is not None and is_wanted(letter):
                wanted.append(letter.record)
            else:
                kept.append(line)
        if wanted:
            spool = Spool(folder, uri)
            for record in wanted:
                spool.put(record, key="", counted=0, sync=record is wanted[-1])
            spool.close()
            _replace(folder / _NAME, b"".join(kept), handle)
        return len(wanted)


def _letters(data: bytes) -> Iterator[tuple[bytes, DeadLetter | None]]:
    """Yield the lines of the file, each with what it says; None for one that is damaged."""
    for (offset, payload), (end, _) in pairwise([*scan(data), (len(data), None)]):
        letter = None
        if payload is not None:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                said = codec.loads(payload)
                letter = DeadLetter(str(said["reason"]), float(said["time"]), said["record"].encode())
        yield data[offset:end], letter


def _replace(path: Path, data: bytes, locked: int) -> None:
    """Put other content in place of a file that is locked, whole or not at all."""
    if not data:
        os.ftruncate(locked, 0)  # nothing can be lost of nothing
        return
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(3)}")
    with os.fdopen(open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Open the file for appending, and lock it: nobody writes to one that is just being replaced."""
    while True:
        handle = open_file(folder / _NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), (folder / _NAME).stat()):
                    yield handle
                    return
        finally:
            os.close(handle)
