"""The tables of reports and docs, each from the results alone, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks import machine
from benchmarks.contestants import CONTESTANTS, FLOOR, MLFLOW, OFF, OPENINFERENCE, OURS, PATCHED
from benchmarks.results import (
    CellResult,
    Results,
    Spread,
    Value,
    cpu_of_the_rest,
    cpu_per_stored_trace,
    last_over_first,
    p50_ms,
    p99_ms,
    until_stored,
    waiting_per_thousand,
    wall,
)

NONE = "-"
NOT_MEASURED = "Not measured in this run."
HEADLINES = ("threads/pool-1", "threads/pool-8", "threads/pool-32", "tasks/100")
_PEERS = (OPENINFERENCE, MLFLOW)


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


def in_short(results: Results) -> str:
    """The one table: what a call of 4 spans costs its caller, and until it is stored, and what is lost."""
    cells = [results.cell(each) for each in ("threads/pool-1", "threads/pool-8", "rate/50-a-second", "waiting/1000")]
    one, eight, paced, held = cells
    is_busy = machine.is_busy(results.data["machine"])
    rows = [
        [
            results.titles[each],
            NONE if is_busy else above_floor(one, each, wall),
            NONE if is_busy else above_floor(eight, each, wall),
            above_floor(one, each, "caller_cpu_us"),
            _median(one.spread(each, cpu_per_stored_trace) if one else None),
            _median(paced.spread(each, p99_ms) if paced and not is_busy else None),
            _median(held.above_floor(each, waiting_per_thousand) if held and each != FLOOR else None),
            _if_stores(results, each, lost(saturated, each) if (saturated := eight or one) else NONE),
        ]
        for each in results.sorted(each for cell in cells if cell for each in cell.contestants)
        if each not in {OFF, PATCHED}
    ]
    head = [
        "",
        "wall above the empty callback, µs a call, 1 thread",
        "8 threads",
        "CPU of the caller above it, µs",
        "CPU until stored, ms a trace",
        "p99 of a call at 50 a second, ms",
        "MiB of 1,000 waiting traces",
        "lost",
    ]
    return table(head, rows) if rows else NOT_MEASURED


def _median(value: Spread | None) -> str:
    return number(value.median) if value else NONE


def lost(cell: CellResult, contestant: str) -> str:
    """How many of the traces made are not in the store, whole."""
    expected = cell.total(contestant, "expected")
    return f"{expected - cell.total(contestant, 'whole'):,} of {expected:,}" if expected else NONE


def above_floor(cell: CellResult | None, contestant: str, value: Value | str) -> str:
    """A figure less the empty callback's, with the sign of a lower bound where too little fell into its window."""
    if cell is None or contestant in {OFF, FLOOR}:
        return NONE
    above = cell.above_floor(contestant, value)
    return f"{bound(cell, contestant, value)}{spread(above)}" if above else NONE


def bound(cell: CellResult, contestant: str, value: Value | str = "wall_us") -> str:
    """The sign before the wall time of a window in which the background did less than half: a lower bound.

    CPU is used up wherever the window ends.
    """
    is_bound = value in ("wall_us", wall) and any(cell.invalid(sample) for sample in cell.of(contestant))
    return "≥ " if is_bound else ""


def ratio(cell: CellResult, value: Value | str, above: str, below: str, floor: str | None = FLOOR) -> str:
    """What one contestant costs over another, with the sign of the bound that invalid windows make of it."""
    found = cell.ratio(value, above, below, floor)
    if found is None:
        return NONE
    signs = {("≥ ", ""): "≥ ", ("", "≥ "): "≤ ", ("≥ ", "≥ "): "(both invalid) ", ("", ""): ""}
    return f"{signs[bound(cell, above, value), bound(cell, below, value)]}{spread(found)}"


