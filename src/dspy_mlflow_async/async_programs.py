"""Async form of a program, metric or other callable of the user's, if it has one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import dspy

_INFINITY = float("inf")


def async_form(program: Any) -> Callable[..., Awaitable[Any]] | None:
    """Return what to call and await in place of ``program``, or None where it has to be called synchronously.

    That is an async function itself, and the ``acall`` of anything else that has one which says the same as its
    ``__call__``. That of a ``dspy.Predict`` subclass with a ``forward`` of its own alone does not: it would run the
    ``aforward`` that the class has inherited, another program than the user wrote.
    """
    if isinstance(program, functools.partial):
        inner = async_form(program.func)
        return None if inner is None else functools.partial(inner, *program.args, **program.keywords)
    if is_coroutine_function(program):
        return program
    wrapped = getattr(type(program), "__wrapped_program__", None)
    if wrapped is not None and async_form(wrapped(program)) is None:
        return None
    if not isinstance(program, dspy.Module):
        is_same = _depth(program, "acall") <= _depth(program, "__call__")
        acall = program.acall if is_same and _depth(program, "acall") < _INFINITY else None
        return acall if inspect.iscoroutinefunction(acall) else None
    if type(program).acall is dspy.Module.acall and not hasattr(program, "aforward"):
        return None
    is_same = _depth(program, "acall", "aforward") <= _depth(program, "__call__", "forward")
    return program.acall if is_same else None


def is_coroutine_function(value: Any) -> bool:
    """Return whether a call gives a coroutine, as far as can be told: also of partials, and objects that are called."""
    while isinstance(value, functools.partial):
        value = value.func
    # `type(value)`: a method of the object itself would not be called.
    return inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(getattr(type(value), "__call__", None))  # noqa: B004


def _depth(instance: Any, *names: str) -> float:
    """Distance in the MRO of ``instance`` of the nearest of these names; an attribute of its own is nearest.

    What every module has by ``dspy.Module`` is not there: it only calls the other.
    """
    if any(name in getattr(instance, "__dict__", ()) for name in names):
        return -1
    for depth, cls in enumerate(type(instance).__mro__):
        if cls is not dspy.Module and any(name in vars(cls) for name in names):
            return depth
    return _INFINITY
