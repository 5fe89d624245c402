"""Writes the figures of docs/performance.md between their markers, so that none is typed by hand."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine, plots, tables
from benchmarks.contestants import MLFLOW, OURS
from benchmarks.results import Results, cpu_per_stored_trace

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def update(results: Results, source: Path, page: Path = PAGE) -> Path:
    """Write every marked section of the page anew.

    Args:
        results: The run.
        source: Its file, which the page links to.
        page: The page.

    Raises:
        ValueError: If the page has a marker that nothing here fills, or one without an end.
    """
    text = page.read_text()
    names = re.findall(r"<!-- figures: (\S+) -->", text)
    for name in names:
        if name not in _SECTIONS:
            raise ValueError(f"{page}: nothing is called {name!r}; there are {', '.join(_SECTIONS)}")
        section = _SECTIONS[name](results, source, page)
        pattern = re.compile(
            rf"(<!-- figures: {re.escape(name)} -->\n)(?:(?!<!-- figures).)*?(<!-- end -->)", re.DOTALL
        )
        text, count = pattern.subn(lambda match, section=section: f"{match[1]}\n{section}\n\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"{page}: the marker {name!r} has no end, or is there twice")
    page.write_text(text)
    return page


def _source(results: Results, source: Path, page: Path) -> str:
    data = results.data
    link = os.path.relpath(source.resolve(), page.parent.resolve())
    report = os.path.relpath(source.resolve().parent / "report.md", page.parent.resolve())
    return (
        f"Measured on {machine.in_words(data['machine'])}, {data['started'][:10]}, {data['seconds'] / 60:.0f} minutes, "
        f"load before {data['machine']['load_before']}, stolen by the hypervisor {data['machine']['steal']:.1%}. "
        f"[The full report]({report}), [every sample]({link})."
    )


def _plots(results: Results, source: Path, page: Path) -> str:  # noqa: ARG001 - the interface of its kind
    """The plots that lie beside the results."""
    folder = source.resolve().parent
    lines = [
        f"![{title}]({os.path.relpath(folder / name, page.parent.resolve())})"
        for title, name in plots.NAMES.items()
        if (folder / name).exists()
    ]
    return "\n\n".join(lines) or "No plots lie beside the results."


def _capacity(results: Results, source: Path, page: Path) -> str:  # noqa: ARG001 - the interface of its kind
    """How many traces a minute one process makes and stores."""
    rows = []
    for cell_id in _STORES:
        cell = results.cell(cell_id)
        if cell is None:
            continue
        for each in results.sorted(each for each in cell.contestants if results.stores(each)):
            cpu = cell.spread(each, cpu_per_stored_trace)
            wall = cell.spread(each, lambda sample: sample["stored_wall_s"] / max(1, sample["found"]))
            if cpu and wall:
                rows.append(
                    [
                        f"{cell.id}, {results.titles[each]}",
                        tables.number(cpu.median),
                        f"{60_000 / cpu.median:,.0f}",
                        f"{60 / wall.median:,.0f}",
                    ]
                )
    head = ["", "CPU ms a stored trace", "traces a minute for one core", "traces a minute stored in this cell"]
    return tables.table(head, rows) if rows else "Not measured in this run."


def _ratio_lines(results: Results, source: Path, page: Path) -> str:  # noqa: ARG001 - the interface of its kind
    return tables.ratios(results, results.axis("threads", "tasks"))


_STORES = ("threads/pool-1", "threads/pool-8", "store/server")

_Section = Callable[[Results, Path, Path], str]


def _of(make: Callable[[Results], str]) -> _Section:
    return lambda results, source, page: make(results)  # noqa: ARG005 - the interface of its kind


_SECTIONS: dict[str, _Section] = {
    "source": _source,
    "plots": _plots,
    "headlines": _of(tables.headlines),
    "ratios": _ratio_lines,
    "ratios-cpu": _of(lambda results: tables.ratios(results, results.axis("threads", "tasks"), "caller_cpu_us")),
    "latency": _of(
        lambda results: tables.by_contestant(
            results, results.axis("latency"), tables.figure(lambda sample: (sample["latency_p50_us"] or 0) / 1000)
        )
    ),
    "sizes": _of(
        lambda results: tables.by_contestant(results, results.axis("payload", "depth", "spans"), tables.per_span)
    ),
    "stores": _of(
        lambda results: tables.by_contestant(
            results,
            [cell for cell in results.cells if cell.id in _STORES],
            tables.figure(cpu_per_stored_trace),
            only=results.stores,
        )
    ),
    "servers": _of(
        lambda results: tables.by_contestant(
            results,
            [cell for cell in results.axis("store") if cell.parameters["store"] == "server"],
            tables.figure("cpu_server_us"),
            only=results.stores,
        )
    ),
    "found": _of(
        lambda results: tables.by_contestant(
            results,
            [cell for cell in results.cells if {OURS, MLFLOW} <= set(cell.contestants)],
            tables.found,
            only=results.stores,
        )
    ),
    "series": _of(tables.series),
    "lag": _of(
        lambda results: tables.by_contestant(
            results,
            [cell for cell in results.cells if cell.parameters["driver"] == "tasks"],
            tables.figure("lag_p99_ms"),
        )
    ),
    "evaluations": _of(lambda results: tables.throughput(results, results.axis("async-evaluate"))),
    "memory": _of(
        lambda results: tables.by_contestant(
            results, results.axis("payload", "calls", "overload"), tables.figure("memory_peak_mib")
        )
    ),
    "capacity": _capacity,
}
