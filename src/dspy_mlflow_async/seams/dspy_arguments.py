"""Arguments that DSPy tells its callbacks of, found without a signature object for each call."""

from __future__ import annotations

import inspect
import weakref
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import dspy.utils.callback as dspy_callback

from dspy_mlflow_async.seams.patching import ModuleStandIn, Undo, patch

# With one of these on it, a function's parameters are not those of its code.
_OVERRIDES = frozenset({"__signature__", "__partialmethod__", "_partialmethod"})


def patch_arguments() -> Undo:
    """Make DSPy find the arguments of a call without building the function's ``inspect.Signature`` each time.

    ``with_callbacks`` asks ``inspect.getcallargs`` once for each call that has callbacks: half of what DSPy's own
    machinery for callbacks costs. Where this DSPy asks elsewhere, it does.

    Returns:
        The undo.
    """
    if getattr(dspy_callback, "inspect", None) is not inspect:
        return lambda: None
    return patch(dspy_callback, inspect=_Inspect(inspect))


class _Inspect(ModuleStandIn):
    """Module ``inspect``, with ``getcallargs`` of ours."""

    @staticmethod
    def getcallargs(func: Any, /, *positional: Any, **named: Any) -> dict[str, Any]:
        """Return the arguments by parameter, as ``inspect.getcallargs`` does; TypeError where they do not fit."""
        found = _arguments_of(func, positional, named)
        return inspect.getcallargs(func, *positional, **named) if found is None else found


class _Parameters(NamedTuple):
    """Parameters of a function, read from its code.

    Attributes:
        code: What they were read from.
        named: All that may be given by name, keyword-only ones last.
        positional: How many of them may be given by position.
        rest: The name of ``*args``, or None.
        others: The name of ``**kwargs``, or None.
    """

    code: CodeType
    named: tuple[str, ...]
    positional: int
    rest: str | None
    others: str | None


_known: dict[weakref.ref[FunctionType], _Parameters] = {}


def _parameters_of(func: FunctionType) -> _Parameters:
    known = _known.get(weakref.ref(func))  # as a WeakKeyDictionary does, without a call in between
    if known is None or known.code is not func.__code__:
        code = func.__code__
        total = code.co_argcount + code.co_kwonlyargcount
        names = iter(code.co_varnames[total:])
        known = _known[weakref.ref(func, lambda gone: _known.pop(gone, None))] = _Parameters(
            code,
            code.co_varnames[:total],
            code.co_argcount,
            next(names) if code.co_flags & inspect.CO_VARARGS else None,
            next(names) if code.co_flags & inspect.CO_VARKEYWORDS else None,
        )
    return known


def _arguments_of(func: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a plain function, or None where they do not fit or where it is something else."""
    if type(func) is not FunctionType or not _OVERRIDES.isdisjoint(func.__dict__):
        return None
    _, parameters, count, rest, kwargs = _parameters_of(func)
    given = len(positional)
    found: dict[str, Any] = dict(zip(parameters[:count], positional, strict=False))
    if rest is not None:
        found[rest] = positional[count:]
    elif given > count:
        return None
    others: dict[str, Any] = {}
    if kwargs is not None:
        found[kwargs] = others
    for name, value in named.items():
        if name not in parameters:
            if kwargs is None:
                return None
            others[name] = value
        elif name in found:
            return None
        else:
            found[name] = value
    return found if _add_defaults(func, found, parameters[given:count], parameters[count:]) else None


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
