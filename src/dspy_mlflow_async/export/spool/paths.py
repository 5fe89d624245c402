"""Paths of a spool: its folder and whose it is, its segments in order, and locks that end with their process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import IO, Any

_URI_FILE = "tracking-uri"
# The name of a segment that a draining child may read while its process still writes it.
SHARED = "-shared.seg"


def folder_of(root: Path, uri: str) -> Path:
    """Return the spool of a tracking URI. The name is a hash, since a URI may hold a password.

    Where another user has a folder of that name, it is one of this user's.
    """
    folder = root / _name_of(uri)
    return folder if why_refused(folder) is None else folder.with_name(f"{folder.name}-{os.geteuid()}")


def _name_of(uri: str) -> str:
    return hashlib.sha256(uri.encode()).hexdigest()[:16]


def why_refused(folder: Path) -> str | None:
    """Tell why a folder is not used as a spool; None for one that is this user's, or not there.

    Whoever can write into a spool decides what is sent to the store, and to which store.
    """
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return str(error.strerror)
    if not stat.S_ISDIR(found.st_mode):
        return "it is a link" if stat.S_ISLNK(found.st_mode) else "it is no folder"
    if found.st_uid != os.geteuid():
        return "it belongs to another user"
    return "others may write to it" if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def uri_of(folder: Path) -> str | None:
    """Return the tracking URI that a spool belongs to; None where its note is lost, or fits another folder's name."""
    try:
        with os.fdopen(open_file(folder / _URI_FILE, os.O_RDONLY), encoding="utf-8") as file:
            uri = file.read()
    except (OSError, UnicodeDecodeError):
        return None
    return uri if folder.name.partition("-")[0] == _name_of(uri) else None


def open_file(path: Path, flags: int) -> int:
    """Open a file of a spool, made readable by its owner alone if it is new; links are not followed.

    Returns:
        The file's descriptor.

    Raises:
        OSError: If it cannot be opened, or is a link, or no regular file of this user's.
    """
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(handle)
        raise PermissionError(errno.EPERM, "not a file of this user's", str(path))
    return handle


def read_file(path: Path, start: int = 0, length: int = -1) -> bytes:
    """Read a file of a spool, or a part of it.

    Args:
        path: The file.
        start: Where to begin, in bytes.
        length: How many bytes; all by default.

    Raises:
        OSError: As for ``open_file``.
    """
    with os.fdopen(open_file(path, os.O_RDONLY), "rb") as file:
        file.seek(start)
        return file.read(length)


def make_folder(folder: Path, uri: str) -> None:
    """Make a spool's folder, readable by its owner alone, and note which store it is for; all safe from a power cut.

    Raises:
        OSError: If it cannot be made, or is not this user's alone.
    """
    if (reason := why_refused(folder)) is not None:
        raise PermissionError(errno.EPERM, reason, str(folder))
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in new:
        sync_folder(path.parent)
    note = folder / _URI_FILE
    if not note.exists():
        folder.chmod(0o700)
        temporary = folder / f".{_URI_FILE}-{os.getpid()}-{secrets.token_hex(3)}"
        with os.fdopen(open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w", encoding="utf-8") as file:
            file.write(uri)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(note)
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder so that they survive a power cut, as far as its file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(segment: Path) -> None:
    """Delete a segment whose records are all done with."""
    for path in (segment, segment.with_suffix(".done")):
        with contextlib.suppress(OSError):
            path.unlink()


def begun(segment: Path) -> int:
    """Return when a segment was begun, nanoseconds since the epoch."""
    stamp = segment.name.partition("-")[0]
    return int(stamp) if stamp.isdecimal() else 0


def segments_of(folder: Path) -> list[Path]:
    """Return the segments of a spool, oldest first; none of a folder that is not this user's alone."""
    if why_refused(folder) is not None:
        return []
    try:
        return sorted(path for path in folder.glob("*.seg") if not path.is_symlink())
    except OSError:
        return []


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
