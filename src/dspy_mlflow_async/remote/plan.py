"""Jobs of other processes: a plan once for each process, an item for each call, a reply back; all of them bytes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from dspy_mlflow_async import export
from dspy_mlflow_async.health import Stats, flush, stats
from dspy_mlflow_async.remote import pickling
from dspy_mlflow_async.spans.secret_texts import mask

_Result = TypeVar("_Result")

_MOST_JOBS = 1_000  # those that nobody forgets by name


class Job(Protocol):
    """Work of one kind, as it is unpickled in a worker."""

    async def run(self, item: bytes) -> bytes:
        """Do it for one item, and return the reply."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A job, pickled.

    Attributes:
        data: The pickle.
        digest: Its hash, by which processes know it.
    """

    data: bytes = field(repr=False)
    digest: str = ""

    @classmethod
    def of(cls, job: Job) -> Plan:
        """Return the plan of a job whose parts are bytes already."""
        data = pickling.dumps("the plan", job)
        return cls(data, hashlib.sha256(data).hexdigest()[:24])


@dataclass(frozen=True, slots=True)
class WorkerBooks:
    """Books of one worker process, as it tells them at the end of its work.

    Attributes:
        process: Machine and process id, ``host:pid``.
        stats: Its counters; those of everything that it has done, not of one evaluation.
        cpu_seconds: What it has used since it began.
        is_settled: Whether all that it has traced is stored.
    """

    process: str
    stats: Stats
    cpu_seconds: float
    is_settled: bool


class CannotBeginError(RuntimeError):
    """Error of a worker that cannot unpickle a plan: what it is made of is missing there."""


def process_name() -> str:
    """Return what this process is called: ``host:pid``."""
    return f"{socket.gethostname()}:{os.getpid()}"


# --- in the worker ----------------------------------------------------------------------------------------------------


class _Jobs:
    """The jobs of this process. ``lock`` guards them, and that each is unpickled once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_digest: OrderedDict[str, Job] = OrderedDict()

    def get(self, digest: str, data: bytes | None) -> Job | None:
        with self.lock:
            job = self.by_digest.get(digest)
            if job is None and data is not None:
                try:
                    job = pickling.loads(data)
                except Exception as error:  # noqa: BLE001 - its modules may be missing here, or fail
                    why = mask(f"{type(error).__name__}: {error}")
                    raise CannotBeginError(f"the worker {process_name()} cannot begin: {why}") from None
                self.by_digest[digest] = job
                while len(self.by_digest) > _MOST_JOBS:
                    self.by_digest.popitem(last=False)
            return job


_jobs = _Jobs()


async def run(digest: str, data: bytes | None, item: bytes) -> bytes | None:
    """Do a job for one item, in the event loop of a worker.

    Args:
        digest: The plan's.
        data: The plan, or None where this process should know it.
        item: The item.

    Returns:
        The reply; None where the plan is not known here and must be sent.

    Raises:
        CannotBeginError: Where it cannot be unpickled here.
    """
    job = _jobs.get(digest, data)
    return None if job is None else await job.run(item)


def know(digest: str, data: bytes | None) -> None:
    """Make a plan known here before its first item, so that the tracer is on, and sends what dead processes have left.

    Raises:
        CannotBeginError: Where it cannot be unpickled here.
    """
    _jobs.get(digest, data)


def forget(digest: str) -> None:
    """Forget a plan that nobody needs any more."""
    with _jobs.lock:
        _jobs.by_digest.pop(digest, None)


def run_in_thread(digest: str, data: bytes | None, item: bytes) -> bytes | None:
    """Do as ``run`` does, for engines that call plain functions; the event loop is one for the whole process."""
    return run_in_loop(run(digest, data, item))


def run_in_loop(call: Coroutine[Any, Any, _Result]) -> _Result:
    """Wait in a thread for a coroutine that runs in an event loop of this package."""
    return asyncio.run_coroutine_threadsafe(call, _loop.get()).result()


def settle(timeout: float) -> WorkerBooks:
    """Store what this process has traced, and what dead ones have left, for so many seconds; return its books."""
    export.take_over()
    is_settled = flush(timeout)
    return WorkerBooks(process_name(), stats(), time.process_time(), is_settled)


class _Loop:
    """An event loop in a thread, once for each process. ``lock`` guards that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._loop: Any = None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._pid != os.getpid():
                self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
                name = "dspy-mlflow-async-worker"
                threading.Thread(target=self._loop.run_forever, name=name, daemon=True).start()
            loop: asyncio.AbstractEventLoop = self._loop
            return loop


_loop = _Loop()
