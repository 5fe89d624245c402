"""``dspy-mlflow-async replay``: sends what a store did not take at the time, and says what is left and why."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dspy_mlflow_async.printable import mask_uris

if TYPE_CHECKING:
    from rich.console import Console

    from dspy_mlflow_async.export import ReplaySummary


def replay(
    tracking_uri: Annotated[
        Optional[str],  # noqa: UP045 - typer evaluates it
        typer.Option(help="Send only what is for this store; with --folder, send that spool to this store."),
    ] = None,
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A spool, or a folder of spools; by default the one that the tracer uses here."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
) -> None:
    """Send the traces and run results that lie in the spool, because their store was away, to their store.

    May be interrupted and run again, also several at once: nothing is lost, and nothing is stored twice.
    """
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download for prices nobody asks for
    if folder is not None and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a folder.", param_hint="--folder")

    from dspy_mlflow_async import export
    from dspy_mlflow_async.cli.console import make_console

    console = make_console()
    if dry_run:
        summary = export.replay(tracking_uri=tracking_uri, folder=folder, dry_run=True)
        console.print(f"{_records(summary.left, summary.traces)} would be sent.")
        _say_damaged(console, summary)
        return
    raise typer.Exit(_send(console, tracking_uri, folder))


def _send(console: Console, tracking_uri: str | None, folder: Path | None) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dspy_mlflow_async import export

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[Path, Any] = {}

        def show(progress: export.ReplayProgress) -> None:
            if progress.folder not in tasks:
                tasks[progress.folder] = bars.add_task(mask_uris(progress.tracking_uri), total=progress.total)
            bars.update(tasks[progress.folder], completed=progress.done, total=progress.total)

        summary = export.replay(tracking_uri=tracking_uri, folder=folder, progress=show)
    console.print(f"{_records(summary.stored, summary.traces)} sent.")
    if summary.dead:
        console.print(f"{summary.dead} refused by the store for good; the reasons stand in the spool's dead letters.")
    if summary.skipped:
        console.print(f"{summary.skipped} files belong to a process that is running, and will be sent by it.")
    if summary.left:
        console.print(f"{summary.left} left in the spool. Run the same command again when the store answers.")
    for reason in summary.errors:
        console.print(f"  {mask_uris(reason)}", markup=False, soft_wrap=True)
    _say_damaged(console, summary)
    return 1 if summary.left or summary.errors else 0


def _records(count: int, traces: int) -> str:
    return f"{count} records ({traces} whole traces)"


def _say_damaged(console: Console, summary: ReplaySummary) -> None:
    if summary.damaged:
        console.print(f"{summary.damaged} stretches of the spool could not be read; the rest could.")
