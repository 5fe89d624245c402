"""The command line of the suite."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cells as cells_module
from benchmarks.cells import Cell
from benchmarks.contestants import CONTESTANTS

_DEFAULT_OUT = Path(".benchmarks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say.

    Returns:
        The exit code: 0, or 1 if a cell did not run, a trace of ours is not whole in the store, or a figure of ours is
        invalid, or 2 for arguments that make no sense.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.compare:
            return _compare(*options.compare)
        if options.report:
            return _report(options.report, options.out)
        if options.docs:
            return _docs(options.docs)
        cells = _chosen(options)
    except (OSError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if options.list:
        return _list(cells)
    return _run(cells, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures what tracing DSPy costs, beside tracing off and what one would use instead. "
        "benchmarks/README.md says how, and what it cannot show.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="every axis once, small, under 2 minutes: does every "
        "cell run, is every trace there, and had the writer its turn? No time is judged",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="CELL",
        help="axes (threads) or cells (threads/pool-8, 'threads/pool-*')",
    )
    parser.add_argument("--contestants", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(CONTESTANTS)}")
    parser.add_argument(
        "--rounds",
        type=_positive,
        metavar="N",
        help="how often each contestant is measured in each cell, in place of the cell's own number",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"for results.json, report.md and the plots; by default a new one below {_DEFAULT_OUT}/",
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--list", action="store_true", help="show the cells and their contestants")
    other.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="show what moved between two results files"
    )
    other.add_argument("--report", type=Path, metavar="RESULTS", help="write report and plots of a results file anew")
    other.add_argument("--docs", type=Path, metavar="RESULTS", help="write the tables of docs/performance.md anew")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {number}")
    return number


def _chosen(options: argparse.Namespace) -> list[Cell]:
    """The cells that the arguments ask for.

    Raises:
        ValueError: For a name that nothing has.
    """
    cells = cells_module.choose(cells_module.quick() if options.quick else cells_module.full(), options.only)
    unknown = set(options.contestants) - CONTESTANTS.keys()
    if unknown:
        raise ValueError(f"no contestant {', '.join(sorted(unknown))}; there are {', '.join(CONTESTANTS)}")
    return [cell for cell in cells if not options.contestants or set(cell.contestants) & set(options.contestants)]


def _list(cells: Sequence[Cell]) -> int:
    for cell in cells:
        print(f"{cell.id:<30} {cell.calls:>6} calls, {cell.rounds} rounds: {' '.join(cell.contestants)}")
    return 0


def _run(cells: Sequence[Cell], options: argparse.Namespace) -> int:
    from benchmarks import report, results, run
    from benchmarks.progress import Display
    from dspy_mlflow_async.cli.console import make_console

    console = make_console()
    wanted = set(options.contestants) or CONTESTANTS.keys()
    samples = sum(
        len(wanted & set(cell.contestants_of(number)))
        for cell in cells
        for number in range(1, (options.rounds or cell.rounds) + 1)
    )
    with Display(console, len(cells), samples) as display:
        data = run.run(
            cells,
            mode="quick" if options.quick else "full",
            watcher=display,
            contestants=options.contestants,
            rounds=options.rounds,
        )
    results.validate(data)
    folder = options.out or _DEFAULT_OUT / dt.datetime.now().strftime("%Y-%m-%d-%H%M%S")  # noqa: DTZ005 - the user's own time
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(data, indent=1) + "\n")
    found = results.Results(data)
    report.write(found, folder)
    problems = found.problems()
    console.print(f"{data['seconds']:.0f} s; report in {folder / 'report.md'}", soft_wrap=True)
    for contestant, reason in found.unavailable.items():
        console.print(f"without {contestant}: {reason}", soft_wrap=True)
    for problem in problems:
        console.print(f"[red]FAILED[/] {problem}", soft_wrap=True, markup=True)
    if not problems:
        console.print(
            "Every cell ran, every trace that should be in the store is there, whole, and our figures are valid.",
            soft_wrap=True,
        )
    return 1 if problems else 0


def _compare(old: Path, new: Path) -> int:
    from benchmarks import compare, results

    print(compare.as_markdown(results.load(old), results.load(new)))
    return 0


def _report(path: Path, out: Path | None) -> int:
    from benchmarks import report, results

    folder = out or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    report.write(results.load(path), folder)
    print(folder / "report.md")
    return 0


def _docs(path: Path) -> int:
    from benchmarks import docs, results

    print(docs.update(results.load(path), path))
    return 0
