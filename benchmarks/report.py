"""The Markdown report of a run, with its plots beside it."""

from __future__ import annotations

from pathlib import Path

from benchmarks import machine, plots, tables, wanted
from benchmarks.results import Results, cpu_per_stored_trace

_HOW = (
    "Medians over the rounds, with the least and the greatest. Each contestant in a fresh process, A B C A B C. "
    "Absolute times belong to this machine; what travels are ratios within one run. See benchmarks/README.md."
)
_VALID = (
    "Share of the background's CPU that fell into the window in which calls were made. Where it is less than half, the "
    "figure is invalid, and a lower bound (≥) of what a program pays that goes on."
)


def write(results: Results, folder: Path) -> None:
    """Write ``report.md`` and the plots into ``folder``."""
    drawn = plots.write(results, folder)
    (folder / "report.md").write_text(as_markdown(results, drawn) + "\n")


def as_markdown(results: Results, drawn: dict[str, str] | None = None) -> str:
    """The report.

    Args:
        results: The run.
        drawn: File names of the plots that are beside it, by title.
    """
    data = results.data
    said = data["machine"]
    source = (
        f"{machine.in_words(said)}. {data['mode']} run of {data['started']}, {data['seconds']:.0f} s, load before "
        f"{said['load_before']}, stolen by the hypervisor {said['steal']:.1%}. `{data['command']}`"
    )
    parts = ["# What tracing costs", source, _HOW]
    if machine.is_busy(said):
        parts.append("**This machine was busy with something else: read no time here, and ratios with care.**")
    elif said["steal"] > machine.MOST_STOLEN:
        parts.append("**The hypervisor gave much of the time to others: read times and ratios of times with care.**")
    parts += [f"Without {results.titles[each]}: {reason}." for each, reason in results.unavailable.items()]
    problems = results.problems()
    parts.append("## Is everything there?")
    parts.append(
        "\n".join(f"- {problem}" for problem in problems)
        if problems
        else "Every cell ran, every trace of ours that should be in the store is there, whole; our figures are valid."
    )
    parts.append(tables.completeness(results))
    parts += ["## Had the writer its turn?", _VALID, tables.validity(results)]
    parts += _times(results)
    parts += [f"![{title}]({name})" for title, name in (drawn or {}).items()]
    return "\n\n".join(parts)


def _times(results: Results) -> list[str]:
    inside = [
        cell
        for cell in results.cells
        if not cell.parameters["latency_ms"] and cell.axis not in {"calls", "waiting"} and not cell.parameters["rate"]
    ]
    storing = [cell for cell in results.cells if any(results.stores(each) for each in cell.contestants)]
    looped = [cell for cell in results.cells if cell.parameters["driver"] in {"tasks", "async-evaluate"}]
    return [
        "## Wanted and measured",
        wanted.as_table(results),
        "## One call of 4 spans",
        tables.in_short(results),
        tables.headlines(results),
        "## The empty callback with our patches of DSPy, and without",
        tables.patches(results),
        "## Calls at a fixed rate",
        tables.rates(results),
        "## Above the empty callback, ours over the peers'",
        "Wall time of a call:",
        tables.ratios(results, inside),
        "CPU of the calling threads:",
        tables.ratios(results, inside, "caller_cpu_us"),
        "## Wall time of a call, µs",
        tables.by_contestant(results, results.cells, tables.figure("wall_us")),
        "## Wall time above the empty callback, µs a span",
        tables.by_contestant(results, inside, tables.per_span),
        "## CPU until stored, ms a stored trace (child processes included)",
        tables.by_contestant(results, storing, tables.figure(cpu_per_stored_trace), only=results.stores),
        "## Wall time until stored, s",
        tables.by_contestant(results, storing, tables.figure("stored_wall_s"), only=results.stores),
        "## Peak memory above the beginning, MiB",
        tables.by_contestant(results, results.cells, tables.figure("memory_peak_mib")),
        "## MiB of 1,000 waiting traces, above the empty callback",
        tables.waiting(results),
        "## A call as its caller sees it, µs at the 99th percentile",
        tables.by_contestant(results, results.cells, tables.figure("latency_p99_us")),
        "## How late the event loop was, ms at the 99th percentile",
        tables.by_contestant(results, looped, tables.figure("lag_p99_ms")),
        "## Does a call cost more, the more calls were made before it?",
        tables.series(results),
        "## Evaluations",
        tables.throughput(results, results.axis("async-evaluate")),
        "### In threads, in tasks and in worker processes",
        tables.workers(results, results.axis("workers")),
        "## Threads left behind",
        tables.threads_left(results),
    ]
