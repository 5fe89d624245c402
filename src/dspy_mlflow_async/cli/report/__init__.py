"""``dspy-mlflow-async report``: what a run and the runs below it have come to, and how evaluations differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dspy_mlflow_async.cli.options import ReadTrackingUri

if TYPE_CHECKING:
    from rich.console import Console

    from dspy_mlflow_async.cli.report.comparing import Changes
    from dspy_mlflow_async.cli.report.reading import Node

_MAX_LISTED = 20


def report(
    runs: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer evaluates it
        typer.Argument(metavar="RUN", help="A run's id; with --compare, several. By default the newest."),
    ] = None,
    last: Annotated[int, typer.Option("--last", min=1, metavar="N", help="The newest N runs.")] = 1,
    list_: Annotated[bool, typer.Option("--list", help="List the newest runs, with their ids.")] = False,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Write one page with the plots, too."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the runs as JSON, for a program.")] = False,
    csv_: Annotated[bool, typer.Option("--csv", help="Print the runs as CSV, for a spreadsheet.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Put evaluations side by side, by example.")] = False,
    lineage: Annotated[
        bool,
        typer.Option("--lineage", help="Show the candidates of compiles as a tree, with their scores."),
    ] = False,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="How many examples that differ to list.")] = 20,
    tracking_uri: ReadTrackingUri = None,
) -> None:
    """Show a run and the runs below it, or what differs between evaluations.

    Evaluations, compiles and their children, with status, scores, traces, errors, tokens and cost. When evaluations
    are compared, a run of evaluate_all stands for all its cases.
    """
    import mlflow

    from dspy_mlflow_async.cli.console import complain, make_console
    from dspy_mlflow_async.cli.report import comparing, reading, text
    from dspy_mlflow_async.evaluate import stored_runs
    from dspy_mlflow_async.printable import printable
    from dspy_mlflow_async.reachability import look

    if tracking_uri is not None:
        mlflow.set_tracking_uri(tracking_uri)
    if problem := look(mlflow.get_tracking_uri()).problem:
        complain("report", problem)
        raise typer.Exit(2)
    console = make_console()
    try:
        if list_:
            console.print(text.list_table(stored_runs.newest(_MAX_LISTED)))
            return
        nodes = [reading.read(run_id) for run_id in runs] if runs else _newest(last)
        changes = comparing.compare(nodes) if compare else None
    except ValueError as error:
        complain("report", error)
        raise typer.Exit(2) from None
    if json_ or csv_:
        _print_records([text.run_record(each, depth) for node in nodes for depth, each in node.walk()], as_json=json_)
    else:
        _show(console, nodes, changes, limit)
        if lineage:
            _show_lineages(console, nodes)
    if html is not None:
        _write(html, nodes, changes)
        typer.echo(printable(f"Written: {html}", one_line=True), err=json_ or csv_)
    say_what_waits("report")


def _show(console: Console, nodes: list[Node], changes: Changes | None, limit: int) -> None:
    from dspy_mlflow_async.cli.report import text

    if changes is not None:
        console.print(text.changes_table(changes, limit))
        return
    for node in nodes:
        console.print(text.run_table(node))
        for said in text.failures_of(node):
            console.print(said, markup=False, highlight=False, soft_wrap=True)


def _show_lineages(console: Console, nodes: list[Node]) -> None:
    from dspy_mlflow_async.cli.console import complain
    from dspy_mlflow_async.cli.lineage import reading, showing

    found = [lineage for node in nodes for _, each in node.walk() if (lineage := reading.read(each.run)) is not None]
    for each in found:
        console.print(showing.tree(each))
    if not found:
        complain("report", "no run here holds the candidates of a compile")


def _write(html: Path, nodes: list[Node], changes: Changes | None) -> None:
    from dspy_mlflow_async.cli.console import complain
    from dspy_mlflow_async.cli.report import page

    try:
        html.write_text(page.page(nodes, changes), encoding="utf-8")
    except OSError as error:
        complain("report", f"cannot write {html}: {error.strerror}")
        raise typer.Exit(2) from None


def _newest(count: int) -> list[Node]:
    """Read the newest runs.

    Raises:
        ValueError: Where there are none.
    """
    from mlflow import get_tracking_uri

    from dspy_mlflow_async.cli.report import reading
    from dspy_mlflow_async.evaluate import stored_runs

    found = stored_runs.newest(count)
    if not found:
        raise ValueError(f"there is no run of an evaluation or a compile in {get_tracking_uri()}")
    return [reading.node_of(run) for run in found]


def _print_records(records: list[dict[str, Any]], *, as_json: bool) -> None:
    import csv
    import json
    import sys

    if as_json:
        typer.echo(json.dumps(records, indent=2))
    else:
        writer = csv.DictWriter(sys.stdout, fieldnames=[*records[0]])
        writer.writeheader()
        writer.writerows(records)


def say_what_waits(command: str) -> None:
    """Say that this machine's spool holds what the store has not got: what a command shows may lack it."""
    from mlflow import get_tracking_uri

    from dspy_mlflow_async import export
    from dspy_mlflow_async.cli.console import complain
    from dspy_mlflow_async.printable import counted

    uri = get_tracking_uri()
    waiting = sum(spool.records for spool in export.spools() if spool.tracking_uri == uri)
    if waiting:
        what = counted(waiting, "record waits", "records wait")
        complain(command, f"{what} on this machine for this store; send with: dspy-mlflow-async replay")
