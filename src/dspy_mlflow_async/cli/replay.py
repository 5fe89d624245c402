"""``dspy-mlflow-async replay``: sends what a store did not take at the time, and says what is left and why."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dspy_mlflow_async.printable import counted, mask_uris

if TYPE_CHECKING:
    from rich.console import Console

    from dspy_mlflow_async.export import DeadLetter, ReplaySummary

    Choice = Callable[[DeadLetter], bool]

_MAX_REASON = 160  # characters


def replay(
    tracking_uri: Annotated[
        Optional[str],  # noqa: UP045 - typer evaluates it
        typer.Option(
            metavar="URI", help="Send only what is for this store; with --folder, send that spool to this store."
        ),
    ] = None,
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FOLDER", help="A spool, or a folder of spools; by default the one that the tracer uses here."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
    dead_letters: Annotated[
        bool, typer.Option("--dead-letters", help="Send what the store had refused for good, too, after asking.")
    ] = False,
    reason: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="TEXT", help="With --dead-letters: those alone in whose reason this text stands."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --dead-letters: do not ask.")] = False,
) -> None:
    """Send the traces and run results that wait on disk, in the spool, since their store was away.

    May be interrupted and run again, also several at once: nothing is lost, and nothing is stored twice.
    """
    if folder is not None and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a folder.", param_hint="--folder")

    from dspy_mlflow_async import export
    from dspy_mlflow_async.cli.console import make_console

    if reason is not None and not dead_letters:
        raise typer.BadParameter("is for --dead-letters.", param_hint="--reason")
    console = make_console()
    chosen = None
    if dead_letters:
        chosen = _choice(reason)
        _list_letters(console, list(filter(chosen, export.letters(tracking_uri=tracking_uri, folder=folder))))
        if not (dry_run or yes) and not _is_agreed():
            raise typer.Exit(2)
    if dry_run:
        summary = export.replay(tracking_uri=tracking_uri, folder=folder, dry_run=True)
        console.print(f"{_records(summary.left, summary.traces)} would be sent.")
        _say_damaged(console, summary)
        return
    raise typer.Exit(_send(console, tracking_uri, folder, chosen))


def _choice(reason: str | None) -> Choice:
    wanted = (reason or "").casefold()
    return lambda letter: wanted in letter.reason.casefold()


def _list_letters(console: Console, letters: list[DeadLetter]) -> None:
    """Say how many records would be sent again, by reason and with the day of the first and the last."""
    console.print(f"{counted(len(letters), 'dead letter')} would be sent again.")
    by_reason: dict[str, list[float]] = {}
    for letter in letters:
        short = " ".join(letter.reason.split())
        by_reason.setdefault(f"{short[:_MAX_REASON]}…" if len(short) > _MAX_REASON else short, []).append(letter.time)
    for reason, times in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        first, last = (time.strftime("%Y-%m-%d", time.localtime(each)) for each in (min(times), max(times)))
        days = first if first == last else f"{first} to {last}"
        console.print(f"  {len(times)}, {days}: {mask_uris(reason)}", markup=False, soft_wrap=True)


def _is_agreed() -> bool:
    """Ask; where nobody can answer, say how to do without."""
    from dspy_mlflow_async.cli.console import complain

    if not sys.stdin.isatty():
        complain("replay", "nobody is there to agree; look at it with --dry-run, then send it with --yes")
        return False
    return typer.confirm("Send them?")


def _send(console: Console, tracking_uri: str | None, folder: Path | None, revive: Choice | None) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dspy_mlflow_async import export

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[Path, Any] = {}

        def show(progress: export.ReplayProgress) -> None:
            if progress.folder not in tasks:
                tasks[progress.folder] = bars.add_task(mask_uris(progress.tracking_uri), total=progress.total)
            bars.update(tasks[progress.folder], completed=progress.done, total=progress.total)

        summary = export.replay(tracking_uri=tracking_uri, folder=folder, progress=show, revive=revive)
    console.print(f"{_records(summary.stored, summary.traces)} sent.")
    if summary.dead:
        console.print(f"{summary.dead} refused by the store for good; see --dead-letters --dry-run for the reasons.")
    if summary.skipped:
        files = counted(summary.skipped, "file belongs", "files belong")
        console.print(f"{files} to a process that is running, and will be sent by it.")
    if summary.left:
        console.print(f"{summary.left} left in the spool. Run the same command again when the store answers.")
    for reason in summary.errors:
        console.print(f"  {mask_uris(reason)}", markup=False, soft_wrap=True)
    _say_damaged(console, summary)
    return 1 if summary.left or summary.errors else 0


def _records(count: int, traces: int) -> str:
    return f"{counted(count, 'record')} ({counted(traces, 'whole trace')})"


def _say_damaged(console: Console, summary: ReplaySummary) -> None:
    if summary.damaged:
        console.print(
            f"{counted(summary.damaged, 'stretch', 'stretches')} of the spool could not be read; the rest could."
        )
