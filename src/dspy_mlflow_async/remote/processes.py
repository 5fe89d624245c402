"""Worker processes on this machine: the side of the user's process, and below it that of the worker.

Each is a Python of its own that imports nothing of the user's but what it is sent, so that scripts need no ``__main__``
guard. A pipe leads there. It ends when its pipe does, whatever has become of the process that started it.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import itertools
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any, ClassVar

from dspy_mlflow_async.remote import plan as jobs
from dspy_mlflow_async.remote.plan import Plan, WorkerBooks
from dspy_mlflow_async.remote.workers import Roster, WorkerLostError, Workers

if TYPE_CHECKING:
    from typing_extensions import Self

_STARTS = 3  # in a row that end before a word has come: then the workers do not work here
_EXIT_SECONDS = 10.0
_BOOT = """\
import sys
sys.path[:] = {path!r}
from dspy_mlflow_async.remote.processes import main
main({descriptor})
"""


class Processes(Workers):
    """Processes of this machine, started with the first use, and kept until this process ends or ``end`` is called.

    ``workers=4`` of ``evaluate_all`` means ``Processes(4)``, one for all calls of this process: it takes each of them
    seconds to import DSPy and MLflow. Each works at many examples at once.

    Args:
        count: How many.

    Raises:
        TypeError: For what is no whole number.
        ValueError: Below 1.
    """

    _shared: ClassVar[dict[int, Processes]] = {}
    _shared_lock = threading.Lock()

    def __init__(self, count: int) -> None:
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"workers must be a whole number of processes, not {count!r}")
        if count < 1:
            raise ValueError(f"workers must be at least 1, not {count}")
        super().__init__(count, in_flight=float("inf"))
        self._lock = threading.Lock()
        self._count = count
        self._pid = os.getpid()
        self._processes: list[_Process] = []

    def __repr__(self) -> str:
        return f"Processes({self._count})"

    @classmethod
    def shared(cls, count: int) -> Processes:
        """Return those that all calls with this number share."""
        with cls._shared_lock:
            found = cls._shared.get(count)
            if found is None or found._pid != os.getpid():
                found = cls._shared[count] = cls(count)
            return found

    def start(self) -> None:
        """Start the processes, unless they are up. They become ready in the background."""
        with self._lock:
            if self._pid != os.getpid():
                raise RuntimeError("these workers are those of the process that this one is a fork of; make others")
            if not self._processes:
                self.roster = Roster(self._count, float("inf"))
                self._processes = [_Process(worker, self.roster) for worker in range(self._count)]
                for each in self._processes:
                    each.start()
                atexit.register(self.end)

    def end(self) -> None:
        """End the processes. What they have traced is stored, or in the spool."""
        with self._lock:
            processes, self._processes = self._processes, []
            self.roster.fail(WorkerLostError("the workers were ended"))
            if self._pid == os.getpid():
                for each in processes:
                    each.end()
                for each in processes:
                    each.join()
        atexit.unregister(self.end)

    def __enter__(self) -> Self:
        """Start the processes."""
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End the processes."""
        self.end()

    def submit(self, worker: int, plan: Plan, item: bytes) -> concurrent.futures.Future[bytes]:
        """Send a call to a process."""
        return self._processes[worker].send("run", plan, item)

    def cancel(self, worker: int, future: concurrent.futures.Future[bytes]) -> None:
        """Cancel what the call awaits; a thread that it has left behind ends by itself."""
        self._processes[worker].cancel(future)

    def settle(self, plan: Plan, timeout: float) -> list[concurrent.futures.Future[WorkerBooks]]:
        """Let every process store what it has traced."""
        return [each.send("settle", plan, timeout) for each in self._processes]

    def close(self, plan: Plan) -> None:
        """Forget a plan."""
        for each in list(self._processes):
            each.forget(plan)


