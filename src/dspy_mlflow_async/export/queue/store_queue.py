"""Queue of one store: bounded in memory, emptied by one thread, overflowing to the spool."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from dspy_mlflow_async.export import worker_processes
from dspy_mlflow_async.export.operations import Operation, RunOperation
from dspy_mlflow_async.export.queue.availability import ATTEMPTS, Availability
from dspy_mlflow_async.export.queue.overflow import Overflow, not_shown
from dspy_mlflow_async.export.queue.pending import Pending, PendingOperations
from dspy_mlflow_async.export.queue.synchronous import SynchronousWriter
from dspy_mlflow_async.export.queue.worker import Worker
from dspy_mlflow_async.export.spool import codec
from dspy_mlflow_async.export.write.errors import Outcome, Verdict
from dspy_mlflow_async.export.write.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dspy_mlflow_async.export.counters import TraceCounters
    from dspy_mlflow_async.export.operations import Reference
    from dspy_mlflow_async.export.options import ExportOptions
    from dspy_mlflow_async.export.spool.segments import Spool

logger = logging.getLogger("dspy_mlflow_async")

# A batch is one SQL transaction: others who write to the same database wait for as long as it takes.
_BATCH_ITEMS = 32
_BATCH_BYTES = 8 * 2**20
# How long the writer rests after a batch at the most, in seconds: it rests as long as the batch took, so that the
# program that is being watched gets the interpreter at least half of the time. It does not once somebody flushes, or
# half of the memory is full.
_LONGEST_REST = 0.5
_ADOPT_EVERY = 60.0


class StoreQueue:
    """Takes operations from any thread and brings them to the store, or to the disk, in the order of their keys.

    Attributes:
        options: How it works.
        uri: The store.
        pending: What waits.
        overflow: The disk beneath it.
        availability: Whether the store is there.
        synchronous: Writes for callers who wait.
        worker: The thread that empties it.
    """

    def __init__(
        self, options: ExportOptions, counters: TraceCounters, uri: str, spool: Spool, *, copies: Spool | None = None
    ) -> None:
        self.options = options
        self.uri = uri
        self.pending = PendingOperations(counters)
        self.availability = Availability()
        self.synchronous = SynchronousWriter(self)
        self.overflow = Overflow(self.pending, spool, copies)
        self._writer = Writer(uri)
        self.worker = Worker(self.work, self.next_wait)
        self._progress = threading.Condition()
        self._flushing = 0  # how many callers wait
        self._adopt_at = 0.0  # monotonic

    @property
    def spool(self) -> Spool:
        """Spool that it overflows to."""
        return self.overflow.disk.spool

    @property
    def writes_ahead(self) -> bool:
        """Return whether what has ended goes to the disk before anything else."""
        return self.options.durable or worker_processes.may_end_unheard()

    # --- the caller's side ---

    def put(self, operation: Operation) -> None:
        """Take an operation. The caller waits for the disk only when the memory is full, or with ``durable``."""
        self._write_ahead(operation)
        # Operations on runs are few, and somebody will wait for them.
        most = None if isinstance(operation, RunOperation) else self.options.max_waiting_bytes
        # What follows what lies on disk would wait in memory for long.
        if not self.pending.is_spooled(operation.key) and self.pending.add(operation, most_bytes=most):
            if 2 * self.pending.size > self.options.max_waiting_bytes:
                self.worker.hurry()
        else:
            self.overflow.put(operation)
        self.worker.wake()

    def _write_ahead(self, operation: Operation) -> None:
        self.overflow.write_ahead(operation, is_wanted=self.writes_ahead, durable=self.options.durable)

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

    def wait_for_progress(self, seconds: float) -> None:
        """Wait until something was written, at most so long."""
        with self._progress:
            self._progress.wait(seconds)

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
            began = time.monotonic()
            self.availability.begin()
            did_something = self._write_batch()
            self._notify()
            if not did_something:
                break
            self.worker.rest(min(time.monotonic() - began, _LONGEST_REST))
        self._notify()

    def _notify(self) -> None:
        with self._progress:
            if not self._flushing and 2 * self.pending.size <= self.options.max_waiting_bytes:
                self.worker.take_time()
            self._progress.notify_all()

    def _write_batch(self, *, from_disk: bool = True) -> bool:
        batch = self.pending.take(_BATCH_ITEMS, _BATCH_BYTES, from_disk=from_disk)
        if not batch:
            return False
        try:
            held = [(entry, operation) for entry in batch if (operation := self._operation_of(entry)) is not None]
            entries = {id(operation): entry for entry, operation in held}
            outcomes = self._writer.write([operation for _, operation in held]) if held else []
            for outcome in outcomes:
                self.settle(entries[id(outcome.operation)], outcome)
        finally:
            self.pending.release(batch)
        if any(outcome.verdict is Verdict.AWAY for outcome in outcomes):
            self._found_away(next((outcome.error for outcome in outcomes if outcome.error is not None), None))
        elif outcomes:
            self.availability.succeed()
            if any(outcome.verdict is Verdict.STORED for outcome in outcomes):
                self._adopt()
        return True

    def _operation_of(self, entry: Pending) -> Operation | None:
        """Return the operation of an entry, from the disk if need be; None where it cannot be had any more."""
        operation, reference = entry.operation, entry.reference
        if operation is not None or reference is None:
            return operation
        try:
            operation = self.overflow.disk.load(reference)
        except codec.UnreadableError as error:
            self._leave_alone(entry, error)
            return None
        if operation is None:
            self.pending.finish(entry, "dropped")
            self.spool.done([reference], stored=False)
        return operation

    def _leave_alone(self, entry: Pending, error: codec.UnreadableError) -> None:  # noqa: ARG002 - for those who report
        """Keep a record on disk that this version cannot read, and wait for it no longer."""
        self.pending.finish(entry, None)

    def settle(self, entry: Pending, outcome: Outcome) -> None:
        """Note what has become of an operation that was in hand; where the store is away, it goes on waiting."""
        operation = outcome.operation
        if outcome.verdict is Verdict.STORED:
            self.pending.note_success(entry)
            self.pending.finish(entry, "stored")
            self.overflow.disk.forget(operation, stored=True)
        elif outcome.verdict is Verdict.AWAY:
            return
        elif self.overflow.is_partial(operation):
            if outcome.verdict is Verdict.SUSPECT:
                not_shown(operation)
            self.pending.finish(entry, None)
        elif outcome.verdict is Verdict.SUSPECT and not self.pending.suspect(entry):
            for waiting in self.pending.residents_of(operation.key):
                self.overflow.spill(waiting)
        else:
            self._refused(entry, outcome)

    def _refused(self, entry: Pending, outcome: Outcome) -> bool:
        """Give up what the store never takes; where there can be no dead letter, its record stays in the spool.

        Returns:
            Whether it is a dead letter.
        """
        operation = outcome.operation
        if isinstance(operation, RunOperation) and operation.write_status is not None:
            operation.write_status.was_refused = True
        is_kept = self.overflow.disk.dead_letter(operation, f"{type(outcome.error).__name__}: {outcome.error}")
        if not is_kept and self.overflow.spill(entry):
            self.pending.finish(entry, None)
            return False
        self.pending.finish(entry, "dead" if is_kept else "dropped")
        self.overflow.disk.forget(operation, stored=False)
        return is_kept

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
        with self._progress:
            self._progress.notify_all()

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
        with self._progress:
            self._flushing += 1
        attempts, suspected, last = self.availability.attempts, self.pending.times_suspect, self.pending.last
        try:
            self.hurry()
            if not self.is_empty():
                self.worker.start()
            if not self.worker.is_running:  # the interpreter shuts down
                self.work()
            return self._wait_for(
                last,
                deadline,
                is_useless=lambda: (
                    self.availability.away_at > attempts
                    or (self.pending.times_suspect != suspected and self.pending.has_only_suspects(last))
                ),
            )
        finally:
            with self._progress:
                self._flushing -= 1
            self._notify()

    def _wait_for(self, last: int, deadline: float | None, *, is_useless: Callable[[], bool]) -> bool:
        """Wait until nothing is left of what came up to number ``last``, or waiting is of no use."""
        with self._progress:
            while not self.pending.is_done_with(last):
                left = 0.5 if deadline is None else min(0.5, deadline - time.monotonic())
                if left <= 0 or is_useless() or (self.worker.is_stopped and not self.worker.is_running):
                    return False
                self._progress.wait(left)
            return True

    def hurry(self) -> None:
        """Try everything now, whatever pause was meant to be kept."""
        self.availability.hurry()
        self.pending.hurry()
        self.worker.hurry()

    def prepare_for_end(self) -> None:
        """Let no caller wait for the store any more, and keep what is shown of open traces: no more may come."""
        self.availability.lets_wait = False
        self.overflow.keeps_partial = True

    def save_everything(self) -> int:
        """Bring all that waits, in flight or not, to the disk. For the end of the process.

        Returns:
            How many operations lie in the spool.
        """
        self.worker.stop()
        self.overflow.close()
        return self.pending.spooled

    def after_fork(self) -> None:
        """Leave what is on disk and what is locked to the parent, in a forked child."""
        self.overflow.after_fork()
