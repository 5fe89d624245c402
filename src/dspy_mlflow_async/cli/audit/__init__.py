"""``dspy-mlflow-async audit``: is what a store holds right, whoever wrote it?"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dspy_mlflow_async.cli.options import Experiments, ReadTrackingUri, Run, Since, seconds_of, since_ms

if TYPE_CHECKING:
    from rich.console import Console

    from dspy_mlflow_async.cli.audit.findings import Audit
    from dspy_mlflow_async.cli.audit.store import Store

_UI = "http://127.0.0.1:5000"  # where `mlflow ui` is


def audit(
    experiment: Experiments = None,
    since: Since = None,
    run: Run = None,
    idle: Annotated[
        str, typer.Option(metavar="TIME", help="How long unfinished runs and traces may be silent before they count.")
    ] = "1h",
    marker: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="REGEX",
            help="Finds strays: a pattern for what all inputs of one call have and no other call's, as order-\\d+.",
        ),
    ] = None,
    examples: Annotated[int, typer.Option(metavar="N", min=0, help="How many examples of each kind to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Write an HTML page, too."),
    ] = None,
    ui: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="URL", help="Where MLflow's UI is, for links; by default the server, or `mlflow ui`."),
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="End the runs and traces that nobody works on, after asking; nothing else.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --fix: do not ask.")] = False,
    tracking_uri: ReadTrackingUri = None,
) -> None:
    """Say whether a store is right: whole traces, under their runs, with their feedback and tokens, without secrets.

    Reads whatever tracer wrote it. The exit code is 1 if there are faults, 2 if the store cannot be read.
    """
    from mlflow.exceptions import MlflowException

    from dspy_mlflow_async.cli.audit import show
    from dspy_mlflow_async.cli.audit.store import Store
    from dspy_mlflow_async.cli.console import complain, make_console
    from dspy_mlflow_async.seams.mlflow_store import resolve_tracking_uri

    idle_seconds, begin_ms = seconds_of(idle, "--idle"), since_ms(since)
    pattern = _pattern(marker)
    console = make_console(sys.stderr if as_json else None)
    uri = resolve_tracking_uri(tracking_uri)
    try:
        store = Store(uri, experiment or (), begin_ms, run)
        result = _run(console, store, idle_seconds=idle_seconds, marker=pattern, examples=examples)
    except (ValueError, MlflowException) as error:
        complain("audit", error)
        raise typer.Exit(2) from None
    base = (ui or (uri if uri.startswith("http") else _UI)).rstrip("/")
    if as_json:
        typer.echo(show.as_json(result, uri, base))
    else:
        show.print_text(console, result, base)
    if html is not None:
        try:
            html.write_text(show.as_html(result, uri, base), encoding="utf-8")
        except OSError as error:
            complain("audit", f"cannot write {html}: {error.strerror}")
            raise typer.Exit(2) from None
    if fix and result.left:
        _fix(console, store, result, yes=yes)
    raise typer.Exit(1 if result.has_faults else 0)


def _run(console: Console, store: Store, **options: Any) -> Audit:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dspy_mlflow_async.cli.audit.auditing import audit as run

    columns = (TextColumn("traces"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("traces", total=store.count())
        return run(store, progress=lambda done: bars.update(task, completed=done), **options)


def _fix(console: Console, store: Store, result: Audit, *, yes: bool) -> None:
    """Show what would be ended, ask, and end it."""
    from dspy_mlflow_async.cli.audit.fixing import fix
    from dspy_mlflow_async.cli.console import complain

    console.print(f"{len(result.left)} would be ended, runs as KILLED, traces as ERROR:", markup=False)
    for finding in result.left:
        console.print(f"  {finding.trace_id or finding.run_id}: {finding.detail}", markup=False, soft_wrap=True)
    if not yes:
        if not sys.stdin.isatty():
            complain("audit", "nobody is there to agree; end them with --fix --yes")
            return
        if not typer.confirm("End them?"):
            return
    for finding, reason in fix(store, result.left):
        said = "ended" if reason is None else f"left as it is: {reason}"
        console.print(f"  {finding.trace_id or finding.run_id}: {said}", markup=False, soft_wrap=True)


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise typer.BadParameter(f"is no regular expression: {error}", param_hint="--marker") from None
