"""Availability of a store: one circuit breaker for the writer, for callers who wait, and for the child process."""

from __future__ import annotations

import threading
import time

from dspy_mlflow_async.export.write.errors import Backoff

# Writes in a row that fail before the store counts as away.
ATTEMPTS = 3
# After a wait in vain of so many seconds nobody waits for so many.
_LONG_WAIT = 2.0
_WAITS_AGAIN = 30.0


class Availability:
    """Circuit breaker of one store, set by attempts to write to it. Safe for threads.

    Attributes:
        attempts: How many attempts have begun.
        failures: How many in a row have found the store away.
        away_at: The last attempt that found it away for a while; who came before that began waits no longer.
        lets_wait: Whether callers may wait for the store at all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._backoff = Backoff()
        self._away_until = 0.0  # monotonic
        self._waits_again_at = 0.0  # monotonic
        self._hurried = 0  # the attempt under way, or the last one, when somebody asked for one at once
        self.attempts = 0
        self.failures = 0
        self.away_at = 0
        self.lets_wait = True

    @property
    def away_until(self) -> float:
        """Time of the next attempt, by the monotonic clock."""
        return self._away_until

    @property
    def is_away(self) -> bool:
        """Return whether no attempt is worth it now."""
        return time.monotonic() < self._away_until

    def may_wait(self) -> bool:
        """Return whether a caller may wait for the store: it was not found away a moment ago."""
        return self.lets_wait and time.monotonic() >= max(self._waits_again_at, self._away_until)

    def note_wait(self, begun: float) -> None:
        """Note that somebody has waited in vain since ``begun``: where that was long, nobody else does for a while."""
        if time.monotonic() - begun > _LONG_WAIT:
            self._waits_again_at = time.monotonic() + _WAITS_AGAIN

    def begin(self) -> None:
        """Note that an attempt begins."""
        with self._lock:
            self.attempts += 1

    def succeed(self) -> None:
        """Note that the store answered."""
        with self._lock:
            self.failures = 0
            self._away_until = self._waits_again_at = 0.0
            self._backoff.reset()

    def fail(self) -> float:
        """Note that an attempt found the store away.

        Returns:
            Seconds to pause.
        """
        with self._lock:
            self.failures += 1
            return self._backoff.pause()

    def pause(self, seconds: float) -> None:
        """Pause attempts for so long, unless somebody who asked for one came while the last one was under way."""
        with self._lock:
            self._away_until = 0.0 if self._hurried == self.attempts else time.monotonic() + seconds

    def give_up(self) -> None:
        """Let those who wait for what came before the last attempt know that waiting does not help now."""
        with self._lock:
            self.away_at = self.attempts

    def hurry(self) -> None:
        """Allow an attempt now, whatever pause was meant to be kept."""
        with self._lock:
            self._hurried = self.attempts
            self._away_until = 0.0
