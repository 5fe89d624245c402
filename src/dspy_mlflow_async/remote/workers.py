"""Workers as their users see them: who of them takes a call, how often it is tried, and what is left at the end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from dspy_mlflow_async.remote.plan import Plan, WorkerBooks
from dspy_mlflow_async.workers import way_into_loop

ATTEMPTS = 3  # two beside others, and one alone, which proves who is to blame
SETTLE_SECONDS = 30.0

_Result = TypeVar("_Result")


class WorkerLostError(RuntimeError):
    """Error of a call whose process is gone.

    Attributes:
        process: Which one that was, ``host:pid``, where the engine tells.
    """

    def __init__(self, text: str, process: str = "") -> None:
        super().__init__(text)
        self.process = process


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker that was lost with a call in its hands.

    Attributes:
        attempt: Which attempt that was: 1, 2, 3.
        reason: What is known of its end.
        process: Which process it was, ``host:pid``, where the engine tells.
    """

    attempt: int
    reason: str
    process: str = ""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker process, and what it has done for an evaluation.

    Attributes:
        process: Machine and process id, ``host:pid``.
        examples: How many examples it has brought home.
        losses: The examples that were lost with it, by their places in their devsets.
        books: Its books at the end; None for one that was gone by then.
    """

    process: str
    examples: int
    losses: tuple[int, ...] = ()
    books: WorkerBooks | None = None


class Workers(ABC):
    """Processes that work for this one. Any number of evaluations may share them, in any threads and event loops.

    Args:
        count: How many workers there are that can be told apart; 1 where an engine keeps that to itself.
        in_flight: How many calls each may have in hand.
    """

    def __init__(self, count: int, in_flight: float) -> None:
        self.roster = Roster(count, in_flight)

    @abstractmethod
    def start(self) -> None:
        """Start what is not up. Called in a thread before each use."""

    @abstractmethod
    def submit(self, worker: int, plan: Plan, item: bytes) -> concurrent.futures.Future[bytes]:
        """Send a call to a worker; its future raises ``WorkerLostError`` where the process is gone."""

    @abstractmethod
    def cancel(self, worker: int, future: concurrent.futures.Future[bytes]) -> None:
        """Stop a call, as far as that is possible: nobody waits for it any more."""

    @abstractmethod
    def settle(self, plan: Plan, timeout: float) -> list[concurrent.futures.Future[WorkerBooks]]:
        """Let every worker store what it has traced; a plan makes one know how that it has not worked yet."""

    def close(self, plan: Plan) -> None:  # noqa: B027 - not every engine has something to forget
        """Forget a plan."""

    async def call(
        self, plan: Plan, item_of: Callable[[int], bytes], note_loss: Callable[[Loss], None] = lambda _: None
    ) -> bytes:
        """Have a call made by whichever worker has the least in hand, again where its process is lost.

        Args:
            plan: What to do.
            item_of: Gives the item, for each attempt.
            note_loss: Called for each attempt that is lost.

        Returns:
            The reply.

        Raises:
            WorkerLostError: Where the third attempt, which had a worker for itself, is lost too.
            Exception: What the engine raises.
        """
        attempt = 1
        while True:
            try:
                return await self._attempt(plan, item_of(attempt), is_alone=attempt == ATTEMPTS)
            except WorkerLostError as error:
                note_loss(Loss(attempt, str(error), error.process))
                if attempt == ATTEMPTS:
                    raise
            attempt += 1

    async def _attempt(self, plan: Plan, item: bytes, *, is_alone: bool) -> bytes:
        worker = await self.roster.taken(is_alone=is_alone)
        try:
            future = self.submit(worker, plan, item)
            try:
                return await result_of(future)
            except anyio.get_cancelled_exc_class():
                self.cancel(worker, future)
                raise
        finally:
            self.roster.give(worker)

    async def settled(self, plan: Plan) -> tuple[WorkerBooks, ...]:
        """Wait until all have stored what they have traced, for a bounded time; return the books of those that do."""
        books = []
        # A worker that is gone has no books, nor has an executor that is broken.
        with anyio.move_on_after(SETTLE_SECONDS + 10), contextlib.suppress(Exception):
            for future in await anyio.to_thread.run_sync(self.settle, plan, SETTLE_SECONDS):
                with contextlib.suppress(Exception):
                    books.append(await result_of(future))
        return tuple(books)


async def result_of(future: concurrent.futures.Future[_Result]) -> _Result:
    """Wait for a future of another thread, in asyncio or trio. Whoever is cancelled leaves it as it is."""
    is_done, into_loop = anyio.Event(), way_into_loop()

    def tell(_: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            into_loop(is_done.set)

    future.add_done_callback(tell)
    await is_done.wait()
    return future.result()


class Roster:
    """Workers, what each has in hand, and who waits for one. ``lock`` guards it; it is asked from any thread.

    Args:
        count: How many workers there are.
        in_flight: How many calls each may have in hand.

    Attributes:
        load: How many each has in hand.
    """

    def __init__(self, count: int, in_flight: float) -> None:
        self._lock = threading.Lock()
        self._in_flight = in_flight
        self.load = Counter(dict.fromkeys(range(count), 0))
        self._down: set[int] = set()
        self._alone: int | None = None  # the worker that one call has, or is to have, for itself
        self._is_alone_granted = False
        self._waiting: deque[concurrent.futures.Future[int]] = deque()
        self._waiting_alone: deque[concurrent.futures.Future[int]] = deque()
        self._failure: Exception | None = None

    async def taken(self, *, is_alone: bool = False) -> int:
        """Wait for a worker that is up and has room, or for one that is at nothing else, and take it.

        Raises:
            Exception: Where the workers have failed for good.
        """
        ticket: concurrent.futures.Future[int] = concurrent.futures.Future()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            (self._waiting_alone if is_alone else self._waiting).append(ticket)
        self._grant()
        try:
            return await result_of(ticket)
        except anyio.get_cancelled_exc_class():
            if not ticket.cancel() and ticket.exception() is None:
                self.give(ticket.result())
            raise

    def give(self, worker: int) -> None:
        """Give a worker back."""
        with self._lock:
            self.load[worker] -= 1
            if self._is_alone_granted and worker == self._alone:
                self._alone, self._is_alone_granted = None, False
        self._grant()

    def note_down(self, worker: int) -> None:
        """Leave a worker out until it is up again."""
        with self._lock:
            self._down.add(worker)
            if worker == self._alone and not self._is_alone_granted:
                self._alone = None
        self._grant()

    def note_up(self, worker: int) -> None:
        """Let a worker take calls again."""
        with self._lock:
            self._down.discard(worker)
        self._grant()

    def fail(self, error: Exception) -> None:
        """Let all who wait, now and later, have this error: the workers are gone for good."""
        with self._lock:
            self._failure = error
            tickets = [*self._waiting, *self._waiting_alone]
            self._waiting.clear()
            self._waiting_alone.clear()
        for ticket in tickets:
            if ticket.set_running_or_notify_cancel():
                ticket.set_exception(error)

    def _grant(self) -> None:
        granted: list[tuple[concurrent.futures.Future[int], int]] = []
        with self._lock:
            self._grant_alone(granted)
            while self._waiting and (free := self._with_room()):
                ticket = self._waiting.popleft()
                if ticket.set_running_or_notify_cancel():
                    worker = min(free, key=self.load.__getitem__)
                    self.load[worker] += 1
                    granted.append((ticket, worker))
        for ticket, worker in granted:
            ticket.set_result(worker)

    def _grant_alone(self, granted: list[tuple[concurrent.futures.Future[int], int]]) -> None:
        while self._waiting_alone and self._waiting_alone[0].cancelled():
            self._waiting_alone.popleft()
        if self._is_alone_granted:
            return
        if not self._waiting_alone:
            self._alone = None
            return
        if self._alone is None:  # the one that is free first gets nothing more until then
            up = [worker for worker in self.load if worker not in self._down]
            self._alone = min(up, key=self.load.__getitem__, default=None)
        if self._alone is None or self.load[self._alone]:
            return
        ticket = self._waiting_alone.popleft()
        if ticket.set_running_or_notify_cancel():
            self.load[self._alone] += 1
            self._is_alone_granted = True
            granted.append((ticket, self._alone))

    def _with_room(self) -> list[int]:
        return [
            worker
            for worker, load in self.load.items()
            if worker not in self._down and worker != self._alone and load < self._in_flight
        ]
