"""The arguments that DSPy tells its callbacks of, found without a signature object for each call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import dspy.utils.callback as dspy_callback

from dspy_mlflow_async.seams.patching import patch

# With one of these on it, a function's parameters are not those of its code.
_OVERRIDES = frozenset({"__signature__", "__partialmethod__", "_partialmethod"})


def patch_arguments() -> Callable[[], None]:
    """Make DSPy find the arguments of a call without building the function's ``inspect.Signature`` each time.

    ``with_callbacks`` asks ``inspect.getcallargs`` once for each call that has callbacks: half of what DSPy's own
    machinery for callbacks costs. Where this DSPy asks elsewhere, it does.

    Returns:
        The undo.
    """
    if getattr(dspy_callback, "inspect", None) is not inspect:
        return lambda: None
    return patch(dspy_callback, inspect=_Inspect())


class _Inspect:
    """The module ``inspect``, with ``getcallargs`` of ours."""

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)

    @staticmethod
    def getcallargs(func: Any, /, *positional: Any, **named: Any) -> dict[str, Any]:
        """``inspect.getcallargs``: the arguments by parameter; TypeError where they do not fit."""
        found = _arguments_of(func, positional, named)
        return inspect.getcallargs(func, *positional, **named) if found is None else found


def _arguments_of(func: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a plain function, or None where they do not fit or where it is something else."""
    if type(func) is not FunctionType or not _OVERRIDES.isdisjoint(func.__dict__):
        return None
    code, given = func.__code__, len(positional)
    names, count = code.co_varnames, code.co_argcount
    total = count + code.co_kwonlyargcount
    rest = total + bool(code.co_flags & inspect.CO_VARARGS)
    found: dict[str, Any] = dict(zip(names[:count], positional, strict=False))
    if rest > total:
        found[names[total]] = positional[count:]
    elif given > count:
        return None
    others: dict[str, Any] | None = None
    if code.co_flags & inspect.CO_VARKEYWORDS:
        found[names[rest]] = others = {}
    for name, value in named.items():
        if name in names[:total]:
            if name in found:
                return None
            found[name] = value
        elif others is None:
            return None
        else:
            others[name] = value
    return found if _add_defaults(func, found, names[given:count], names[count:total]) else None


def _add_defaults(func: Any, found: dict[str, Any], unfilled: tuple[str, ...], keyword_only: tuple[str, ...]) -> bool:
    """Add what was left out, and say whether nothing is missing.

    Args:
        func: The function.
        found: The arguments so far, by parameter.
        unfilled: Its last positional parameters, from the first that was not given by position.
        keyword_only: Its keyword-only parameters.
    """
    defaults = func.__defaults__ or ()
    required = len(unfilled) - len(defaults)
    for at, name in enumerate(unfilled):
        if name not in found:
            if at < required:
                return False
            found[name] = defaults[at - required]
    for name in keyword_only:
        if name not in found:
            if not func.__kwdefaults__ or name not in func.__kwdefaults__:
                return False
            found[name] = func.__kwdefaults__[name]
    return True
