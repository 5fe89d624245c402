"""Settings of the export pipeline, and the location of its spool."""

from __future__ import annotations

import numbers
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_state_dir

MODES = ("thread", "process")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Settings of how traces travel to the store.

    Attributes:
        durable: Write each finished trace to the spool before anything else, and sync it to the disk.
        mode: "thread" writes to the store from a thread, "process" from a child process.
        visible_after: Seconds after which an open trace is stored with what has ended so far.
        children_timeout: Seconds that a finished root waits for its children, and a held trace for its release.
        max_waiting_bytes: Bytes of waiting traces kept in memory; the rest goes to the spool.
        max_spool_bytes: Bytes of one spool on disk; what exceeds them is dropped, and counted.
        exit_timeout: Seconds that the end of the process waits for the store.
        spool_dir: Folder of the spools; by default ``DSPY_MLFLOW_ASYNC_SPOOL``, else the user's state directory.
    """

    durable: bool = False
    mode: Literal["thread", "process"] = "thread"
    visible_after: float = 10.0
    children_timeout: float = 30.0
    max_waiting_bytes: int = 64 * 2**20
    max_spool_bytes: int = 2**30
    exit_timeout: float = 10.0
    spool_dir: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what could only fail later, in a thread of ours."""
        if self.mode not in MODES:
            raise ValueError(f"export must be {' or '.join(map(repr, MODES))}, not {self.mode!r}")
        for name in ("visible_after", "children_timeout", "exit_timeout"):
            _require(getattr(self, name), name, numbers.Real, "a number of seconds")
        for name in ("max_waiting_bytes", "max_spool_bytes"):
            _require(getattr(self, name), name, numbers.Integral, "a whole number of bytes")


def _require(value: Any, name: str, kind: type, words: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {words}, not {value!r}")
    if not value >= 0:  # type: ignore[operator]
        raise ValueError(f"{name} must be 0 or more, not {value!r}")


def spool_root(folder: Path | None = None) -> Path:
    """Return the folder that holds one spool per tracking URI; the environment variable wins over ``folder``."""
    if named := os.environ.get("DSPY_MLFLOW_ASYNC_SPOOL"):
        return Path(named)
    return folder or Path(user_state_dir("dspy-mlflow-async")) / "spool"
