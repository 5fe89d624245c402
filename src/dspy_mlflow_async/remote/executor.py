"""Examples on any ``concurrent.futures.Executor``: spawned processes, loky, Dask's, MPI's."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable
from typing import Any

from dspy_mlflow_async.remote import plan as jobs
from dspy_mlflow_async.remote.plan import Plan, WorkerBooks
from dspy_mlflow_async.remote.workers import WorkerLostError, Workers

# An executor does not say how many processes it has: so many calls reach as good as every one of a machine.
_SETTLING_CALLS = 2 * (os.cpu_count() or 4)
# By name, since whose they are need not be installed: the process of a call is gone.
_LOST = frozenset({"BrokenProcessPool", "KilledWorker", "TerminatedWorkerError", "WorkerLostError"})


class Executor(Workers):
    """An executor that evaluates examples; it schedules, and knows its workers.

    It does not say which of its processes does what: an example that is to have a worker for itself waits until the
    executor is at nothing else.

    Args:
        executor: The executor, or a function that makes one, without arguments. A ``ProcessPoolExecutor`` that has lost
            a process takes nothing any more: only a function can give another one.
        in_flight: How many examples it may have in hand; by default as many as the evaluation allows.

    Raises:
        TypeError: For what is neither.
    """

    def __init__(
        self,
        executor: concurrent.futures.Executor | Callable[[], concurrent.futures.Executor],
        *,
        in_flight: int | None = None,
    ) -> None:
        is_executor = hasattr(executor, "submit")
        if not is_executor and not callable(executor):
            raise TypeError(f"executor must be a concurrent.futures.Executor, or make one, not {executor!r}")
        super().__init__(1, float("inf") if in_flight is None else in_flight)
        self._make: Any = None if is_executor else executor
        self._executor: Any = executor if is_executor else None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Executor({self._executor or self._make!r})"

    def start(self) -> None:
        """Make the executor, if that is left to us."""
        with self._lock:
            if self._executor is None:
                self._executor = self._make()

    def submit(self, worker: int, plan: Plan, item: bytes) -> concurrent.futures.Future[bytes]:  # noqa: ARG002 - it has but one
        """Submit a call, and the plan with it where a process says that it does not know it."""
        future: concurrent.futures.Future[bytes] = concurrent.futures.Future()
        self._send(future, plan, None, item)
        return future

    def _send(self, future: concurrent.futures.Future[bytes], plan: Plan, data: bytes | None, item: bytes) -> None:
        executor = self._executor
        try:
            inner = executor.submit(jobs.run_in_thread, plan.digest, data, item)
        except Exception as error:  # noqa: BLE001 - the executor's own
            self._failed(future, executor, error)
            return
        future.inner = inner  # type: ignore[attr-defined]

        def ended(done: Any) -> None:
            try:
                reply = done.result()
            except concurrent.futures.CancelledError:  # by us, and nobody waits, or by the executor
                self._failed(future, executor, WorkerLostError("the executor has cancelled it"))
            except Exception as error:  # noqa: BLE001 - the executor's own, or the call's
                self._failed(future, executor, error)
            else:
                if reply is None:
                    self._send(future, plan, plan.data, item)
                elif future.set_running_or_notify_cancel():
                    future.set_result(reply)

        inner.add_done_callback(ended)

    def _failed(self, future: concurrent.futures.Future[bytes], broken: Any, error: Exception) -> None:
        is_lost = type(error).__name__ in _LOST or isinstance(error, concurrent.futures.BrokenExecutor)
        if isinstance(error, concurrent.futures.BrokenExecutor):
            if self._make is None:
                is_lost = False
                error = RuntimeError(
                    f"{type(broken).__name__} has lost a process, and takes nothing any more ({error}). Give "
                    "Executor a function that makes one, and it goes on with another"
                )
            else:
                self._renew(broken)
        if future.set_running_or_notify_cancel():
            future.set_exception(WorkerLostError(f"{type(error).__name__}: {error}") if is_lost else error)

    def _renew(self, broken: Any) -> None:
        with self._lock:
            if self._executor is broken:
                broken.shutdown(wait=False)
                self._executor = self._make()

    def cancel(self, worker: int, future: concurrent.futures.Future[bytes]) -> None:  # noqa: ARG002 - it has but one
        """Cancel a call, where the executor can: most can while it waits."""
        future.cancel()
        inner = getattr(future, "inner", None)
        if inner is not None:
            inner.cancel()

    def close(self, plan: Plan) -> None:
        """Forget a plan, where the executor works in this process; others forget the oldest."""
        jobs.forget(plan.digest)

    def settle(self, plan: Plan, timeout: float) -> list[concurrent.futures.Future[WorkerBooks]]:  # noqa: ARG002 - none is new
        """Let the processes store what they have traced: those that get one of so many calls."""
        return [self._executor.submit(jobs.settle, timeout) for _ in range(_SETTLING_CALLS)]
