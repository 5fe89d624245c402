"""One sample: one contestant in one cell, once, in the fresh process that this is called in."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import meters
from benchmarks.cells import PROCESS, Cell
from benchmarks.contestants import CONTESTANTS, Contestant, Installed
from benchmarks.drivers import DRIVERS, Driven
from benchmarks.meters import Reading
from benchmarks.programs import make_lm, make_program, make_question, span_count
from benchmarks.stores import Found, Sink

EXPERIMENT = "bench"
_WARM_UP_CALLS = 20
_WARM_UP_SPANS = 200
_GRACE_SECONDS = 0.5  # for threads to end after a contestant is taken out
_LOG_TAIL = 2000


class UnavailableError(Exception):
    """A contestant cannot take part, through no fault of the run."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What to measure.

    Attributes:
        cell: The situation.
        contestant: Its id.
        uri: MLflow's tracking URI.
        folder: For everything that this sample writes.
        experiment: Name of the experiment that the traces go to.
        endpoint: The address of the LM, where the cell has latency.
        server_pid: The process of the MLflow server, if there is one.
    """

    cell: Cell
    contestant: str
    uri: str
    folder: Path
    experiment: str = EXPERIMENT
    endpoint: str | None = None
    server_pid: int | None = None


class _Bars(weakref.WeakSet):
    """tqdm's set of progress bars. DSPy empties it for each evaluation, and a bar of another one then cannot leave."""

    remove = weakref.WeakSet.discard


def nothing() -> None:
    """Begin and end: the first process waits for the imports that the others are spared."""


def run(spec: Spec, connection: Any) -> None:
    """Measure, and send what came of it: ``figures``, ``unavailable`` or ``error``."""
    began = time.time()
    is_warm = "mlflow" in sys.modules
    try:
        with _said_to(spec.folder / "log.txt"):
            outcome = {"figures": measure(spec)}
    except UnavailableError as reason:
        outcome = {"unavailable": str(reason)}
    except BaseException:  # noqa: BLE001 - whatever it is, the run must hear of it
        outcome = {"error": f"{traceback.format_exc()}\n{_tail(spec.folder / 'log.txt')}"}
    connection.send(outcome | {"is_warm": is_warm, "seconds": time.time() - began})
    connection.close()
    if spec.contestant in spec.cell.hot_only:
        os._exit(0)  # what it has not stored yet is not waited for


def measure(spec: Spec) -> dict[str, Any]:
    """Make the calls, wait until they are stored, and take the contestant out again.

    Raises:
        UnavailableError: If the contestant is a peer that is not installed, or has no effect here.
    """
    cell, contestant = spec.cell, CONTESTANTS[spec.contestant]
    sink = Sink()
    program = _prepare(spec, sink)
    threads = set(threading.enumerate())
    installed = _install(contestant, cell)
    program, question = installed.wrap(program), make_question(cell.payload)
    drive = functools.partial(DRIVERS[cell.driver], cell, program, question)
    drive(_warm_up_calls(cell))
    installed.flush()
    gc.collect()  # touches what the fork shares, so that it is copied now
    time.sleep(0.005)  # no warm-up trace begins in the millisecond that the measurement begins in
    sink.reset()
    since_ms = int(time.time() * 1000)

    is_hot_only = contestant.id in cell.hot_only
    waiting = None
    memory = meters.memory()
    meters.forget_peak()
    server = _server_cpu(spec)
    began = meters.read()
    with sink.held() if cell.store == "held" else contextlib.nullcontext():
        driven = drive(cell.calls)
        called = meters.read()
        if cell.store == "held":
            waiting = _waiting(sink, memory)
    if not is_hot_only:
        installed.flush()
    stored = meters.read()
    peak = meters.peak_memory()
    there = meters.memory_of_children() if cell.driver == "workers" else None
    server = _server_cpu(spec) - server

    if contestant.id == PROCESS and stored.cpu_children == 0:
        raise UnavailableError('export="process" started no process of its own')
    report = installed.report()
    if not is_hot_only:
        installed.uninstall()
    figures = _figures(driven, began, called, None if is_hot_only else stored) | {
        "since_ms": since_ms,
        "expected": driven.calls if contestant.stores and not is_hot_only else 0,
        "cpu_server_us": None if spec.server_pid is None or is_hot_only else server * 1e6 / driven.calls,
        "memory_peak_mib": max(0, peak - memory) / 2**20,
        "memory_children_mib": None if there is None else there / 2**20,
        "memory_waiting_mib": waiting,
        "threads_left": {} if is_hot_only else _threads_left(threads),
        "report": report,
    }
    if cell.store in {"sink", "held"}:
        found = sink.found(span_count(cell.depth, cell.width))
        figures |= {"found": found.traces, "whole": found.whole, "found_spans": found.spans}
    return figures


