"""The cells: what is run, with which sizes, by which contestants, how often. All sizes stand here and nowhere else."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.contestants import FLOOR, MLFLOW, OFF, OPENINFERENCE, OTLP, OURS, PATCHED, PLUGIN

KIB = 1024
MIB = 1024 * KIB

SILENT, SUPPRESS, DURABLE, PROCESS = "ours-silent", "ours-suppress", "ours-durable", "ours-process"

# A window of so many calls, or of so many seconds, is long enough for the writer to have had its turn in it.
ENOUGH_CALLS = 2000
ENOUGH_SECONDS = 10.0

_ALL = (OFF, FLOOR, PATCHED, SILENT, SUPPRESS, OURS, DURABLE, PROCESS, MLFLOW, OPENINFERENCE)
_BASE = (FLOOR, OURS, OPENINFERENCE)
_PEERS = (FLOOR, OURS, MLFLOW, OPENINFERENCE)


@dataclass(frozen=True, slots=True)
class Cell:
    """One situation, in which each contestant is measured ``rounds`` times.

    Attributes:
        axis: What varies among the cells beside it.
        name: Its value on that axis; with the axis, the cell's id.
        driver: Who makes the calls: a key of ``drivers.DRIVERS``.
        workers: Threads or tasks at once; of each evaluation, where there are several.
        calls: The hot window ends after so many calls of the program,
        seconds: or after so many seconds, if they are over before.
        rate: For the driver "rate": calls a second.
        payload: Bytes of each input.
        depth: Modules around one another.
        width: Predictor calls in one call of the program.
        latency_ms: What the LM takes to answer, over HTTP; 0 is an LM in this process.
        store: "sqlite", "server" (a real ``mlflow server`` over sqlite), "sink" (keeps nothing, costs nothing) or
            "held" (a sink that takes nothing until the window is over).
        groups: Evaluations or optimizers at once; worker processes, where these evaluate.
        step: For a series: calls between two marks.
        logs: Further settings of autolog that are on.
        contestants: Ids of those that take part.
        once: Those of them that are measured in the first round alone, since they take minutes.
        hot_only: Those whose store is not waited for: only their window counts.
        is_timed: Whether its figures mean something, so that a window in which the writer did too little is invalid.
        rounds: How often each is measured.
        timeout: Seconds after which a sample has failed.
    """

    axis: str
    name: str
    driver: str = "pool"
    workers: int = 1
    calls: int = ENOUGH_CALLS
    seconds: float = ENOUGH_SECONDS
    rate: int = 0
    payload: int = 100
    depth: int = 1
    width: int = 1
    latency_ms: int = 0
    store: str = "sqlite"
    groups: int = 1
    step: int = 250
    logs: tuple[str, ...] = ()
    contestants: tuple[str, ...] = _BASE
    once: tuple[str, ...] = ()
    hot_only: tuple[str, ...] = ()
    is_timed: bool = True
    rounds: int = 1
    timeout: float = 600.0

    @property
    def id(self) -> str:
        """The cell's name on the command line and in the results."""
        return f"{self.axis}/{self.name}"

    def contestants_of(self, round_number: int) -> tuple[str, ...]:
        """Return the ids of those that are measured in this round, from 1."""
        return tuple(each for each in self.contestants if round_number == 1 or each not in self.once)


_THREADS = (1, 2, 4, 8, 16, 32, 64)
_HEADLINES = (1, 8, 32)


