"""Writing from a child process: the program only appends to the spool, the child brings it to the store."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dspy_mlflow_async.export import spool as spools
from dspy_mlflow_async.export.items import Item
from dspy_mlflow_async.export.queue import StoreQueue
from dspy_mlflow_async.export.retry import Backoff
from dspy_mlflow_async.export.spool import Reference, Spool

if TYPE_CHECKING:
    from dspy_mlflow_async.export.books import Books
    from dspy_mlflow_async.export.options import ExportOptions

logger = logging.getLogger("dspy_mlflow_async")

# How often the program looks what its child has done.
_LOOK = 0.25
# The child needs this room and MLflow: it goes round the package's own `__init__`, which would import DSPy.
_BOOT = """
import sys, types
package = types.ModuleType("dspy_mlflow_async")
package.__path__ = [sys.argv[1]]
sys.modules["dspy_mlflow_async"] = package
from dspy_mlflow_async.export.drain import main
main(sys.argv[2], sys.argv[3])
"""


# Children that still had something to do when we stopped caring; kept so that they are no zombies for ever.
_left_alone: list[subprocess.Popen[bytes]] = []


class Child:
    """The draining process of one spool, started when there is something to drain and again when it dies."""

    def __init__(self, folder: Path, uri: str) -> None:
        self._command = [sys.executable, "-c", _BOOT, str(Path(__file__).parents[1]), str(folder), uri]
        self._process: subprocess.Popen[bytes] | None = None
        self._backoff = Backoff(0.5, 30.0)
        self._not_before = 0.0  # monotonic

    def nudge(self) -> None:
        """Tell the child that there is something new, after starting it if need be."""
        _left_alone[:] = [process for process in _left_alone if process.poll() is None]
        process = self._process
        if process is None or process.poll() is not None:
            if time.monotonic() < self._not_before:
                return
            if process is not None:
                logger.warning("dspy-mlflow-async: the export process ended (%s); starting another", process.poll())
                self._close_input(process)
            self._not_before = time.monotonic() + self._backoff.pause()
            process = self._start()
        with contextlib.suppress(OSError, ValueError):  # it is just ending
            assert process.stdin is not None  # noqa: S101 - for the type checker
            os.write(process.stdin.fileno(), b".")

    def _start(self) -> subprocess.Popen[bytes]:
        # A new interpreter, not a fork: this process has threads. It lives until its standard input ends.
        environment = os.environ | {"DSPY_MLFLOW_ASYNC_PARENT": str(os.getpid())}
        process = subprocess.Popen(  # noqa: S603 - our own module
            self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        assert process.stdin is not None  # noqa: S101 - for the type checker
        os.set_blocking(process.stdin.fileno(), False)
        self._process = process
        return process

    @staticmethod
    def _close_input(process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()

    def worked(self) -> None:
        """It brought something to the store: the next one may be started at once."""
        self._backoff.reset()
        self._not_before = 0.0

    def leave(self) -> None:
        """Let the child finish on its own, and wait a moment for it."""
        process = self._process
        if process is not None:
            self._close_input(process)
            try:
                process.wait(2.0)
            except subprocess.TimeoutExpired:
                _left_alone.append(process)

    @property
    def pid(self) -> int | None:
        """The process id, once started."""
        return self._process.pid if self._process is not None else None


class ProcessQueue(StoreQueue):
    """A queue whose store is the spool; the child's notes say what has arrived."""

    keeps_partial = True

    def __init__(self, options: ExportOptions, books: Books, uri: str, spool: Spool) -> None:
        super().__init__(options, books, uri, spool)
        self.child = Child(spool.folder, uri)

    def work(self) -> None:
        """Append what waits to the spool, and note what the child has done."""
        had_something = bool(self._waiting)
        self._spool_waiting()
        self._collect()
        if had_something or len(self.backlog):
            self.child.nudge()
        self._tell()

    def _rest(self) -> float | None:
        return _LOOK if len(self.backlog) else None

    def _collect(self) -> None:
        by_segment: dict[Path, list[Reference]] = {}
        for reference in self.backlog.waiting():
            by_segment.setdefault(reference.segment, []).append(reference)
        for segment, references in by_segment.items():
            notes = spools.done_offsets(segment)
            done = [reference for reference in references if reference.offset in notes]
            if not done:
                continue
            self.child.worked()
            self.backlog.finish(done)
            for reference in done:
                self._books.move("spooled", "stored" if notes[reference.offset] else "dead", reference.counted)
            self.spool.done(done, noted=True)

    def put(self, item: Item) -> None:
        """Take an item. What follows a spooled record goes to the spool by the same way, so nothing need be asked."""
        self._secure(item)
        with self._lock:
            has_room = self._waiting_bytes + item.size <= self.options.max_waiting_bytes
            if has_room:
                self._waiting.append(item)
                self._waiting_bytes += item.size
        if not has_room and not self._to_spool(item):
            self._drop(item)
        if not self._wake.is_set():
            self._wake.set()
            self._start()

    def flush(self, deadline: float | None) -> bool:
        """Wait for the child, at most a minute where no deadline is given."""
        return super().flush(deadline if deadline is not None else time.monotonic() + 60.0)

    def save_everything(self) -> int:
        """Append the rest to the spool, and let the child finish on its own."""
        self._collect()
        left = super().save_everything()
        self.child.leave()
        return left
