"""Terminal output with rich; plain text, in one width, when it is piped."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.segment import Segment

from dspy_mlflow_async.printable import mask_uris, printable

_PIPED_WIDTH = 120


class _PrintableConsole(Console):
    """Console that obeys rich alone: names of runs, cases or errors cannot move the cursor or recolour the screen."""

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        """Render, and replace what a terminal would obey but for rich's own control codes."""
        for segment in super().render(*args, **kwargs):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def make_console(file: TextIO | None = None) -> Console:
    """Return a console for ``file`` (standard output by default): no colours and no line breaks by luck when piped."""
    console = _PrintableConsole(file=file, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console


def complain(command: str, what: object) -> None:
    """Print one line to standard error: what is wrong with what ``command`` was asked to do."""
    typer.echo(f"dspy-mlflow-async {command}: {mask_uris(what)}", err=True)
