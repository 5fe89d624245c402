"""Patches that put functions of ours in the place of others, and their undo."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any


def patch(owner: Any, **replacements: Any) -> Callable[[], None]:
    """Replace attributes of a module or a class.

    Args:
        owner: The module or the class.
        **replacements: By name, what takes the place of what is there.

    Returns:
        The undo. It leaves alone what somebody else has put there since.
    """
    originals = {name: getattr(owner, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(owner, name, replacement)

    def undo() -> None:
        for name, replacement in replacements.items():
            if getattr(owner, name) is replacement:
                setattr(owner, name, originals[name])

    return undo


def over(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """Copy a function over other globals, for what it is to find there in our case alone."""
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
