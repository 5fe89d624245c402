"""Options that several commands take alike, and how the times in them are read."""

from __future__ import annotations

import re
import time
from datetime import datetime
from typing import Annotated, Optional

import typer

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

# typer evaluates these, where X | None is not to be had on Python 3.10 with an older typer.
ReadTrackingUri = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--tracking-uri", metavar="URI", help="Read this store; by default the one that MLflow would take here."
    ),
]
Experiments = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--experiment", metavar="NAME", help="Only this experiment, by name or id; may be given several times."
    ),
]
Since = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--since", metavar="TIME", help="Only what began since: 12h, 7d, or a date."),
]
Run = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--run", metavar="RUN", help="Only this run, the runs below it and their traces."),
]


def since_ms(text: str | None) -> int:
    """Return what ``--since`` says, in milliseconds since the epoch; 0 for nothing.

    Raises:
        typer.BadParameter: For what is neither an age nor a date.
    """
    if text is None:
        return 0
    ago = _AGO.fullmatch(text.strip())
    if ago is not None:
        return int((time.time() - float(ago[1]) * _SECONDS[ago[2]]) * 1000)
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1000)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither like 12h or 7d, nor a date.", param_hint="--since") from None


def seconds_of(text: str, option: str) -> float:
    """Return a duration such as ``30m`` in seconds.

    Raises:
        typer.BadParameter: For anything else, with the name of the option.
    """
    found = _AGO.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is not like 30m, 12h or 7d.", param_hint=option)
    return float(found[1]) * _SECONDS[found[2]]
