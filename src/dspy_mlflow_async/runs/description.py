"""Description of a compile in Markdown, as MLflow's page of its run shows it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dspy

from dspy_mlflow_async.spans.safe_inspection import contain, text_of

_MAX_ARGUMENTS = 40
MAX_VALUE = 100  # characters
_MAX_INSTRUCTIONS = 20_000  # characters of one predictor that are compared
_MAX_LINES = 400
_TICKS = re.compile("`+")


def instructions_of(program: Any) -> dict[str, str]:
    """Return the instructions of a program's predictors, by name; empty where it does not tell."""
    if not isinstance(program, dspy.Module):
        return {}
    try:
        found = {name: predictor.signature.instructions for name, predictor in program.named_predictors()}
    except BaseException as error:  # noqa: BLE001 - a module's walk may be the user's
        contain(error)
        return {}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """Return a table in Markdown.

    Args:
        columns: What stands above them.
        rows: Their cells.
        numbers: Whether all columns but the first hold numbers.
    """
    rules = [":--", *(["--:" if numbers else ":--"] * (len(columns) - 1))]
    lines = [columns, rules, *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split()) or " "


def describe_compile(
    optimizer: str,
    arguments: Mapping[str, Any],
    best: Mapping[str, tuple[int, float]],
    before: Mapping[str, str],
    after: Mapping[str, str],
) -> str:
    """Return the description of a compile.

    Args:
        optimizer: The name of its class.
        arguments: Its parameters and the arguments of ``compile``.
        best: By score series, step and score of the best.
        before: The instructions of the program as it came, by predictor.
        after: Those of the program that was found.
    """
    scores = [f"best `{key}` **{score:g}** at step {step}" for key, (step, score) in sorted(best.items())]
    parts = [" · ".join([f"**{optimizer}**", *scores])]
    for name, text in after.items():
        parts += [f"**Instructions of `{name}`**", _difference(before.get(name), text)]
    shown = [(key, f"`{text_of(value)[:MAX_VALUE]}`") for key, value in sorted(arguments.items())]
    if shown:
        parts += ["**Arguments**", table(("argument", "value"), shown[:_MAX_ARGUMENTS])]
    return "\n\n".join(parts)


def _difference(before: str | None, after: str) -> str:
    if before is None or before == after:
        return "\n\n".join(["Unchanged." if before == after else "New.", _fenced(after[:_MAX_INSTRUCTIONS])])
    old, new = (text[:_MAX_INSTRUCTIONS].splitlines()[:_MAX_LINES] for text in (before, after))
    _, _, *lines = difflib.unified_diff(old, new, n=_MAX_LINES, lineterm="")
    return _fenced("\n".join(line for line in lines if not line.startswith("@@")), "diff")


def _fenced(text: str, language: str = "") -> str:
    longest = max(map(len, _TICKS.findall(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
