"""The result of an evaluation, and what ``dspy.Evaluate`` prints and saves of it."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dspy

from dspy_mlflow_async.evaluate.example_result import Outcome
from dspy_mlflow_async.seams.dspy_evaluate import EVALUATE_LOGGER, EvaluationResult, display_table, result_rows

Row = tuple[Any, Any, Any]


class NothingRun(Exception):  # noqa: N818 - not a mistake of anybody's
    """Error of an evaluation whose budget was reached before its first example: it has neither a score nor results."""


class PartialResult(EvaluationResult):
    """The result of an evaluation that a budget has ended early: its score is that of the examples that were run.

    Args:
        score: In percent.
        results: A tuple of example, prediction and score for each example that was run.
        places: The place of each of them in the devset.
    """

    def __init__(self, score: float, results: list[Row], places: list[int]) -> None:
        super().__init__(score=score, results=results)
        self.places = places


def result_of(outcomes: Sequence[Outcome], devset: Sequence[Any], failure_score: float) -> EvaluationResult:
    """Return the score in percent, rounded, and a row per example. Source: ``dspy.Evaluate.__call__``.

    Raises:
        TypeError: For a score that is no number.
    """
    results: list[Row] = [
        (devset[outcome.index], dspy.Prediction(), failure_score)
        if outcome.has_failed
        else (devset[outcome.index], outcome.prediction, outcome.score)
        for outcome in outcomes
    ]
    total, count = sum(score for *_, score in results), len(results)
    percent = 100 * total / count  # in dspy.Evaluate's order, which rounds otherwise
    EVALUATE_LOGGER.info(f"Average Metric: {total} / {count} ({round(percent, 1)}%)")
    if count == len(devset):
        return EvaluationResult(score=round(percent, 2), results=results)
    return PartialResult(round(percent, 2), results, [outcome.index for outcome in outcomes])


def show(evaluator: dspy.Evaluate, results: list[Row], metric: Any, rows: bool | int) -> None:
    """Show the results as a table, all of them or the first ``rows``."""
    if importlib.util.find_spec("pandas") is None:
        EVALUATE_LOGGER.warning("Skipping table display since `pandas` is not installed.")
    else:
        display_table(evaluator, results, metric, rows)


def save_as_csv(path: str, results: list[Row], metric: Any) -> None:
    """Write the results as ``dspy.Evaluate`` does.

    It fails where a later row has a field that the first has not, as after a failed example; here all have a column.
    """
    data, name = result_rows(results, metric)
    columns = dict.fromkeys(key for row in data for key in row if key != name)
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*columns, name])
        writer.writeheader()
        writer.writerows(data)


def save_as_json(path: str, results: list[Row], metric: Any) -> None:
    """Write the results as ``dspy.Evaluate`` does.

    Raises:
        TypeError: For values that JSON has no words for.
    """
    data, _ = result_rows(results, metric)
    with Path(path).open("w", encoding="utf-8") as file:
        json.dump(data, file)
