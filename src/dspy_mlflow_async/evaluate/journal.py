"""Journal of a case's finished examples in its run's artifacts, so that an interrupted evaluation can go on.

An artifact cannot be appended to, and one that is being replaced when the process is killed may be lost. So each part
is written to two files in turn, and the fuller one that can be read counts.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import dspy

from dspy_mlflow_async import export
from dspy_mlflow_async.evaluate import local_records
from dspy_mlflow_async.evaluate.example_result import Outcome, number_of
from dspy_mlflow_async.evaluate.fingerprint import MAX_VALUE_BYTES
from dspy_mlflow_async.evaluate.local_records import LocalCopy
from dspy_mlflow_async.runs.handle import RunHandle
from dspy_mlflow_async.seams import mlflow_artifact_reads as artifacts
from dspy_mlflow_async.seams import mlflow_store
from dspy_mlflow_async.spans.door import MAX_FAILURE_BYTES, Door
from dspy_mlflow_async.workers import run_uninterrupted

logger = logging.getLogger("dspy_mlflow_async")

FOLDER = "examples"
PART_SIZE = 256  # records; what is written again with each one that is added
_RETRY_SECONDS = 1.0
_CLOSE_SECONDS = 10.0


class Journal:
    """Write outcomes to the artifacts of a run, in the background of an event loop.

    Args:
        run: The run.
        keys: The fingerprint of each example of the devset.
        stored: What earlier processes have written.
        door: What is written passes it.
    """

    def __init__(self, run: RunHandle, keys: Sequence[str], stored: Stored, door: Door) -> None:
        self._run = run
        self._door = door
        self._keys = keys
        self._part = stored.next_part
        self._turn = 0
        self._lines: list[str] = []
        self._waiting: list[str] = list(stored.unstored)
        self._news = anyio.Event()
        self._is_closing = False
        self._has_warned = False
        self._local = LocalCopy(run.key)

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome: on this machine now, in the store soon."""
        record = record_of(outcome, self._keys[outcome.index], self._door)
        self._local.add(record)
        self._waiting.append(record)
        self._news.set()

    def close(self) -> None:
        """Let ``keep`` end when all is written."""
        self._is_closing = True
        self._news.set()

    async def keep(self) -> None:
        """Write what is added, until ``close``."""
        while not (self._is_closing and not self._waiting):
            await self._news.wait()
            self._news = anyio.Event()
            began = time.monotonic()
            is_written = await self._write(run_uninterrupted)
            if not self._is_closing:  # one fifth of the time at most
                await anyio.sleep(4 * (time.monotonic() - began) if is_written else _RETRY_SECONDS)
            elif not is_written:
                return
            if self._waiting or self._is_closing:
                self._news.set()

    async def end(self) -> None:
        """Write what is left when ``keep`` was cancelled, perhaps before it began; then nothing more is kept."""
        try:
            with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
                await self._write(functools.partial(anyio.to_thread.run_sync, abandon_on_cancel=True))
            if self._waiting and self._run.is_pending:  # the queue brings it when the run is there
                text = "\n".join([*self._lines, *self._waiting]) + "\n"
                self._run.picture(self._path(), text.encode())
        finally:
            self._local.close(is_stored=not self._waiting)

    def _path(self) -> str:
        return f"{FOLDER}/{self._part:05}-{'ab'[self._turn]}.jsonl"

    async def _write(self, in_thread: Callable[..., Awaitable[Any]]) -> bool:
        if not self._waiting:
            return True
        taken = list(self._waiting)
        lines = [*self._lines, *taken]
        if self._run.is_pending:  # the copy on this machine is there
            return False
        try:
            await in_thread(_log_text, self._run.run_id, self._path(), "\n".join(lines) + "\n")
        except Exception as error:  # noqa: BLE001 - the store may fail in any way; the evaluation goes on
            if not self._has_warned:
                self._has_warned = True
                logger.warning("Finished examples cannot be stored now, for a resume; trying again: %s", error)
            return False
        del self._waiting[: len(taken)]  # not before: a cancellation may come in between
        self._lines, self._turn = lines, 1 - self._turn
        if len(lines) >= PART_SIZE:
            self._lines, self._part = [], self._part + 1
        return True


def _log_text(run_id: str, path: str, text: str) -> None:
    # In a thread of ours: a client of its own would import things each time.
    mlflow_store.client_of(mlflow_store.resolve_tracking_uri()).log_text(run_id, text, path)


@dataclass(frozen=True, slots=True)
class Stored:
    """Contents of the journals of earlier processes.

    Attributes:
        outcomes: The outcomes by place in the devset.
        unstored: Records that are on this machine alone.
        next_part: The number of the first part that is not written.
    """

    outcomes: Mapping[int, Outcome] = field(default_factory=dict)
    unstored: Sequence[str] = ()
    next_part: int = 0


