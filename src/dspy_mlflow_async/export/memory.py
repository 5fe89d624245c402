"""What waits in memory for one store, oldest first, and what of it is in whose hands."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from typing import TYPE_CHECKING

from dspy_mlflow_async.export.items import Item, RunItem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

# How many items of other sorts a batch leaves out before it is taken as it is: callers wait meanwhile.
_LOOK_AHEAD = 512


class Memory:
    """Items that wait, and batches of them that somebody has taken. Safe for threads; nothing here does I/O.

    Attributes:
        size: Bytes of all of them.
        count: How many items have ever come.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Item] = deque()  # in the order of their numbers
        self._taken: list[list[Item]] = []
        self.size = 0
        self.count = 0

    def __len__(self) -> int:
        """How many wait in nobody's hands."""
        return len(self._waiting)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is here, in anybody's hands or not."""
        with self._lock:
            return not (self._waiting or self._taken)

    def has(self, key: str) -> bool:
        """Whether something of this trace or run is here."""
        with self._lock:
            return any(item.key == key for item in itertools.chain(self._waiting, *self._taken))

    def has_any_of_first(self, count: int) -> bool:
        """Whether something is left of the first so many items."""
        with self._lock:
            oldest = itertools.chain(itertools.islice(self._waiting, 1), *self._taken)
            return any(item.number <= count for item in oldest)

    def add(self, item: Item, *, unless: Callable[[], bool]) -> bool:
        """Keep an item, unless there is a reason against it, which is asked while nothing moves.

        Returns:
            Whether it is kept.
        """
        with self._lock:
            if unless():
                return False
            self.count += 1
            item.number = self.count
            self._waiting.append(item)
            self.size += item.size
            return True

    def take(self, most: int, most_bytes: int, are_meant: Callable[[Item], bool] | None = None) -> list[Item]:
        """The next batch, traces or one run, each key in order; nothing of what others have in their hands.

        Args:
            most: How many items.
            most_bytes: How many bytes, and the item that exceeds them.
            are_meant: Chooses among them, if given; what follows one that is passed over, of the same key, is so, too.
        """
        batch: list[Item] = []
        size = 0
        with self._lock:
            theirs = {item.key for item in itertools.chain(*self._taken)}
            passed_over: list[Item] = []
            others = 0
            while self._waiting and len(batch) < most and size < most_bytes and others < _LOOK_AHEAD:
                item = self._waiting.popleft()
                # A run is a batch of its own: who waits for it does not wait for traces, or for another one.
                is_other = bool(batch) and run_of(item) != run_of(batch[0])
                others += is_other
                if is_other or item.key in theirs or not (are_meant is None or are_meant(item)):
                    passed_over.append(item)
                    theirs.add(item.key)
                    continue
                batch.append(item)
                size += item.size
            self._waiting.extendleft(reversed(passed_over))
            if batch:
                self._taken.append(batch)
        return batch

    def take_all_of(self, key: str) -> list[Item] | None:
        """All that waits of one trace or run; None where others have some of it in their hands."""
        with self._lock:
            if any(item.key == key for item in itertools.chain(*self._taken)):
                return None
            batch = [item for item in self._waiting if item.key == key]
            if batch:
                self._waiting = deque(item for item in self._waiting if item.key != key)
                self._taken.append(batch)
            return batch

    def is_taken(self, batch: list[Item]) -> bool:
        """Whether a batch is still its taker's, or has been removed by `remove_all`."""
        with self._lock:
            return any(taken is batch for taken in self._taken)

    def give_back(self, batch: list[Item], again: Sequence[Item] = ()) -> None:
        """A batch is dealt with, but for what must be tried again."""
        with self._lock:
            self._taken = [taken for taken in self._taken if taken is not batch]
            self.size -= sum(item.size for item in batch) - sum(item.size for item in again)
            if again:
                self._waiting = deque(sorted([*again, *self._waiting], key=lambda item: item.number))

    def remove(self, keys: Iterable[str]) -> list[Item]:
        """Take what waits of these traces and runs out of here for good."""
        gone = set(keys)
        with self._lock:
            removed = [item for item in self._waiting if item.key in gone]
            if removed:
                self._waiting = deque(item for item in self._waiting if item.key not in gone)
                self.size -= sum(item.size for item in removed)
            return removed

    def remove_all(self) -> list[Item]:
        """Take everything out of here for good, whoever has it in their hands."""
        with self._lock:
            removed = [*itertools.chain(*self._taken), *self._waiting]
            self._waiting.clear()
            self._taken = []
            self.size = 0
            return removed


def run_of(item: Item) -> str | None:
    """The run that an item is an operation on."""
    return item.key if isinstance(item, RunItem) else None
