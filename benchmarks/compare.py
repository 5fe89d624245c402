"""What moved between two runs."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import machine, tables
from benchmarks.contestants import FLOOR, MLFLOW, OFF
from benchmarks.results import CellResult, Results, Spread, Value, cpu_per_stored_trace

_NOISE = 0.1  # a change of the median below this share is not shown as one
_NOISE_OF_ONE = 0.3  # where one of the runs had a single round, which has no spread
_LOST = "whole traces found"


def as_markdown(old: Results, new: Results) -> str:
    """A table of what is beyond noise, and what cannot be compared.

    Times are compared as multiples of tracing off in the same round, or of the empty callback, or of MLflow's where
    a cell has neither: so machines and busy hours drop out, as far as they do.
    """
    parts = ["# What moved"]
    for name, each in (("old", old), ("new", new)):
        data = each.data
        parts.append(f"{name}: {data['mode']} run of {data['started']}; {machine.in_words(data['machine'])}")
    if old.data["machine"]["cpu"] != new.data["machine"]["cpu"] or old.data["mode"] != new.data["mode"]:
        parts.append("**The runs differ in machine or mode: compare with care.**")
    known = {cell.id: cell for cell in old.cells}
    rows = [row for cell in new.cells if cell.id in known for row in _rows(new, known[cell.id], cell)]
    head = ["cell", "contestant", "figure", "old", "new", "change"]
    parts.append(
        tables.table(head, rows)
        if rows
        else f"Nothing beyond noise: spreads overlap, or medians are within {_NOISE:.0%}."
    )
    only_old = sorted(known.keys() - {cell.id for cell in new.cells})
    only_new = sorted({cell.id for cell in new.cells} - known.keys())
    if only_old:
        parts.append(f"Only in the old run: {', '.join(only_old)}.")
    if only_new:
        parts.append(f"Only in the new run: {', '.join(only_new)}.")
    return "\n\n".join(parts)


def _rows(results: Results, old: CellResult, new: CellResult) -> list[list[str]]:
    if old.parameters != new.parameters:
        return [[new.id, tables.NONE, "other sizes: not compared", tables.NONE, tables.NONE, tables.NONE]]
    rows = []
    common = results.sorted(set(old.contestants) & set(new.contestants))
    for contestant in common:
        base = next((each for each in (OFF, FLOOR, MLFLOW) if each in common and each != contestant), None)
        for figure in _FIGURES:
            before, after = (figure.spread(cell, contestant, base) for cell in (old, new))
            if row := _moved(before, after, figure.least):
                label = f"{figure.label} / {base}" if figure.is_relative and base else figure.label
                rows.append([new.id, results.titles[contestant], label, *row])
        if _lost(old, contestant) != _lost(new, contestant):
            counts = [tables.found(cell, contestant) for cell in (old, new)]
            rows.append([new.id, results.titles[contestant], _LOST, *counts, tables.NONE])
    return rows


@dataclass(frozen=True, slots=True)
class _Figure:
    """What is compared.

    Attributes:
        label: Its name.
        value: Where it is found in a sample.
        is_relative: Whether it is compared as a multiple of another contestant's.
        least: A smaller change, in its unit, means nothing.
    """

    label: str
    value: Value | str
    is_relative: bool = False
    least: float = 0.0

    def spread(self, cell: CellResult, contestant: str, base: str | None) -> Spread | None:
        """It, or its ratio to that of ``base``."""
        if self.is_relative and base is not None:
            return cell.ratio(self.value, contestant, base)
        return cell.spread(contestant, self.value)


def _moved(old: Spread | None, new: Spread | None, least: float) -> list[str] | None:
    """The change, where the rounds of the two runs do not overlap and the medians differ."""
    if old is None or new is None or old.median <= 0 or abs(new.median - old.median) < least:
        return None
    change = new.median / old.median - 1
    noise = _NOISE if min(old.rounds, new.rounds) > 1 else _NOISE_OF_ONE
    if abs(change) < noise or (old.low <= new.high and new.low <= old.high):
        return None
    return [tables.spread(old), tables.spread(new), f"{change:+.0%}"]


def _lost(cell: CellResult, contestant: str) -> float:
    expected = cell.total(contestant, "expected")
    return round(1 - cell.total(contestant, "whole") / expected, 3) if expected else 0.0


_FIGURES = (
    _Figure("wall time", "wall_us", is_relative=True),
    _Figure("caller's CPU", "caller_cpu_us", is_relative=True),
    _Figure("CPU ms a stored trace", cpu_per_stored_trace),
    _Figure("peak MiB", "memory_peak_mib", least=5.0),
    _Figure("loop lag p99 ms", "lag_p99_ms", least=2.0),
)