def full() -> list[Cell]:
    """Every axis."""
    return [
        *_threads(),
        Cell("tasks", "1", "tasks", 1),
        Cell("tasks", "10", "tasks", 10),
        Cell(
            "tasks",
            "100",
            "tasks",
            100,
            contestants=(OFF, FLOOR, PATCHED, OURS, PROCESS, MLFLOW, OPENINFERENCE),
            once=(MLFLOW,),
            hot_only=(MLFLOW,),
            rounds=2,
        ),
        Cell("tasks", "1000", "tasks", 1000),
        *_rates("rate", (FLOOR, OURS, PROCESS, MLFLOW, OPENINFERENCE)),
        *_rates("server", (FLOOR, OURS, PLUGIN, PROCESS, MLFLOW, OTLP), store="server"),
        Cell("calls", "10000", "series", 8, calls=10_000, seconds=120, contestants=(*_BASE, PROCESS)),
        Cell("calls", "20000", "series", 8, calls=20_000, seconds=240, contestants=(FLOOR, OURS), timeout=1200),
        Cell(
            "calls",
            "50000-sink",
            "series",
            8,
            calls=50_000,
            step=1000,
            seconds=60,
            store="sink",
            contestants=(FLOOR, OURS),
        ),
        Cell(
            "waiting",
            "1000",
            workers=8,
            calls=1000,
            seconds=60,
            store="held",
            contestants=_PEERS,
            is_timed=False,
            rounds=2,
        ),
        Cell("payload", "1KiB", payload=KIB),
        Cell("payload", "32KiB", payload=32 * KIB),
        Cell("payload", "1MiB", payload=MIB),
        Cell("depth", "1", depth=1),
        Cell("depth", "10", depth=10),
        Cell("depth", "50", depth=50),
        Cell("spans", "4", width=1),
        Cell("spans", "41", width=10),
        Cell("spans", "201", width=50),
        Cell("spans", "1001", width=250),
        Cell("latency", "20ms-pool-8", workers=8, latency_ms=20),
        Cell("latency", "20ms-tasks-32", "tasks", 32, latency_ms=20),
        Cell("latency", "200ms-pool-32", workers=32, latency_ms=200),
        Cell("latency", "200ms-tasks-64", "tasks", 64, latency_ms=200),
        Cell(
            "evaluations",
            "4-at-once",
            "evaluations",
            8,
            groups=4,
            logs=("log_evals",),
            contestants=(FLOOR, OURS, MLFLOW),
            hot_only=(MLFLOW,),
        ),
        Cell(
            "optimizers",
            "2-beside-calls",
            "optimizers",
            4,
            groups=2,
            logs=("log_compiles",),
            contestants=(FLOOR, OURS, MLFLOW),
        ),
        Cell("async-evaluate", "evaluate-64", "evaluate", 64, latency_ms=200, contestants=(OFF, OURS)),
        Cell("async-evaluate", "async-64", "async-evaluate", 64, latency_ms=200, contestants=(OFF, OURS)),
        Cell("async-evaluate", "async-1000", "async-evaluate", 1000, latency_ms=200, contestants=(OFF, OURS)),
        Cell("workers", "threads", "evaluate", 32, seconds=120, latency_ms=200, contestants=(OURS,)),
        Cell("workers", "tasks", "async-evaluate", 32, seconds=120, latency_ms=200, contestants=(OURS,)),
        *(
            Cell(
                "workers",
                f"processes-{count}",
                "workers",
                32,
                seconds=120,
                latency_ms=200,
                groups=count,
                contestants=(OURS,),
            )
            for count in (1, 2, 4)
        ),
    ]


def _threads() -> Iterable[Cell]:
    for threads in _THREADS:
        if threads not in _HEADLINES:
            yield Cell("threads", f"pool-{threads}", "pool", threads)
            continue
        yield Cell(
            "threads",
            f"pool-{threads}",
            "pool",
            threads,
            contestants=_ALL,
            once=(OFF, SILENT, SUPPRESS, DURABLE, MLFLOW),
            hot_only=(MLFLOW,) if threads > 8 else (),  # noqa: PLR2004 - waiting for it takes a minute
            rounds=3,
        )
        for driver in ("parallel", "evaluate"):
            yield Cell(
                "threads",
                f"{driver}-{threads}",
                driver,
                threads,
                contestants=_PEERS,
                once=(MLFLOW,),
                hot_only=(MLFLOW,),
                rounds=2,
            )


