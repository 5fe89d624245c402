"""The cells: what is run, with which sizes, by which contestants, how often. All sizes stand here and nowhere else."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.contestants import FLOOR, MLFLOW, OFF, OURS

KIB = 1024
MIB = 1024 * KIB

SILENT, SUPPRESS, DURABLE, PROCESS = "ours-silent", "ours-suppress", "ours-durable", "ours-process"
OPENINFERENCE = "openinference"

_BASE = (OFF, FLOOR, SILENT, OURS, MLFLOW, OPENINFERENCE)
_ALL = (OFF, FLOOR, SILENT, SUPPRESS, OURS, DURABLE, PROCESS, MLFLOW, OPENINFERENCE)
_TRACED = (OFF, FLOOR, OURS, MLFLOW, OPENINFERENCE)
_LOGGED = (OFF, FLOOR, OURS, MLFLOW)
_STORED = (OURS, DURABLE, PROCESS, MLFLOW)


@dataclass(frozen=True, slots=True)
class Cell:
    """One situation, in which each contestant is measured ``rounds`` times.

    Attributes:
        axis: What varies among the cells beside it.
        name: Its value on that axis; with the axis, the cell's id.
        driver: Who makes the calls: a key of ``drivers.DRIVERS``.
        workers: Threads or tasks at once; of each evaluation, where there are several.
        calls: Calls of the program that are measured, and so the traces that should be there.
        light: How many times as many calls contestants make that store nothing: theirs are too short to measure.
        payload: Bytes of each input.
        depth: Modules around one another.
        width: Predictor calls in one call of the program.
        latency_ms: What the LM takes to answer, over HTTP; 0 is an LM in this process.
        store: "sqlite", "server" (a real ``mlflow server`` over sqlite) or "sink" (keeps nothing, costs nothing).
        groups: Evaluations or optimizers at once.
        seconds: For a series: no further step begins after so long.
        step: For a series: calls between two marks.
        logs: Further settings of autolog that are on.
        contestants: Ids of those that take part.
        rounds: How often each is measured.
        timeout: Seconds after which a sample has failed.
    """

    axis: str
    name: str
    driver: str = "pool"
    workers: int = 1
    calls: int = 120
    light: int = 4
    payload: int = 100
    depth: int = 1
    width: int = 1
    latency_ms: int = 0
    store: str = "sqlite"
    groups: int = 1
    seconds: float = 60.0
    step: int = 500
    logs: tuple[str, ...] = ()
    contestants: tuple[str, ...] = _TRACED
    rounds: int = 3
    timeout: float = 240.0

    @property
    def id(self) -> str:
        """The cell's name on the command line and in the results."""
        return f"{self.axis}/{self.name}"

    def calls_of(self, *, stores: bool) -> int:
        """How many calls a contestant makes."""
        return self.calls if stores else self.calls * self.light


_THREADS = (1, 2, 4, 8, 16, 32, 64)
_HEADLINES = (1, 8, 32)


def full() -> list[Cell]:
    """Every axis, about 20 minutes on 2 cores."""
    return [
        *_threads(),
        Cell("tasks", "1", "tasks", 1, contestants=_BASE, rounds=2),
        Cell("tasks", "10", "tasks", 10, contestants=_BASE, rounds=2),
        Cell("tasks", "100", "tasks", 100, contestants=_BASE, rounds=2),
        Cell("tasks", "1000", "tasks", 1000, calls=1000, light=1, rounds=1),
        Cell("payload", "1KiB", payload=KIB, calls=60, rounds=2),
        Cell("payload", "32KiB", payload=32 * KIB, calls=30, rounds=2),
        Cell("payload", "1MiB", payload=MIB, calls=8, rounds=2),
        Cell("depth", "1", depth=1, calls=60, rounds=2),
        Cell("depth", "10", depth=10, calls=20, rounds=2),
        Cell("depth", "50", depth=50, calls=6, rounds=2),
        Cell("spans", "4", width=1, calls=60, rounds=2),
        Cell("spans", "41", width=10, calls=10, rounds=2),
        Cell("spans", "201", width=50, calls=3, rounds=2),
        Cell("spans", "1001", width=250, calls=1, rounds=2),
        Cell("latency", "20ms-pool-8", workers=8, calls=120, light=1, latency_ms=20, rounds=2),
        Cell("latency", "20ms-tasks-32", "tasks", 32, calls=120, light=1, latency_ms=20, rounds=2),
        Cell("latency", "200ms-pool-32", workers=32, calls=128, light=1, latency_ms=200, rounds=2),
        Cell("latency", "200ms-tasks-64", "tasks", 64, calls=128, light=1, latency_ms=200, rounds=2),
        Cell("calls", "10000", "series", 8, calls=10_000, light=1, seconds=20, rounds=1, timeout=600),
        Cell(
            "calls",
            "50000-sink",
            "series",
            8,
            calls=50_000,
            light=1,
            step=1000,
            seconds=60,
            store="sink",
            rounds=1,
            timeout=600,
            contestants=(OFF, FLOOR, OURS, MLFLOW),
        ),
        Cell("store", "server", workers=8, calls=120, store="server", contestants=_STORED, rounds=2),
        Cell("overload", "32-threads", workers=32, calls=3000, contestants=(OURS, MLFLOW), rounds=1, timeout=600),
        Cell(
            "evaluations",
            "4-at-once",
            "evaluations",
            8,
            calls=120,
            groups=4,
            light=1,
            logs=("log_evals",),
            contestants=_LOGGED,
            rounds=2,
        ),
        Cell(
            "optimizers",
            "2-beside-calls",
            "optimizers",
            4,
            calls=120,
            groups=2,
            light=1,
            logs=("log_compiles",),
            contestants=_LOGGED,
            rounds=2,
        ),
        Cell(
            "async-evaluate",
            "evaluate-64",
            "evaluate",
            64,
            calls=640,
            light=1,
            latency_ms=200,
            contestants=(OFF, OURS, MLFLOW),
            rounds=1,
        ),
        Cell(
            "async-evaluate",
            "async-64",
            "async-evaluate",
            64,
            calls=640,
            light=1,
            latency_ms=200,
            contestants=(OFF, OURS),
            rounds=1,
        ),
        Cell(
            "async-evaluate",
            "async-1000",
            "async-evaluate",
            1000,
            calls=2000,
            light=1,
            latency_ms=200,
            contestants=(OFF, OURS),
            rounds=1,
        ),
    ]


