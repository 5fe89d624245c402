"""Tables of runs and comparisons for a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dspy_mlflow_async.cli.report.comparing import Changes
from dspy_mlflow_async.cli.report.reading import Node
from dspy_mlflow_async.evaluate.comparison import cost_text, errors_text
from dspy_mlflow_async.printable import printable

_BARS = "▁▂▃▄▅▆▇█"
_SPARKS = 16  # characters
_STYLES = {"FINISHED": "green", "FAILED": "red", "KILLED": "yellow", "RUNNING": "cyan"}
MAX_TEXT = 60  # characters of an example
_MAX_ANSWER = 40  # of what a program answered, or of what it raised


def spark_line(values: Sequence[float], width: int = _SPARKS) -> str:
    """Return values as bars between the lowest and the highest, many averaged into ``width``, non-numbers left out."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    if len(values) > width:
        edges = [round(place * len(values) / width) for place in range(width + 1)]
        values = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    low, high = min(values), max(values)
    if high == low:
        return _BARS[len(_BARS) // 2] * len(values)
    return "".join(_BARS[round((value - low) / (high - low) * (len(_BARS) - 1))] for value in values)


def run_cells(node: Node, depth: int) -> dict[str, str]:
    """Return the cells of one run in the table of runs, by column."""
    return {
        "run": f"{'  ' * depth}{printable(node.name, one_line=True)}",
        "kind": node.kind,
        "status": str(node.run.info.status),
        "score": _score_cell(node),
        "difference": _difference_cell(node),
        "progress": node.progress,
        "scores": spark_line(node.series),
        "stopped": node.stopped,
        "traces": str(node.traces.count or ""),
        "errors": str(node.errors or ""),
        "tokens": "" if node.tokens is None else f"{node.tokens:,}",
        "cost $": cost_text(node.cost),
        "seconds": "" if node.seconds is None else f"{node.seconds:.1f}",
    }


def _score_cell(node: Node) -> str:
    if node.score is None:
        return ""
    return f"{node.score:.1f}" if node.standard_error is None else f"{node.score:.1f} ± {node.standard_error:.1f}"


def _difference_cell(node: Node) -> str:
    if node.difference is None:
        return ""
    mean, low, high = node.difference
    return f"{mean:+.1f}" if low is None or high is None else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def run_record(node: Node, depth: int = 0) -> dict[str, Any]:
    """Return a run for a program to read: numbers as numbers, None for what is not known."""
    mean, low, high = node.difference or (None, None, None)
    return {
        "run_id": node.run.info.run_id,
        "name": node.name,
        "depth": depth,
        "kind": node.kind,
        "status": str(node.run.info.status),
        "score": node.score,
        "standard_error": node.standard_error,
        "difference": mean,
        "difference_low": low,
        "difference_high": high,
        "examples": node.done if node.done is not None else node.run.data.metrics.get("examples"),
        "errors": node.errors,
        "traces": node.traces.count,
        "tokens": node.tokens,
        "cost_usd": node.cost,
        "seconds": node.seconds,
    }


def list_table(runs: Sequence[Any]) -> Table:
    """Return a table of runs that a report can be made of, by MLflow's entities."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("run", "name", "status", "begun"):
        table.add_column(name, no_wrap=name != "name")
    for run in runs:
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.info.start_time / 1000))
        status = Text(str(run.info.status), style=_STYLES.get(str(run.info.status), ""))
        table.add_row(
            Text(run.info.run_id), Text(printable(run.info.run_name or "", one_line=True)), status, Text(begun)
        )
    return table


def run_table(node: Node) -> Table:
    """Return a table of a run and the runs below it, a line each."""
    rows = [run_cells(each, depth) for depth, each in node.walk()]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        is_number = name in {"score", "difference", "traces", "errors", "tokens", "cost $", "seconds"}
        table.add_column(name, justify="right" if is_number else "left", no_wrap=name != "run")
    for row in rows:
        table.add_row(
            *(Text(row[name], style=_STYLES.get(row[name], "") if name == "status" else "") for name in columns)
        )
    return table


def failures_of(node: Node) -> list[str]:
    """Say what examples have raised, a sentence for each evaluation that has such."""
    return [
        f"{each.name}: {errors_text(len(each.failures), each.failures[0])}" for _, each in node.walk() if each.failures
    ]


def changes_table(changes: Changes, limit: int) -> Table:
    """Return a table of the examples that differ, most first, with their score in each evaluation."""
    changed = changes.changed
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left", caption_justify="left")
    table.title = Text(summary_of(changes))
    table.add_column("example")
    for node in changes.evaluations:
        score = "" if node.score is None else f" {node.score:.1f}"
        table.add_column(Text(f"{node.name}{score}"), justify="right")
    for row in changed[:limit]:
        said = zip(row.scores, row.errors, row.predictions, strict=True)
        cells = [_cell(score, error, prediction) for score, error, prediction in said]
        table.add_row(Text(shortened(row.example)), *map(Text, cells))
    if len(changed) > limit:
        table.caption = f"… and {len(changed) - limit} more; see --limit"
    return table


def _cell(score: float | None, error: str | None, prediction: Mapping[str, Any]) -> str:
    answer = " ".join((error or shortened(prediction, _MAX_ANSWER)).split())[:_MAX_ANSWER]
    return f"{score_text(score, error)}\n{answer}" if answer else score_text(score, error)


def summary_of(changes: Changes) -> str:
    """Say how many examples differ, in one sentence."""
    parts = [f"{len(changes.changed)} of {len(changes.rows)} examples differ"]
    if changes.partly:
        parts.append(f"{changes.partly} are not in all evaluations")
    return "; ".join(parts)


def score_text(score: float | None, error: str | None) -> str:
    """Return a score as text, marked where the example failed; a dash where the evaluation has it not."""
    if score is None:
        return "-"
    return f"{score:g} (failed)" if error else f"{score:g}"


def shortened(fields: Mapping[str, Any], length: int = MAX_TEXT) -> str:
    """Return the fields of an example as one short line."""
    text = " ".join(", ".join(f"{key}={value}" for key, value in fields.items()).split())
    return text if len(text) <= length else f"{text[: length - 1]}…"