def _rates(axis: str, contestants: tuple[str, ...], store: str = "sqlite") -> Iterable[Cell]:
    for rate, seconds in ((20, 15), (50, 10)):
        yield Cell(
            axis,
            f"{rate}-a-second",
            "rate",
            8,
            rate=rate,
            seconds=seconds,
            store=store,
            contestants=contestants,
            once=(MLFLOW,),
            rounds=2,
        )


def quick() -> list[Cell]:
    """Every axis once, small, under 2 minutes: does each cell run, and is every trace there? No time is judged.

    In the cell at a fixed rate it is judged, too, whether the writer had its turn.
    """
    small = [
        Cell("threads", "pool-1", calls=30, contestants=_ALL),
        Cell("threads", "pool-8", workers=8, calls=40, contestants=(OURS, MLFLOW)),
        Cell("threads", "pool-64", workers=64, calls=128, contestants=(OURS,)),
        Cell("threads", "parallel-8", "parallel", 8, calls=40, contestants=(OURS,)),
        Cell("threads", "evaluate-8", "evaluate", 8, calls=40, contestants=(OURS,)),
        Cell("tasks", "100", "tasks", 100, calls=100, contestants=(OURS,)),
        Cell("tasks", "1000", "tasks", 1000, calls=1000, contestants=(OURS,)),
        Cell("payload", "32KiB", payload=32 * KIB, calls=10, contestants=(OURS,)),
        Cell("payload", "1MiB", payload=MIB, calls=4, contestants=(OURS,)),
        Cell("depth", "50", depth=50, calls=4, contestants=(OURS,)),
        Cell("spans", "1001", width=250, calls=2, contestants=(OURS,)),
        Cell("latency", "20ms-pool-8", workers=8, calls=40, latency_ms=20, contestants=(OURS,)),
        Cell("latency", "200ms-tasks-64", "tasks", 64, calls=64, latency_ms=200, contestants=(OURS,)),
        Cell("calls", "500", "series", 8, calls=500, contestants=(OURS,)),
        Cell("calls", "500-sink", "series", 8, calls=500, store="sink", contestants=(OURS,)),
        Cell("waiting", "200", workers=8, calls=200, store="held", contestants=(FLOOR, OURS)),
        Cell(
            "server",
            "pool-8",
            workers=8,
            calls=40,
            store="server",
            contestants=(OURS, PLUGIN, DURABLE, PROCESS, MLFLOW, OTLP),
        ),
        Cell(
            "evaluations", "4-at-once", "evaluations", 4, calls=40, groups=4, logs=("log_evals",), contestants=(OURS,)
        ),
        Cell(
            "optimizers",
            "2-beside-calls",
            "optimizers",
            4,
            calls=40,
            groups=2,
            logs=("log_compiles",),
            contestants=(OURS,),
        ),
        Cell("async-evaluate", "async-64", "async-evaluate", 64, calls=64, latency_ms=200, contestants=(OURS,)),
        Cell("workers", "processes-1", "workers", 8, calls=16, latency_ms=20, contestants=(OURS,)),
    ]
    return [
        *(dataclasses.replace(cell, is_timed=False, timeout=240) for cell in small),
        Cell("rate", "10-a-second", "rate", 8, rate=10, contestants=(OURS, PROCESS)),
    ]


def choose(cells: Iterable[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose axis or id one of the patterns names; all without a pattern.

    Raises:
        ValueError: If a pattern fits none.
    """
    cells = list(cells)
    if not patterns:
        return cells
    for pattern in patterns:
        if not any(_fits(cell, pattern) for cell in cells):
            raise ValueError(f"no cell fits {pattern!r}; --list shows them")
    return [cell for cell in cells if any(_fits(cell, pattern) for pattern in patterns)]


def _fits(cell: Cell, pattern: str) -> bool:
    return pattern == cell.axis or fnmatch.fnmatchcase(cell.id, pattern)
