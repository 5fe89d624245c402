"""The folder of a spool: where it is, which store it is for, and that a power cut leaves it its names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path

_URI_FILE = "tracking-uri"


def folder_of(root: Path, uri: str) -> Path:
    """The spool of a tracking URI. The name is a hash, since a URI may hold a password."""
    return root / hashlib.sha256(uri.encode()).hexdigest()[:16]


def uri_of(folder: Path) -> str | None:
    """The tracking URI that a spool belongs to."""
    try:
        return (folder / _URI_FILE).read_text()
    except OSError:
        return None


def make_folder(folder: Path, uri: str) -> None:
    """Make a spool's folder, readable by its owner alone, and note which store it is for; all safe from a power cut."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in new:
        sync_folder(path.parent)
    note = folder / _URI_FILE
    if not note.exists():
        folder.chmod(0o700)
        temporary = folder / f".{_URI_FILE}-{os.getpid()}-{secrets.token_hex(3)}"
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(uri)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(note)
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder survive a power cut, as far as its file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
