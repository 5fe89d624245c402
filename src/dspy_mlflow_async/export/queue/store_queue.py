"""Queue of one store: bounded in memory, emptied by one thread, overflowing to the spool."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, ClassVar

from dspy_mlflow_async.export.operations import Operation, RunOperation, TraceOperation
from dspy_mlflow_async.export.queue.availability import ATTEMPTS, Availability
from dspy_mlflow_async.export.queue.overflow import Overflow
from dspy_mlflow_async.export.queue.pending import Pending, PendingOperations
from dspy_mlflow_async.export.queue.settlement import Settlement
from dspy_mlflow_async.export.queue.synchronous import SECONDS, SynchronousWriter
from dspy_mlflow_async.export.queue.worker import Progress, Worker
from dspy_mlflow_async.export.queue.write_ahead import WriteAhead
from dspy_mlflow_async.export.spool.disk import Disk
from dspy_mlflow_async.export.write.errors import Verdict
from dspy_mlflow_async.export.write.writer import Writer
from dspy_mlflow_async.seams.mlflow_packed_spans import packed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dspy_mlflow_async.export.counters import TraceCounters
    from dspy_mlflow_async.export.operations import Reference
    from dspy_mlflow_async.export.options import ExportOptions
    from dspy_mlflow_async.export.spool.segments import Spool

logger = logging.getLogger("dspy_mlflow_async")

# A batch is one SQL transaction: others who write to the same database wait for as long as it takes; with rows some
# 20 ms.
BATCH_OPERATIONS = 64
_BATCH_BYTES = 8 * 2**20
# How long the writer rests after a batch at the most, in seconds: it rests as long as the batch took, so that the
# program that is being watched gets the interpreter at least half of the time. It does not once somebody flushes, half
# of the memory is full, or more waits than a burst leaves: what a program that never pauses puts off, it pays later.
# Less than a batch of traces waits for more of them, since a transaction costs as much as ten traces in it.
_LONGEST_REST = 0.5
_BURST = 4 * BATCH_OPERATIONS
# How long a caller leaves the interpreter to a writer that is behind, in seconds: twice as long for each burst. A
# thread may keep it for 5 ms, and among many the writer has it so seldom that it falls further behind.
_TURN = 0.0025
_MOST_BURSTS = 8
_ADOPT_EVERY = 60.0


class StoreQueue:
    """Takes operations from any thread and brings them to the store, or to the disk, in the order of their keys.

    Attributes:
        options: How it works.
        spool: The spool that it overflows to.
        pending: What waits.
        availability: Whether the store is there.
        progress: What has been written, for those who wait for it.
        ahead: Copies on disk of what waits elsewhere.
        overflow: The disk beneath what waits.
        settlement: What becomes of what was in hand.
        writer: Writes for the worker.
        synchronous: Writes for callers who wait.
        worker: The thread that empties it.
    """

    settles: ClassVar[type[Settlement]] = Settlement

    def __init__(
        self, options: ExportOptions, counters: TraceCounters, uri: str, spool: Spool, *, copies: Spool | None = None
    ) -> None:
        self.options = options
        self.spool = spool
        self.pending = PendingOperations(counters)
        self.availability = Availability()
        self.progress = Progress()
        disk = Disk(spool)
        self.ahead = WriteAhead(options, disk, disk if copies is None else Disk(copies))
        self.overflow = Overflow(self.pending, disk, self.ahead, keeps_partial=copies is not None)
        self.settlement = self.settles(self.pending, self.overflow, disk)
        self.writer = Writer(uri, between_traces=self._let_callers_on)
        self.synchronous = SynchronousWriter(
            Writer(uri, request_seconds=SECONDS, may_try_rows=False),
            self.pending,
            self.settlement,
            self.availability,
            self.progress,
            self,
        )
        self.worker = Worker(self.work, self.next_wait)
        self._adopt_at = 0.0  # monotonic

    def renew(self, options: ExportOptions) -> None:
        """Work by other options from now on."""
        self.options = self.ahead.options = options

    # --- the caller's side ---

    def put(self, operation: Operation) -> None:
        """Take an operation. The caller waits for the disk only when the memory is full, or with ``durable``."""
        self._write_ahead(operation)
        if isinstance(operation, TraceOperation):
            operation.spans = packed(operation.spans)
        # Operations on runs are few, and somebody will wait for them.
        most = None if isinstance(operation, RunOperation) else self.options.max_waiting_bytes
        # What follows what lies on disk would wait in memory for long.
        if not self.pending.is_spooled(operation.key) and self.pending.add(operation, most_bytes=most):
            if 2 * self.pending.size > self.options.max_waiting_bytes:
                self.worker.hurry()
        else:
            self.overflow.put(operation)
        self.worker.wake()
        if bursts := len(self.pending) // _BURST:
            self.worker.turns.give(_TURN * 2 ** min(bursts, _MOST_BURSTS) if self._writes_here else 0.0)

    @property
    def _writes_here(self) -> bool:
        """Return whether the store is written in this process; any other takes its time elsewhere."""
        return self.writer.uri.startswith("sqlite:")

    def _write_ahead(self, operation: Operation) -> None:
        if not self.overflow.is_partial(operation):
            self.ahead.write(operation)

    def take_back(self, entries: list[Pending]) -> None:
        """Queue what a caller has had in hand and could not bring to the store."""
        for entry in entries:
            if entry.operation is not None:
                self._write_ahead(entry.operation)
        self.pending.release(entries)
        if len(self.pending):
            self.worker.wake()
        self._notify()

    def hasten(self) -> None:
        """Write what waits without lingering, for a caller who waits for some of it."""
        self.worker.hurry()
        self.worker.wake()

    # --- the writer's thread ---

    def next_wait(self) -> float | None:
        """Return the seconds until something is due that nobody will wake us for."""
        due = self.pending.due(self.availability.away_until)
        return None if due is None else max(0.0, due - time.monotonic())

    def work(self) -> None:
        """Bring to the store what can be brought there now."""
        while not self.worker.is_stopped:
            if self.availability.is_away:
                self.overflow.spill_all()
                break
            began, taken = time.monotonic(), time.thread_time()
            self.availability.begin()
            did_something = self._write_batch()
            self.worker.turns.note_progress(time.thread_time() - taken)
            self._notify()
            if not (did_something and len(self.pending)):
                break
            if self.pending.is_part_of_batch(BATCH_OPERATIONS):
                self.worker.linger()
            elif len(self.pending) < _BURST:
                self.worker.rest(min(time.monotonic() - began, _LONGEST_REST))
        self._notify()

    def _let_callers_on(self) -> None:
        """Let go of the interpreter between two traces, unless the writer is behind or somebody waits for it.

        A caller would else wait for 5 ms, and for each time that it lets go of it itself, for as long as a batch takes.
        """
        if len(self.pending) < _BURST and not self.worker.is_hurried:
            self.worker.turns.let_go()

    def _notify(self) -> None:
        is_light = 2 * self.pending.size <= self.options.max_waiting_bytes
        self.progress.note(otherwise=self.worker.take_time if is_light else None)

    def _write_batch(self, *, from_disk: bool = True) -> bool:
        batch = self.pending.take(BATCH_OPERATIONS, _BATCH_BYTES, from_disk=from_disk)
        if not batch:
            return False
        try:
            held = self.settlement.held(batch)
            entries = {id(operation): entry for entry, operation in held}
            outcomes = self.writer.write([operation for _, operation in held]) if held else []
            for outcome in outcomes:
                self.settlement.settle(entries[id(outcome.operation)], outcome)
        finally:
            self.pending.release(batch)
        if any(outcome.verdict is Verdict.AWAY for outcome in outcomes):
            self._found_away(next((outcome.error for outcome in outcomes if outcome.error is not None), None))
        elif outcomes:
            self.availability.succeed()
            if any(outcome.verdict is Verdict.STORED for outcome in outcomes):
                self._adopt()
        return True

    def _found_away(self, error: Exception | None) -> None:
        """Try again soon, and after some attempts bring what waits to safety."""
        pause = self.availability.fail()
        failures = self.availability.failures
        if failures < ATTEMPTS and not self.pending.spooled:
            self.worker.pause(pause)
            return
        if failures == ATTEMPTS:
            logger.warning(
                "dspy-mlflow-async: the MLflow store cannot be reached (%s: %s); traces are kept in %s and sent "
                "when it is back.",
                type(error).__name__,
                error,
                self.spool.folder,
            )
        self.availability.pause(pause)
        self.overflow.spill_all()
        self._give_up()

    def _give_up(self) -> None:
        """Let those who flush know that trying does not help now."""
        self.availability.give_up()
        self.progress.note()

    # --- the spool ---

    def enqueue_spooled(self, references: Iterable[Reference]) -> None:
        """Send records that somebody else has spooled."""
        self.pending.add_spooled(references)

    def _adopt(self) -> None:
        """Adopt now and then, while the store takes what it is given, what ended processes have left behind."""
        if time.monotonic() >= self._adopt_at and not self.worker.is_stopped:
            self._adopt_at = time.monotonic() + _ADOPT_EVERY
            self.enqueue_spooled(self.spool.adopt())

    def take_over(self) -> None:
        """Send what ended processes have left behind, now."""
        self._adopt_at = 0.0
        before = self.pending.last
        self._adopt()
        if self.pending.last != before:
            self.worker.wake()

    # --- the end ---

    def is_empty(self) -> bool:
        """Return whether nothing of this process waits, in memory or on disk."""
        return not len(self.pending)

    def flush(self, deadline: float | None) -> bool:
        """Wait until what has come so far is stored, or the store proves to be away, or the deadline is over.

        Args:
            deadline: By the monotonic clock; None for no bound.

        Returns:
            Whether all of it is stored.
        """
        attempts, suspected, last = self.availability.attempts, self.pending.times_suspect, self.pending.last

        def is_useless() -> bool:
            return (
                self.availability.away_at > attempts
                or (self.pending.times_suspect != suspected and self.pending.has_only_suspects(last))
                or (self.worker.is_stopped and not self.worker.is_running)
            )

        try:
            with self.progress.awaited():
                self.hurry()
                if not self.is_empty():
                    self.worker.start()
                if not self.worker.is_running:  # the interpreter shuts down
                    self.work()
                return self.progress.wait_for(lambda: self.pending.is_done_with(last), deadline, is_useless)
        finally:
            self._notify()

    def hurry(self) -> None:
        """Try everything now, whatever pause was meant to be kept."""
        self.availability.hurry()
        self.pending.hurry()
        self.worker.hurry()

    def prepare_for_end(self) -> None:
        """Let no caller wait for the store any more, and keep what is shown of open traces: no more may come."""
        self.availability.lets_wait = False
        self.overflow.keep_partial()

    def save_everything(self) -> int:
        """Bring all that waits, in flight or not, to the disk. For the end of the process.

        Returns:
            How many operations lie in the spool.
        """
        self.worker.stop()
        self.overflow.close()
        self.ahead.close()
        return self.pending.spooled

    def after_fork(self) -> None:
        """Leave what is on disk and what is locked to the parent, in a forked child."""
        self.ahead.after_fork()
