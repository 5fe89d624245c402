"""Sequences whose items are made once somebody asks for one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any


class MadeOnce(Sequence[Any]):
    """Sequence of as many items as are known, all of which are made when the first is asked for."""

    __slots__ = ("_made",)

    def __init__(self) -> None:
        self._made: list[Any] | None = None

    @abstractmethod
    def make(self) -> list[Any]:
        """Make all of them."""

    def __getitem__(self, index: Any) -> Any:
        """Return one of them, or several."""
        return self._all()[index]

    def __iter__(self) -> Iterator[Any]:
        """Go through all of them."""
        return iter(self._all())

    def _all(self) -> list[Any]:
        made = self._made
        if made is None:
            made = self._made = self.make()
        return made
