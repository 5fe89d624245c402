"""Takes chosen context variables, and only those, from one thread to another."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Mapping
from typing import Any, Protocol, TypeVar, cast

_Result = TypeVar("_Result")


class Variable(Protocol):
    """Anything with the ``get`` and ``set`` of a ``contextvars.ContextVar`` that has a default."""

    def get(self) -> Any:
        """Return the value in the current context."""

    def set(self, value: Any, /) -> Any:
        """Give the current context this value."""

    def __hash__(self) -> int:
        """Hash by identity, which tells variables apart."""


class Carrier:
    """Values for some context variables, ready to be set anywhere, any number of times.

    ``contextvars.copy_context().run`` would carry the user's own variables too, and one context cannot be
    entered by two threads at once.

    Args:
        values: The values by variable.
    """

    __slots__ = ("_values", "_variables")

    def __init__(self, values: Mapping[Variable, Any]) -> None:
        self._variables = tuple(values)
        self._values = list(values.values())

    @contextlib.contextmanager
    def carried(self) -> Iterator[None]:
        """Set the values for a block, and put back afterwards what was there before."""
        before = [variable.get() for variable in self._variables]
        for variable, value in zip(self._variables, self._values, strict=True):
            variable.set(value)
        try:
            yield
        finally:
            for variable, value in zip(self._variables, before, strict=True):
                variable.set(value)

    def run(self, function: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> _Result:
        """Call ``function`` with the carried values set, and put back what was there before."""
        with self.carried():
            return function(*args, **kwargs)

    def bind(self, function: Callable[..., _Result]) -> Callable[..., _Result]:
        """Return a ``function`` that runs with the carried values set wherever it is called.

        A coroutine function stays one. What any other function returns to be awaited or iterated over later (a
        coroutine, a generator, an async generator) runs with them set, too.
        """
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def bound_coroutine(*args: Any, **kwargs: Any) -> Any:
                with self.carried():
                    return await function(*args, **kwargs)

            return cast("Callable[..., _Result]", bound_coroutine)

        @functools.wraps(function)
        def bound(*args: Any, **kwargs: Any) -> Any:
            return self._later(self.run(function, *args, **kwargs))

        return bound

    def _later(self, result: Any) -> Any:
        if inspect.iscoroutine(result):
            return self._awaited(result)
        if inspect.isgenerator(result):
            return self._generated(result)
        if inspect.isasyncgen(result):
            return self._generated_async(result)
        return result

    async def _awaited(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        with self.carried():
            return await coroutine

    def _generated(self, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Run each step of a generator in the carried context; the consumer keeps its own context."""
        step = functools.partial(next, generator)
        while True:
            try:
                value = self.run(step)
            except StopIteration as stop:
                return stop.value
            try:
                step = functools.partial(generator.send, (yield value))
            except GeneratorExit:
                self.run(generator.close)
                raise
            except BaseException as error:  # noqa: BLE001 - thrown in by whoever takes the values
                step = functools.partial(generator.throw, error)

    async def _generated_async(self, generator: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
        """Run each step of an async generator in the carried context, as ``_generated`` does."""
        step = generator.__anext__
        while True:
            try:
                with self.carried():
                    value = await step()
            except StopAsyncIteration:
                return
            try:
                step = functools.partial(generator.asend, (yield value))
            except GeneratorExit:
                with self.carried():
                    await generator.aclose()
                raise
            except BaseException as error:  # noqa: BLE001 - thrown in by whoever takes the values
                step = functools.partial(generator.athrow, error)
