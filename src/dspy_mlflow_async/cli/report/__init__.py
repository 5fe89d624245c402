"""``dspy-mlflow-async report``: what a run and the runs below it have come to, and how evaluations differ."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="A run's id; with --compare, several.")],
    html: Annotated[
        Optional[Path],  # noqa: UP045 - typer evaluates it
        typer.Option(metavar="FILE", help="Write one page with the plots, too."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Put evaluations side by side, by example.")] = False,
    limit: Annotated[int, typer.Option(metavar="NUMBER", min=1, help="How many examples that differ to list.")] = 20,
    tracking_uri: Annotated[
        Optional[str],  # noqa: UP045 - typer evaluates it
        typer.Option(metavar="URI", help="Read this store; by default the one that MLflow would take here."),
    ] = None,
) -> None:
    """Show a run and the runs below it, or what differs between evaluations.

    Evaluations, compiles and their children, with status, scores, traces, errors, tokens and cost. When evaluations
    are compared, a run of evaluate_all stands for all its cases.
    """
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download for prices nobody asks for

    import mlflow

    from dspy_mlflow_async.cli.console import complain, make_console
    from dspy_mlflow_async.cli.report import comparing, page, reading, text

    if tracking_uri is not None:
        mlflow.set_tracking_uri(tracking_uri)
    console = make_console()
    try:
        nodes = [reading.read(run_id) for run_id in runs]
        changes = comparing.compare(nodes) if compare else None
    except ValueError as error:
        complain("report", error)
        raise typer.Exit(2) from None
    if changes is not None:
        console.print(text.changes_table(changes, limit))
    else:
        for node in nodes:
            console.print(text.run_table(node))
            for said in text.failures_of(node):
                console.print(said, markup=False, highlight=False, soft_wrap=True)
    if html is not None:
        try:
            html.write_text(page.page(nodes, changes), encoding="utf-8")
        except OSError as error:
            complain("report", f"cannot write {html}: {error.strerror}")
            raise typer.Exit(2) from None
        console.print(f"Written: {html}", markup=False, soft_wrap=True)
