"""What lies in the spool and is still to be sent: in order of keys, with what fails for no clear reason put aside."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dspy_mlflow_async.export.retry import Backoff

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dspy_mlflow_async.export.spool import Reference

# A record that fails this often while others succeed is to blame itself.
_SUSPICIONS = 10


class _Records:
    """A queue of references from which any can be taken at once."""

    def __init__(self) -> None:
        self._by_place: OrderedDict[tuple[Path, int], Reference] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_place)

    def __iter__(self) -> Iterator[Reference]:
        return iter(self._by_place.values())

    def at(self, segment: Path, offset: int) -> Reference | None:
        return self._by_place.get((segment, offset))

    def first(self) -> Reference:
        return next(iter(self))

    def append(self, reference: Reference) -> None:
        self._by_place[reference.segment, reference.offset] = reference

    def appendleft(self, reference: Reference) -> None:
        self.append(reference)
        self._by_place.move_to_end((reference.segment, reference.offset), last=False)

    def popleft(self) -> Reference:
        return self._by_place.popitem(last=False)[1]

    def discard(self, reference: Reference) -> None:
        self._by_place.pop((reference.segment, reference.offset), None)


class Backlog:
    """References into the spool. Safe for threads; nothing here reads or writes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting = _Records()
        self._in_flight: list[Reference] = []
        self._numbers: OrderedDict[tuple[Path, int], int] = OrderedDict()  # of all that is here, oldest first
        self.count = 0  # how many records have ever come
        self._keys: Counter[str] = Counter()
        self._suspects = _Records()  # tried one by one
        self._suspects_at = 0.0  # monotonic
        self._backoff = Backoff(1.0, 60.0)
        self._suspicions: dict[str, tuple[int, int]] = {}  # failures that count, successes of others by then
        self._successes = 0

    def __len__(self) -> int:
        with self._lock:
            return len(self._waiting) + len(self._in_flight) + len(self._suspects)

    def has(self, key: str) -> bool:
        """Whether something of this trace or run lies here; what comes next must wait behind it."""
        return bool(self._keys.get(key))

    def add(self, references: Iterable[Reference]) -> None:
        """Add records, to be sent after those that are here."""
        with self._lock:
            for reference in references:
                self._waiting.append(reference)
                self._keys[reference.key] += 1
                self.count += 1
                self._numbers[reference.segment, reference.offset] = self.count

    def is_done_with(self, count: int) -> bool:
        """Whether nothing is left of the first so many records."""
        with self._lock:
            return next(iter(self._numbers.values()), count + 1) > count

    def waiting(self) -> list[Reference]:
        """The records that nobody is sending."""
        with self._lock:
            return list(self._waiting)

    def at(self, segment: Path, offsets: Iterable[int]) -> list[Reference]:
        """Those records of a segment that lie here and that nobody is sending."""
        with self._lock:
            found = (self._waiting.at(segment, offset) for offset in offsets)
            return [reference for reference in found if reference is not None]

    def take(self, most: int, most_bytes: int) -> tuple[list[Reference], bool]:
        """The records to try next.

        Returns:
            A batch in order, and False; or one suspect whose time has come, and True.
        """
        size = 0
        with self._lock:
            batch = self._in_flight = []
            if self._suspects and time.monotonic() >= self._suspects_at:
                return [self._suspects.first()], True
            while self._waiting and len(batch) < most and size < most_bytes:
                reference = self._waiting.popleft()
                if reference.key in self._suspicions:
                    self._suspects.append(reference)  # stays behind what came before it
                else:
                    batch.append(reference)
                    size += reference.length
        return batch, False

    def put_back(self, references: list[Reference], *, was_suspect: bool) -> None:
        """The batch is over; these could not be tried, since the store is away."""
        with self._lock:
            self._in_flight = []
            if not was_suspect:
                for reference in reversed(references):
                    self._waiting.appendleft(reference)

    def finish(self, references: Iterable[Reference]) -> None:
        """Records are done with."""
        gone = set(references)
        with self._lock:
            for reference in gone:
                self._waiting.discard(reference)
                self._suspects.discard(reference)
                self._numbers.pop((reference.segment, reference.offset), None)
                self._keys[reference.key] -= 1
                if self._keys[reference.key] <= 0:
                    del self._keys[reference.key]
                    self._suspicions.pop(reference.key, None)

    # --- what fails for no clear reason ---

    def succeeded(self) -> None:
        """The store took something, so it is there."""
        self._successes += 1

    def suspect(self, key: str) -> None:
        """Note that an operation failed for no clear reason, before it comes here."""
        with self._lock:
            self._suspicions.setdefault(key, (0, self._successes))

    def is_guilty(self, key: str) -> bool:
        """Note another failure.

        Returns:
            Whether there have been enough while others succeeded.
        """
        with self._lock:
            count, seen = self._suspicions.get(key, (0, self._successes))
            count += self._successes > seen
            self._suspicions[key] = (count, self._successes)
            return count >= _SUSPICIONS

    def postpone(self, reference: Reference, *, was_suspect: bool) -> None:
        """Try a record again later, by itself."""
        with self._lock:
            if was_suspect:
                self._suspects_at = time.monotonic() + self._backoff.pause()
            else:
                self._suspects.append(reference)

    def recovered(self) -> None:
        """A suspect was stored: the others need not wait."""
        self._backoff.reset()
        self._suspects_at = 0.0

    def hurry(self) -> None:
        """Try the suspects now."""
        self._suspects_at = 0.0

    def due(self, not_before: float) -> float | None:
        """When the next attempt is due (monotonic), no earlier than ``not_before``; None if nothing is here."""
        with self._lock:
            if self._waiting:
                return not_before
            return max(not_before, self._suspects_at) if self._suspects else None
