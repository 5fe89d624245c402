"""Counters of traces: every trace is in exactly one place, and the sum is always right."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

Place = Literal["open", "waiting", "spooled", "stored", "dead", "dropped", "sampled_out"]
_Event = Literal["started", "ended", "left out", "remote span"]


class Counted(IntEnum):
    """Thing that an operation carries for the counters. Records of the spool have it as a digit."""

    NOTHING = 0
    TRACE = 1
    REMOTE_SPAN = 2


@dataclass(frozen=True, slots=True)
class RemoteSpanCounts:
    """Counts of the ended spans of this process whose trace began in another one, by where they are now.

    Attributes:
        ended: All of them: the sum of the others.
        stored: In the store.
        waiting: In memory, not yet stored.
        spooled: On disk, not yet stored.
        dead: Refused by the store for good; on disk, with the reason.
        dropped: Lost, with a warning.
    """

    ended: int = 0
    stored: int = 0
    waiting: int = 0
    spooled: int = 0
    dead: int = 0
    dropped: int = 0


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
        remote_spans: Spans of traces that began in another process, which counts those traces.
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
    remote_spans: RemoteSpanCounts = field(default_factory=RemoteSpanCounts)


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
        self._remote: dict[Place, int] = dict.fromkeys(("waiting", "spooled", "stored", "dead", "dropped"), 0)

    def start(self) -> None:
        """Count a trace that began."""
        self._noted.append("started")

    def end(self) -> None:
        """Count an open trace whose root ended."""
        self._noted.append("ended")

    def leave_out(self) -> None:
        """Count a trace that was left out before its first span."""
        self._noted.append("left out")

    def take_remote_span(self) -> None:
        """Count a span that ended, of a trace that began in another process."""
        self._noted.append("remote span")

    def forget(self, count: int) -> None:
        """Take open traces off the counters that were handed back to MLflow, and are no longer ours to count."""
        with self._lock:
            self._add_up()
            self._started -= count
            self._places["open"] -= count

    def move(self, source: Place, target: Place, counted: int = Counted.TRACE) -> None:
        """Count a trace, or a span of another process's trace, that went from one place to another."""
        if counted and source != target:
            places = self._remote if counted == Counted.REMOTE_SPAN else self._places
            with self._lock:
                self._add_up()
                places[source] -= 1
                places[target] += 1

    def stats(self) -> ExportStats:
        """Return all counters at one moment."""
        with self._lock:
            self._add_up()
            remote = RemoteSpanCounts(ended=sum(self._remote.values()), **self._remote)
            return ExportStats(started=self._started, ended=self._ended, remote_spans=remote, **self._places)

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
            elif event == "remote span":
                self._remote["waiting"] += 1
            else:
                self._started += 1
                self._ended += 1
                self._places["sampled_out"] += 1
