"""Takes chosen context variables, and only those, from one thread to another."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

_Result = TypeVar("_Result")


class Variable(Protocol):
    """Anything with the ``get`` and ``set`` of a ``contextvars.ContextVar`` that has a default."""

    def get(self) -> Any:
        """The value in the current context."""

    def set(self, value: Any, /) -> Any:
        """Give the current context this value."""


class Carrier:
    """The values that some variables had where it was made, ready to be set elsewhere, any number of times.

    ``contextvars.copy_context().run`` would carry the user's own variables too, and one context cannot be
    entered by two threads at once.
    """

    __slots__ = ("_values", "_variables")

    def __init__(self, variables: Sequence[Variable]) -> None:
        self._variables = tuple(variables)
        self._values = [variable.get() for variable in self._variables]

    def run(self, function: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> _Result:
        """Call ``function`` with the carried values set, and put back what was there before."""
        before = self._exchange(self._values)
        try:
            return function(*args, **kwargs)
        finally:
            self._restore(before)

    def bind(self, function: Callable[..., _Result]) -> Callable[..., _Result]:
        """``function``, sync or async, that runs with the carried values set wherever it is called."""
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def bound_coroutine(*args: Any, **kwargs: Any) -> Any:
                before = self._exchange(self._values)
                try:
                    return await function(*args, **kwargs)
                finally:
                    self._restore(before)

            return cast("Callable[..., _Result]", bound_coroutine)

        @functools.wraps(function)
        def bound(*args: Any, **kwargs: Any) -> _Result:
            return self.run(function, *args, **kwargs)

        return bound

    def _exchange(self, values: Sequence[Any]) -> list[Any]:
        before = [variable.get() for variable in self._variables]
        for variable, value in zip(self._variables, values, strict=True):
            variable.set(value)
        return before

    def _restore(self, before: Sequence[Any]) -> None:
        for variable, value in zip(self._variables, before, strict=True):
            variable.set(value)
