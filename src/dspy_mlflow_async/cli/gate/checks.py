"""Bounds that an evaluation must keep, and what a look at them comes to."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dspy_mlflow_async.evaluate.comparison import cost_text
from dspy_mlflow_async.evaluate.statistics import Difference, standard_error

MIN, MAX = "min", "max"
HELD, FAILED, UNKNOWN = "ok", "FAILED", "ERROR"
PERCENT = ("score", "errors", "failures")  # what may be bounded in percent
_SIGNS = {MIN: "≥", MAX: "≤"}
_LARGE = 1000  # without digits after the point
_NEARLY = 1e-9  # 0.8 as a mean of scores is not always 0.8
_MAX_NAMES = 30  # that a sentence lists
_WHY_NO_COST = (
    "the cost is not known: MLflow has no price for the model, or the provider reported no tokens; bound tokens instead"
)


@dataclass(frozen=True, slots=True)
class Bound:
    """Bound on one metric.

    Attributes:
        name: The metric.
        kind: ``min`` or ``max``.
        value: The least or the most that it may be.
        is_percent: Whether ``value`` is in percent: of the metric's 1, or of all examples.
    """

    name: str
    kind: str
    value: float
    is_percent: bool = False

    @classmethod
    def of(cls, name: str, kind: str, value: Any) -> Bound:
        """Return the bound that a person has written.

        Args:
            name: The metric.
            kind: ``min`` or ``max``.
            value: A number, or a text such as ``0.8`` or ``80%``.

        Raises:
            ValueError: For what is no number, or is in percent where nothing is.
        """
        if not name:
            raise ValueError(f"{kind} needs the name of a metric: score=0.8")
        number, is_percent = read_number(value, f"{kind} {name}")
        if is_percent and name not in PERCENT:
            raise ValueError(f"{kind} {name}: only {', '.join(PERCENT)} may be in percent, not {value!r}")
        return cls(name, kind, number, is_percent)

    @property
    def text(self) -> str:
        """It as a person reads it, such as ``≥ 0.8``."""
        return f"{_SIGNS[self.kind]} {_shown(self.name, self.value, self.is_percent)}"

    def holds(self, value: float) -> bool:
        """Return whether a value keeps it."""
        nearly = _NEARLY * max(1.0, abs(self.value))
        return value >= self.value - nearly if self.kind == MIN else value <= self.value + nearly


def read_number(value: Any, what: str) -> tuple[float, bool]:
    """Return a number, and whether it is in percent.

    Raises:
        ValueError: For anything else; ``what`` begins the sentence.
    """
    text = str(value).strip()
    try:
        number = math.nan if isinstance(value, bool) else float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a number, such as 0.8 or 80%, not {value!r}")
    return number, text.endswith("%")


@dataclass(frozen=True, slots=True)
class Subject:
    """One evaluation, or another run, that bounds are put to.

    Attributes:
        name: Its name, with its parent's where it is a case.
        values: What it may be bounded by, by name.
        run_id: MLflow's id of its run, or None.
        scores: The scores of its examples, as the metric gave them.
        durations: How long its predictions took, in seconds, in order of length.
        unfinished: Why it is not whole, in words; empty where it is.
        is_running: Whether it is still at work.
    """

    name: str
    values: Mapping[str, float]
    run_id: str | None = None
    scores: tuple[float, ...] = ()
    durations: tuple[float, ...] = ()
    unfinished: str = ""
    is_running: bool = False

    def value(self, name: str) -> float | None:
        """Return the value of a metric, or None where there is none."""
        if name in self.values:
            return self.values[name]
        quantile = name.removeprefix("latency_p")
        if quantile != name and quantile.isdigit() and 0 < int(quantile) < 100 and self.durations:  # noqa: PLR2004
            from dspy_mlflow_async.runs.results import quantile as quantile_of

            return quantile_of(self.durations, int(quantile) / 100)
        return None

    def why_missing(self, name: str) -> str:
        """Say why there is no value of a metric, and what to do."""
        if name in {"cost", "cost_usd"}:
            return f"{self.name}: {_WHY_NO_COST}"
        names = sorted(self.values)
        close = difflib.get_close_matches(name, names, 1)
        guess = f"; did you mean {close[0]}?" if close else "."
        listed = ", ".join(names[:_MAX_NAMES]) + (", …" if len(names) > _MAX_NAMES else "")
        return f"{self.name} has no metric {name}{guess} It has: {listed or 'none'}"


@dataclass(frozen=True, slots=True)
class Check:
    """One bound, put to one evaluation.

    Attributes:
        subject: The name of the evaluation.
        name: What is bounded.
        wanted: The bound, in words.
        found: What the evaluation has, in words.
        verdict: ``ok``, ``FAILED``, or ``ERROR`` where it cannot be told.
        reason: Why, and what to do, in a sentence; empty where it holds.
    """

    subject: str
    name: str
    wanted: str
    found: str
    verdict: str = HELD
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Another evaluation, and how one differs from it.

    Attributes:
        subject: The other.
        difference: Of the scores on the examples that both have; None where they have none in common.
        only_here: How many examples the other has not.
        only_there: How many examples only the other has.
        problem: Why the two cannot be compared, in a sentence; empty where they can.
    """

    subject: Subject
    difference: Difference | None = None
    only_here: int = 0
    only_there: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules that evaluations must keep.

    Attributes:
        bounds: What their metrics may be.
        tolerance: By how many percentage points a score may fall below the baseline's.
        is_certain: Whether noise must not leave open that it falls further.
        allow_unfinished: Whether an evaluation that has not ended, or that a budget has stopped, is judged as it is.
    """

    bounds: tuple[Bound, ...] = ()
    tolerance: float = 0.0
    is_certain: bool = False
    allow_unfinished: bool = False

    @classmethod
    def of(
        cls,
        minima: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        maxima: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        tolerance: Any = 0,
        *,
        is_certain: bool = False,
        allow_unfinished: bool = False,
    ) -> Rules:
        """Return the rules that a person has written.

        Args:
            minima: The least value by name of the metric.
            maxima: The most.
            tolerance: By how much a score may fall below the baseline's, in the metric's own scale or in percent.
            is_certain: Whether noise must not leave open that it falls further.
            allow_unfinished: Whether an evaluation that has not ended is judged as it is.

        Raises:
            ValueError: For what is no number.
        """
        given = ((kind, pair) for kind, pairs in ((MIN, minima), (MAX, maxima)) for pair in _pairs(pairs))
        bounds = [Bound.of(name, kind, value) for kind, (name, value) in given]
        number, is_percent = read_number(tolerance, "tolerance")
        if number < 0:
            raise ValueError(f"tolerance must be 0 or more, not {tolerance!r}")
        return cls(tuple(bounds), number if is_percent else 100 * number, is_certain, allow_unfinished)

    def judge(self, subject: Subject, baseline: Baseline | None = None) -> list[Check]:
        """Put all bounds to an evaluation, and compare it with a baseline where there is one."""
        checks = []
        if subject.unfinished and not self.allow_unfinished:
            checks.append(_unfinished(subject))
            if subject.is_running:
                return checks
        checks += [_bounded(subject, bound) for bound in self.bounds]
        if baseline is not None:
            checks.append(self._not_worse(subject, baseline))
        return checks

    def _not_worse(self, subject: Subject, baseline: Baseline) -> Check:
        other, difference = baseline.subject, baseline.difference
        wanted = f"not worse than {other.name}"
        if self.tolerance:
            wanted += f" by more than {self.tolerance:g} points"
        if baseline.problem or difference is None:
            problem = baseline.problem or f"{subject.name} and {other.name} have no example in common"
            return Check(subject.name, "score", wanted, "-", UNKNOWN, problem)
        low, high = (difference.mean if end is None else end for end in (difference.low, difference.high))
        found = f"{difference.mean:+.1f} points"
        if difference.low is not None:
            found += f" [{low:+.1f}, {high:+.1f}]"
        found += f" on {difference.pairs} examples"
        if baseline.only_here or baseline.only_there:
            found += f" ({baseline.only_here} only here, {baseline.only_there} only there)"
        if high < -self.tolerance - _NEARLY:
            reason = f"{subject.name} is worse than {other.name}, and by more than chance explains"
        elif self.is_certain and low < -self.tolerance - _NEARLY:
            reason = f"{subject.name} may be worse than {other.name}: so few examples cannot tell"
        else:
            return Check(subject.name, "score", wanted, found)
        return Check(subject.name, "score", wanted, found, FAILED, reason)


def _pairs(pairs: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    return pairs.items() if isinstance(pairs, Mapping) else pairs


def _unfinished(subject: Subject) -> Check:
    if subject.is_running:
        reason = f"{subject.name} is {subject.unfinished}: ask again when it is over, or give --allow-unfinished"
        return Check(subject.name, "status", "finished", subject.unfinished, UNKNOWN, reason)
    reason = f"{subject.name} was not finished: {subject.unfinished}"
    return Check(subject.name, "status", "finished", subject.unfinished, FAILED, reason)


def _bounded(subject: Subject, bound: Bound) -> Check:
    value = subject.value(bound.name)
    if value is not None and bound.is_percent:
        whole = 1.0 if bound.name == "score" else subject.value("examples")
        value = 100 * value / whole if whole else None
    if value is None:
        return Check(subject.name, bound.name, bound.text, "-", UNKNOWN, subject.why_missing(bound.name))
    found = _shown(bound.name, value, bound.is_percent)
    if bound.name == "score" and (error := standard_error(subject.scores)) is not None:
        found += f" ± {_shown(bound.name, error if bound.is_percent else error / 100, bound.is_percent)}"
    if bound.holds(value):
        return Check(subject.name, bound.name, bound.text, found)
    reason = f"{subject.name}: {bound.name} is {found}, and must be {bound.text}"
    if bound.name == "score" and not bound.is_percent and bound.value > 1 >= max(subject.scores, default=2):
        reason += f". That is the metric's own scale; in percent it is {bound.name}={bound.value:g}%"
    return Check(subject.name, bound.name, bound.text, found, FAILED, reason)


def _shown(name: str, value: float, is_percent: bool) -> str:
    if name in {"cost", "cost_usd"}:
        return f"{cost_text(value)} $"
    text = f"{value:,.0f}" if value == round(value) or abs(value) >= _LARGE else f"{value:.4g}"
    return f"{text}{'%' if is_percent else ' s' if name.startswith(('seconds', 'latency_')) else ''}"
