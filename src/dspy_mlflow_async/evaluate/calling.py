"""Calls of programs and metrics: async ones in the event loop, sync ones in worker threads with the context carried."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import anyio
import dspy

from dspy_mlflow_async.async_programs import async_form
from dspy_mlflow_async.workers import Threads

# Sync metrics are short as a rule: this many threads are enough, however many examples are in flight.
METRIC_THREADS = 64


class Caller:
    """Call programs, metrics and other functions of the user's, sync or async.

    Args:
        function: A ``dspy.Module``, a coroutine function, or any other callable.
        threads: How many threads may be in it at once, if it is sync.

    Attributes:
        function: The callable itself.
    """

    def __init__(self, function: Callable[..., Any], threads: int) -> None:
        self.function = function
        self._await = async_form(function)
        self._limiter = anyio.CapacityLimiter(threads)

    async def __call__(self, threads: Threads, /, *args: Any, **kwargs: Any) -> Any:
        """Call the function and return its result.

        Args:
            threads: Where the thread counts that it runs in; one that is cancelled goes on until its end, unheeded.
            *args: What it is called with.
            **kwargs: The same by name.
        """
        if self._await is not None:
            return await self._await(*args, **kwargs)
        result = await threads.run(functools.partial(self.function, *args, **kwargs), self._limiter)
        return await result if inspect.isawaitable(result) else result


def check_program(program: Any, name: str = "program") -> None:
    """Refuse what cannot be evaluated.

    Raises:
        TypeError: For a class, for what cannot be called, and for a module without ``forward`` and ``aforward``.
    """
    if isinstance(program, type):
        raise TypeError(f"{name} is the class {program.__name__}; pass an instance of it: {program.__name__}(...)")
    if isinstance(program, dspy.Module):
        # Not `hasattr(program, "forward")`: DSPy warns of whoever looks at it from outside.
        has_forward = hasattr(type(program), "forward") or "forward" in vars(program)
        if not (has_forward or hasattr(program, "aforward")):
            raise TypeError(f"{name} is a {type(program).__name__}, which has neither forward nor aforward")
    elif not callable(program):
        raise TypeError(f"{name} must be a dspy.Module or another callable, not {type(program).__name__}")


def check_keywords(given: Iterable[str], name: str, known: Collection[str]) -> None:
    """Refuse keyword arguments that a callable does not have.

    Args:
        given: The arguments' names.
        name: The callable's.
        known: The names of its arguments.

    Raises:
        TypeError: For the first that it does not have, with the one that was meant, perhaps.
    """
    for argument in given:
        if argument not in known:
            close = difflib.get_close_matches(argument, known, 1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{name} has no argument {argument!r}{meant}")


def check_metric(metric: Any) -> None:
    """Refuse what cannot judge.

    Raises:
        ValueError: For None.
        TypeError: For what cannot be called.
    """
    if metric is None:
        raise ValueError("there is no metric: pass metric=, a function of an example and a prediction")
    if not callable(metric):
        raise TypeError(f"metric must be a function of an example and a prediction, not {type(metric).__name__}")


def check_devset(devset: Any) -> list[Any]:
    """Return the devset as a list.

    Raises:
        ValueError: For an empty one. Source: ``dspy.Evaluate``, with its text.
        TypeError: For what is no collection of examples.
    """
    if devset is None:
        raise ValueError("there is no devset: pass devset=, a list of dspy.Example")
    if isinstance(devset, (str, bytes, Mapping)):
        raise TypeError(f"devset must be a list of dspy.Example, not {type(devset).__name__}")
    if not isinstance(devset, Iterable):
        raise TypeError(f"devset must be a list of dspy.Example, not {devset!r}")
    if not isinstance(devset, list):
        devset = list(devset)
    if not devset:
        raise ValueError("devset must contain at least one example, got an empty devset.")
    if not hasattr(devset[0], "inputs"):
        raise TypeError(f"devset must be a list of dspy.Example, not of {type(devset[0]).__name__}")
    return devset


def check_limit(value: Any, name: str = "max_concurrency") -> int:
    """Check a number of examples that may be in flight, and return it.

    Raises:
        TypeError: For what is no integer.
        ValueError: Below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of examples in flight, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return value


def check_number(value: Any, name: str) -> Any:
    """Check for a real number, which can be added up and compared, and return it.

    Raises:
        TypeError: For what is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    return value


def check_max_errors(value: Any) -> Any:
    """Check the number of failed examples that ends an evaluation (None for DSPy's setting), and return it.

    Raises:
        TypeError: For what is no number.
        ValueError: Below 0, or for NaN.
    """
    if value is not None and not check_number(value, "max_errors") >= 0:
        raise ValueError(f"max_errors must be 0 or more, not {value!r}")
    return value


def check_positive(value: Any, name: str, unit: str) -> float | None:
    """Check for a positive number or None, and return it.

    Raises:
        TypeError: For what is no number.
        ValueError: For zero, less, or NaN.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of {unit}, not {value!r}")
    if not value > 0:
        raise ValueError(f"{name} must be more than 0 {unit}, not {value!r}")
    return float(value)
