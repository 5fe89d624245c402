"""The bounds that are wanted, beside what a run has measured. A bound is a wish, and no figure of any run."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks import machine, tables
from benchmarks.contestants import FLOOR, MLFLOW, OPENINFERENCE, OTLP, OURS, PLUGIN
from benchmarks.results import (
    CellResult,
    Results,
    Spread,
    Value,
    cpu_of_all,
    cpu_per_stored_trace,
    last_wall_over_first,
    until_stored,
    waiting_per_thousand,
    wall,
)

_SATURATED = tuple(f"threads/{driver}-{n}" for n in (1, 8, 32) for driver in ("pool", "parallel", "evaluate"))
_SATURATED = (*_SATURATED, "tasks/100")
_SERVERS = ("server/20-a-second", "server/50-a-second")
_LONG, _LONGER, _WAITING = "calls/10000", "calls/20000", "waiting/1000"

# Every cell that a bound looks into.
CELLS = (*_SATURATED, *_SERVERS, _LONG, _LONGER, _WAITING)


@dataclass(frozen=True, slots=True)
class Found:
    """A figure of one cell.

    Attributes:
        cell: Its name.
        value: The median over the rounds; None where the hypervisor has not let it be told.
        sign: What makes a bound of it, where its window or its peer's was invalid.
    """

    cell: str
    value: float | None
    sign: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A bound.

    Attributes:
        label: The name of the figure.
        most: It should be no more than this.
        find: Gives the figures of a run.
        is_time: Whether it compares times, which a busy machine does not tell.
    """

    label: str
    most: float
    find: Callable[[Results], list[Found]]
    is_time: bool = False


def as_table(results: Results) -> str:
    """Each bound, what was measured, and whether all of it is within."""
    return tables.table(["", "wanted", "measured", "where", "reached"], map(_row, WANTED, [results] * len(WANTED)))


def _row(wanted: Wanted, results: Results) -> list[str]:
    found = wanted.find(results)
    told = [(each.value, each) for each in found if each.value is not None]
    told.sort(key=operator.itemgetter(0))
    most = f"≤ {tables.number(wanted.most)}" if wanted.most else "0"
    if wanted.is_time and machine.is_busy(results.data["machine"]):
        return [wanted.label, most, "not told: the machine was busy", tables.NONE, tables.NONE]
    if not told:
        reason = "not told: the hypervisor took too much" if found else "not measured"
        return [wanted.label, most, reason, tables.NONE, tables.NONE]
    # An upper bound that is within is reached; what is only known to be more, or not to be known, is not.
    is_within = all(value <= wanted.most and each.sign in {"", "≤ "} for value, each in told)
    ends = [told[0]] if len(told) == 1 else [told[0], told[-1]]
    measured = " to ".join(f"{each.sign}{tables.number(value)}" for value, each in ends)
    where = " to ".join(each.cell for _, each in ends)
    if untold := len(found) - len(told):
        where += f"; {untold} not told"
    return [wanted.label, most, measured, where, ("yes" if not untold else tables.NONE) if is_within else "no"]


def _cells(results: Results, names: Iterable[str]) -> list[CellResult]:
    return [cell for name in names if (cell := results.cell(name)) is not None]


def _ratio(
    names: Iterable[str], value: Value | str, peer: str, floor: str | None = FLOOR, ours: str = OURS
) -> Callable[..., list[Found]]:
    """Ours over a peer."""

    def find(results: Results) -> list[Found]:
        found = []
        for cell in _cells(results, names):
            name = cell.name if cell.axis == "threads" else cell.id
            if ratio := cell.ratio(value, ours, peer, floor):
                found.append(Found(name, ratio.median, _sign(cell, value, ours, peer)))
            elif value is wall and {ours, peer} <= {*cell.contestants}:
                found.append(Found(name, None))
        return found

    return find


def _sign(cell: CellResult, value: Value | str, ours: str, peer: str) -> str:
    of_ours, of_peer = tables.bound(cell, ours, value), tables.bound(cell, peer, value)
    return "? " if of_ours and of_peer else "≤ " if of_peer else of_ours


def _of_ours(name: str, spread: Callable[[CellResult], Spread | None]) -> Callable[[Results], list[Found]]:
    def find(results: Results) -> list[Found]:
        cells = [cell for cell in _cells(results, [name]) if OURS in cell.contestants]
        return [Found(cell.id, found.median if (found := spread(cell)) else None) for cell in cells]

    return find


def _lost(results: Results) -> list[Found]:
    """Traces of ours that were made, and are not whole in the store, in the whole run."""
    samples = [
        sample
        for cell in results.cells
        for each in cell.contestants
        if results.is_ours(each)
        for sample in cell.of(each)
    ]
    return [Found("all", sum(sample["expected"] - sample["whole"] for sample in samples))] if samples else []


WANTED = (
    Wanted(
        "wall above the empty callback, callers as fast as they go, ÷ OpenInference in memory",
        0.25,
        _ratio(_SATURATED, wall, OPENINFERENCE),
        is_time=True,
    ),
    Wanted("the same ÷ MLflow", 0.06, _ratio(_SATURATED, wall, MLFLOW), is_time=True),
    Wanted(
        "CPU of the callers above the empty callback ÷ OpenInference",
        0.2,
        _ratio(_SATURATED, "caller_cpu_us", OPENINFERENCE),
    ),
    Wanted("CPU until stored, sqlite, ÷ MLflow", 0.05, _ratio(_SATURATED, cpu_per_stored_trace, MLFLOW, None)),
    Wanted(
        "a server: CPU of the client above the empty callback ÷ (OpenInference + OTLP)",
        0.8,
        _ratio(_SERVERS, cpu_of_all, OTLP),
    ),
    Wanted("a server: CPU of the server ÷ (OpenInference + OTLP)", 1.0, _ratio(_SERVERS, "cpu_server_us", OTLP, None)),
    Wanted(
        "the same, with our store in the server",
        0.25,
        _ratio(_SERVERS, "cpu_server_us", OTLP, None, PLUGIN),
    ),
    Wanted(
        "until stored ÷ window, 10,000 calls",
        1.1,
        _of_ours(_LONG, lambda cell: cell.spread(OURS, until_stored)),
    ),
    Wanted(
        "MiB of 1,000 waiting traces",
        12,
        _of_ours(_WAITING, lambda cell: cell.above_floor(OURS, waiting_per_thousand)),
    ),
    Wanted(
        "wall of the last 1,000 of 20,000 calls ÷ the first 1,000 since the writer began",
        1.1,
        _of_ours(_LONGER, lambda cell: cell.spread(OURS, last_wall_over_first)),
        is_time=True,
    ),
    Wanted("lost", 0, _lost),
)