def headlines(results: Results) -> str:
    """Everything about one call of 4 spans, on 1, 8 and 32 threads and in 100 tasks."""
    parts = []
    for cell in filter(None, map(results.cell, HEADLINES)):
        rows = [
            [
                results.titles[each],
                f"{bound(cell, each)}{spread(cell.spread(each, 'wall_us'))}",
                above_floor(cell, each, "wall_us"),
                spread(cell.spread(each, "caller_cpu_us")),
                spread(cell.spread(each, cpu_of_the_rest)),
                spread(cell.spread(each, "cpu_children_us")),
                _if_stores(results, each, spread(cell.spread(each, cpu_per_stored_trace))),
                inside(cell, each),
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
            "CPU of the callers, µs",
            "of the rest of the process",
            "of its children",
            "CPU ms a stored trace",
            "of the background inside",
            "s until stored",
            "peak MiB",
            "whole traces found",
        ]
        parts.append(table(head, rows))
    return "\n\n".join(parts) or NOT_MEASURED


def inside(cell: CellResult, contestant: str) -> str:
    """Share of the background's CPU in the window, or why the sample is invalid."""
    samples = cell.of(contestant)
    shares = Spread.of(share for sample in samples if (share := cell.inside(sample)) is not None)
    text = f"{shares.median:.0%}" if shares else NONE
    return f"**invalid**: {text}" if any(map(cell.invalid, samples)) else text


def validity(results: Results) -> str:
    """How much of each background fell into its window."""
    cells = [cell for cell in results.cells if cell.parameters["is_timed"]]
    return by_contestant(results, cells, inside, only=results.stores)


def patches(results: Results) -> str:
    """The empty callback with our patches of DSPy and without, and ours above each."""
    value = "caller_cpu_us"
    rows = [
        [
            cell.id,
            spread(cell.spread(FLOOR, value)),
            spread(cell.spread(PATCHED, value)),
            above_floor(cell, OURS, value),
            spread(_above(cell, OURS, value, PATCHED)),
        ]
        for cell in results.cells
        if {FLOOR, PATCHED, OURS} <= set(cell.contestants)
    ]
    head = ["CPU of the callers, µs", "empty callback", "with our patches", "ours above the first", "above the second"]
    return table(head, rows) if rows else NOT_MEASURED


def _above(cell: CellResult, contestant: str, value: str, base: str) -> Spread | None:
    bases = {sample["round"]: sample[value] for sample in cell.of(base)}
    return Spread.of(s[value] - bases[s["round"]] for s in cell.of(contestant) if s["round"] in bases)


def rates(results: Results) -> str:
    """Latency of calls that come at a fixed rate, and what they use."""
    is_busy = machine.is_busy(results.data["machine"])
    rows = [
        [
            f"{cell.id}, {results.titles[each]}",
            NONE if is_busy else spread(cell.spread(each, p50_ms)),
            NONE if is_busy else spread(cell.spread(each, p99_ms)),
            spread(cell.spread(each, "caller_cpu_us")),
            spread(cell.spread(each, cpu_of_the_rest)),
            spread(cell.spread(each, "cpu_children_us")),
            spread(cell.spread(each, "cpu_server_us")),
            found(cell, each) if results.stores(each) else NONE,
        ]
        for cell in results.axis("rate", "server")
        for each in results.sorted(cell.contestants)
    ]
    head = [
        "calls at a fixed rate",
        "p50 of a call, ms",
        "p99, ms",
        "CPU of the callers, µs a call",
        "of the rest of the process",
        "of its children",
        "of the server",
        "whole traces found",
    ]
    return table(head, rows) if rows else NOT_MEASURED


def waiting(results: Results) -> str:
    """What 1,000 traces take while the store takes nothing."""
    return by_contestant(
        results,
        results.axis("waiting"),
        lambda cell, each: spread(cell.above_floor(each, waiting_per_thousand)) if each != FLOOR else NONE,
    )


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
        over_peers = [ratio(cell, value, OURS, peer) for peer in _PEERS]
        rows.append([cell.id, *over_peers, spread(cell.ratio(value, "ours-silent", FLOOR))])
    head = ["cell", *(f"ours / {results.titles[peer]}" for peer in _PEERS), "log_traces=False / empty callback"]
    return table(head, rows) if rows else NOT_MEASURED


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
        return NOT_MEASURED
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
    return table(head, rows) if rows else NOT_MEASURED


def workers(results: Results, cells: Sequence[CellResult]) -> str:
    """Evaluations in this process and in others: examples a second until stored, CPU of both sides, and memory."""
    rows = [
        [
            cell.name,
            spread(cell.spread(each, lambda sample: sample["calls"] / sample["stored_wall_s"])),
            spread(cell.spread(each, lambda sample: sample["cpu_stored_us"] / 1000)),
            spread(cell.spread(each, lambda sample: sample["cpu_children_us"] / 1000)),
            spread(cell.spread(each, "memory_peak_mib")),
            spread(cell.spread(each, lambda sample: sample.get("memory_children_mib"))),
            found(cell, each),
        ]
        for cell in cells
        for each in results.sorted(cell.contestants)
    ]
    there = ["CPU ms an example, in workers", "peak MiB", "MiB of all workers", "whole traces found"]
    return table(["evaluation", "examples a second", "CPU ms an example, here", *there], rows) if rows else NOT_MEASURED


def series(results: Results) -> str:
    """What a call cost at the beginning and at the end of a long run."""
    rows = []
    for cell in results.axis("calls"):
        for each in results.sorted(cell.contestants):
            marks = [mark for sample in cell.of(each) for mark in sample["marks"]]
            if not marks:
                continue
            rows.append(
                [
                    f"{cell.name}, {results.titles[each]}",
                    f"{max(mark[0] for mark in marks):,}",
                    spread(cell.spread(each, "wall_us")),
                    *(spread(cell.spread(each, last_over_first(place))) for place in (2, 3, 4)),
                    _if_stores(results, each, spread(cell.spread(each, until_stored))),
                    inside(cell, each),
                    spread(cell.spread(each, "memory_peak_mib")),
                    _if_stores(results, each, found(cell, each)),
                ]
            )
    head = [
        "series",
        "calls made",
        "wall µs a call",
        "wall, the last 1,000 over the first since the writer began",
        "CPU of the process",
        "CPU of the callers",
        "until stored over the window",
        "of the background inside",
        "peak MiB",
        "whole traces found",
    ]
    return table(head, rows) if rows else NOT_MEASURED


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
