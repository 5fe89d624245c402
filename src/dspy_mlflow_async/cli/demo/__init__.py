"""``dspy-mlflow-async demo``: runs DSPy programs at the same time, and checks every span that MLflow has stored."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from dspy_mlflow_async.cli.demo.acts import Act, Performed
    from dspy_mlflow_async.cli.demo.stage import Stage

FOLDER = Path("dspy-mlflow-async-demo")


def demo(
    folder: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the MLflow store goes; made if need be.")
    ] = FOLDER,
    model: Annotated[
        Optional[str],  # noqa: UP045 - typer evaluates it
        typer.Option(
            metavar="NAME", help="Ask this model, by LiteLLM's name (openai/gpt-4o-mini), not the local endpoint."
        ),
    ] = None,
    api_base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="URL", help="The OpenAI-compatible endpoint of --model; by default its provider's."),
    ] = None,
) -> None:
    """Trace a DSPy program under concurrency, read the traces back from MLflow, and check every span."""
    if api_base is not None and model is None:
        raise typer.BadParameter("it needs --model too, such as --model openai/NAME.", param_hint="--api-base")
    os.environ.setdefault("DISABLE_AIOHTTP_TRANSPORT", "True")  # LiteLLM 1.108's complains when the process ends

    from dspy_mlflow_async.cli.console import make_console

    raise typer.Exit(play(make_console(), folder, model, api_base))


def play(console: Console, folder: Path, model: str | None = None, api_base: str | None = None) -> int:
    """Run the demo and return the exit code: 0 if every span is where it belongs, else 1."""
    started = time.monotonic()
    with console.status("Importing DSPy and MLflow …"):
        from dspy_mlflow_async.cli.demo import acts, check, show, stage

    console.print(f"The store goes into {folder.resolve()}")
    try:
        with stage.set_up(folder, model, api_base) as scene:
            where = f"on {scene.endpoint.api_base}, over HTTP" if scene.endpoint else "as you asked"
            console.print(f"The model is {scene.model}, {where}")
            scripted = scene.endpoint is not None
            planned = [plan for act in acts.ACTS for plan in act.plan(scene.tickets)]
            performed = [_perform(console, act, scene) for act in acts.ACTS]
            with console.status("Reading the traces back from MLflow …"):
                verdict = check.check(scene.traces(), planned, scene.billed(), exact=scripted)
    except OSError as error:
        console.print(
            f"{error}\nName another folder, that you may write to: dspy-mlflow-async demo --folder PATH", markup=False
        )
        return 1
    except Exception as error:
        if model is None:
            raise
        console.print(
            f"{type(error).__name__}: {error}\nThe model {model} did not answer as it should. Check --model and "
            "--api-base, and that its key is in the environment (OPENAI_API_KEY, …); or leave both options out.",
            markup=False,
        )
        return 1
    verdict.problems.extend(problem for each in performed for problem in each.problems if scripted)

    marker = f"parallel/{scene.tickets[0].id}"
    if marker in verdict.by_marker:
        console.print(f"\nThe trace of call #{marker}, whose three lookups ran in DSPy's worker threads:", markup=False)
        show.show_tree(console, verdict.by_marker[marker])
    for each in performed:
        for shown in each.shown:
            console.print(shown, markup=False)
    console.print()
    show.show_counts(console, verdict)
    show.show_verdict(console, verdict)
    console.print(f"{time.monotonic() - started:.0f} seconds. Look at it all in MLflow's UI, on http://127.0.0.1:5000:")
    console.print(f"  {show.ui_command(scene.store)}", markup=False, soft_wrap=True)
    return 1 if verdict.problems else 0


def _perform(console: Console, act: Act, scene: Stage) -> Performed:
    """Run one act under a progress bar, and say how long it took."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    count = len(act.plan(scene.tickets))
    started = time.monotonic()
    columns = (TextColumn(act.title), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(act.name, total=count)
        performed = act.perform(scene.tickets, lambda: progress.advance(bar))
    calls = f"{count} calls in " if count else ""
    console.print(f"{act.title}: {calls}{time.monotonic() - started:.1f} s")
    return performed
