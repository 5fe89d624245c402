"""Export from a child process, both halves: the program only appends to the spool, the child sends it to the store."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from dspy_mlflow_async.export.counters import TraceCounters
from dspy_mlflow_async.export.operations import Operation
from dspy_mlflow_async.export.options import ExportOptions
from dspy_mlflow_async.export.queue.store_queue import StoreQueue
from dspy_mlflow_async.export.spool.follower import SegmentFollower
from dspy_mlflow_async.export.spool.format import read_notes
from dspy_mlflow_async.export.spool.paths import Lock, read_file, segments_of, uri_of
from dspy_mlflow_async.export.spool.segments import Spool
from dspy_mlflow_async.export.write.errors import Backoff
from dspy_mlflow_async.seams import mlflow_http

logger = logging.getLogger("dspy_mlflow_async")

# How often the program looks what its child has done, and how long it waits while nothing arrives, in seconds.
_LOOK = 0.25
_PATIENCE = 60.0
_FAILURES = 2
_LOCK = "drain.lock"
# What the parent writes: something is new, or somebody waits for it.
_NEWS, _HURRY = b".", b"!"
# How often it looks for what is new when nobody tells it.
_CHILD_LOOKS = 0.25
# How long it goes on after its parent, if the store does not take what is left.
_OUTLIVE = 60.0
# The child needs this room and MLflow: it goes round the package's own `__init__`, which would import DSPy.
_BOOT = """
import sys, types
package = types.ModuleType("dspy_mlflow_async")
package.__path__ = [sys.argv[1]]
sys.modules["dspy_mlflow_async"] = package
from dspy_mlflow_async.export.queue.export_process import main
main(sys.argv[2])
"""


# Children that still had something to do when we stopped caring; kept so that they are no zombies for ever.
_left_alone: list[subprocess.Popen[bytes]] = []


class Child:
    """The draining process of one spool, started when there is something to drain and again when it dies."""

    def __init__(self, folder: Path) -> None:
        self._lock_file = folder / _LOCK
        self._command = [sys.executable, "-c", _BOOT, str(Path(__file__).parents[2]), str(folder)]
        self._process: subprocess.Popen[bytes] | None = None
        self._backoff = Backoff(0.5, 30.0)
        self._not_before = 0.0  # monotonic

    def nudge(self, *, hurry: bool) -> None:
        """Tell the child that there is something new, or that somebody waits, after starting it if need be.

        The child of another process that drains this spool does that for us, too.
        """
        _left_alone[:] = [process for process in _left_alone if process.poll() is None]
        process = self._process
        if process is None or process.poll() is not None:
            if time.monotonic() < self._not_before or self._is_drained_by_another():
                return
            if process is not None:
                if process.poll() != 0:
                    logger.warning("dspy-mlflow-async: the export process ended (%s); starting another", process.poll())
                self._close_input(process)
            self._not_before = time.monotonic() + self._backoff.pause()
            process = self._start()
        with contextlib.suppress(OSError, ValueError):  # it is just ending
            assert process.stdin is not None  # noqa: S101 - for the type checker
            os.write(process.stdin.fileno(), _HURRY if hurry else _NEWS)

    def _is_drained_by_another(self) -> bool:
        lock = Lock(self._lock_file)
        try:
            is_free = lock.acquire()
        except OSError:  # no folder yet
            return False
        lock.release()
        return not is_free

    def failure(self) -> str:
        """Return the failure to reach the store that the draining process has noted last; empty if there was none."""
        try:
            return read_file(self._lock_file).decode("utf-8", "replace")
        except OSError:
            return ""

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
        """Note that it brought something to the store: the next one may be started at once."""
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
        """Process id, once started."""
        return self._process.pid if self._process is not None else None


class ProcessQueue(StoreQueue):
    """Queue whose store is the spool; the child's notes say what has arrived."""

    def __init__(self, options: ExportOptions, counters: TraceCounters, uri: str, spool: Spool) -> None:
        # Copies are not shared: the child would send them.
        super().__init__(options, counters, uri, spool, copies=Spool(spool.folder, uri, quota=spool.quota))
        self.child = Child(spool.folder)
        self._read_until: dict[Path, int] = {}  # where the notes on a segment go on
        self._unmatched: dict[Path, dict[int, bool]] = {}  # notes that came before we knew of the record
        self._last_failure = self.child.failure()
        self._collecting = threading.Lock()
        self._is_writing_around = False  # said once
        self._somebody_waits = threading.Event()

    def put(self, operation: Operation) -> None:
        """Append an operation to the spool: when this returns, the end of the process cannot lose it."""
        self._write_ahead(operation)
        # A disk that was full may have room again, but what came first goes first.
        is_spooled = not self.pending.resident and self.overflow.try_put(operation)
        if not is_spooled and not self.pending.add(operation, most_bytes=self.options.max_waiting_bytes):
            self.pending.drop(operation)
        self.worker.wake()

    def work(self) -> None:
        """Tell the child what is new, and note what it has done."""
        self.overflow.spill_all()
        if self.overflow.is_full:
            self._write_around()
        self._collect()
        if self.pending.spooled:
            somebody_waits = self._somebody_waits.is_set()
            if somebody_waits:
                self._somebody_waits.clear()
            self.child.nudge(hurry=somebody_waits)
        failure = self.child.failure()
        if failure != self._last_failure:
            self._last_failure = failure
            if failure:
                self.availability.begin()  # the child's attempt
                self._give_up()
        self._notify()

    def _write_around(self) -> None:
        """Write from this thread, as ``export="thread"`` does: the spool takes nothing, and the store may be well."""
        if not self._is_writing_around:
            self._is_writing_around = True
            logger.warning(
                "dspy-mlflow-async: export='process' needs the spool %s, which takes nothing; the traces are written "
                "to the store from a thread of this process.",
                self.spool.folder,
            )
        while not (self.availability.is_away or self.worker.is_stopped):
            if not self._write_batch(from_disk=False):
                break

    def take_over(self) -> None:
        """Have the child send what ended processes have left behind."""
        if segments_of(self.spool.folder):
            self.child.nudge(hurry=False)

    def next_wait(self) -> float | None:
        """Return the seconds until there may be something to do; None to wait until woken."""
        return _LOOK if len(self.pending) else None

    def hurry(self) -> None:
        """Let the child try everything now, whatever pause it meant to keep."""
        self._somebody_waits.set()
        super().hurry()

    def hasten(self) -> None:
        """Let the child write without lingering, too."""
        self._somebody_waits.set()
        super().hasten()

    def _collect(self) -> None:
        with self._collecting:
            self._read_notes()

    def _read_notes(self) -> None:
        for segment in self.spool.written():
            notes, self._read_until[segment] = read_notes(segment, self._read_until.get(segment, 0))
            notes = self._unmatched.pop(segment, {}) | notes
            references = []
            for entry in self.pending.at(segment, list(notes)):
                assert entry.reference is not None  # noqa: S101 - for the type checker
                is_stored = notes.pop(entry.reference.offset)
                self.pending.finish(entry, "stored" if is_stored else "dead")
                references.append(entry.reference)
            if references:
                self.child.worked()
            if notes:
                self._unmatched[segment] = notes
            self.spool.done(references, noted=True)
        for segment in self._read_until.keys() - set(self.spool.written()):
            del self._read_until[segment]
            self._unmatched.pop(segment, None)

    def flush(self, deadline: float | None) -> bool:
        """Wait for the child; without a deadline, as long as something arrives within a minute.

        A failure counts when it comes twice: the first may be of an attempt that the child began before it was told
        to make haste.
        """
        self._last_failure = self.child.failure()
        failures = 0
        while True:
            before = len(self.pending)
            patience = time.monotonic() + _PATIENCE
            if super().flush(patience if deadline is None else min(deadline, patience)):
                return True
            failures = failures + 1 if len(self.pending) >= before else 0
            now = time.monotonic()
            is_over = deadline is not None and now >= deadline
            if is_over or failures == _FAILURES or (failures and now >= patience):
                return False

    def save_everything(self) -> int:
        """Append the rest to the spool, and let the child finish on its own."""
        self._collect()
        left = super().save_everything()
        self.child.leave()
        return left


