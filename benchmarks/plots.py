"""The plots of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contestants import CONTESTANTS, FLOOR, OFF
from benchmarks.results import CellResult, Results, Spread, cpu_per_stored_trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRIVERS = {"pool": "plain threads", "parallel": "dspy.Parallel", "evaluate": "dspy.Evaluate"}
_TIMES = {"wall_us": "wall µs a call", "caller_cpu_us": "caller's CPU µs a call"}
_BASE_SPANS = 4  # of one dspy.Predict
_MARKS = 60  # points of a line


def write(results: Results, folder: Path) -> dict[str, str]:
    """Draw what there is data for.

    Returns:
        The file names, by title.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    drawn = {}
    for title, (name, draw) in _PLOTS.items():
        figure = draw(results)
        if figure is None:
            continue
        figure.suptitle(title)
        figure.tight_layout()
        # No date and no random ids: the same results draw the same file.
        with mpl.rc_context({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"}):
            figure.savefig(folder / name, metadata={"Date": None})
        drawn[title] = name
    return drawn


def _figure(columns: int = 1, rows: int = 1, width: float | None = None) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width or 1.5 + 4.0 * columns, 0.8 + 3.4 * rows))
    return figure, figure.subplots(rows, columns, squeeze=False)


def _style(contestant: str) -> dict[str, Any]:
    return {"color": CONTESTANTS[contestant].color, "marker": "o", "markersize": 4}


def _overhead(results: Results) -> Figure | None:
    """Microseconds a call above the empty callback against threads: wall time, and the callers' CPU."""
    by_driver = {
        driver: [
            cell
            for cell in results.axis("threads")
            if cell.parameters["driver"] == driver and FLOOR in cell.contestants
        ]
        for driver in _DRIVERS
    }
    by_driver = {driver: cells for driver, cells in by_driver.items() if cells}
    if not by_driver:
        return None
    figure, axes = _figure(len(by_driver), len(_TIMES))
    for row, (figure_name, label) in zip(axes, _TIMES.items(), strict=True):
        for ax, (driver, cells) in zip(row, by_driver.items(), strict=True):
            for each in results.sorted({each for cell in cells for each in cell.contestants} - {OFF, FLOOR}):
                _line(ax, results.titles[each], each, [(c, c.above_floor(each, figure_name)) for c in cells])
            threads = sorted({cell.parameters["workers"] for cell in cells})
            ax.set_xscale("log", base=2)
            ax.set_xticks(threads, [str(each) for each in threads])
            ax.set_ylabel(label)
            ax.set_title(_DRIVERS[driver], fontsize="medium")
            ax.grid(alpha=0.3)
        row[0].legend(fontsize="x-small")
    for ax in axes[-1]:
        ax.set_xlabel("threads")
    return figure


def _line(ax: Any, title: str, contestant: str, points: list[tuple[CellResult, Spread | None]]) -> None:
    """The medians over threads, with the extremes as a band."""
    known = [(cell.parameters["workers"], above) for cell, above in points if above]
    if not known:
        return
    x = [threads for threads, _ in known]
    ax.plot(x, [above.median for _, above in known], label=title, **_style(contestant))
    low, high = [above.low for _, above in known], [above.high for _, above in known]
    ax.fill_between(x, low, high, color=CONTESTANTS[contestant].color, alpha=0.15, linewidth=0)


def _cpu(results: Results) -> Figure | None:
    """Milliseconds of CPU for each stored trace."""
    cells = [
        cell
        for cell in results.cells
        if cell.spans == _BASE_SPANS
        and cell.axis in {"threads", "rate", "server"}
        and cell.parameters["driver"] in {"pool", "rate"}
        and any(cell.spread(each, cpu_per_stored_trace) for each in cell.contestants if results.stores(each))
    ]
    if not cells:
        return None
    contestants = results.sorted(each for cell in cells for each in cell.contestants if results.stores(each))
    figure, ((ax,),) = _figure(width=10.0)
    width = 0.8 / len(contestants)
    for index, each in enumerate(contestants):
        for place, cell in enumerate(cells):
            if found := cell.spread(each, cpu_per_stored_trace):
                ax.bar(
                    place + index * width,
                    found.median,
                    width,
                    color=CONTESTANTS[each].color,
                    yerr=[[found.median - found.low], [found.high - found.median]],
                    label=results.titles[each] if each not in ax.get_legend_handles_labels()[1] else None,
                )
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    ax.legend(unique.values(), unique.keys(), fontsize="small")
    ax.set_xticks([place + 0.4 - width / 2 for place in range(len(cells))], [cell.id for cell in cells], rotation=30)
    ax.set_ylabel("CPU ms")
    ax.grid(axis="y", alpha=0.3)
    return figure


def _found(results: Results) -> Figure | None:
    """Whole traces found against traces made, a dot for each sample."""
    points = [
        (each, sample["expected"], sample["whole"])
        for cell in results.cells
        for each in cell.contestants
        if results.stores(each)
        for sample in cell.of(each)
        if sample["expected"]
    ]
    if not points:
        return None
    figure, ((ax,),) = _figure(width=6.0)
    most = max(made for _, made, _ in points)
    ax.plot([1, most], [1, most], color="#cccccc", linewidth=1, zorder=0)
    for each in results.sorted(each for each, _, _ in points):
        mine = [(made, found) for contestant, made, found in points if contestant == each]
        ax.scatter(
            [made for made, _ in mine],
            [found for _, found in mine],
            s=22,
            alpha=0.7,
            color=CONTESTANTS[each].color,
            label=results.titles[each],
        )
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=1)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("traces made")
    ax.set_ylabel("whole traces found")
    ax.legend(fontsize="small")
    ax.grid(alpha=0.3)
    return figure


def _calls(results: Results) -> Figure | None:
    """Microseconds a call against the calls made before it."""
    cells = [cell for cell in results.axis("calls") if any(sample["marks"] for sample in cell.samples)]
    if not cells:
        return None
    figure, (axes,) = _figure(len(cells))
    for ax, cell in zip(axes, cells, strict=True):
        for each in results.sorted(cell.contestants):
            marks = _thinned(cell, each)
            ax.plot(
                [mark[0] for mark in marks],
                [mark[2] for mark in marks],
                color=CONTESTANTS[each].color,
                label=results.titles[each],
            )
        ax.set_ylim(bottom=0)
        ax.set_xlabel("calls made")
        ax.set_ylabel("wall µs a call")
        ax.set_title(f"{cell.parameters['workers']} threads, {cell.parameters['store']}", fontsize="medium")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return figure


def _thinned(cell: CellResult, contestant: str) -> list[list[float]]:
    marks = [mark for sample in cell.of(contestant)[:1] for mark in sample["marks"]]
    return marks[:: max(1, len(marks) // _MARKS)]


_PLOTS: dict[str, tuple[str, Callable[[Results], Any]]] = {
    "What a traced call costs above an empty callback": ("overhead.svg", _overhead),
    "CPU of the process for each stored trace": ("cpu.svg", _cpu),
    "Traces found against traces made": ("found.svg", _found),
    "What a call costs, after the calls made before it": ("calls.svg", _calls),
}

# File names, by title.
NAMES = {title: name for title, (name, _) in _PLOTS.items()}
