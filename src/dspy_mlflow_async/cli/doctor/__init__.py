"""``dspy-mlflow-async doctor``: one plain sentence for each thing that is as it must be, or is not.

In a program of your own, where the tracer is on, ask it there: ``print(diagnose())``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dspy_mlflow_async.cli.doctor.findings import Diagnosis, Finding, Level

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Diagnosis", "Finding", "Level", "diagnose", "doctor"]

_STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.PROBLEM: "bold red"}


def doctor(
    tracking_uri: Annotated[
        Optional[str],  # noqa: UP045 - typer evaluates it
        typer.Option(metavar="URI", help="Ask after this store; by default the one that MLflow would take here."),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="List the private names of DSPy and MLflow that it uses, with what for."),
    ] = False,
) -> None:
    """Say whether the tracer can work here: versions, private names it needs, store, spool, and a test of itself."""
    from dspy_mlflow_async.cli.console import make_console

    console = make_console()
    with console.status("Looking …"):
        diagnosis = diagnose(tracking_uri=tracking_uri, self_test=True)
    show(console, diagnosis, verbose=verbose)
    raise typer.Exit(0 if diagnosis.is_well else 1)


def diagnose(*, tracking_uri: str | None = None, self_test: bool = False) -> Diagnosis:
    """Examine this process.

    Args:
        tracking_uri: The store to ask after; by default MLflow's current one.
        self_test: Trace a small program against a local endpoint and check its tree. Meanwhile the traces of the
            whole process are kept from the store, so leave it off in a process that serves.

    Returns:
        The findings; ``print`` shows them, ``is_well`` sums them up.
    """
    from dspy_mlflow_async.cli.doctor import checks
    from dspy_mlflow_async.seams.listed import lost_ground

    can_test = self_test and not lost_ground()
    traces: list[Any] = []
    store = _asked("store", lambda: checks.store(tracking_uri))
    can_ask = not lost_ground() and all(finding.level is not Level.PROBLEM for finding in store)
    findings = [
        *_asked("versions", checks.versions),
        *_asked("seams", checks.seams),
        *store,
        *_asked("spool", checks.spool),
        *(_asked("self-test", lambda: _self_test(traces)) if can_test else _asked("tracer", checks.tracer)),
        *(_asked("store", lambda: checks.rows(tracking_uri, traces)) if can_ask else ()),
        *checks.holes(),
    ]
    return Diagnosis(tuple(findings))


def _asked(topic: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return what a check finds; where it fails, most likely for a seam that has gone, the failure is the finding."""
    try:
        return list(check())
    except Exception as error:  # noqa: BLE001 - the doctor must be able to speak of anything
        return [Finding(Level.PROBLEM, topic, f"it cannot be looked at, for {type(error).__name__}: {error}")]


def _self_test(traces: list[Any]) -> Iterable[Finding]:
    from dspy_mlflow_async.cli.doctor import selftest

    return selftest.run(traces)


def show(console: Console, diagnosis: Diagnosis, *, verbose: bool = False) -> None:
    """Print the findings, a line for each."""
    from rich.text import Text

    for finding in diagnosis.findings:
        mark = Text(f"{finding.level.value:<8}", style=_STYLES[finding.level])
        console.print(Text.assemble(mark, f"{finding.topic}: {finding.text}"), soft_wrap=not console.is_terminal)
        if verbose:
            for line in finding.details:
                console.print(Text(f"          {line}", style="dim"), soft_wrap=True)
    if diagnosis.is_well:
        console.print("All is well.", style="bold green")
    else:
        console.print(f"{len(diagnosis.problems)} to be mended.", style="bold red")
