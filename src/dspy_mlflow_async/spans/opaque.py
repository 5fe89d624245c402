"""Looks into objects whose text shows what they hold, without running anybody's code."""

from __future__ import annotations

import gc
import sys
from collections import UserDict, UserList, deque
from itertools import islice
from types import MappingProxyType, SimpleNamespace
from typing import Any

import dspy

from dspy_mlflow_async.spans import bounds

_LARGE = frozenset({set, frozenset, deque, type({}.keys()), type({}.values()), type({}.items())})
_VIEWS: tuple[type[Any], ...] = (type({}.values()), type({}.items()))


def held_by(value: Any, most: int = sys.maxsize) -> Any:
    """What an object holds, as a mapping or list that may be the object's own; None where that cannot be known.

    Other mappings are not read: to iterate over one is to run its code.

    Args:
        value: The object.
        most: How many items to take where they have to be copied.
    """
    if isinstance(value, dspy.Example):  # and Prediction
        return dict(dspy.Example.items(value))
    if isinstance(value, SimpleNamespace):
        return object.__getattribute__(value, "__dict__")
    if isinstance(value, (UserDict, UserList)):
        held = object.__getattribute__(value, "__dict__").get("data")
        return held if isinstance(held, (dict, list)) else None
    if isinstance(value, MappingProxyType):
        (held,) = gc.get_referents(value)
        return held if isinstance(held, dict) else None
    if isinstance(value, deque):
        return list(islice(deque.__iter__(value), most))
    if isinstance(value, (set, frozenset)):
        return list(islice(set.__iter__(value) if isinstance(value, set) else frozenset.__iter__(value), most))
    return list(islice(value, most)) if isinstance(value, _VIEWS) else None


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


def text_of(value: Any) -> str:
    """What ``str`` makes of an object, or what its failure tells."""
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 - str() runs the user's code
        return f"<{type(value).__module__}.{type(value).__qualname__} without text: {type(error).__name__}>"