def _threads() -> Iterable[Cell]:
    for threads in _THREADS:
        is_headline = threads in _HEADLINES
        yield Cell(
            "threads",
            f"pool-{threads}",
            "pool",
            threads,
            contestants=_ALL if is_headline else _BASE,
            rounds=3 if is_headline else 2,
        )
        for driver in ("parallel", "evaluate"):
            yield Cell(
                "threads",
                f"{driver}-{threads}",
                driver,
                threads,
                calls=80,
                contestants=(FLOOR, OURS, MLFLOW, OPENINFERENCE),
                rounds=2 if is_headline else 1,
            )


def quick() -> list[Cell]:
    """Every axis once, small, under 3 minutes: does each cell run, and is every trace there? No time is judged."""
    return [
        Cell("threads", "pool-1", calls=30, contestants=_ALL, rounds=1),
        Cell("threads", "pool-8", workers=8, calls=40, contestants=(OFF, FLOOR, OURS, MLFLOW), rounds=1),
        Cell("threads", "pool-64", workers=64, calls=128, contestants=(OURS,), rounds=1),
        Cell("threads", "parallel-8", "parallel", 8, calls=40, contestants=(FLOOR, OURS), rounds=1),
        Cell("threads", "evaluate-8", "evaluate", 8, calls=40, contestants=(FLOOR, OURS), rounds=1),
        Cell("tasks", "100", "tasks", 100, calls=100, contestants=(FLOOR, OURS), rounds=1),
        Cell("tasks", "1000", "tasks", 1000, calls=1000, light=1, contestants=(OURS,), rounds=1),
        Cell("payload", "32KiB", payload=32 * KIB, calls=10, contestants=(OURS,), rounds=1),
        Cell("payload", "1MiB", payload=MIB, calls=4, contestants=(OURS,), rounds=1),
        Cell("depth", "50", depth=50, calls=4, contestants=(OURS,), rounds=1),
        Cell("spans", "1001", width=250, calls=2, contestants=(OURS,), rounds=1),
        Cell("latency", "20ms-pool-8", workers=8, calls=40, light=1, latency_ms=20, contestants=(OFF, OURS), rounds=1),
        Cell(
            "latency", "200ms-tasks-64", "tasks", 64, calls=64, light=1, latency_ms=200, contestants=(OURS,), rounds=1
        ),
        Cell("calls", "1000", "series", 8, calls=1000, light=1, step=250, contestants=(FLOOR, OURS), rounds=1),
        Cell("calls", "2000-sink", "series", 8, calls=2000, light=1, store="sink", contestants=(OURS,), rounds=1),
        Cell("store", "server", workers=8, calls=40, store="server", contestants=_STORED, rounds=1),
        Cell(
            "evaluations",
            "4-at-once",
            "evaluations",
            4,
            calls=40,
            groups=4,
            logs=("log_evals",),
            light=1,
            contestants=(OURS,),
            rounds=1,
        ),
        Cell(
            "optimizers",
            "2-beside-calls",
            "optimizers",
            4,
            calls=40,
            groups=2,
            logs=("log_compiles",),
            light=1,
            contestants=(OURS,),
            rounds=1,
        ),
        Cell(
            "async-evaluate",
            "async-64",
            "async-evaluate",
            64,
            calls=64,
            latency_ms=200,
            light=1,
            contestants=(OURS,),
            rounds=1,
        ),
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
