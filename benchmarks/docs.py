"""Writes the figures of docs/performance.md between their markers, so that none is typed by hand."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine, tables, wanted
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
    said = data["machine"]
    load = f"{said['load_before']:.1f} on {said['cores']} cores"
    untold = f" Of a sample of which it stole more than {machine.MOST_STOLEN:.0%}, no time is told."
    busy = f" **The machine was busy, with a load of {load}: no times are told.**"
    return (
        f"Measured on {machine.in_words(data['machine'])}, {data['started'][:10]}, {data['seconds'] / 60:.0f} minutes, "
        f"load before {data['machine']['load_before']}, stolen by the hypervisor {data['machine']['steal']:.1%}. "
        f"[The full report]({report}), [every sample]({link})."
        f"{busy if machine.is_busy(said) else untold}"
    )


def _capacity(results: Results) -> str:
    """How many traces a minute one core stores."""
    rows = []
    for cell in filter(None, map(results.cell, _STORES)):
        for each in results.sorted(each for each in cell.contestants if results.stores(each)):
            cpu, server = cell.spread(each, cpu_per_stored_trace), cell.spread(each, "cpu_server_us")
            if cpu:
                of_server = server.median / 1000 if server else 0.0
                rows.append(
                    [
                        f"{cell.id}, {results.titles[each]}",
                        tables.number(cpu.median),
                        tables.number(of_server) if server else tables.NONE,
                        f"{60_000 / (cpu.median + of_server):,.0f}",
                    ]
                )
    head = ["", "CPU of your process, ms a trace", "of the server", "traces a minute for one core"]
    return tables.table(head, rows) if rows else tables.NOT_MEASURED


_STORES = ("threads/pool-8", "server/50-a-second")

_Section = Callable[[Results, Path, Path], str]


def _of(make: Callable[[Results], str]) -> _Section:
    return lambda results, source, page: make(results)  # noqa: ARG005 - the interface of its kind


_SECTIONS: dict[str, _Section] = {
    "source": _source,
    "in-short": _of(tables.in_short),
    "wanted": _of(wanted.as_table),
    "rates": _of(tables.rates),
    "capacity": _of(_capacity),
}
