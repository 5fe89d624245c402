"""Counters of traces: every trace is in exactly one place, and the sum is always right."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

Place = Literal["open", "waiting", "spooled", "stored", "dead", "dropped", "sampled_out"]
_Event = Literal["started", "ended", "left out"]


@dataclass(frozen=True, slots=True)
class ExportStats:
    """Counts of the traces of this process; ``started`` is always the sum of all but ``ended`` and ``in_progress``.

    Attributes:
        started: Traces that began.
        ended: Traces whose root has ended.
        stored: In the store.
        waiting: Ended, in memory, not yet stored.
        spooled: On disk, not yet stored.
        dead: Refused by the store for good; on disk, with the reason.
        dropped: Lost, with a warning: neither the store nor the disk took them.
        sampled_out: Left out on purpose, by ``sample``.
        open: Begun and not ended.
        in_progress: Those of the open ones that are shown with what has ended of them, in state ``IN_PROGRESS``.
    """

    started: int = 0
    ended: int = 0
    stored: int = 0
    waiting: int = 0
    spooled: int = 0
    dead: int = 0
    dropped: int = 0
    sampled_out: int = 0
    open: int = 0
    in_progress: int = 0


class TraceCounters:
    """Counts traces by place.

    Callers only append what happened, so that they share no lock; whoever moves or reads, which is the writer's work
    or somebody's question, adds it up first. What a thread has noted before it hands a trace on is therefore counted
    before that trace moves.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin at zero, with a new lock (a forked child inherits neither)."""
        self._lock = threading.Lock()
        self._noted: deque[_Event] = deque()
        self._started = self._ended = 0
        self._places: dict[Place, int] = dict.fromkeys(
            ("open", "waiting", "spooled", "stored", "dead", "dropped", "sampled_out"), 0
        )

    def start(self) -> None:
        """Count a trace that began."""
        self._noted.append("started")

    def end(self) -> None:
        """Count an open trace whose root ended."""
        self._noted.append("ended")

    def leave_out(self) -> None:
        """Count a trace that was left out before its first span."""
        self._noted.append("left out")

    def forget(self, count: int) -> None:
        """Take open traces off the counters that were handed back to MLflow, and are no longer ours to count."""
        with self._lock:
            self._add_up()
            self._started -= count
            self._places["open"] -= count

    def move(self, source: Place, target: Place, count: int = 1) -> None:
        """Count traces that went from one place to another."""
        if count and source != target:
            with self._lock:
                self._add_up()
                self._places[source] -= count
                self._places[target] += count

    def stats(self) -> ExportStats:
        """Return all counters at one moment."""
        with self._lock:
            self._add_up()
            return ExportStats(started=self._started, ended=self._ended, **self._places)

    def _add_up(self) -> None:
        while self._noted:
            event = self._noted.popleft()  # nobody else takes: the lock is held
            if event == "started":
                self._started += 1
                self._places["open"] += 1
            elif event == "ended":
                self._ended += 1
                self._places["open"] -= 1
                self._places["waiting"] += 1
            else:
                self._started += 1
                self._ended += 1
                self._places["sampled_out"] += 1
