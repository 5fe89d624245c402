"""Outcome of a call: ``ok``, ``error``, ``cancelled``, ``abandoned`` or ``late``."""

from __future__ import annotations

import asyncio
import builtins
import sys
import traceback
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

from dspy_mlflow_async.spans.safe_inspection import contain

OK = "ok"
ERROR = "error"
CANCELLED = "cancelled"
ABANDONED = "abandoned"
LATE = "late"


class Failure(NamedTuple):
    """Outcome, type, message and stack trace of an exception that ended a call.

    Attributes:
        outcome: ``error``, ``cancelled`` or ``abandoned``.
        type: The exception's class name.
        message: Its text; never empty.
        stacktrace: As ``traceback`` prints it, but for calls and causes that are many.
    """

    outcome: str
    type: str
    message: str
    stacktrace: str


def failure_of(error: BaseException) -> Failure:
    """Describe the exception that a call ended with."""
    kind = type(error).__name__
    try:
        message = str(error)
    except BaseException as failure:  # noqa: BLE001 - str() runs the user's code
        contain(failure)
        message = ""
    try:
        stacktrace = stacktrace_of(error)
    except BaseException as failure:  # noqa: BLE001 - a __str__ or __repr__ in the chain may raise
        contain(failure)
        stacktrace = kind
    return Failure(outcome_of(error), kind, message or kind, stacktrace)


MAX_CALLS = 24  # of a stack trace, the innermost; each span around shows those that lead to it
MAX_CAUSES = 8


def stacktrace_of(error: BaseException) -> str:
    """Stack trace of an exception as ``traceback`` prints it: its innermost calls and those of its nearest causes.

    A traceback grows by some calls with each span that it passes through, and each of these stores one.
    """
    calls = sum(1 for _ in traceback.walk_tb(error.__traceback__))
    told = traceback.TracebackException(type(error), error, error.__traceback__, limit=-MAX_CALLS, compact=True)
    notes = [f"[cut: {calls - MAX_CALLS} of {calls} calls are left out]\n"] if calls > MAX_CALLS else []
    nearest = told
    for _ in range(MAX_CAUSES):
        further = nearest.__cause__ or nearest.__context__
        if further is None:
            break
        nearest = further
    else:
        if nearest.__cause__ or nearest.__context__:
            nearest.__cause__ = nearest.__context__ = None
            notes.append("[cut: earlier exceptions are left out]\n")
    return "".join([*notes, *told.format()]).strip()


ABANDONED_FAILURE = Failure(
    ABANDONED, "Abandoned", "The call was dropped before it ended; nothing holds it any more.", ""
)


def outcome_of(error: BaseException) -> str:
    """Return ``error``, ``cancelled`` or ``abandoned`` for an exception.

    A group is what all of its exceptions are: a nursery that is cancelled raises a group of cancellations.
    """
    outcomes = {_outcome_of_one(leaf) for leaf in _leaves(error)}
    if len(outcomes) == 1:
        return outcomes.pop()
    return ERROR if ERROR in outcomes else CANCELLED


def _outcome_of_one(error: BaseException) -> str:
    if isinstance(error, GeneratorExit):  # its coroutine was closed, or collected, before it could end
        return ABANDONED
    if isinstance(error, (asyncio.CancelledError, CancelledError, KeyboardInterrupt)):
        return CANCELLED
    trio = sys.modules.get("trio")
    if trio is not None and isinstance(error, trio.Cancelled):
        return CANCELLED
    return ERROR


def _leaves(error: BaseException) -> list[BaseException]:
    """The exceptions of a group and of the groups in it, without recursion; any other exception by itself."""
    group = _group_type()
    leaves, waiting = [], [error]
    while waiting:
        each = waiting.pop()
        if group is not None and isinstance(each, group):
            waiting.extend(each.exceptions)
        else:
            leaves.append(each)
    return leaves


def _group_type() -> Any:
    """Return ``BaseExceptionGroup``; on Python 3.10 that of the backport, if anybody has imported it."""
    own = getattr(builtins, "BaseExceptionGroup", None)
    return own or getattr(sys.modules.get("exceptiongroup"), "BaseExceptionGroup", None)
