"""The tables of reports and docs, each from the results alone, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.contestants import CONTESTANTS, FLOOR, MLFLOW, OFF, OURS
from benchmarks.results import CellResult, Results, Spread, Value, cpu_per_stored_trace

NONE = "-"
HEADLINES = ("threads/pool-1", "threads/pool-8", "threads/pool-32")
_PEERS = (MLFLOW, "openinference")


def number(value: float) -> str:
    """As many digits as mean something."""
    size = abs(value)
    if size >= 100:  # noqa: PLR2004
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}"  # noqa: PLR2004


def spread(value: Spread | None, unit: str = "") -> str:
    """The median, and the least and the greatest where there was more than one round."""
    if value is None:
        return NONE
    text = f"{number(value.median)}{unit}"
    return text if value.rounds == 1 else f"{text} ({number(value.low)} to {number(value.high)})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def headlines(results: Results) -> str:
    """Everything about one call of 4 spans, on 1, 8 and 32 threads."""
    parts = []
    for cell in filter(None, map(results.cell, HEADLINES)):
        rows = [
            [
                results.titles[each],
                spread(cell.spread(each, "wall_us")),
                NONE if each in {OFF, FLOOR} else spread(cell.above_floor(each, "wall_us")),
                spread(cell.spread(each, "caller_cpu_us")),
                _if_stores(results, each, spread(cell.spread(each, cpu_per_stored_trace))),
                _if_stores(results, each, spread(cell.spread(each, "stored_wall_s"))),
                spread(cell.spread(each, "memory_peak_mib")),
                _if_stores(results, each, found(cell, each)),
            ]
            for each in results.sorted(cell.contestants)
        ]
        head = [
            cell.name,
            "wall µs a call",
            "above the empty callback",
            "caller's CPU µs a call",
            "CPU ms a stored trace",
            "s until stored",
            "peak MiB",
            "whole traces found",
        ]
        parts.append(table(head, rows))
    return "\n\n".join(parts) or "Not measured in this run."


def _if_stores(results: Results, contestant: str, text: str) -> str:
    return text if results.stores(contestant) else NONE


def found(cell: CellResult, contestant: str) -> str:
    """Whole traces found, of those made."""
    expected = cell.total(contestant, "expected")
    return f"{cell.total(contestant, 'whole'):,} of {expected:,}" if expected else NONE


def ratios(results: Results, cells: Sequence[CellResult], value: Value | str = "wall_us") -> str:
    """What ours costs above the empty callback, over what the peers cost above it."""
    rows = []
    for cell in cells:
        with_peers = [each for each in _PEERS if each in cell.contestants]
        if FLOOR not in cell.contestants or not with_peers:
            continue
        over_peers = [spread(cell.ratio(value, OURS, peer, FLOOR)) for peer in _PEERS]
        rows.append([cell.id, *over_peers, spread(cell.ratio(value, "ours-silent", FLOOR))])
    head = ["cell", *(f"ours / {results.titles[peer]}" for peer in _PEERS), "log_traces=False / empty callback"]
    return table(head, rows) if rows else "Not measured in this run."


def by_contestant(
    results: Results,
    cells: Sequence[CellResult],
    cell_text: Callable[[CellResult, str], str],
    *,
    only: Callable[[str], bool] = lambda contestant: True,  # noqa: ARG005 - all
    first: str = "cell",
) -> str:
    """A row for each cell and a column for each contestant."""
    columns = results.sorted(each for cell in cells for each in cell.contestants if only(each))
    if not columns:
        return "Not measured in this run."
    rows = [
        [cell.id, *(cell_text(cell, each) if each in cell.contestants else NONE for each in columns)] for cell in cells
    ]
    return table([first, *(results.titles[each] for each in columns)], rows)


def figure(value: Value | str, unit: str = "") -> Callable[[CellResult, str], str]:
    """A cell's text from one figure."""
    return lambda cell, contestant: spread(cell.spread(contestant, value), unit)


def per_span(cell: CellResult, contestant: str) -> str:
    """Wall microseconds above the empty callback, for each span."""
    if contestant in {OFF, FLOOR}:
        return NONE
    above = cell.above_floor(contestant, lambda sample: sample["wall_us"] / cell.spans)
    return spread(above)


def completeness(results: Results) -> str:
    """How many whole traces were found in each cell."""
    storing = [cell for cell in results.cells if any(results.stores(each) for each in cell.contestants)]
    return by_contestant(results, storing, found, only=results.stores)


def throughput(results: Results, cells: Sequence[CellResult]) -> str:
    """Evaluations side by side: calls a second, CPU, memory, and how late the event loop was."""
    rows = [
        [
            f"{cell.name}, {results.titles[each]}",
            spread(cell.spread(each, lambda sample: 1e6 / sample["wall_us"])),
            spread(cell.spread(each, lambda sample: sample["cpu_calls_us"] / 1000)),
            spread(cell.spread(each, "memory_peak_mib")),
            spread(cell.spread(each, "lag_p99_ms")),
            found(cell, each),
        ]
        for cell in cells
        for each in results.sorted(cell.contestants)
    ]
    head = ["evaluation", "examples a second", "CPU ms an example", "peak MiB", "loop lag p99 ms", "whole traces found"]
    return table(head, rows) if rows else "Not measured in this run."


def series(results: Results) -> str:
    """What a call cost at the beginning and at the end of a long run."""
    rows = []
    for cell in results.axis("calls"):
        for each in results.sorted(cell.contestants):
            marks = [mark for sample in cell.of(each) for mark in sample["marks"]]
            if not marks:
                continue
            count = max(1, len(marks) // 5)
            first, last = marks[:count], marks[-count:]
            rows.append(
                [
                    f"{cell.name}, {results.titles[each]}",
                    f"{max(mark[0] for mark in marks):,}",
                    number(sum(mark[1] for mark in first) / count),
                    number(sum(mark[1] for mark in last) / count),
                    number(sum(mark[2] for mark in first) / count),
                    number(sum(mark[2] for mark in last) / count),
                    spread(cell.spread(each, "memory_peak_mib")),
                    found(cell, each),
                ]
            )
    head = [
        "series",
        "calls made",
        "wall µs a call, first fifth",
        "last fifth",
        "CPU µs a call, first fifth",
        "last fifth",
        "peak MiB",
        "whole traces found",
    ]
    return table(head, rows) if rows else "Not measured in this run."


def threads_left(results: Results) -> str:
    """Who leaves threads behind, in how many samples."""
    rows = []
    for each in CONTESTANTS:
        samples = [sample for cell in results.cells for sample in cell.of(each)]
        if not samples:
            continue
        names: dict[str, int] = {}
        for sample in samples:
            for name in sample["threads_left"]:
                names[name] = names.get(name, 0) + 1
        said = ", ".join(f"{name} ({count} of {len(samples)} samples)" for name, count in sorted(names.items()))
        rows.append([results.titles[each], said or "none"])
    return table(["contestant", "threads still there after it was taken out"], rows)