class _Process:
    """One worker: its process, the pipe to it, and a thread for each direction. ``lock`` guards all but the pipe.

    Args:
        worker: Its place in the roster.
        roster: Who is told whether it is up.
    """

    def __init__(self, worker: int, roster: Roster) -> None:
        self._worker = worker
        self.roster = roster
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._is_ended = False
        self._starts = 0  # since the last word from one
        self._popen: subprocess.Popen[bytes] | None = None
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._calls: dict[int, concurrent.futures.Future[Any]] = {}
        self._plans: set[str] = set()

    def start(self) -> None:
        """Start a process; it is up when it says so."""
        ours, theirs = Pipe()
        code = _BOOT.format(path=sys.path, descriptor=theirs.fileno())
        with self._lock, theirs:
            self._starts += 1
            self.roster.note_down(self._worker)
            # A session of its own: Ctrl-C is for the user's process, which cancels what runs here.
            self._popen = subprocess.Popen(  # noqa: S603 - our own code, and no shell
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        for target in (self._read, self._write):
            arguments = (ours, self._popen) if target == self._read else (ours, self._outbox)
            threading.Thread(target=target, args=arguments, name="dspy-mlflow-async-workers", daemon=True).start()

    def send(self, verb: str, plan: Plan, argument: Any) -> concurrent.futures.Future[Any]:
        """Send a request, the plan ahead of it where the process has not had it."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._lock:
            if self._is_ended:
                future.set_exception(WorkerLostError("the workers were ended"))
                return future
            number = next(self._numbers)
            self._calls[number] = future
            future.number = number  # type: ignore[attr-defined]
            data = None if plan.digest in self._plans else plan.data
            self._plans.add(plan.digest)
            self._outbox.put(pickle.dumps((number, verb, plan.digest, data, argument)))
        return future

    def cancel(self, future: Any) -> None:
        """Cancel a request."""
        with self._lock:
            if self._calls.pop(future.number, None) is not None:
                self._outbox.put(pickle.dumps((future.number, "cancel", "", None, None)))

    def forget(self, plan: Plan) -> None:
        """Let the process forget a plan."""
        with self._lock:
            if plan.digest in self._plans:
                self._plans.discard(plan.digest)
                self._outbox.put(pickle.dumps((0, "forget", plan.digest, None, None)))

    def end(self) -> None:
        """Let the process end; it stores first what it has."""
        with self._lock:
            self._is_ended = True
            self._outbox.put(None)

    def join(self) -> None:
        """Wait until it has ended, for a bounded time."""
        popen = self._popen
        if popen is not None:
            try:
                popen.wait(_EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                popen.kill()  # its spool has the rest
                popen.wait()

    def _write(self, connection: Connection, outbox: queue.SimpleQueue[bytes | None]) -> None:
        with contextlib.suppress(OSError):  # it is gone; the other thread hears of it
            while (message := outbox.get()) is not None:
                connection.send_bytes(message)
            connection.send_bytes(b"")

    def _read(self, connection: Connection, popen: subprocess.Popen[bytes]) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            while True:
                number, is_good, value = pickle.loads(connection.recv_bytes())  # noqa: S301 - of our own process
                if number == 0:
                    self._starts = 0
                    self.roster.note_up(self._worker)
                    continue
                with self._lock:
                    future = self._calls.pop(number, None)
                if future is not None and future.set_running_or_notify_cancel():
                    future.set_result(value) if is_good else future.set_exception(value)
        self._lost(popen)

    def _lost(self, popen: subprocess.Popen[bytes]) -> None:
        code = popen.wait()
        self.roster.note_down(self._worker)
        with self._lock:
            self._outbox.put(None)
            # What is sent from here on is for the next process.
            self._outbox, self._plans = queue.SimpleQueue(), set()
            calls, self._calls = self._calls, {}
            is_over, is_hopeless = self._is_ended, self._starts >= _STARTS
            self._is_ended = is_over or is_hopeless
        reason = f"the worker process {popen.pid} ended with {_told(code)}"
        if not is_over and is_hopeless:
            self.roster.fail(RuntimeError(f"worker processes do not start here: {reason}; its output says why"))
        elif not is_over:
            self.start()
        for future in calls.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(WorkerLostError(reason, f"{socket.gethostname()}:{popen.pid}"))


def _told(code: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"exit code {code}"


# --- the worker -------------------------------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Work until the pipe ends; what has been traced is stored then, or left in the spool.

    Args:
        descriptor: The pipe's.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    asyncio.run(_Worker(connection).work())
    from dspy_mlflow_async.health import secure

    secure(_EXIT_SECONDS / 2)
    # Threads that programs have left behind would keep the interpreter waiting.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _Worker:
    """The worker's side of the pipe. All but the reading happens in its event loop."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._sending = threading.Lock()

    async def work(self) -> None:
        """Say that the process is up, and do what comes in."""
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[bytes]()

        def read() -> None:
            with contextlib.suppress(OSError, EOFError):
                while message := self._connection.recv_bytes():
                    loop.call_soon_threadsafe(inbox.put_nowait, message)
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(inbox.put_nowait, b"")

        threading.Thread(target=read, name="dspy-mlflow-async-worker", daemon=True).start()
        self._send(0, True, None)
        while message := await inbox.get():
            number, verb, digest, data, argument = pickle.loads(message)  # noqa: S301 - of the process that started us
            if verb == "cancel":
                if (task := self._tasks.get(number)) is not None:
                    task.cancel()
            elif verb == "forget":
                jobs.forget(digest)
            else:
                task = asyncio.create_task(self._do(number, verb, digest, data, argument))
                self._tasks[number] = task
        for task in self._tasks.values():
            task.cancel()  # nobody waits for them any more
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _do(self, number: int, verb: str, digest: str, data: bytes | None, argument: Any) -> None:
        try:
            if verb == "settle":
                jobs.know(digest, data)
                self._send(number, True, await asyncio.to_thread(jobs.settle, argument))
            else:
                self._send(number, True, await jobs.run(digest, data, argument))
        except Exception as error:  # noqa: BLE001 - whatever it is, the other side waits for it
            self._send(number, False, error)
        finally:
            self._tasks.pop(number, None)

    def _send(self, number: int, is_good: bool, value: Any) -> None:
        try:
            message = pickle.dumps((number, is_good, value))
        except Exception:  # noqa: BLE001 - an error of the user's may hold anything
            message = pickle.dumps((number, is_good, RuntimeError(f"{type(value).__name__}: {value}")))
        with self._sending, contextlib.suppress(OSError):
            self._connection.send_bytes(message)