def _prepare(spec: Spec, sink: Sink) -> Any:
    """Bring DSPy and MLflow into the state that every contestant begins with.

    Returns:
        The program.
    """
    import dspy
    import mlflow
    import tqdm

    warnings.simplefilter("ignore")
    tqdm.tqdm._instances = _Bars()
    cell = spec.cell
    os.chdir(spec.folder)
    os.environ["DSPY_MLFLOW_ASYNC_SPOOL"] = str(spec.folder / "spool")
    if cell.store in {"sink", "held"}:
        sink.register()
    mlflow.set_tracking_uri(spec.uri)
    mlflow.set_experiment(spec.experiment)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    # The history would hold every prompt: a cost of DSPy's own, the same for all, and larger than most of theirs.
    dspy.configure(lm=make_lm(cell.latency_ms, spec.endpoint), disable_history=True, max_errors=10_000)
    if cell.driver == "async-evaluate" and not _has_async_evaluate():
        raise UnavailableError("this version has no AsyncEvaluate")
    return make_program(cell.depth, cell.width)


def _waiting(sink: Sink, before: int) -> float:
    """MiB that this process has grown by while the store took nothing.

    Raises:
        RuntimeError: If the store has taken something.
    """
    if sink.found(0) != Found(0, 0, 0):
        raise RuntimeError("the store was to take nothing, and has taken traces")
    gc.collect()
    return (meters.memory() - before) / 2**20


def _figures(driven: Driven, began: Reading, called: Reading, stored: Reading | None) -> dict[str, Any]:
    """Figures of a window, and of what followed until everything was stored, where that was waited for."""
    per_call = 1e6 / driven.calls
    last = stored or called
    seconds = last.wall - began.wall
    return {
        "calls": driven.calls,
        "wall_us": (called.wall - began.wall) * per_call,
        "caller_cpu_us": None if driven.caller_cpu is None else driven.caller_cpu * per_call,
        "latency_p50_us": _quantile(driven.latencies, 0.5, 1e6),
        "latency_p99_us": _quantile(driven.latencies, 0.99, 1e6),
        "cpu_calls_us": (called.cpu - began.cpu) * per_call,
        "cpu_children_calls_us": (called.cpu_children - began.cpu_children) * per_call,
        "cpu_stored_us": None if stored is None else (stored.cpu - began.cpu) * per_call,
        "cpu_children_us": None if stored is None else (stored.cpu_children - began.cpu_children) * per_call,
        "stored_wall_s": None if stored is None else stored.wall - began.wall,
        "lag_p50_ms": _quantile(driven.lags, 0.5, 1e3),
        "lag_p99_ms": _quantile(driven.lags, 0.99, 1e3),
        "lag_max_ms": _quantile(driven.lags, 1.0, 1e3),
        "steal": (last.steal - began.steal) / (seconds * (os.cpu_count() or 1)),
        "marks": [[made, since, wall * 1e6, cpu * 1e6, own * 1e6] for made, since, wall, cpu, own in driven.marks],
    }


def _server_cpu(spec: Spec) -> float:
    return 0.0 if spec.server_pid is None else meters.cpu_of(spec.server_pid)


def _install(contestant: Contestant, cell: Cell) -> Installed:
    try:
        return contestant.install(**dict.fromkeys(cell.logs, True))
    except ImportError as error:
        if contestant.is_peer:
            raise UnavailableError(f"not installed: {error}") from error
        raise


def _has_async_evaluate() -> bool:
    import dspy_mlflow_async

    try:
        return hasattr(dspy_mlflow_async, "AsyncEvaluate")
    except ImportError:
        return False


def _warm_up_calls(cell: Cell) -> int:
    """Enough to open the store and fill the caches, in as many threads or tasks as there will be."""
    few = max(1, min(_WARM_UP_CALLS, _WARM_UP_SPANS // span_count(cell.depth, cell.width)))
    return max(few, cell.groups)


def _threads_left(before: set[threading.Thread]) -> dict[str, int]:
    """Threads that were not there before the contestant came, by name without its number."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while left := set(threading.enumerate()) - before:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return dict(Counter(thread.name.rstrip("0123456789_-") for thread in left))


def _quantile(values: Sequence[float], share: float, factor: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * factor


@contextlib.contextmanager
def _said_to(path: Path) -> Iterator[None]:
    """Let everything that this process says go to a file, whoever says it."""
    with path.open("ab", buffering=0) as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield


def _tail(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")[-_LOG_TAIL:]
    return ""
