"""How a call ended: ``ok``, ``error``, ``cancelled``, ``abandoned`` or ``late``."""

from __future__ import annotations

import asyncio
import sys
import traceback
from concurrent.futures import CancelledError
from typing import NamedTuple

OK = "ok"
ERROR = "error"
CANCELLED = "cancelled"
ABANDONED = "abandoned"
LATE = "late"


class Failure(NamedTuple):
    """What an exception tells of a call that it ended.

    Attributes:
        outcome: ``error``, ``cancelled`` or ``abandoned``.
        type: The exception's class name.
        message: Its text; never empty.
        stacktrace: As ``traceback`` prints it.
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
    except Exception:  # noqa: BLE001 - str() runs the user's code
        message = ""
    try:
        stacktrace = "".join(traceback.format_exception(error)).strip()
    except Exception:  # noqa: BLE001 - a __str__ or __repr__ in the chain may raise
        stacktrace = kind
    return Failure(outcome_of(error), kind, message or kind, stacktrace)


ABANDONED_FAILURE = Failure(
    ABANDONED, "Abandoned", "The call was dropped before it ended; nothing holds it any more.", ""
)


def outcome_of(error: BaseException) -> str:
    """``error``, ``cancelled`` or ``abandoned``."""
    if isinstance(error, GeneratorExit):  # its coroutine was closed, or collected, before it could end
        return ABANDONED
    if isinstance(error, (asyncio.CancelledError, CancelledError, KeyboardInterrupt)):
        return CANCELLED
    trio = sys.modules.get("trio")
    if trio is not None and isinstance(error, trio.Cancelled):
        return CANCELLED
    return ERROR
