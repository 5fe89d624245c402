"""Contents of objects whose text shows what they hold, read without running the user's code."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import traceback
from collections import UserDict, UserList, deque
from itertools import islice
from types import MappingProxyType, SimpleNamespace
from typing import Any

import dspy

from dspy_mlflow_async.spans import bounds

_LARGE = frozenset({set, frozenset, deque, type({}.keys()), type({}.values()), type({}.items())})
_VIEWS: tuple[type[Any], ...] = (type({}.values()), type({}.items()))


def contents_of(value: Any, most: int = sys.maxsize) -> Any:
    """Contents of an object, as a mapping or list that may be the object's own; None where they cannot be known.

    Other mappings are not read: to iterate over one is to run its code.

    Args:
        value: The object.
        most: How many items to take where they have to be copied.
    """
    if is_a(value, dspy.Example):  # and Prediction
        return dict(dspy.Example.items(value))
    if is_a(value, SimpleNamespace):
        return object.__getattribute__(value, "__dict__")
    if is_a(value, (UserDict, UserList)):
        held = object.__getattribute__(value, "__dict__").get("data")
        return held if isinstance(held, (dict, list)) else None
    if is_a(value, MappingProxyType):
        (held,) = gc.get_referents(value)
        return held if isinstance(held, dict) else None
    if is_a(value, deque):
        return list(islice(deque.__iter__(value), most))
    if is_a(value, (set, frozenset)):
        return list(islice(set.__iter__(value) if is_a(value, set) else frozenset.__iter__(value), most))
    return list(islice(value, most)) if is_a(value, _VIEWS) else None


def beginning_of_text(value: Any, most: int) -> tuple[str, int, str]:
    """The text of an object, or its beginning where no more than that need be made.

    Args:
        value: The object. Its ``__str__`` runs, unless it is of a built-in type and large.
        most: How many characters are wanted, at least; there may be more.

    Returns:
        The text, how much the whole would be, and in what that is counted.
    """
    kind = type(value)
    if (kind is bytes or kind is bytearray) and len(value) > most:
        return str(value[:most]), len(value), bounds.BYTES
    if kind in _LARGE and len(value) > most:
        return str([*islice(value, most)]), len(value), bounds.ITEMS
    text = text_of(value)
    return text, len(text), bounds.CHARACTERS


def is_a(value: Any, kinds: Any) -> bool:
    """Check an object's type without reading its ``__class__``, which evaluates lazy ones and runs ``__getattr__``."""
    return issubclass(type(value), kinds)


# Of the class as it is, whatever its metaclass says.
_module_of = type.__dict__["__module__"].__get__
_mro_of = type.__dict__["__mro__"].__get__


def _stands_for_another(kind: type) -> bool:
    if _module_of(kind) == "django.utils.functional":
        return True
    return any("__class__" in type.__getattribute__(cls, "__dict__") for cls in _mro_of(kind)[:-1])


def behind(value: Any) -> tuple[Any, bool]:
    """Return what a lazy object or proxy stands for, if that is known without asking it, and whether it is one at all.

    Django's and werkzeug's say to be of another class than they are. One that has not been evaluated is named and
    left alone: to evaluate it is the program's to do.
    """
    if not _stands_for_another(type(value)):
        return value, False
    try:
        wrapped = object.__getattribute__(value, "__dict__").get("_wrapped")  # Django's; a bare object() until then
    except Exception:  # noqa: BLE001 - it need not have any
        wrapped = None
    if wrapped is None or type(wrapped) is object:
        return f"<{type(value).__module__}.{type(value).__qualname__}, not evaluated>", True
    return wrapped, True


def contain(error: BaseException) -> None:
    """Raise again an error that did not come from the user's object that was looked at, but only struck there.

    Ctrl-C, and what the program's own handler of a signal raises, such as SystemExit, may strike anywhere.
    """
    if isinstance(error, Exception):
        return
    if isinstance(error, (SystemExit, GeneratorExit, asyncio.CancelledError)):
        handlers = {getattr(signal.getsignal(each), "__code__", None) for each in signal.valid_signals()}
        if not any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__)):
            return
    raise error


def text_of(value: Any) -> str:
    """Text of an object as ``str`` makes it, or a text that names the error."""
    try:
        return str(value)
    except BaseException as error:  # noqa: BLE001 - str() runs the user's code
        contain(error)
        return f"<{type(value).__module__}.{type(value).__qualname__} without text: {type(error).__name__}>"
