"""Replay of spools: from the command line, and for processes that ended before their store came back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dspy_mlflow_async.export.counters import Counted, TraceCounters
from dspy_mlflow_async.export.options import ExportOptions, spool_root
from dspy_mlflow_async.export.queue.overflow import Overflow
from dspy_mlflow_async.export.queue.pending import Pending, PendingOperations
from dspy_mlflow_async.export.queue.settlement import Settlement
from dspy_mlflow_async.export.queue.store_queue import StoreQueue
from dspy_mlflow_async.export.spool import codec, dead_letters
from dspy_mlflow_async.export.spool.dead_letters import DeadLetter
from dspy_mlflow_async.export.spool.disk import Disk
from dspy_mlflow_async.export.spool.follower import SegmentFollower
from dspy_mlflow_async.export.spool.format import done_offsets, scan
from dspy_mlflow_async.export.spool.paths import Lock, begun, read_file, segments_of, uri_of, why_refused
from dspy_mlflow_async.export.spool.segments import Spool
from dspy_mlflow_async.export.write.errors import Backoff, Outcome, Verdict
from dspy_mlflow_async.seams import mlflow_http, mlflow_store

# How often to try while the store is away, and what fails for no clear reason.
_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class SpoolInfo:
    """Contents of one spool.

    Attributes:
        folder: Where.
        tracking_uri: The store it is for; None if the note about it is lost.
        records: Operations that are not done with (traces, feedback, run results).
        traces: How many of them are whole traces.
        size: Bytes on disk.
        damaged: Stretches that cannot be read.
        dead: Records that the store has refused for good.
        in_use: Whether a living process writes to it.
        refused: Why it is not used, as when it belongs to another user; None for one that is.
        oldest: When the oldest segment was begun, seconds since the epoch; None if there is none.
    """

    folder: Path
    tracking_uri: str | None
    records: int = 0
    traces: int = 0
    size: int = 0
    damaged: int = 0
    dead: int = 0
    in_use: bool = False
    refused: str | None = None
    oldest: float | None = None

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing that anybody should care about."""
        return not (self.records or self.damaged or self.dead or self.refused)


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """Progress of a replay.

    Attributes:
        folder: The spool being sent.
        tracking_uri: Its store.
        done: Records dealt with.
        total: Records found when the replay began.
    """

    folder: Path
    tracking_uri: str | None
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class ReplaySummary:
    """Result of a replay, over all spools.

    Attributes:
        stored: Records that the store has now (those it had already included).
        traces: How many of them are whole traces.
        dead: Records that it refuses for good.
        left: Records still in the spool.
        damaged: Stretches that could not be read.
        skipped: Segments that another process is using.
        errors: Why records are left, one line for each reason.
    """

    stored: int = 0
    traces: int = 0
    dead: int = 0
    left: int = 0
    damaged: int = 0
    skipped: int = 0
    errors: tuple[str, ...] = ()


def spools(root: Path | None = None) -> list[SpoolInfo]:
    """Return the contents of the spools under a folder, by default the configured one."""
    return [_info(folder) for folder in _folders(spool_root(root))]


def replay(
    *,
    tracking_uri: str | None = None,
    folder: Path | None = None,
    dry_run: bool = False,
    progress: Callable[[ReplayProgress], None] | None = None,
    revive: Callable[[DeadLetter], bool] | None = None,
) -> ReplaySummary:
    """Send what lies in spools. Interrupted or run several times at once, it neither loses nor doubles anything.

    Args:
        tracking_uri: Send only the spool of this store; with ``folder``, send that spool to this store.
        folder: One spool, or a folder of spools; by default the configured one.
        dry_run: Only count.
        progress: Called after each batch.
        revive: Chooses dead letters to send, too.
    """
    summary = ReplaySummary()
    uri = _absolute(tracking_uri)
    unbound = mlflow_http.bound_http()
    try:
        for path in _chosen(folder, uri):
            target = (uri or uri_of(path)) if why_refused(path) is None else None
            if dry_run and why_refused(path) is None:
                info = _info(path)
                summary = replace(
                    summary,
                    left=summary.left + info.records,
                    traces=summary.traces + info.traces,
                    damaged=summary.damaged + info.damaged,
                )
            elif target is None:
                reason = why_refused(path)
                said = "no tracking URI that fits it is known, give one" if reason is None else f"not used: {reason}"
                summary = replace(summary, errors=(*summary.errors, f"{path}: {said}"))
            else:
                if revive is not None:
                    dead_letters.revive(path, target, revive)
                summary = _send(path, target, summary, progress)
    finally:
        unbound()
    return summary


def letters(*, tracking_uri: str | None = None, folder: Path | None = None) -> list[DeadLetter]:
    """Return the dead letters of the spools that ``replay`` would send with the same arguments."""
    return [letter for path in _chosen(folder, _absolute(tracking_uri)) for letter in dead_letters.read(path)]


def _absolute(tracking_uri: str | None) -> str | None:
    return mlflow_store.absolute_uri(mlflow_store.resolve_tracking_uri(tracking_uri)) if tracking_uri else None


def _chosen(folder: Path | None, uri: str | None) -> list[Path]:
    if folder is not None and _is_spool(folder):
        return [folder]
    root = folder if folder is not None else spool_root()
    if uri is not None:
        return [path for path in _folders(root) if uri_of(path) == uri]
    return _folders(root)


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and _is_spool(path))
    except OSError:
        return []


def _is_spool(folder: Path) -> bool:
    return uri_of(folder) is not None or any(folder.glob("*.seg"))


