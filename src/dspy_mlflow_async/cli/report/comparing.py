"""Comparison of evaluations, example by example."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dspy_mlflow_async.cli.report import reading
from dspy_mlflow_async.cli.report.reading import EVALUATION, Node
from dspy_mlflow_async.cli.report.scores import number_of

_ALIKE = 1e-12


@dataclass(frozen=True, slots=True)
class Row:
    """One example in several evaluations.

    Attributes:
        example: Its fields.
        scores: Its score in each evaluation as a number, or None where that has none.
        predictions: The fields that each predicted; empty for a failed or missing example.
        errors: What each raised, or None.
    """

    example: dict[str, Any]
    scores: tuple[float | None, ...]
    predictions: tuple[dict[str, Any], ...]
    errors: tuple[str | None, ...]

    @property
    def has_changed(self) -> bool:
        """True if the evaluations that have it disagree on its score, or on whether it fails."""
        scores = [score for score in self.scores if score is not None]
        failures = {
            error is not None for error, score in zip(self.errors, self.scores, strict=True) if score is not None
        }
        return len(failures) > 1 or (bool(scores) and max(scores) - min(scores) > _ALIKE)

    @property
    def spread(self) -> float:
        """Distance between the lowest and the highest score."""
        scores = [score for score in self.scores if score is not None]
        return max(scores) - min(scores) if scores else 0.0


@dataclass(frozen=True, slots=True)
class Changes:
    """Several evaluations side by side.

    Attributes:
        evaluations: What is compared.
        rows: A row per example, in the order of the first evaluation that has it.
    """

    evaluations: tuple[Node, ...]
    rows: tuple[Row, ...]

    @property
    def changed(self) -> list[Row]:
        """Examples that differ, those that differ most first."""
        return sorted((row for row in self.rows if row.has_changed), key=lambda row: -row.spread)

    @property
    def partly(self) -> int:
        """Number of examples that only some of the evaluations have."""
        return sum(None in row.scores for row in self.rows)


def compare(nodes: Sequence[Node]) -> Changes:
    """Compare all evaluations at or below these runs.

    Raises:
        ValueError: For fewer than two evaluations with a result table.
    """
    evaluations, tables = [], []
    for node in nodes:
        for _, each in node.walk():
            if each.kind == EVALUATION and (table := reading.result_table(each.run)):
                evaluations.append(each)
                tables.append(_by_example(table))
    if len(evaluations) < 2:  # noqa: PLR2004 - one is not to be compared
        raise ValueError(
            f"there must be two evaluations with a result table to compare, and there are {len(evaluations)}"
        )
    keys = dict.fromkeys(key for table in tables for key in table)
    return Changes(tuple(evaluations), tuple(_row([table.get(key) for table in tables]) for key in keys))


def _by_example(table: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the rows by example; the n-th of equal ones is another than the first."""
    seen: dict[str, int] = defaultdict(int)
    found = {}
    for row in table:
        text = json.dumps(_fields(row, "example_"), sort_keys=True)
        found[text, seen[text]] = row
        seen[text] += 1
    return found


def _row(rows: Sequence[dict[str, Any] | None]) -> Row:
    known = [row or {} for row in rows]
    return Row(
        _fields(next(row for row in known if row), "example_"),
        tuple(number_of(row.get("score")) for row in known),
        tuple(_fields(row, "pred_") for row in known),
        tuple(row.get("error") for row in known),
    )


def _fields(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {
        key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix) and value is not None
    }
