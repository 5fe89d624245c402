"""Terminal output with rich; plain text, in one width, when it is piped."""

from __future__ import annotations

import os
from typing import TextIO

from rich.console import Console

_PIPED_WIDTH = 120


def make_console(file: TextIO | None = None) -> Console:
    """A console for ``file`` (standard output by default): no colours and no line breaks by luck when piped."""
    console = Console(file=file, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console
