"""Sends what lies in spools: from the command line, and for processes that ended before their store came back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from dspy_mlflow_async.export import codec, dead_letters, spool
from dspy_mlflow_async.export.dead_letters import DeadLetter
from dspy_mlflow_async.export.folder import read_file, uri_of, why_refused
from dspy_mlflow_async.export.items import Item
from dspy_mlflow_async.export.lock import Lock
from dspy_mlflow_async.export.options import spool_root
from dspy_mlflow_async.export.retry import Backoff, Verdict
from dspy_mlflow_async.export.writer import Writer
from dspy_mlflow_async.seams import mlflow_http, mlflow_store

_BATCH = 32
_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class SpoolInfo:
    """What lies in one spool.

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
        """Whether there is nothing that anybody should care about."""
        return not (self.records or self.damaged or self.dead or self.refused)


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """How far a replay has come.

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
    """What a replay has done, over all spools.

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
    """What lies in the spools under a folder, by default the configured one."""
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
                summary = _send(path, Writer(target), summary, progress)
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
    paths = spool.segments(folder)
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
    oldest = spool.begun(paths[0]) / 1e9 if paths else None
    return replace(
        info, records=records, traces=traces, size=size, damaged=damaged, dead=dead, in_use=in_use, oldest=oldest
    )


def pending(segment: Path) -> Iterator[tuple[int, bytes | None]]:
    """The records of a segment that are not done with, and its damaged stretches as None."""
    done = spool.done_offsets(segment)
    try:
        data = read_file(segment)
    except OSError:
        return
    for offset, payload in spool.scan(data):
        if offset not in done:
            yield offset, payload


def _send(
    folder: Path, writer: Writer, summary: ReplaySummary, progress: Callable[[ReplayProgress], None] | None
) -> ReplaySummary:
    total = sum(payload is not None for segment in spool.segments(folder) for _, payload in pending(segment))
    before = summary.stored + summary.dead
    waits = Waits()
    for segment in spool.segments(folder):
        lock = Lock(segment)
        if not segment.exists() or not lock.acquire():
            summary = replace(summary, skipped=summary.skipped + segment.exists())
            continue
        try:
            for step in drain(segment, writer, waits):
                summary = add(summary, step)
                if progress is not None:
                    done = summary.stored + summary.dead - before
                    progress(ReplayProgress(folder, writer.uri, done, max(total, done)))
        finally:
            lock.release()
    return summary


def add(one: ReplaySummary, other: ReplaySummary) -> ReplaySummary:
    """The sum of two summaries."""
    return ReplaySummary(
        stored=one.stored + other.stored,
        traces=one.traces + other.traces,
        dead=one.dead + other.dead,
        left=one.left + other.left,
        damaged=one.damaged + other.damaged,
        skipped=one.skipped + other.skipped,
        errors=tuple(dict.fromkeys((*one.errors, *other.errors))),
    )


@dataclass(slots=True)
class Waits:
    """What keeps records of a spool from being sent now.

    Attributes:
        keys: Of records that did not go through: what follows must wait for them.
        is_away: Whether the store is.
    """

    keys: set[str] = field(default_factory=set)
    is_away: bool = False


def drain(
    segment: Path, writer: Writer, waits: Waits | None = None, *, attempts: int = _ATTEMPTS
) -> Iterator[ReplaySummary]:
    """Send one segment, whose lock the caller holds, and delete it when nothing is left.

    Args:
        segment: The segment.
        writer: For the store to send to.
        waits: Shared by the segments of one spool, which are drained in order.
        attempts: How often to try a batch while the store is away.

    Yields:
        What each batch added to the summary.
    """
    batch: list[tuple[int, bytes, Item]] = []
    waits = waits or Waits()
    records = list(pending(segment))
    readable = [(offset, payload) for offset, payload in records if payload is not None]
    if damaged := len(records) - len(readable):
        yield ReplaySummary(damaged=damaged)
    left = 0
    if waits.is_away:
        yield ReplaySummary(left=len(readable))
        return
    for number, (offset, payload) in enumerate(readable, 1):
        item, step = _read(segment, payload, waits)
        if item is not None:
            batch.append((offset, payload, item))
        elif step is not None:
            left += step.left
            yield step
        if batch and (len(batch) >= _BATCH or number == len(readable)):
            step = _write(segment, writer, batch, attempts, waits)
            batch = []
            left += step.left
            yield step
            if waits.is_away:
                yield ReplaySummary(left=len(readable) - number)
                return
    if not left:
        if damaged:
            with contextlib.suppress(OSError):
                segment.rename(segment.with_suffix(".damaged"))
        spool.remove(segment)


def _read(segment: Path, payload: bytes, waits: Waits) -> tuple[Item | None, ReplaySummary | None]:
    """The item of a record that may be sent now, or what became of it instead."""
    try:
        item = codec.decode(payload)
    except Exception as error:  # noqa: BLE001 - another version's record, or one that lies
        return None, ReplaySummary(left=1, errors=(f"{segment.name}: {error}",))
    return (None, ReplaySummary(left=1)) if item.key in waits.keys else (item, None)


def _write(
    segment: Path, writer: Writer, batch: list[tuple[int, bytes, Item]], attempts: int, waits: Waits
) -> ReplaySummary:
    """Write a batch; what did not go through, and what follows it, ``waits``."""
    backoff = Backoff()
    summary = ReplaySummary()
    todo = batch
    for attempt in range(attempts):
        outcomes = writer.write([item for _, _, item in todo])
        again: list[tuple[int, bytes, Item]] = []
        stored: list[int] = []
        errors: set[str] = set()
        by_item = {id(outcome.item): outcome for outcome in outcomes}
        for offset, payload, item in todo:
            outcome = by_item[id(item)]
            reason = f"{type(outcome.error).__name__}: {outcome.error}"
            if outcome.verdict is Verdict.STORED:
                stored.append(offset)
                summary = replace(summary, stored=summary.stored + 1, traces=summary.traces + item.counted)
            elif outcome.verdict is Verdict.REFUSED:
                dead_letters.append(segment.parent, writer.uri, payload, reason)
                spool.mark_done(segment, [offset], stored=False)
                summary = replace(summary, dead=summary.dead + 1)
            else:
                errors.add(reason[:300])
                again.append((offset, payload, item))
                if attempt == attempts - 1:
                    waits.keys.add(item.key)
                    waits.is_away = waits.is_away or outcome.verdict is Verdict.AWAY
        if stored:
            spool.mark_done(segment, stored)
        todo = again
        if not todo:
            return summary
        if attempt < attempts - 1:
            time.sleep(backoff.pause())
    return replace(summary, left=len(todo), errors=tuple(sorted(errors)))