def _info(folder: Path) -> SpoolInfo:
    info = SpoolInfo(folder, uri_of(folder), refused=why_refused(folder))
    if info.refused is not None:
        return info
    records = traces = size = damaged = 0
    in_use = False
    paths = segments_of(folder)
    for segment in paths:
        for _, payload in pending(segment):
            if payload is None:
                damaged += 1
            else:
                records += 1
                traces += codec.peek(payload)[1]
        with contextlib.suppress(OSError):
            size += segment.stat().st_size
        lock = Lock(segment)
        if lock.acquire():
            lock.release()
        else:
            in_use = True
    dead = len(dead_letters.read(folder))
    oldest = begun(paths[0]) / 1e9 if paths else None
    return replace(
        info, records=records, traces=traces, size=size, damaged=damaged, dead=dead, in_use=in_use, oldest=oldest
    )


def pending(segment: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield the records of a segment that are not done with, and its damaged stretches as None."""
    done = done_offsets(segment)
    try:
        data = read_file(segment)
    except OSError:
        return
    for offset, payload in scan(data):
        if offset not in done:
            yield offset, payload


def _send(
    folder: Path, uri: str, summary: ReplaySummary, progress: Callable[[ReplayProgress], None] | None
) -> ReplaySummary:
    queue = _ReplayQueue(folder, uri)
    try:
        queue.find()
        total = len(queue.pending)
        while queue.send_batch():
            if progress is not None:
                progress(ReplayProgress(folder, uri, queue.done, max(total, queue.done)))
        return _sum(summary, queue.summary())
    finally:
        queue.spool.close()


def _sum(one: ReplaySummary, other: ReplaySummary) -> ReplaySummary:
    return ReplaySummary(
        stored=one.stored + other.stored,
        traces=one.traces + other.traces,
        dead=one.dead + other.dead,
        left=one.left + other.left,
        damaged=one.damaged + other.damaged,
        skipped=one.skipped + other.skipped,
        errors=tuple(dict.fromkeys((*one.errors, *other.errors))),
    )


class _ReplaySettlement(Settlement):
    """Settlement that counts what becomes of records, and keeps why some are left."""

    def __init__(self, pending: PendingOperations, overflow: Overflow, disk: Disk) -> None:
        super().__init__(pending, overflow, disk)
        self.stored = self.traces = self.dead = 0
        self.left: list[str] = []  # why records stay that are not tried again
        self.reasons: dict[str, str] = {}  # why something of a key is left

    def settle(self, entry: Pending, outcome: Outcome) -> None:
        """Note what has become of an operation, and count it."""
        super().settle(entry, outcome)
        if outcome.verdict is Verdict.STORED:
            self.stored += 1
            self.traces += entry.counted == Counted.TRACE
        elif outcome.verdict is not Verdict.REFUSED:
            self.reasons[entry.key] = f"{type(outcome.error).__name__}: {outcome.error}"[:300]

    def refuse(self, entry: Pending, outcome: Outcome) -> bool:
        """Give up what the store never takes, and count it."""
        is_dead = super().refuse(entry, outcome)
        if is_dead:
            self.dead += 1
        else:
            self.left.append(f"no dead letter can be written: {outcome.error}"[:300])
        return is_dead

    def leave_alone(self, entry: Pending, error: codec.UnreadableError) -> None:
        """Keep a record that this version cannot read, and say so."""
        super().leave_alone(entry, error)
        if entry.reference is not None:
            self.left.append(f"{entry.reference.segment.name}: {error}")


class _ReplayQueue(StoreQueue):
    """Queue over what others have left in a spool, written in the thread of whoever asks for it."""

    settlement: _ReplaySettlement
    settles = _ReplaySettlement

    def __init__(self, folder: Path, uri: str) -> None:
        self._follower = SegmentFollower(folder, counts=True, follows_living=False)
        super().__init__(ExportOptions(), TraceCounters(), uri, Spool(folder, uri, follower=self._follower))
        self._skipped = 0
        self._round = 0  # how often each suspect has been tried
        self._pauses = Backoff()

    @property
    def done(self) -> int:
        """Number of records dealt with."""
        return self.settlement.stored + self.settlement.dead

    def find(self) -> None:
        """Take what nobody else has, with its locks."""
        self.enqueue_spooled(self.spool.adopt())
        self._skipped = sum(segment not in self._follower for segment in segments_of(self.spool.folder))

    def send_batch(self) -> bool:
        """Write a batch, after a pause where the last one failed.

        Returns:
            Whether there was something that is worth another attempt.
        """
        if not len(self.pending) or self.availability.failures == _ATTEMPTS:
            return False
        if self.pending.has_only_suspects(self.pending.last):
            tries = self.pending.tries_of_suspects()
            if tries >= _ATTEMPTS:
                return False
            if tries > self._round:
                self._round = tries
                time.sleep(self._pauses.pause())
            self.pending.hurry()
        time.sleep(max(0.0, self.availability.away_until - time.monotonic()))
        self.availability.begin()
        return self._write_batch()

    def _found_away(self, error: Exception | None) -> None:  # noqa: ARG002 - whoever asked is told in the end
        self.availability.pause(self.availability.fail())

    def summary(self) -> ReplaySummary:
        """Return what has been done so far."""
        found = self.settlement
        reasons = sorted({reason for key, reason in found.reasons.items() if self.pending.has(key)})
        return ReplaySummary(
            stored=found.stored,
            traces=found.traces,
            dead=found.dead,
            left=len(self.pending) + len(found.left),
            damaged=self._follower.damaged,
            skipped=self._skipped,
            errors=tuple(dict.fromkeys((*found.left, *reasons))),
        )
