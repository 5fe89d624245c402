"""Worker processes on a Ray cluster: async actors, each of which works at many examples at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from typing import TYPE_CHECKING, Any

from dspy_mlflow_async.remote import plan as jobs
from dspy_mlflow_async.remote.plan import Plan, WorkerBooks
from dspy_mlflow_async.remote.workers import Roster, WorkerLostError, Workers
from dspy_mlflow_async.seams.installed import needs_extra

if TYPE_CHECKING:
    from typing_extensions import Self

_LOOK_SECONDS = 0.3  # between two looks whether an actor that is being restarted is up
_MAX_CONCURRENCY = 100_000  # as good as none: `in_flight` and `max_concurrency` are the limits


class Ray(Workers):
    """Actors on the Ray cluster that this process is connected to, or on one of this machine that Ray starts.

    They are made with the first use and serve any number of evaluations, until this process ends or ``end`` is called.
    DSPy, MLflow and this package must be installed where they run: by the cluster's image, or by ``runtime_env``.

    Args:
        count: How many actors.
        in_flight: How many examples each may have in hand.
        **options: For ``ray.remote``: ``num_cpus`` (1), ``runtime_env``, ``resources`` and so on.

    Raises:
        TypeError: For what is no whole number.
        ValueError: Below 1.
        ImportError: Without Ray, with the extra that brings it.
    """

    def __init__(self, count: int, *, in_flight: int = 200, **options: Any) -> None:
        for name, value in (("workers", count), ("in_flight", in_flight)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, not {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        try:
            import ray
        except ImportError:
            raise ImportError(needs_extra("dspy_mlflow_async.remote.Ray", "ray")) from None
        super().__init__(count, in_flight)
        self._ray = ray
        self._count, self._most, self._options = count, in_flight, {"num_cpus": 1, **options}
        self._lock = threading.Lock()
        self._actors: list[Any] = []
        self._names: dict[int, str] = {}
        self._plans: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Ray({self._count})"

    def start(self) -> None:
        """Make the actors, unless there are some."""
        with self._lock:
            if not self._actors:
                self.roster = Roster(self._count, self._most)
                make = self._ray.remote(
                    max_concurrency=_MAX_CONCURRENCY, max_restarts=-1, max_task_retries=0, **self._options
                )(_Actor)
                self._actors = [make.remote() for _ in range(self._count)]
                for worker in range(self._count):
                    self._look_after(worker)

    def end(self) -> None:
        """End the actors at once. What they have traced is stored at the end of each evaluation."""
        with self._lock:
            actors, self._actors = self._actors, []
            self.roster.fail(WorkerLostError("the workers were ended"))
        for actor in actors:
            with contextlib.suppress(Exception):  # the cluster may be gone
                self._ray.kill(actor)

    def __enter__(self) -> Self:
        """Make the actors."""
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End the actors."""
        self.end()

    def submit(self, worker: int, plan: Plan, item: bytes) -> concurrent.futures.Future[bytes]:
        """Send a call to an actor, and the plan with it where it says that it does not know it."""
        future: concurrent.futures.Future[bytes] = concurrent.futures.Future()
        self._send(worker, plan, None, item, future)
        return future

    def _send(self, worker: int, plan: Plan, data: Any, item: bytes, future: concurrent.futures.Future[bytes]) -> None:
        reference = self._actors[worker].run.remote(plan.digest, data, item)
        future.reference = reference  # type: ignore[attr-defined]

        def ended(done: Any) -> None:
            try:
                reply = done.result()
            except self._ray.exceptions.RayActorError as error:
                self._look_after(worker)
                first = str(error).strip().partition("\n")[0]
                self._fail(future, WorkerLostError(f"{type(error).__name__}: {first}", self._names.get(worker, "")))
            except self._ray.exceptions.TaskCancelledError:
                self._fail(future, WorkerLostError("Ray has cancelled it"))  # by us, and nobody waits, or by itself
            except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for it
                self._fail(future, error)
            else:
                if reply is None:
                    self._send(worker, plan, self._shared(plan), item, future)
                elif future.set_running_or_notify_cancel():
                    future.set_result(reply)

        reference.future().add_done_callback(ended)

    @staticmethod
    def _fail(future: concurrent.futures.Future[bytes], error: Exception) -> None:
        if future.set_running_or_notify_cancel():
            future.set_exception(error)

    def _shared(self, plan: Plan) -> Any:
        """Return a plan in Ray's object store, from which all actors of a machine read it."""
        with self._lock:
            if plan.digest not in self._plans:
                self._plans[plan.digest] = self._ray.put(plan.data)
            return self._plans[plan.digest]

    def _look_after(self, worker: int) -> None:
        """Leave an actor out until it answers: Ray restarts it."""
        self.roster.note_down(worker)
        actors = self._actors

        def answered(done: Any) -> None:
            if actors is not self._actors:
                return
            try:
                self._names[worker] = done.result()
            except self._ray.exceptions.RayActorError:
                timer = threading.Timer(_LOOK_SECONDS, ask)
                timer.daemon = True
                timer.start()
            except Exception as error:  # noqa: BLE001 - the actor cannot be made: its imports fail, or nobody has room
                self.roster.fail(RuntimeError(f"Ray's workers do not start: {error}"))
            else:
                self.roster.note_up(worker)

        def ask() -> None:
            with contextlib.suppress(IndexError):  # ended meanwhile
                actors[worker].name.remote().future().add_done_callback(answered)

        ask()

    def cancel(self, worker: int, future: concurrent.futures.Future[bytes]) -> None:  # noqa: ARG002 - Ray knows who has it
        """Cancel what the call awaits."""
        future.cancel()
        with contextlib.suppress(Exception):  # it may be over, or its actor gone
            self._ray.cancel(future.reference)  # type: ignore[attr-defined]

    def settle(self, plan: Plan, timeout: float) -> list[concurrent.futures.Future[WorkerBooks]]:
        """Let every actor store what it has traced."""
        shared = self._shared(plan)
        return [actor.settle.remote(plan.digest, shared, timeout).future() for actor in self._actors]

    def close(self, plan: Plan) -> None:
        """Forget a plan."""
        with self._lock:
            self._plans.pop(plan.digest, None)
            actors = list(self._actors)
        for actor in actors:
            with contextlib.suppress(Exception):  # the cluster may be gone
                actor.forget.remote(plan.digest)


class _Actor:
    """The worker's side. Each call is a task in the actor's event loop."""

    async def name(self) -> str:
        return jobs.process_name()

    async def run(self, digest: str, data: bytes | None, item: bytes) -> bytes | None:
        return await jobs.run(digest, data, item)

    async def settle(self, digest: str, data: bytes, timeout: float) -> WorkerBooks:
        jobs.know(digest, data)
        return await asyncio.to_thread(jobs.settle, timeout)

    async def forget(self, digest: str) -> None:
        jobs.forget(digest)
