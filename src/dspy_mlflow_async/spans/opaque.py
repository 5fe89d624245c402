"""Looks into objects whose text shows what they hold, without running anybody's code."""

from __future__ import annotations

import gc
from collections import UserDict, UserList, deque
from types import MappingProxyType, SimpleNamespace
from typing import Any

import dspy

_VIEWS: tuple[type[Any], ...] = (type({}.values()), type({}.items()))


def held_by(value: Any) -> Any:
    """What an object holds, as a mapping or list that may be the object's own; None where that cannot be known.

    Other mappings are not read: to iterate over one is to run its code.
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
        return list(deque.__iter__(value))
    if isinstance(value, (set, frozenset)):
        return list(set.__iter__(value) if isinstance(value, set) else frozenset.__iter__(value))
    return [*value] if isinstance(value, _VIEWS) else None
