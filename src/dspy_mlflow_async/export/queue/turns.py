"""Turns at the interpreter that callers give to the thread that writes, where that is behind."""

from __future__ import annotations

import threading
import time

# How long a caller lets go of the interpreter at least, in seconds: as long as a thread takes to wake up.
_SHORTEST = 0.00005
# What a batch of rows needs of the processor, in seconds, as long as none was written.
_USUAL = 0.05


class Turns:
    """Turns at the interpreter.

    A thread that waits for the interpreter asks for it once nobody has let go of it for 5 ms. A program that lets go of
    it for a microsecond now and then, as DSPy does for each id that it makes, is never asked, and takes it back before
    the other has woken up: that would never have its turn.

    Callers give no more than the work needs, so that a store that is slow for other reasons slows nobody down: between
    two batches all of them together what the last one has taken of the processor, once for each that must be away
    while each of the others is.
    """

    def __init__(self) -> None:
        self._rests = threading.Event()
        self._rests.set()
        self._giving: set[int] = set()  # the threads that have given some since the last progress
        self._given = 0.0  # seconds since then
        self._needed = _USUAL

    def give(self, seconds: float) -> None:
        """Let the thread have the interpreter, from a caller's: for so long, or until it rests or has got on."""
        if self._rests.is_set():
            return
        self._giving.add(threading.get_ident())
        left = self._needed * len(self._giving) ** 2 - self._given
        seconds = max(min(seconds, left), _SHORTEST)
        self._given += seconds
        self._rests.wait(seconds)

    def begin(self) -> None:
        """Ask for turns, in the thread."""
        self._rests.clear()

    def let_go(self) -> None:
        """Let go of the interpreter, in the thread, for long enough that a caller who waits for it wakes up."""
        time.sleep(_SHORTEST)

    def rest(self) -> None:
        """Ask for none, in the thread; whoever gives one goes on."""
        self._rests.set()

    def note_progress(self, needed: float) -> None:
        """Note, in the thread, that a part of the work is done; whoever gives a turn goes on.

        Args:
            needed: How long it has taken of the processor, in seconds.
        """
        self._giving.clear()
        self._given, self._needed = 0.0, needed
        self.rest()
        self.begin()
