"""The queue of one store: bounded in memory, emptied by one thread, overflowing to the spool."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING

from dspy_mlflow_async.export import codec, workers
from dspy_mlflow_async.export.backlog import Backlog
from dspy_mlflow_async.export.disk import Disk
from dspy_mlflow_async.export.items import Item, RunItem, TraceItem
from dspy_mlflow_async.export.memory import Memory
from dspy_mlflow_async.export.retry import Backoff, Verdict
from dspy_mlflow_async.export.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable

    from dspy_mlflow_async.export.books import Books, Place
    from dspy_mlflow_async.export.options import ExportOptions
    from dspy_mlflow_async.export.retry import Outcome
    from dspy_mlflow_async.export.spool import Reference, Spool

logger = logging.getLogger("dspy_mlflow_async")

# A batch is one SQL transaction: others who write to the same database wait for as long as it takes.
_BATCH_ITEMS = 32
_BATCH_BYTES = 8 * 2**20
# How long the first of a batch waits for others, in seconds, and how long the writer rests after a batch at the most:
# it rests as long as the batch took, so that the program that is being watched gets the interpreter at least half of
# the time. Neither holds once somebody flushes, or half of the memory is full.
_LINGER = 0.5
_LONGEST_REST = 0.5
# Writes in a row that fail before the store counts as away.
_ATTEMPTS_IN_MEMORY = 3
_ADOPT_EVERY = 60.0
# A caller who waits for one operation waits no longer than this for an answer.
_URGENT_SECONDS = 10.0
_LONG_WAIT = 2.0
_WAITS_AGAIN = 30.0


class StoreQueue:
    """Takes items from any thread and brings them to the store, or to the disk, in the order of their keys."""

    keeps_partial = False  # whether what is shown of an open trace is worth a place in the spool

    def __init__(self, options: ExportOptions, books: Books, uri: str, spool: Spool) -> None:
        self.options = options
        self.uri = uri
        self.spool = spool
        self.waits = True  # whether callers of `write_now` and `write_waiting` may wait for the store
        self._waits_again_at = 0.0  # monotonic
        self._disk = self._copies = Disk(spool)
        self._may_end_unheard = workers.may_end_unheard()
        self._books = books
        self._writer = Writer(uri)
        self._urgent_writer = Writer(uri, request_seconds=_URGENT_SECONDS)  # for callers who wait
        self.memory = Memory()
        # Who has an item in their hands says what becomes of it: the writer, a caller who waits, or the end of the
        # process, which does not wait for a store. Held while they do, and by nobody else.
        self._fate = threading.Lock()
        self.backlog = Backlog()
        self._is_warned = False  # of records of another version
        self._adopt_at = 0.0  # monotonic
        self._backoff = Backoff()
        self._failures = 0  # writes in a row that found the store away
        self._away_until = 0.0  # monotonic
        self._attempts = 0  # how often the writer has begun to write what waits
        self._hurried = 0  # the attempt under way, or the last one, when somebody asked for one at once
        self.away_at = 0  # the last attempt that found the store away; who came before it began waits no longer
        self._times_suspect = 0  # how often a record failed for no clear reason
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._stop = threading.Event()
        self._progress = threading.Condition()
        self._flushing = 0  # how many callers wait
        self._moved = 0  # the backlog's count when something last went from memory to the disk, or was adopted
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    # --- the caller's side ---

    @property
    def writes_ahead(self) -> bool:
        """Whether what has ended goes to the disk before anything else."""
        return self.options.durable or self._may_end_unheard

    def put(self, item: Item) -> None:
        """Take an item. The caller waits for the disk only when the memory is full, or with ``durable``."""
        is_partial = self._is_partial(item)
        if not is_partial:
            self._secure(item)
        if self.memory.add(item, unless=lambda: self._must_spool(item)):
            if 2 * self.memory.size > self.options.max_waiting_bytes:
                self._hurry.set()
        elif is_partial:
            _not_shown(item)
        elif not self._to_spool(item):
            self._drop(item)
        if not self._wake.is_set():
            self._wake.set()
            self._start()

    def _must_spool(self, item: Item) -> bool:
        return (
            self._stop.is_set()  # nobody writes any more: what comes now is sent by the next process
            or self.backlog.has(item.key)
            # Operations on runs are few, and somebody will wait for them.
            or (not self._has_room_for(item) and not isinstance(item, RunItem))
        )

    def _has_room_for(self, item: Item) -> bool:
        return self.memory.size + item.size <= self.options.max_waiting_bytes

    def write_now(self, item: Item) -> bool:
        """Write in the caller's thread, behind what waits of the same trace; what does not work now is queued.

        Returns:
            Whether it is stored.
        """
        if self.has_queued(item.key):  # what has ended of it was shown while it was open
            self.put(item)
            return self.write_waiting(item.key, _URGENT_SECONDS)
        if self.may_wait():
            begun = time.monotonic()
            outcome = self._urgent_writer.write([item])[0]
            if outcome.verdict in (Verdict.STORED, Verdict.REFUSED):
                self._settle(outcome, "waiting")
                return outcome.verdict is Verdict.STORED
            self.note_wait(begun)
        self.put(item)
        return False

    def write_waiting(self, key: str, timeout: float) -> bool:
        """Write what waits of one trace or run in the caller's thread, ahead of all else; the rest waits on.

        Args:
            key: The trace or the run.
            timeout: Seconds to wait for what others are writing of it just now.

        Returns:
            Whether nothing of it waits any more.
        """
        items = self._take_out(key, time.monotonic() + timeout) if self.may_wait() else None
        if items is None:
            return False
        begun = time.monotonic()
        try:
            outcomes = self._urgent_writer.write(items) if items else []
        except BaseException:  # an interrupt: the writer takes them up
            self.memory.give_back(items, items)
            raise
        with self._fate:
            if items and not self.memory.is_taken(items):
                self._settle_saved(outcomes)
                return all(outcome.verdict is Verdict.STORED for outcome in outcomes)
            is_settled = {Verdict.STORED, Verdict.REFUSED}
            for outcome in outcomes:
                if outcome.verdict in is_settled:
                    self._settle(outcome, "waiting")
            again = [outcome.item for outcome in outcomes if outcome.verdict not in is_settled]
            self.memory.give_back(items, again)
        if again:
            self.note_wait(begun)
        if len(self.memory):
            self._wake.set()
            self._start()
        self._tell()
        return not again

    def may_wait(self) -> bool:
        """Whether a caller may wait for the store: it was not found away a moment ago."""
        return self.waits and time.monotonic() >= max(self._waits_again_at, self._away_until)

    def note_wait(self, begun: float) -> None:
        """Somebody has waited in vain since ``begun``: where that was long, let nobody else for a while."""
        if time.monotonic() - begun > _LONG_WAIT:
            self._waits_again_at = time.monotonic() + _WAITS_AGAIN

    def _take_out(self, key: str, deadline: float) -> list[Item] | None:
        """What waits of a trace or run, now in the hands of the caller; None where others have it, and keep it."""
        with self._progress:
            attempts = self._attempts
            while True:
                if not self.backlog.has(key) and (items := self.memory.take_all_of(key)) is not None:
                    return items
                left = deadline - time.monotonic()
                if left <= 0 or self._failures or self.away_at > attempts or not self.may_wait():
                    return None
                self._hurry.set()
                self._wake.set()
                self._start()
                self._progress.wait(min(left, 0.05))

    def _secure(self, item: Item) -> None:
        if self.writes_ahead:
            self._disk.save(item, durable=self.options.durable, is_needed=self.options.durable)
        if item.reference is not None or not self.writes_ahead:
            self._discard_superseded(item)

    def _discard_superseded(self, item: Item) -> None:
        if item.supersedes is not None:
            self.discard_copy(item.supersedes)
            item.supersedes = None

    def safeguard(self, item: Item) -> Reference | None:
        """Keep a copy on disk of what is not ready to be written yet.

        Returns:
            Where it lies, for the item that will supersede it; None if it could not be written.
        """
        return item.reference if self._copies.save(item, durable=self.options.durable) else None

    def discard_copy(self, reference: Reference) -> None:
        """Forget a copy that nothing supersedes any more, and take it off the disk: it may have been sampled out."""
        self._copies.spool.erase(reference)

    def has_queued(self, key: str) -> bool:
        """Whether something of this trace or run still waits; then what comes next must wait behind it."""
        return self.backlog.has(key) or self.memory.has(key)

    def _start(self) -> None:
        with self._starting:
            if not self._is_writing():
                thread = threading.Thread(target=self._run, name="dspy-mlflow-async-writer", daemon=True)
                with contextlib.suppress(RuntimeError):  # the interpreter shuts down; `flush` writes in its thread
                    thread.start()
                    self._thread = thread

    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    # --- the writer's thread ---

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self.next_wait())
            if not self._hurry.is_set():
                self._hurry.wait(_LINGER)
            self._wake.clear()
            try:
                self.work()
            except Exception:
                logger.exception("dspy-mlflow-async: the export queue failed; it goes on")
                self._stop.wait(1.0)

    def next_wait(self) -> float | None:
        """Seconds until something is due that nobody will wake us for."""
        due = self.backlog.due(self._away_until)
        if due is None and len(self.memory):
            due = self._away_until
        return None if due is None else max(0.0, due - time.monotonic())

    def work(self) -> None:
        """Bring to the store what can be brought there now."""
        while not self._stop.is_set():
            if time.monotonic() < self._away_until:
                self._spool_waiting()
                break
            began = time.monotonic()
            self._attempts += 1
            did_something = self._write_waiting()
            did_something = self._write_backlog() or did_something
            self._tell()
            if not did_something:
                break
            if not self._hurry.is_set():
                self._hurry.wait(min(time.monotonic() - began, _LONGEST_REST))
        self._tell()

    def _tell(self) -> None:
        with self._progress:
            if not self._flushing and 2 * self.memory.size <= self.options.max_waiting_bytes:
                self._hurry.clear()
            self._progress.notify_all()

    def _write_waiting(self, are_meant: Callable[[Item], bool] | None = None) -> bool:
        batch = self.memory.take(_BATCH_ITEMS, _BATCH_BYTES, are_meant)
        if not batch:
            return False
        outcomes = self._writer.write(batch)
        with self._fate:
            if not self.memory.is_taken(batch):
                self._settle_saved(outcomes)
                return False
            again = [outcome.item for outcome in outcomes if outcome.verdict is Verdict.AWAY]
            for outcome in outcomes:
                if outcome.verdict is Verdict.SUSPECT:
                    self._suspect(outcome)
                elif outcome.verdict is not Verdict.AWAY:
                    self._settle(outcome, "waiting")
            self.memory.give_back(batch, again)
            self._put_behind({outcome.item.key for outcome in outcomes if outcome.verdict is Verdict.SUSPECT})
        if again:
            self._found_away(outcomes)
        else:
            self._found_there(outcomes)
        return True

    def _put_behind(self, suspects: set[str]) -> None:
        """What waits behind a suspect goes after it to the spool: sent before it, it would be refused."""
        for item in self.memory.remove(suspects) if suspects else ():
            if self._is_partial(item):
                _not_shown(item)
            elif not self._move_to_spool(item):
                self._drop(item)

    def _settle_saved(self, outcomes: list[Outcome]) -> None:
        """What `save_everything` has brought to the disk while it was being written."""
        for outcome in outcomes:
            reference = outcome.item.reference
            if outcome.verdict is Verdict.STORED and reference is not None:
                self._settle(outcome, "spooled")
                self.backlog.finish([reference])

    def _found_there(self, outcomes: list[Outcome]) -> None:
        self._failures = 0
        self._away_until = self._waits_again_at = 0.0
        self._backoff.reset()
        if any(outcome.verdict is Verdict.STORED for outcome in outcomes):
            self.backlog.succeeded()
            self._adopt()

    def _found_away(self, outcomes: list[Outcome]) -> None:
        """The store is away: try again soon, and after some attempts bring what waits to safety."""
        self._failures += 1
        pause = self._backoff.pause()
        if self._failures < _ATTEMPTS_IN_MEMORY and not len(self.backlog):
            self._stop.wait(pause)
            return
        if self._failures == _ATTEMPTS_IN_MEMORY:
            error = next((o.error for o in outcomes if o.error is not None), None)
            logger.warning(
                "dspy-mlflow-async: the MLflow store cannot be reached (%s: %s); traces are kept in %s and sent "
                "when it is back.",
                type(error).__name__,
                error,
                self.spool.folder,
            )
        with self._progress:
            # Somebody who asked while this attempt was under way wants one that begins now.
            self._away_until = 0.0 if self._hurried == self._attempts else time.monotonic() + pause
        self._spool_waiting()
        self._failed()

    # --- the spool ---

    def _to_spool(self, item: Item) -> bool:
        if not self._disk.save(item):
            return False
        reference = item.reference
        assert reference is not None  # noqa: S101 - for the type checker
        self._discard_superseded(item)
        self.backlog.add([reference])
        self._books.move("waiting", "spooled", item.counted)
        return True

    def _move_to_spool(self, item: Item) -> bool:
        """Bring to the disk what has waited in memory; who flushes goes on waiting for it."""
        if not self._to_spool(item):
            return False
        self._moved = self.backlog.count
        return True

    def _spool_waiting(self) -> None:
        """Bring what waits to the disk; what the disk does not take stays in memory, as far as there is room."""
        self._spool_those()
        if self._disk.is_full:  # there may be room yet for what is the last to go
            self._spool_those(lambda item: item.is_vital)
            self._disk.is_full = True

    def _spool_those(self, are_meant: Callable[[Item], bool] | None = None) -> None:
        self._disk.is_full = False
        while not self._disk.is_full:
            with self._fate:
                batch = self.memory.take(1, 1, are_meant)
                if not batch:
                    return
                is_partial = self._is_partial(batch[0])
                if is_partial:
                    _not_shown(batch[0])
                is_safe = is_partial or self._move_to_spool(batch[0])
                self.memory.give_back(batch, [] if is_safe or not self._disk.is_full else batch)
                if not is_safe and not self._disk.is_full:  # nobody can ever write it down
                    self._drop(batch[0])

    def _write_backlog(self) -> bool:
        batch, is_suspect = self.backlog.take(_BATCH_ITEMS, _BATCH_BYTES)
        if not batch:
            return False
        items = [item for reference in batch if (item := self._load(reference)) is not None]
        outcomes = self._writer.write(items) if items else []
        again: list[Reference] = []
        postponed = 0
        for outcome in outcomes:
            reference = outcome.item.reference
            assert reference is not None  # noqa: S101 - `_load` sets it
            if outcome.verdict is Verdict.AWAY:
                again.append(reference)
            elif outcome.verdict is Verdict.SUSPECT and not self.backlog.is_guilty(reference.key):
                self.backlog.postpone(reference, was_suspect=is_suspect)
                postponed += 1
            else:
                self._settle(outcome, "spooled")
                self.backlog.finish([reference])
                if is_suspect and outcome.verdict is Verdict.STORED:
                    self.backlog.recovered()
        self.backlog.put_back(again, was_suspect=is_suspect)
        if postponed:
            with self._progress:
                self._times_suspect += 1
        if again:
            self._found_away(outcomes)
            return False
        self._found_there(outcomes)
        return True

    def _failed(self) -> None:
        """Let those who flush know that trying does not help now."""
        with self._progress:
            self.away_at = self._attempts
            self._progress.notify_all()

    def _load(self, reference: Reference) -> Item | None:
        try:
            item = self._disk.load(reference)
        except codec.UnreadableError as error:
            if not self._is_warned:
                self._is_warned = True
                logger.warning("dspy-mlflow-async: left alone in %s: %s", self.spool.folder, error)
            self.backlog.finish([reference])
            return None
        if item is None:
            self._books.move("spooled", "dropped", reference.counted)
            self.backlog.finish([reference])
            self.spool.done([reference], stored=False)
        return item

    # --- what becomes of an item ---

    def _settle(self, outcome: Outcome, place: Place) -> None:
        item = outcome.item
        if outcome.verdict is Verdict.STORED:
            self._books.move(place, "stored", item.counted)
            self._disk.forget(item, stored=True)
            return
        if self._is_partial(item):
            return
        if isinstance(item, RunItem) and item.fate is not None:
            item.fate.was_refused = True
        reason = f"{type(outcome.error).__name__}: {outcome.error}"
        self._books.move(place, "dead" if self._disk.bury(item, reason) else "dropped", item.counted)
        self._disk.forget(item, stored=False)

    def _suspect(self, outcome: Outcome) -> None:
        """Put aside a record that failed for no clear reason, so that it holds up nobody."""
        item = outcome.item
        if self._is_partial(item):
            _not_shown(item)
            return
        self.backlog.suspect(item.key)
        if not self._move_to_spool(item):
            self._drop(item)

    def _is_partial(self, item: Item) -> bool:
        """Whether an item may be forgotten, since the whole of it will follow."""
        return isinstance(item, TraceItem) and item.stage == "partial" and not self.keeps_partial

    def feed(self, references: list[Reference]) -> None:
        """Send records that somebody else has spooled."""
        self.backlog.add(references)
        if references:
            self._moved = self.backlog.count

    def _adopt(self) -> None:
        """Now and then, while the store takes what it is given: what ended processes have left behind."""
        if time.monotonic() >= self._adopt_at and not self._stop.is_set():
            self._adopt_at = time.monotonic() + _ADOPT_EVERY
            self.feed(self.spool.adopt())

    def take_over(self) -> None:
        """Send what ended processes have left behind, now."""
        if not self._stop.is_set():
            self._adopt_at = 0.0
            before = self.backlog.count
            self._adopt()
            if self.backlog.count != before:
                self._wake.set()
                self._start()

    def _drop(self, item: Item) -> None:
        self._books.move("waiting", "dropped", item.counted)

    # --- the end ---

    def is_empty(self) -> bool:
        """Whether nothing of this process waits, in memory or on disk."""
        return self.memory.is_empty and not len(self.backlog)

    def flush(self, deadline: float | None) -> bool:
        """Wait until what has come so far is stored, or the store proves to be away, or the deadline is over.

        Args:
            deadline: By the monotonic clock; None for no bound.

        Returns:
            Whether all of it is stored.
        """
        with self._progress:
            self._flushing += 1
            attempts, suspect = self._attempts, self._times_suspect
        count, spooled = self.memory.count, self.backlog.count
        try:
            self.hurry()
            if not self.is_empty():
                self._start()
            if not self._is_writing():  # the interpreter shuts down
                self.work()
            return self._wait_for(
                count,
                spooled,
                deadline,
                is_away=lambda: self.away_at > attempts,
                has_suspects=lambda: self._times_suspect != suspect,
            )
        finally:
            with self._progress:
                self._flushing -= 1
            self._tell()

    def _wait_for(
        self,
        count: int,
        spooled: int,
        deadline: float | None,
        *,
        is_away: Callable[[], bool],
        has_suspects: Callable[[], bool],
    ) -> bool:
        """Wait until nothing is left of the first ``count`` items and ``spooled`` records, or waiting is of no use.

        What overflows to the disk meanwhile is not waited for.
        """
        left_memory = False
        with self._progress:
            while True:
                if not left_memory and not self.memory.has_any_of_first(count):
                    left_memory, spooled = True, max(spooled, self._moved)
                if left_memory and self.backlog.is_done_with(spooled):
                    return True
                if self._stop.is_set() and not self._is_writing():
                    return False
                if is_away() or (left_memory and has_suspects() and not self.backlog.waiting()):
                    return False
                left = 0.5 if deadline is None else min(0.5, deadline - time.monotonic())
                if left <= 0:
                    return False
                self._progress.wait(left)

    def hurry(self) -> None:
        """Try everything now, whatever pause was meant to be kept."""
        with self._progress:
            self._hurried = self._attempts
            self._away_until = 0.0
        self._hurry.set()
        self.backlog.hurry()
        self._wake.set()

    def prepare_for_end(self) -> None:
        """Let no caller wait for the store any more, and keep what is shown of open traces: no more may come."""
        self.waits = False
        self.keeps_partial = True

    def stop(self) -> None:
        """End the thread after what it is doing, and leave what waits on disk."""
        self._stop.set()
        self._wake.set()
        self._hurry.set()

    def save_everything(self) -> int:
        """Bring all that waits, in flight or not, to the disk. For the end of the process.

        Returns:
            How many operations lie in the spool.
        """
        self.stop()
        with self._fate:
            for item in self.memory.remove_all():
                if self._is_partial(item):
                    _not_shown(item)
                elif not self._to_spool(item):
                    self._drop(item)
        with contextlib.suppress(OSError):
            self.spool.close()
        return len(self.backlog)

    def after_fork(self) -> None:
        """In a forked child: what is on disk and what is locked is the parent's."""
        self.spool.after_fork()


def _not_shown(item: Item) -> None:
    """Let the spans of a partial item that is not written be shown again."""
    if isinstance(item, TraceItem) and item.shown is not None:
        item.shown.clear()
