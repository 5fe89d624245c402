"""Gate that keeps `fork` out of a write: SQLite's locks, copied into the child, would never be released there."""

from __future__ import annotations

import threading
from types import TracebackType

# https://www.sqlite.org/howtocorrupt.html, section 2.6: connections and their locks do not survive a fork.
_LONGEST_WAIT = 20.0  # as long as MLflow lets SQLite wait for a lock


class ForkGate:
    """Gate between writes and forks: any number of writes may be inside; a fork waits, bounded, until none is."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew, as a forked child does: whoever was inside is in the parent."""
        self._condition = threading.Condition()
        self._inside = 0
        self._is_closed = False

    def __enter__(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._is_closed, _LONGEST_WAIT)
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._condition:
            self._inside -= 1
            self._condition.notify_all()

    def close(self) -> None:
        """Close the gate, and wait until nobody is inside."""
        with self._condition:
            self._is_closed = True
            self._condition.wait_for(lambda: self._inside == 0, _LONGEST_WAIT)

    def open(self) -> None:
        """Open the gate again."""
        with self._condition:
            self._is_closed = False
            self._condition.notify_all()


# Set when Python is about to be taken down and all is on the disk: no further request is begun, in a batch under way
# either, and what is left of it counts as not tried.
is_over = threading.Event()
writes = ForkGate()  # one per process, as SQLite's locks are