# --- in the child ---


def main(path: str) -> None:
    """Drain the spool in a folder until the parent is gone and nothing is left, or a bound has passed.

    The store stands in the spool's own note: everybody on the machine can read a command line, and a URI may hold a
    password.
    """
    folder = Path(path)
    uri = uri_of(folder)
    if uri is None:
        return
    parent = int(os.environ.get("DSPY_MLFLOW_ASYNC_PARENT") or os.getppid())
    mlflow_http.bound_http()
    lock = Lock(folder / _LOCK)
    if not lock.acquire():  # another child drains for all
        return
    lock.note("")
    follower = SegmentFollower(folder, counts=True, follows_living=True)
    queue = StoreQueue(ExportOptions(), TraceCounters(), uri, Spool(folder, uri, follower=follower))
    gone_since: float | None = None
    away_at = 0
    while True:
        has_parent = _wait(parent, 0.0, queue)
        queue.enqueue_spooled(queue.spool.adopt())
        queue.work()
        if queue.availability.away_at != away_at:
            away_at = queue.availability.away_at
            lock.note(f"{os.getpid()} {away_at}")
        if not has_parent:
            gone_since = gone_since or time.monotonic()
            if queue.is_empty() or time.monotonic() - gone_since > _OUTLIVE:
                break
        rest = queue.next_wait()
        pause = _CHILD_LOOKS if rest is None else max(0.05, min(rest, 1.0))
        if has_parent:
            _wait(parent, pause, queue)
        else:
            threading.Event().wait(pause)
    queue.spool.close()
    lock.release()


def _wait(parent: int, seconds: float, queue: StoreQueue) -> bool:
    """Wait for news from the parent, at most so long; where somebody there waits for us, make haste.

    Returns:
        Whether the parent lives.
    """
    if os.getppid() != parent:
        return False
    readable, _, _ = select.select([0], [], [], seconds)
    if not readable:
        return True
    news = os.read(0, 65536)
    if _HURRY in news:
        queue.hurry()
    return bool(news)
