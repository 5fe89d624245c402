"""Concurrency limit that several evaluations share fairly: the one with the fewest examples in flight goes next."""

from __future__ import annotations

import anyio
import anyio.lowlevel


class Slots:
    """Slots for at most ``limit`` examples in flight, over all evaluations that share them.

    It belongs to one event loop, so it needs no lock.

    Args:
        limit: How many, at least 1.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.is_closed = False
        self._free = limit
        self._waiting: dict[Entrance, _Ticket] = {}  # in order of arrival

    def close(self) -> None:
        """Let nobody in any more; who is in stays until the end."""
        self.is_closed = True
        for ticket in self._waiting.values():
            ticket.called.set()
        self._waiting.clear()

    async def enter(self, entrance: Entrance) -> bool:
        """Wait for a slot; an evaluation waits for one at a time.

        Returns:
            Whether there is one; False when nothing may start any more.
        """
        await anyio.lowlevel.checkpoint()  # so that nobody takes all slots before the others have asked
        if self.is_closed:
            return False
        ticket = self._waiting[entrance] = _Ticket()
        self._grant()
        try:
            await ticket.called.wait()
        except BaseException:  # cancelled, perhaps just after it was granted
            self._waiting.pop(entrance, None)
            if ticket.is_granted:
                self.leave(entrance)
            raise
        return ticket.is_granted

    def leave(self, entrance: Entrance) -> None:
        """Give a slot back."""
        entrance.in_flight -= 1
        self._free += 1
        self._grant()

    def _grant(self) -> None:
        while self._free and self._waiting:
            entrance = min(self._waiting, key=lambda waiting: waiting.in_flight)  # the first of equals
            ticket = self._waiting.pop(entrance)
            ticket.is_granted = True
            entrance.in_flight += 1
            self._free -= 1
            ticket.called.set()


class Entrance:
    """Entrance of one evaluation to slots that it shares, and how many of them it has."""

    __slots__ = ("in_flight",)

    def __init__(self) -> None:
        self.in_flight = 0


class _Ticket:
    __slots__ = ("called", "is_granted")

    def __init__(self) -> None:
        self.called = anyio.Event()
        self.is_granted = False
