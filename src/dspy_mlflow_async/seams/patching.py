"""Patches that put functions of ours in the place of others, and their undo."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

Undo = Callable[[], None]

_INHERITED = object()


def patch(owner: Any, **replacements: Any) -> Undo:
    """Replace attributes of a module or a class.

    Args:
        owner: The module or the class.
        **replacements: By name, what takes the place of what is there.

    Returns:
        The undo. It leaves alone what somebody else has put there since, and does nothing a second time.

    Raises:
        AttributeError: Where there is no attribute of one of these names.
    """
    for name in replacements:
        getattr(owner, name)
    originals = {name: vars(owner).get(name, _INHERITED) for name in replacements}
    for name, replacement in replacements.items():
        setattr(owner, name, replacement)

    def undo() -> None:
        for name, replacement in replacements.items():
            if vars(owner).get(name) is not replacement:
                continue
            if originals[name] is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, originals[name])

    return undo


def together(*undos: Undo) -> Undo:
    """Make one undo of several: the last patch is undone first, each once, whatever another raises."""
    stack = contextlib.ExitStack()
    for undo in undos:
        stack.callback(undo)
    return stack.close


class Patches:
    """Patches by name, put in and taken out as their need comes and goes. Their owner's lock guards them."""

    def __init__(self) -> None:
        self._undos: dict[str, Undo] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._undos

    def set(self, name: str, patch: Callable[[], Undo], *, is_needed: bool = True) -> None:
        """Put a patch in or take it out, unless that is so already."""
        if not is_needed:
            self.take_out(name)
        elif name not in self._undos:
            self._undos[name] = patch()

    def renew(self, name: str, patch: Callable[[], Undo]) -> None:
        """Put in a patch that takes the place of the one that is in, so that this is not undone first."""
        self._undos[name] = patch()

    def take_out(self, name: str) -> None:
        """Take a patch out, if it is in."""
        undo = self._undos.pop(name, None)
        if undo is not None:
            undo()

    def take_out_all(self, *, but: tuple[str, ...] = ()) -> None:
        """Take all patches out, the last first, but these."""
        for name in reversed(list(self._undos)):
            if name not in but:
                self.take_out(name)


class ModuleStandIn:
    """Module as others see it by one name of theirs, with some functions of ours.

    Args:
        module: The module.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        """Return whatever else the module has."""
        return getattr(self._module, name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the module itself: who takes it along may be loaded where this package is absent."""
        return importlib.import_module, (self._module.__name__,)


def over(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """Copy a function over other globals, for what it is to find there in our case alone."""
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
