"""Pending operations of one store, in memory or on disk: one list, in the order in which they came."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspy_mlflow_async.export.operations import Operation, RunOperation
from dspy_mlflow_async.export.write.errors import Backoff

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from dspy_mlflow_async.export.counters import Place, TraceCounters
    from dspy_mlflow_async.export.operations import Reference

# How many entries a batch passes over before it is taken as it is: callers wait meanwhile.
_LOOK_AHEAD = 512
# A record that fails this often while others succeed is to blame itself.
SUSPICIONS = 10


@dataclass(slots=True, eq=False)
class Pending:
    """One operation that waits.

    Attributes:
        number: Sequence number within its queue, from 1.
        key: The trace or the run it belongs to.
        size: Bytes that it takes in memory, or its record on disk.
        counted: What of the counters it carries, a ``Counted``.
        operation: The operation itself; None once it lies on disk alone.
        reference: Where it lies on disk, once it does so alone.
        is_taken: Whether somebody has it in hand.
    """

    number: int
    key: str
    size: int
    counted: int
    operation: Operation | None = None
    reference: Reference | None = None
    is_taken: bool = False

    @property
    def place(self) -> Place:
        """Place that the counters have it in."""
        return "spooled" if self.operation is None else "waiting"

    @property
    def run(self) -> str | None:
        """Run that it is an operation on, as far as that is known without the disk."""
        return self.key if isinstance(self.operation, RunOperation) else None


class PendingOperations:
    """Pending operations of one store. Safe for threads; nothing here does I/O.

    Entries of the same key are taken in the order in which they came, wherever they lie. Spilling drops the operation
    from memory and keeps the entry: its number and its key do not change.

    Attributes:
        size: Bytes in memory.
        last: The number of the entry that came last.
        times_suspect: How often an operation that was tried by itself has failed again.
        lock: Held for each look and each change.
    """

    def __init__(self, counters: TraceCounters) -> None:
        self._counters = counters
        self.lock = threading.Lock()
        self._all: OrderedDict[int, Pending] = OrderedDict()  # by number
        self._resident: OrderedDict[int, Pending] = OrderedDict()
        self._spooled: OrderedDict[tuple[Path, int], Pending] = OrderedDict()
        self._by_key: dict[str, list[Pending]] = {}  # most have one entry, for which a deque takes ten times as much
        self._suspicions = _Suspicions()
        self._is_closed = False
        self._was_resident = False  # whether the last batch came from memory
        self.size = 0
        self.last = 0
        self.times_suspect = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def spooled(self) -> int:
        """Number of entries on disk alone."""
        return len(self._spooled)

    @property
    def resident(self) -> int:
        """Number of entries in memory."""
        return len(self._resident)

    def has(self, key: str) -> bool:
        """Return whether something of this trace or run is here, in anybody's hands or not."""
        return key in self._by_key

    def is_spooled(self, key: str) -> bool:
        """Return whether some of this trace or run lies on disk alone."""
        if key not in self._by_key:
            return False
        with self.lock:
            return any(entry.operation is None for entry in self._by_key.get(key, ()))

    def is_part_of_batch(self, most: int) -> bool:
        """Return whether some traces wait, less than a batch of so many, and nothing else, as far as that is known."""
        if not 0 < len(self._all) < most:
            return False
        with self.lock:
            return all(entry.run is None for entry in self._all.values())

    def is_done_with(self, number: int) -> bool:
        """Return whether nothing is left of the entries up to a number."""
        with self.lock:
            return next(iter(self._all), number + 1) > number

    def has_only_suspects(self, number: int) -> bool:
        """Return whether all that is left up to a number has failed for no clear reason."""
        with self.lock:
            left = itertools.takewhile(lambda entry: entry.number <= number, self._all.values())
            return all(entry.key in self._suspicions for entry in left)

    def due(self, not_before: float) -> float | None:
        """Return when the next attempt is due (monotonic), no earlier than ``not_before``; None if nothing is here."""
        with self.lock:
            is_any_suspect = False
            for entry in self._all.values():
                if not entry.is_taken:
                    if entry.key not in self._suspicions:
                        return not_before
                    is_any_suspect = True
            return max(not_before, self._suspicions.due_at) if is_any_suspect else None

    # --- coming ---

    def add(self, operation: Operation, *, most_bytes: int | None) -> bool:
        """Keep an operation in memory.

        Args:
            operation: The operation.
            most_bytes: How many bytes all that is in memory may have; None for no bound.

        Returns:
            False where there is no room, and once this is closed.
        """
        with self.lock:
            if self._is_closed or (most_bytes is not None and self.size + operation.size > most_bytes):
                return False
            self._append_resident(operation)
            return True

    def add_taken(self, operation: Operation) -> Pending | None:
        """Keep an operation that its caller writes now.

        Returns:
            Its entry; None where others of its key are here, and once this is closed.
        """
        with self.lock:
            if self._is_closed or operation.key in self._by_key:
                return None
            entry = self._append_resident(operation)
            entry.is_taken = True
            return entry

    def add_spooled(self, references: Iterable[Reference], *, coming_from: Place | None = None) -> None:
        """Add records that lie on disk.

        Args:
            references: Where they lie.
            coming_from: Where the counters have had them; None for those of other processes, which are not counted.
        """
        with self.lock:
            for reference in references:
                entry = self._append(reference.key, reference.length, reference.counted)
                self._place_on_disk(entry, reference)
                if coming_from is not None:
                    self._counters.move(coming_from, "spooled", entry.counted)

    def _append_resident(self, operation: Operation) -> Pending:
        entry = self._append(operation.key, operation.size, operation.counted)
        entry.operation = operation
        self._resident[entry.number] = entry
        self.size += operation.size
        return entry

    def _append(self, key: str, size: int, counted: int) -> Pending:
        self.last += 1
        entry = Pending(self.last, key, size, counted)
        self._all[entry.number] = entry
        self._by_key.setdefault(key, []).append(entry)
        return entry

    def _place_on_disk(self, entry: Pending, reference: Reference) -> None:
        entry.operation, entry.reference, entry.size = None, reference, reference.length
        self._spooled[reference.segment, reference.offset] = entry

    def drop(self, operation: Operation) -> None:
        """Count an operation as lost that neither memory nor disk has room for."""
        self._counters.move("waiting", "dropped", operation.counted)

    # --- in somebody's hands ---

    def take(self, most: int, most_bytes: int, *, from_disk: bool = True) -> list[Pending]:
        """Take the next batch: traces, or one run. Memory and disk take turns, so that neither waits for the other.

        Args:
            most: How many entries.
            most_bytes: How many bytes, and the entry that exceeds them.
            from_disk: Whether entries on disk are meant, too; else somebody else brings them to the store.

        Returns:
            Entries that are the caller's until `release` or `finish`; one alone if it is a suspect whose time has come.
        """
        with self.lock:
            if (suspect := self._due_suspect(from_disk=from_disk)) is not None:
                batch = [suspect]
            else:
                batch = []
                indexes: list[Mapping[Any, Pending]] = (
                    [self._resident, self._spooled] if from_disk else [self._resident]
                )
                if from_disk and self._was_resident:
                    indexes.reverse()
                for index in indexes:
                    if batch := self._first_of(index, most, most_bytes):
                        self._was_resident = index is self._resident
                        break
            for entry in batch:
                entry.is_taken = True
            return batch

    def _due_suspect(self, *, from_disk: bool) -> Pending | None:
        if not self._suspicions or time.monotonic() < self._suspicions.due_at:
            return None
        heads = (entries[0] for key in self._suspicions if (entries := self._by_key.get(key)))
        free = (entry for entry in heads if not entry.is_taken and (from_disk or entry.operation is not None))
        return min(free, key=lambda entry: (self._suspicions.tries_of(entry.key), entry.number), default=None)

    def _first_of(self, index: Mapping[Any, Pending], most: int, most_bytes: int) -> list[Pending]:
        batch: list[Pending] = []
        taken_of: dict[str, int] = {}
        size = passed_over = 0
        for entry in index.values():
            if len(batch) >= most or size >= most_bytes or passed_over >= _LOOK_AHEAD:
                break
            of_key = taken_of.get(entry.key, 0)
            # What came before it of the same key is in other hands, in the other place, or has been passed over.
            is_blocked = self._by_key[entry.key][of_key] is not entry or entry.is_taken
            # A run is a batch of its own: who waits for it does not wait for traces, or for another one.
            is_other = bool(batch) and entry.run != batch[0].run
            if is_blocked or is_other or entry.key in self._suspicions:
                passed_over += is_other
                continue
            batch.append(entry)
            taken_of[entry.key] = of_key + 1
            size += entry.size
        return batch

    def take_all_of(self, key: str) -> list[Pending] | None:
        """Take all of one trace or run; None where others have some of it in hand, or some of it lies on disk."""
        with self.lock:
            batch = list(self._by_key.get(key, ()))
            if any(entry.is_taken or entry.operation is None for entry in batch):
                return None
            for entry in batch:
                entry.is_taken = True
            return batch

    def take_residents(self) -> list[Pending]:
        """Take all that is in memory and in nobody's hands."""
        with self.lock:
            batch = [entry for entry in self._resident.values() if not entry.is_taken]
            for entry in batch:
                entry.is_taken = True
            return batch

    def release(self, batch: Iterable[Pending]) -> None:
        """Give entries back, to be taken again."""
        with self.lock:
            for entry in batch:
                entry.is_taken = False

    def finish(self, entry: Pending, place: Place | None) -> bool:
        """Take an entry out of here for good.

        Args:
            entry: The entry.
            place: Where the counters have it from now on; None for what is not counted.

        Returns:
            Whether it was here.
        """
        with self.lock:
            if self._all.pop(entry.number, None) is None:
                return False
            if place is not None:
                self._counters.move(entry.place, place, entry.counted)
            if self._resident.pop(entry.number, None) is not None:
                self.size -= entry.size
            if entry.reference is not None:
                self._spooled.pop((entry.reference.segment, entry.reference.offset), None)
            of_key = self._by_key[entry.key]
            of_key.remove(entry)
            if not of_key:
                del self._by_key[entry.key]
                self._suspicions.forget(entry.key)
            return True

    # --- between memory and disk ---

    def spill(self, entry: Pending, reference: Reference) -> bool:
        """Note that an operation lies on disk, and forget it here; whoever has it in hand keeps it.

        Returns:
            Whether it was still here.
        """
        with self.lock:
            if self._resident.pop(entry.number, None) is None:
                return False
            self.size -= entry.size
            self._counters.move("waiting", "spooled", entry.counted)
            self._place_on_disk(entry, reference)
            return True

    def residents_of(self, key: str) -> list[Pending]:
        """Return all of one trace or run that is in memory."""
        with self.lock:
            return [entry for entry in self._by_key.get(key, ()) if entry.operation is not None]

    def at(self, segment: Path, offsets: Iterable[int]) -> list[Pending]:
        """Return the entries whose records lie at these places of a segment, as far as they are in nobody's hands."""
        with self.lock:
            found = (self._spooled.get((segment, offset)) for offset in offsets)
            return [entry for entry in found if entry is not None and not entry.is_taken]

    def close(self) -> list[Pending]:
        """Close the memory: keep nothing in it from now on.

        Returns:
            What is in memory, in whoever's hands; it is theirs to say what becomes of it, until it is spilled.
        """
        with self.lock:
            self._is_closed = True
            return list(self._resident.values())

    # --- what fails for no clear reason ---

    def suspect(self, entry: Pending) -> bool:
        """Note that an operation failed for no clear reason: it is tried again by itself.

        Returns:
            Whether it has failed so often while others succeeded that it is to blame itself.
        """
        with self.lock:
            self.times_suspect += entry.key in self._suspicions
            return self._suspicions.note_failure(entry.key)

    def tries_of_suspects(self) -> int:
        """Return how often each of the suspects has been tried at least."""
        with self.lock:
            return min(map(self._suspicions.tries_of, self._suspicions), default=0)

    def note_success(self, entry: Pending) -> None:
        """Note that the store took an operation, so that it is there; other suspects need not wait if it was one."""
        with self.lock:
            self._suspicions.note_success(entry.key)

    def hurry(self) -> None:
        """Try the suspects now."""
        with self.lock:
            self._suspicions.due_at = 0.0


