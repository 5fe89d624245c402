"""Group sync: one caller syncs for all who wait, so that slow syncs hold up nobody for longer than two of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class GroupSync:
    """Turns at one file, of which only one is taken at a time.

    A lock would do, but whoever waits for it must have it to learn that another's sync was good for them, too, and
    meanwhile the next begins.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_taken = False

    def until(self, is_safe: Callable[[], bool], sync: Callable[[], None]) -> None:
        """Return once ``is_safe``, after a turn of another or one of one's own, in which ``sync`` is called.

        Args:
            is_safe: Whether there is nothing to wait for; asked at first, and when a turn is over. What it raises is
                raised here.
            sync: Makes it so.
        """
        is_mine = False
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._is_taken or is_safe())
                if is_safe():
                    return
                self._is_taken = is_mine = True
            sync()
        finally:  # an interrupt may come at any line
            if is_mine:
                self._release()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Take a turn for something else, in which nobody syncs."""
        is_mine = False
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._is_taken)
                self._is_taken = is_mine = True
            yield
        finally:
            if is_mine:
                self._release()

    def _release(self) -> None:
        with self._changed:
            self._is_taken = False
            self._changed.notify_all()
