"""The command ``dspy-mlflow-async``: each of its commands is a module of its own, imported when it is called."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

import typer
import typer.core
import typer.main

# name: (module below this package, function). The order is that of the help text.
COMMANDS = {
    "audit": ("audit", "audit"),
    "demo": ("demo", "demo"),
    "doctor": ("doctor", "doctor"),
    "gate": ("gate", "gate"),
    "harvest": ("harvest", "harvest"),
    "replay": ("replay", "replay"),
    "report": ("report", "report"),
    "which": ("lineage", "which"),
}

NEED_RUNS = ("audit", "demo", "gate", "harvest", "report", "which")
READ_ALONE = ("audit", "gate", "harvest", "report", "which")  # a store that they made would have nothing wrong in it


def __getattr__(name: str) -> Any:
    """Import a command's module when somebody asks for it, as in ``dspy_mlflow_async.cli.doctor.diagnose()``."""
    if name not in COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{COMMANDS[name][0]}")


def _named_alone(parameters: list[Any]) -> list[Any]:
    """Let a help text show no types: not ``<bool>`` behind what is only switched on, nor ``<list[str]>`` behind RUN."""
    for each in parameters:
        if each.param_type_name == "argument":
            each.display_type_rich = lambda ctx: None  # noqa: ARG005 - typer's
        elif each.is_flag:
            each.metavar = ""
    return parameters


class _Command(typer.core.TyperCommand):
    """A command."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _named_alone(super().get_params(ctx))


class _LazyGroup(typer.core.TyperGroup):
    """Imports a command's module when somebody asks for that command, or for the list of them all."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _named_alone(super().get_params(ctx))

    # Newer typers bring a click of their own, so click's types cannot be named here.

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, and for one that there is not, name the one that was meant, perhaps."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, 1)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - click's signature
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name]
        command = typer.Typer(add_completion=False)
        called = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        command.command(cmd_name, cls=_Command, help=_paragraphs(called))(_checked(cmd_name, called))
        return typer.main.get_command(command)


def _paragraphs(function: Callable[..., None]) -> str:
    """Return what a docstring says, a line a paragraph: a terminal has a width of its own."""
    said = inspect.getdoc(function) or ""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in said.split("\n\n"))


def _checked(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """Keep a command off the net; where the MLflow that is installed lacks what it needs, end it with one sentence."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> None:
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download for prices nobody asks for

        from dspy_mlflow_async.cli.console import complain

        said = _what_is_missing(name, kwargs) if name in NEED_RUNS else None
        if said is not None:
            complain(name, said)
            raise typer.Exit(2)
        function(*args, **kwargs)

    return checked


def _what_is_missing(name: str, options: dict[str, Any]) -> str | None:
    from dspy_mlflow_async.reachability import missing_store
    from dspy_mlflow_async.seams.installed import has_runs, missing_for, needs_whole
    from dspy_mlflow_async.seams.mlflow_store import resolve_tracking_uri

    if not has_runs():
        return needs_whole("this command")
    if name == "demo":
        return missing_for("sqlite://")
    uri = resolve_tracking_uri(options.get("tracking_uri"))
    return missing_for(uri) or (missing_store(uri) if name in READ_ALONE else None)


app = typer.Typer(
    cls=_LazyGroup,
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
    """Run the command line; called by the console script."""
    app(prog_name="dspy-mlflow-async")
