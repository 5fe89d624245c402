"""Classification of store errors: retry, back off, or refuse for good."""

from __future__ import annotations

import enum
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlflow.exceptions import MlflowException

if TYPE_CHECKING:
    from dspy_mlflow_async.export.operations import Operation
    from dspy_mlflow_async.seams.mlflow_http import Status

# One of our own: the shared one is the program's, which may have seeded it.
_random = random.Random()  # noqa: S311 - no secret


class Verdict(enum.Enum):
    """Verdict on one operation on the store."""

    STORED = "stored"
    AWAY = "away"  # the store cannot be reached, is overloaded, or does not know us: try everything later
    SUSPECT = "suspect"  # failed without a clear reason: try later, and blame the record if others succeed
    REFUSED = "refused"  # never going to work


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one operation: its verdict, and the error if there was one."""

    operation: Operation
    verdict: Verdict
    error: Exception | None = None


# Credentials can be renewed, a proxy be given its routes.
_AWAY_STATUSES = frozenset({401, 403, 407, 408, 425, 429, 502, 503, 504})
# What an ingress says while the service behind it is rolled out, unless MLflow says so itself.
_NOT_ROUTED_STATUSES = frozenset({404, 405, 410, 421})
# What MLflow makes of what `requests` raises.
_HAS_NO_ANSWER = re.compile("API request to .{0,4096} failed with (timeout )?exception ")
# Of errors that have to do with files, those that no store raises by being away: artifacts that may not be written.
_OUR_FILES = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
# SQLAlchemy's words (https://sqlalche.me/e/20/3o7r) for what MLflow calls a bad request, also behind a server.
_TOO_MANY_CONNECTIONS = "QueuePool limit"
# What SQLite, PostgreSQL and MySQL say of a file or a standby that takes nothing now, and psycopg2 of a connection that
# it has lost. MLflow calls all that a bad request, too, but for SQLite's.
_CANNOT_WRITE_NOW = re.compile(
    "readonly database|in a read-only transaction|--(?:super-)?read-only option|connection already closed"
)
# What SQLite, PostgreSQL and MySQL say where MLflow has looked for something, and somebody else has inserted it since.
_WAS_OVERTAKEN = re.compile("UNIQUE constraint failed|duplicate key value violates unique constraint|Duplicate entry")
_SUSPECT_STATUSES = frozenset({422})  # what MLflow's OTLP endpoint says for any failure, a busy database too


def is_away(status: int) -> bool:
    """Return whether an HTTP status says that the server, or what is before it, is not there for us now."""
    return status in _AWAY_STATUSES


def cannot_write_now(error: BaseException) -> bool:
    """Return whether a database says that it may only be read, or that a connection to it is lost."""
    return _CANNOT_WRITE_NOW.search(_said_by_database(error)) is not None


def was_overtaken(error: BaseException) -> bool:
    """Return whether somebody else has inserted the same since MLflow looked for it: another attempt finds it there."""
    return _WAS_OVERTAKEN.search(_said_by_database(error)) is not None


def _said_by_database(error: BaseException) -> str:
    said, _, _ = str(error).partition("[SQL:")  # behind that stands what was to be written
    return said


def classify(error: BaseException, statuses: Sequence[Status] = ()) -> Verdict:
    """Decide what to do about an error of the store. Only MLflow itself can refuse for good.

    Args:
        error: What was raised.
        statuses: The HTTP statuses seen on the way, if there were any.
    """
    if not isinstance(error, MlflowException):
        if isinstance(error, ImportError):
            return Verdict.AWAY  # not installed: whoever has it, `replay` included, sends what waits
        is_away = isinstance(error, OSError) and not isinstance(error, _OUR_FILES)  # also what `requests` raises
        return Verdict.AWAY if is_away else Verdict.SUSPECT
    if _HAS_NO_ANSWER.match(error.message):
        return Verdict.AWAY  # refused, reset, timed out
    last = statuses[-1] if statuses and statuses[-1] >= 300 else None  # noqa: PLR2004 - HTTP: no success
    status = error.get_http_status_code() if last is None or last.is_mlflows else last
    if last in _AWAY_STATUSES or status in _AWAY_STATUSES or _TOO_MANY_CONNECTIONS in error.message:
        return Verdict.AWAY
    if cannot_write_now(error):
        return Verdict.AWAY
    if was_overtaken(error):
        return Verdict.SUSPECT
    if last is not None and not last.is_mlflows:
        return Verdict.AWAY if last in _NOT_ROUTED_STATUSES or last < 400 else Verdict.SUSPECT  # noqa: PLR2004 - HTTP
    is_refused = 400 <= status < 500 and status not in _SUSPECT_STATUSES  # noqa: PLR2004 - HTTP
    return Verdict.REFUSED if is_refused else Verdict.SUSPECT


def blocked_by(operation: Operation, earlier: Iterable[Outcome]) -> Outcome | None:
    """Return the outcome of an operation that comes after others: None where it may be tried.

    Where the store is away nothing further is. What follows an operation on the same trace or run that must be tried
    again would be refused, or come too early.
    """
    for outcome in earlier:
        if outcome.verdict is Verdict.AWAY or (
            outcome.verdict is Verdict.SUSPECT and outcome.operation.key == operation.key
        ):
            return Outcome(operation, outcome.verdict, outcome.error)
    return None


class Backoff:
    """Backoff by growing pauses with full jitter, so that many processes do not come back at once."""

    def __init__(self, first: float = 0.25, longest: float = 30.0) -> None:
        self._first = first
        self._longest = longest
        self._ceiling = first

    def reset(self) -> None:
        """Note that something worked."""
        self._ceiling = self._first

    def pause(self) -> float:
        """Return the seconds to wait before the next attempt."""
        ceiling = self._ceiling
        self._ceiling = min(self._longest, ceiling * 2)
        return ceiling * _random.uniform(0.5, 1.0)
