"""The command ``dspy-mlflow-async``: each of its commands is a module of its own, imported when it is called."""

from __future__ import annotations

import importlib
from typing import Any

import typer
import typer.core
import typer.main

# name: (module below this package, function). The order is that of the help text.
COMMANDS = {
    "demo": ("demo", "demo"),
    "doctor": ("doctor", "doctor"),
    "replay": ("replay", "replay"),
    "report": ("report", "report"),
}


class _LazyGroup(typer.core.TyperGroup):
    """Imports a command's module when somebody asks for that command, or for the list of them all."""

    # Newer typers bring a click of their own, so click's types cannot be named here.

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - click's signature
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name]
        command = typer.Typer(add_completion=False)
        command.command(cmd_name)(getattr(importlib.import_module(f"{__name__}.{module}"), function))
        return typer.main.get_command(command)


app = typer.Typer(
    cls=_LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="MLflow tracing for DSPy programs that run concurrently.",
)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"dspy-mlflow-async {version('dspy-mlflow-async')}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


def main() -> None:
    """What the console script calls."""
    app(prog_name="dspy-mlflow-async")
