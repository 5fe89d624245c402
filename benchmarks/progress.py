"""Tells how far a run is: a bar in a terminal, a line for each cell when piped."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.cells import Cell
from benchmarks.contestants import FLOOR, MLFLOW, OURS, Contestant
from benchmarks.results import CellResult

if TYPE_CHECKING:
    from typing_extensions import Self


class Display:
    """A ``run.Watcher`` for people.

    Args:
        console: Where to.
        cells: How many there will be.
        samples: How many in all of them.
    """

    def __init__(self, console: Console, cells: int, samples: int) -> None:
        self._console = console
        self._cells = cells
        self._ended = 0
        self._began = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=samples)

    def __enter__(self) -> Self:
        """Begin to show it."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Clear it away."""
        self._progress.stop()

    def began(self, cell: Cell, samples: int) -> None:  # noqa: ARG002 - run.Watcher's signature
        """A cell begins."""
        self._progress.update(self._task, description=cell.id)

    def sampled(self, cell: Cell, contestant: Contestant, round_number: int) -> None:
        """A sample is over."""
        description = f"{cell.id} [dim]{escape(contestant.id)} {round_number}[/]"
        self._progress.update(self._task, advance=1, description=description)

    def ended(self, cell: dict[str, Any]) -> None:
        """A cell is over."""
        self._ended += 1
        result = CellResult(cell)
        parts = [f"[{self._ended:>2}/{self._cells}]", f"{cell['id']:<30}", f"{cell['seconds']:>6.1f} s"]
        for contestant in (FLOOR, OURS, MLFLOW):
            if spread := result.spread(contestant, "wall_us"):
                found = result.total(contestant, "whole")
                expected = result.total(contestant, "expected")
                counted = f" {found}/{expected}" if expected else ""
                parts.append(f"{contestant} {spread.median:,.0f} µs{counted}{_inside(result, contestant)}")
        if result.failures:
            parts.append(f"[red]{len(result.failures)} failed[/]")
        if cell["skipped"]:
            parts.append(f"[dim]without {', '.join(cell['skipped'])}[/]")
        self._progress.console.print("  ".join(parts).replace("[ ", r"\[ ", 1), soft_wrap=True)


def _inside(result: CellResult, contestant: str) -> str:
    """How much of the background's CPU fell into the window, where that matters."""
    inside = result.spread(contestant, result.inside) if result.parameters["is_timed"] else None
    return f" {inside.median:.0%} inside" if inside else ""
