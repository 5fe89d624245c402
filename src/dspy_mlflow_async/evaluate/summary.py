"""Summary of the cases of an ``evaluate_all``, and their comparison, logged into the parent run."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dspy_mlflow_async.evaluate import statistics, stored_runs
from dspy_mlflow_async.evaluate.case import Case
from dspy_mlflow_async.evaluate.comparison import CaseResult, CaseUsage, Comparison, ExampleCounts, Latency
from dspy_mlflow_async.evaluate.example_result import Outcome, number_of
from dspy_mlflow_async.evaluate.plot import plot_of_cases
from dspy_mlflow_async.runs.artifacts import columns_of
from dspy_mlflow_async.runs.handle import MAX_TAG_LENGTH, RunHandle
from dspy_mlflow_async.runs.results import quantile
from dspy_mlflow_async.runs.usage import cost_of
from dspy_mlflow_async.seams.mlflow_spans import TokenUsageKey
from dspy_mlflow_async.spans.door import Door

logger = logging.getLogger("dspy_mlflow_async")

TABLE, PLOT = "comparison.json", "scores.png"
# What mlflow.utils.validation takes in a metric's name on every system, without "/", which separates case and metric.
_NO_METRIC_CHARACTER = re.compile(r"[^\w\-. ]")
_MAX_METRIC_NAME = 150  # characters; MLflow takes 250, and a number and the metric follow


def case_result(
    case: Case,
    outcomes: Mapping[int, Outcome],
    status: str,
    *,
    failure_score: float = 0.0,
    result: Any = None,
    error: BaseException | None = None,
    run_id: str | None = None,
) -> CaseResult:
    """Sum up a case.

    Args:
        case: The case.
        outcomes: What became of its examples, by place in the devset.
        status: How it ended.
        failure_score: The score of a failed example.
        result: What the evaluator returned, or None.
        error: What it raised, or None.
        run_id: The run of the case, or None.
    """
    scores = [*scores_of(outcomes, failure_score).values()]
    durations = sorted(outcome.duration for outcome in outcomes.values() if outcome.duration is not None)
    tokens = _tokens(outcomes.values())
    score = None if result is None or math.isnan(result.score) else float(result.score)
    return CaseResult(
        case.name,
        status,
        result=result,
        error=error,
        run_id=run_id,
        score=score,
        standard_error=None if score is None else statistics.standard_error(scores),
        scores=scores_of(outcomes, failure_score),
        counts=ExampleCounts(
            len(outcomes),
            sum(outcome.has_failed for outcome in outcomes.values()),
            next((outcomes[place].error for place in sorted(outcomes) if outcomes[place].has_failed), None),
            tuple(place for place in range(len(case.devset or ())) if place not in outcomes),
        ),
        latency=Latency(quantile(durations, 0.5), quantile(durations, 0.95)),
        usage=CaseUsage(
            _sum(tokens, TokenUsageKey.INPUT_TOKENS),
            _sum(tokens, TokenUsageKey.OUTPUT_TOKENS),
            cost_of(tokens) if tokens else None,
        ),
    )


def scores_of(outcomes: Mapping[int, Outcome], failure_score: float) -> dict[int, float]:
    """Return the scores as numbers, by place in the devset."""
    numbers = {
        place: failure_score if outcome.has_failed else number_of(outcome.score) for place, outcome in outcomes.items()
    }
    return {place: float(number) for place, number in numbers.items() if number is not None}


def with_differences(
    cases: Sequence[Case], results: Mapping[str, CaseResult], baseline: str, seed: int, devsets: Mapping[str, str]
) -> list[CaseResult]:
    """Return the results in the order of the cases, each with its difference from the baseline where that makes sense.

    Args:
        cases: The cases.
        results: Their results by name.
        baseline: The name of the case to compare with.
        seed: Of the bootstrap.
        devsets: By case, a text that is the same for equal devsets: examples that hold arrays cannot be compared.
    """
    base = next(case for case in cases if case.name == baseline)
    compared = []
    for case in cases:
        result = results[case.name]
        is_pair = case is not base and devsets[case.name] == devsets[baseline] and _is_same(case.metric, base.metric)
        if is_pair and result.score is not None and results[baseline].score is not None:
            difference = statistics.paired_difference(result.scores, results[baseline].scores, seed=seed)
            result = replace(result, difference=difference)
        compared.append(result)
    return compared


def _is_same(metric: Any, other: Any) -> bool:
    """Return whether two cases have one metric; a method of an object is another object each time it is looked up."""
    if metric is other:
        return True
    try:
        return bool(metric == other)
    except Exception:  # noqa: BLE001 - somebody's own __eq__
        return False


def log(parent: RunHandle, comparison: Comparison, *, is_resumed: bool) -> None:
    """Log the comparison as a table, a score per case, and a plot. The rest of the metrics is in the cases' runs."""
    comparison = _passed(comparison, parent.door)
    parent.table(TABLE, columns_of(comparison.rows()))
    scores = (case.score for case in comparison.cases)
    parent.metrics(dict(zip((f"{name}/score" for name in metric_names(comparison)), scores, strict=True)))
    parent.describe(comparison.to_markdown())
    best = comparison.best
    parent.tags(
        {
            "dspy_mlflow_async.baseline": comparison.baseline,
            "dspy_mlflow_async.best": None if best is None else best.name,
            stored_runs.STOPPED_TAG: stored_runs.stopped_tag(comparison.stopped_by, is_resumed=is_resumed),
            stored_runs.NOT_RUN_TAG: sum(map(len, comparison.not_run.values())),
        }
    )
    try:
        parent.plot(PLOT, lambda: plot_of_cases(comparison.cases, comparison.baseline))
    except ImportError:
        logger.warning("The scores are not plotted: matplotlib is not installed.")


def _passed(comparison: Comparison, door: Door) -> Comparison:
    """Return the comparison with the names of its cases as they may be stored: metrics and the plot show them, too."""
    shown: dict[str, str] = {}
    for case in comparison.cases:
        name, number = door.text(case.name, MAX_TAG_LENGTH), 1
        unique = name
        while unique in shown.values():  # a hook may have taken out what told them apart
            number += 1
            unique = f"{name} {number}"
        shown[case.name] = unique
    cases = tuple(replace(case, name=shown[case.name]) for case in comparison.cases)
    return replace(comparison, cases=cases, baseline=shown[comparison.baseline])


def metric_names(names: Iterable[str]) -> list[str]:
    """Return prefixes for the metrics of cases with these names: readable, different, and valid in MLflow."""
    names = list(names)
    plain = [_plain(name) for name in names]
    # Who can be called as it is keeps its name, wherever it stands.
    taken = {shown.casefold() for shown, name in zip(plain, names, strict=True) if shown == name}
    found = []
    for shown, name in zip(plain, names, strict=True):
        number, free = 1, shown
        while free != name and free.casefold() in taken:
            number += 1
            free = f"{shown} {number}"
        taken.add(free.casefold())
        found.append(free)
    return found


def _plain(name: str) -> str:
    shown = _NO_METRIC_CHARACTER.sub("_", name)[:_MAX_METRIC_NAME]
    return shown if shown.strip(".") else "_" * len(shown)  # not a folder's own name


def _tokens(outcomes: Any) -> dict[str, dict[str, int]]:
    total: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        for tokens in (outcome.program_tokens, outcome.metric_tokens):
            for model, counted in tokens.items():
                total[model].update(counted)
    return {model: dict(counted) for model, counted in total.items()}


def _sum(tokens: Mapping[str, Mapping[str, int]], key: str) -> int | None:
    return sum(counted.get(key, 0) for counted in tokens.values()) if tokens else None
