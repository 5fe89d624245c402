"""The ways to make calls: threads, DSPy's own pools, asyncio tasks, evaluations and optimizers at once."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import dspy

from benchmarks.cells import Cell
from benchmarks.programs import metric

_LAG_INTERVAL = 0.005  # seconds between two looks at the event loop's clock
_CHUNK = 500  # calls that a pool of DSPy's gets at once, between which a window may end
_PATIENCE = 600.0  # seconds; a barrier that breaks means that a thread has died


@dataclass(slots=True)
class Driven:
    """What a driver has seen from the caller's side.

    Attributes:
        calls: How many calls of the program were made that a tracer should make a trace of.
        latencies: Seconds of each call, as its caller sees it.
        caller_cpu: CPU seconds of the threads that made the calls, during the calls; None where it cannot be told.
        lags: Seconds by which the event loop was late, each time it was looked at.
        marks: For a series, since the mark before: calls made so far in all, seconds since the beginning, and wall,
            CPU and callers' CPU seconds a call.
    """

    calls: int = 0
    latencies: list[float] = field(default_factory=list)
    caller_cpu: float | None = None
    lags: list[float] = field(default_factory=list)
    marks: list[tuple[int, float, float, float, float]] = field(default_factory=list)


class Meter:
    """Calls a program and notes what each call took its caller. Only appends, so that threads share no lock."""

    def __init__(self, program: Callable[..., Any]) -> None:
        self._program = program
        self.times: list[tuple[float, float]] = []

    def __call__(self, **inputs: Any) -> Any:
        """What the program returns."""
        return self.call_due(time.perf_counter(), **inputs)

    def call_due(self, due: float, **inputs: Any) -> Any:
        """Call the program; its caller has waited since ``due``."""
        cpu = time.thread_time()
        try:
            return self._program(**inputs)
        finally:
            self.times.append((time.perf_counter() - due, time.thread_time() - cpu))

    def cpu(self) -> float:
        """CPU seconds of the callers so far."""
        return sum(cpu for _, cpu in self.times)

    def driven(self) -> Driven:
        """The sum of it."""
        return Driven(len(self.times), [wall for wall, _ in self.times], self.cpu())


class Window:
    """The hot window: over after so many calls, or after so many seconds. Threads and tasks share it."""

    def __init__(self, calls: int, seconds: float) -> None:
        self._numbers = itertools.count()  # atomic, as a lock would be
        self._calls = calls
        self.began = time.perf_counter()
        self._ends = self.began + seconds

    def take(self) -> int | None:
        """Return the number of the next call, from 0, or None when the window is over."""
        number = next(self._numbers)
        return number if number < self._calls and time.perf_counter() < self._ends else None

    def chunks(self, size: int) -> Iterator[int]:
        """Share the calls out in chunks, for pools that take a list of them."""
        made = 0
        while made < self._calls and time.perf_counter() < self._ends:
            share = min(size, self._calls - made)
            yield share
            made += share


def in_pool(cell: Cell, program: dspy.Module, question: str, calls: int) -> Driven:
    """Plain threads, all started before the first call, sharing the calls."""
    meter = Meter(program)
    _pool(meter, question, calls, cell.workers, cell.seconds)
    return meter.driven()


def _pool(meter: Meter, question: str, calls: int, workers: int, seconds: float) -> None:
    def work(window: Window) -> None:
        while window.take() is not None:
            meter(question=question)

    _in_threads(work, calls, workers, seconds)


def _in_threads(work: Callable[[Window], None], calls: int, workers: int, seconds: float) -> None:
    """Let threads share a window that begins when all of them are there; one of them is the caller itself."""
    if workers == 1:
        work(Window(calls, seconds))
        return
    windows: list[Window] = []
    ready = threading.Barrier(workers, lambda: windows.append(Window(calls, seconds)), timeout=_PATIENCE)

    def begin() -> None:
        ready.wait()
        work(windows[0])

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(begin) for _ in range(workers)]:
            future.result()


def at_a_rate(cell: Cell, program: dspy.Module, question: str, calls: int) -> Driven:
    """Calls that are due at a fixed rate, whether those before them are over or not, as far as the threads go.

    A latency counts from the moment that the call was due: who comes while all threads are late waits, too.
    """
    meter = Meter(program)

    def work(window: Window) -> None:
        while (number := window.take()) is not None:
            due = window.began + number / cell.rate
            if (early := due - time.perf_counter()) > 0:
                time.sleep(early)
            meter.call_due(due, question=question)

    # All that were due are made, however late: the slow ones are those that would be left out.
    _in_threads(work, min(calls, round(cell.rate * cell.seconds) + 1), cell.workers, _PATIENCE)
    return meter.driven()


def in_series(cell: Cell, program: dspy.Module, question: str, calls: int) -> Driven:
    """Calls in steps, each measured on its own, until they are made or the time is over."""
    meter = Meter(program)
    marks: list[tuple[int, float, float, float, float]] = []
    window = Window(calls, cell.seconds)
    made = 0
    for step in window.chunks(cell.step):
        callers = meter.cpu()
        wall, cpu = time.perf_counter(), time.process_time()
        _pool(meter, question, step, cell.workers, _PATIENCE)
        now, cpu = time.perf_counter(), time.process_time() - cpu
        made += step
        marks.append((made, now - window.began, (now - wall) / step, cpu / step, (meter.cpu() - callers) / step))
    driven = meter.driven()
    driven.marks = marks
    return driven


def in_parallel(cell: Cell, program: dspy.Module, question: str, calls: int) -> Driven:
    """``dspy.Parallel``."""
    meter = Meter(program)
    parallel = dspy.Parallel(num_threads=cell.workers, disable_progress_bar=True, provide_traceback=True)
    for share in Window(calls, cell.seconds).chunks(_CHUNK):
        parallel([(meter, {"question": question})] * share)
    return meter.driven()


def in_evaluate(cell: Cell, program: dspy.Module, question: str, calls: int) -> Driven:
    """``dspy.Evaluate``."""
    meter = Meter(program)
    for share in Window(calls, cell.seconds).chunks(_CHUNK):
        _evaluate(meter, question, share, cell.workers)
    return meter.driven()


def _evaluate(program: Callable[..., Any], question: str, calls: int, threads: int) -> None:
    devset = [dspy.Example(question=question).with_inputs("question") for _ in range(calls)]
    evaluate = dspy.Evaluate(devset=devset, metric=metric, num_threads=threads, display_progress=False)
    _check_score(evaluate(program))


def _check_score(result: Any) -> None:
    if result.score != 100:  # noqa: PLR2004 - percent
        raise RuntimeError(f"the evaluation scored {result.score}, not 100: calls have failed")


def in_tasks(cell: Cell, program: dspy.Module, question: str, calls: int) -> Driven:
    """``asyncio`` tasks in one thread, sharing the calls, and one that looks at how late the loop is."""
    driven = Driven()

    async def work(window: Window) -> None:
        while window.take() is not None:
            began = time.perf_counter()
            await program.acall(question=question)
            driven.latencies.append(time.perf_counter() - began)

    async def main() -> None:
        cpu = time.thread_time()
        window = Window(calls, cell.seconds)
        await asyncio.gather(*(work(window) for _ in range(cell.workers)))
        driven.calls = len(driven.latencies)
        driven.caller_cpu = time.thread_time() - cpu

    asyncio.run(_with_lag(main, driven.lags))
    return driven


async def _with_lag(main: Callable[[], Any], lags: list[float]) -> None:
    async def watch() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(_LAG_INTERVAL)
            lags.append(time.perf_counter() - began - _LAG_INTERVAL)

    watcher = asyncio.create_task(watch())
    try:
        await main()
    finally:
        watcher.cancel()


def in_async_evaluate(cell: Cell, program: dspy.Module, question: str, calls: int) -> Driven:
    """Our ``AsyncEvaluate``, which needs no tracer."""
    return _evaluate_async(cell, program, question, calls)


def on_workers(cell: Cell, program: dspy.Module, question: str, calls: int) -> Driven:
    """The same, with ``groups`` worker processes that evaluate, each with its share of the examples in flight.

    A call ends when each of them has stored its traces, so that the first, which is the warm-up's, waits for their
    imports. Their CPU is that of child processes.
    """
    return _evaluate_async(cell, program, question, calls, workers=cell.groups)


def _evaluate_async(cell: Cell, program: dspy.Module, question: str, calls: int, **options: Any) -> Driven:
    from dspy_mlflow_async import AsyncEvaluate

    devset = [dspy.Example(question=question).with_inputs("question") for _ in range(calls)]
    evaluate = AsyncEvaluate(devset=devset, metric=metric, max_concurrency=cell.workers, **options)
    driven = Driven(calls)

    async def main() -> None:
        cpu = time.thread_time()
        _check_score(await evaluate.acall(program))
        driven.caller_cpu = time.thread_time() - cpu

    asyncio.run(_with_lag(main, driven.lags))
    return driven


def in_evaluations(cell: Cell, program: dspy.Module, question: str, calls: int) -> Driven:
    """Several ``dspy.Evaluate`` at once, each logging a run of its own."""
    share = calls // cell.groups
    with ThreadPoolExecutor(cell.groups) as pool:
        for future in [
            pool.submit(_evaluate, program.deepcopy(), question, share, cell.workers) for _ in range(cell.groups)
        ]:
            future.result()
    return Driven(share * cell.groups)


def in_optimizers(cell: Cell, program: dspy.Module, question: str, calls: int) -> Driven:
    """Optimizers at work, and other calls of the same process at the same time, which are the ones that count.

    The traces of a compile are off by default; those of everybody else are not.
    """
    trainset = [dspy.Example(question=question, answer="yes").with_inputs("question") for _ in range(20)]
    stop = threading.Event()
    compiles: list[int] = []

    def compile_again_and_again() -> None:
        while not stop.is_set():
            optimizer = dspy.BootstrapFewShot(metric=metric, max_bootstrapped_demos=4, max_labeled_demos=4)
            optimizer.compile(program.deepcopy(), trainset=trainset)
            compiles.append(1)

    meter = Meter(program)
    with ThreadPoolExecutor(cell.groups) as pool:
        futures = [pool.submit(compile_again_and_again) for _ in range(cell.groups)]
        try:
            _pool(meter, question, calls, cell.workers, cell.seconds)
        finally:
            stop.set()
        for future in futures:
            future.result()
    return meter.driven()


DRIVERS: dict[str, Callable[[Cell, dspy.Module, str, int], Driven]] = {
    "pool": in_pool,
    "rate": at_a_rate,
    "series": in_series,
    "parallel": in_parallel,
    "evaluate": in_evaluate,
    "tasks": in_tasks,
    "async-evaluate": in_async_evaluate,
    "workers": on_workers,
    "evaluations": in_evaluations,
    "optimizers": in_optimizers,
}
