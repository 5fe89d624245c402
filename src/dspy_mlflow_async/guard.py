"""One boundary between the tracer's own errors and the program that it traces.

Any exception inside the tracer is logged once per place with its traceback, counted, and swallowed, because
an observer must never change the observed. With ``DSPY_MLFLOW_ASYNC_STRICT=1`` (the test suite) it is raised.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from dspy_mlflow_async.printable import PrintableFilter

logger = logging.getLogger("dspy_mlflow_async")
logger.addFilter(PrintableFilter())  # every room logs to this one

_Function = TypeVar("_Function", bound=Callable[..., Any])

_lock = threading.Lock()
_errors_by_place: dict[str, int] = {}


def is_strict() -> bool:
    """Return whether internal errors are raised, as they are in the test suite."""
    return os.environ.get("DSPY_MLFLOW_ASYNC_STRICT") == "1"


def internal_errors() -> int:
    """Return the number of errors of its own that the tracer has swallowed in this process."""
    return sum(errors_by_place().values())


def errors_by_place() -> dict[str, int]:
    """Return the number of errors that were swallowed, by the function that failed."""
    with _lock:
        return dict(_errors_by_place)


def report(place: str, error: Exception) -> None:
    """Count ``error`` and log it, with its traceback, unless ``place`` has been logged before.

    Args:
        place: The function that failed, as a dotted name.
        error: The exception it raised.

    Raises:
        Exception: ``error`` itself, in strict mode.
    """
    with _lock:
        _errors_by_place[place] = _errors_by_place.get(place, 0) + 1
        is_first = _errors_by_place[place] == 1
    if is_first:
        logger.error(
            "dspy-mlflow-async failed in %s; the program goes on, and further errors there are only counted. "
            "Please report this.",
            place,
            exc_info=error,
        )
    if is_strict():
        raise error


def start_afresh() -> None:
    """Start afresh in a forked child: nothing has failed there yet, and nobody holds a lock."""
    global _lock  # noqa: PLW0603 - one per process
    _lock = threading.Lock()
    _errors_by_place.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=start_afresh)


def place_of(function: Callable[..., Any]) -> str:
    """Return the name under which errors in a function are counted."""
    return f"{function.__module__}.{function.__qualname__}"


def guarded(function: _Function) -> _Function:
    """Make ``function`` return None instead of raising an ``Exception``; everything else passes."""
    place = place_of(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the never-raise boundary: see the module's docstring
            report(place, error)

    return cast("_Function", wrapper)