@dataclass(slots=True)
class _Suspicion:
    """Failures counted against a key.

    Attributes:
        tries: How often its first operation has failed.
        counts: How often while others succeeded.
        seen: How many others had succeeded when it failed last.
    """

    tries: int = 0
    counts: int = 0
    seen: int = 0


class _Suspicions:
    """Keys whose operations failed for no clear reason, and when the next of them is tried."""

    def __init__(self) -> None:
        self._by_key: dict[str, _Suspicion] = {}
        self._successes = 0
        self._backoff = Backoff(1.0, 60.0)
        self.due_at = 0.0  # monotonic

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def tries_of(self, key: str) -> int:
        return self._by_key[key].tries

    def note_failure(self, key: str) -> bool:
        if key in self._by_key:
            self.due_at = time.monotonic() + self._backoff.pause()
        suspicion = self._by_key.setdefault(key, _Suspicion(seen=self._successes))
        suspicion.tries += 1
        suspicion.counts += self._successes > suspicion.seen
        suspicion.seen = self._successes
        return suspicion.counts >= SUSPICIONS

    def note_success(self, key: str) -> None:
        self._successes += 1
        if key in self._by_key:
            self._backoff.reset()
            self.due_at = 0.0

    def forget(self, key: str) -> None:
        self._by_key.pop(key, None)