def read(run: Any, keys: Sequence[str]) -> Stored:
    """Read the journals of a run.

    Args:
        run: MLflow's run.
        keys: The fingerprint of each example of the devset; records of other examples do not count.
    """
    lines, next_part = _stored_lines(run)
    found = {outcome.index: outcome for outcome, _ in _outcomes(lines, keys)}
    kept = [
        line
        for name in (run.data.tags.get(export.CREATION_TAG), run.info.run_id)
        if name is not None
        for line in local_records.read(name)
    ]
    here = {outcome.index: (outcome, line) for outcome, line in _outcomes(kept, keys)}
    unstored = [line for index, (_, line) in here.items() if index not in found]
    return Stored({index: outcome for index, (outcome, _) in here.items()} | found, unstored, next_part)


def errors(run: Any) -> list[str]:
    """Return what the examples that are stored in a run have raised, in devset order."""
    found: dict[int, str | None] = {}
    for line in _stored_lines(run)[0]:
        try:
            record = json.loads(line)
            place, error = int(record["index"]), record["error"]
        except (ValueError, KeyError, TypeError):
            continue
        found[place] = error
    return [error for _, error in sorted(found.items()) if error is not None]


def finished(run: Any) -> list[Outcome]:
    """Return what a run tells of the examples that have ended, in devset order, whatever its devset."""
    found: dict[int, Outcome] = {}
    for line in [*_stored_lines(run)[0], *local_records.read(run.info.run_id)]:
        try:
            outcome, _ = outcome_of(json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue
        found[outcome.index] = outcome
    return [found[place] for place in sorted(found)]


def _stored_lines(run: Any) -> tuple[list[str], int]:
    """Return the records in a run's artifacts, and the number of the first part that is not written."""
    lines: list[str] = []
    next_part = 0
    for path in artifacts.names(run, FOLDER):
        next_part = int(Path(path).name.partition("-")[0]) + 1
        lines += (artifacts.read(run, path) or b"").decode("utf-8", "replace").splitlines()
    return lines, next_part


def _outcomes(lines: Iterable[str], keys: Sequence[str]) -> Iterator[tuple[Outcome, str]]:
    """Yield the outcomes that some lines tell of, each with its line."""
    for line in lines:
        try:
            outcome, key = outcome_of(json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue
        if outcome.index < len(keys) and keys[outcome.index] == key:
            yield outcome, line


def record_of(outcome: Outcome, key: str, door: Door) -> str:
    """Encode an outcome as a line of JSON."""
    plain = door.plain(MAX_VALUE_BYTES)
    return json.dumps(
        {
            "index": outcome.index,
            "key": key,
            "score": _plain_score(outcome.score, plain),
            "prediction": _plain_prediction(outcome.prediction, plain),
            "error": None if outcome.error is None else door.text(outcome.error, MAX_FAILURE_BYTES),
            "duration": outcome.duration,
            "trace_id": outcome.trace_id,
            "program_tokens": {model: dict(counted) for model, counted in outcome.program_tokens.items()},
            "metric_tokens": {model: dict(counted) for model, counted in outcome.metric_tokens.items()},
        }
    )


def outcome_of(record: Mapping[str, Any]) -> tuple[Outcome, str]:
    """Return the outcome that a record tells of, and the fingerprint of its example.

    Raises:
        KeyError: For a record that lacks something.
    """
    outcome = Outcome(
        int(record["index"]),
        prediction=_restored(record["prediction"]),
        score=_restored(record["score"]),
        error=record["error"],
        duration=record["duration"],
        trace_id=record["trace_id"],
        program_tokens=record["program_tokens"],
        metric_tokens=record["metric_tokens"],
    )
    return outcome, str(record["key"])


def _plain_score(score: Any, plain: Callable[[Any], Any]) -> Any:
    if score is None or isinstance(score, (bool, int, float)):
        return {"value": score}
    if isinstance(score, dspy.Prediction):  # its number as one: as a text it could not be added up
        return {"fields": plain(dict(score.items()) | {"score": number_of(score)})}
    return {"value": number_of(score)}


def _plain_prediction(prediction: Any, plain: Callable[[Any], Any]) -> Any:
    if isinstance(prediction, dspy.Prediction):
        return {"fields": plain(dict(prediction.items()))}
    return {"value": plain(prediction)}


def _restored(stored: Mapping[str, Any]) -> Any:
    return dspy.Prediction(**stored["fields"]) if "fields" in stored else stored["value"]
