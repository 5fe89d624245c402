"""Evaluations of one test: each is shown where the test fails, and judged where the test is marked."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import mlflow
import pytest

from dspy_mlflow_async import aevaluate_all, evaluate_all, flush
from dspy_mlflow_async.cli.gate import choosing, showing
from dspy_mlflow_async.cli.gate.checks import HELD, Check, Rules, Subject
from dspy_mlflow_async.cli.report import comparing, text
from dspy_mlflow_async.cli.report.reading import Node
from dspy_mlflow_async.evaluate.case import Case
from dspy_mlflow_async.evaluate.comparison import FAILED, CaseResult, Comparison
from dspy_mlflow_async.evaluate.example_result import number_of
from dspy_mlflow_async.printable import printable
from dspy_mlflow_async.reachability import look
from dspy_mlflow_async.workers import call_with_timeout

_MOST = 5  # examples of a case that are shown
_SECONDS = 60.0  # for the store, when a test is judged against a run in it
_WIDTH = 160  # columns of a report


def rules_of(positional: Sequence[Any], options: Mapping[str, Any]) -> tuple[Rules, str | None]:
    """Return the rules of a mark, and what the evaluations are compared with.

    Raises:
        TypeError: For arguments that it does not take.
        ValueError: For values that it does not take.
    """
    if positional:
        raise TypeError(f"it takes names, such as min={{'score': 0.8}}, not {positional[0]!r}")
    return _rules(**options)


def _rules(
    min: Mapping[str, Any] | None = None,  # noqa: A002 - as on the command line
    max: Mapping[str, Any] | None = None,  # noqa: A002
    not_worse_than: str | None = None,
    tolerance: Any = 0,
    certain: bool = False,
) -> tuple[Rules, str | None]:
    for name, bounds in (("min", min), ("max", max)):
        if bounds is not None and not isinstance(bounds, Mapping):
            raise TypeError(f"{name} must be a mapping of metrics to numbers, such as {{'score': 0.8}}, not {bounds!r}")
    if not_worse_than is not None and not isinstance(not_worse_than, str):
        raise TypeError(f"not_worse_than must be a run's id or name, not {not_worse_than!r}")
    return Rules.of(min or {}, max or {}, tolerance, is_certain=certain), not_worse_than


class Evaluations:
    """Evaluations of one test.

    Args:
        item: The test.
        rules: What must hold, or None.
        baseline: What the evaluations are compared with, or None.

    Attributes:
        comparisons: What has been evaluated, in order.
    """

    def __init__(self, item: pytest.Item, rules: Rules | None, baseline: str | None) -> None:
        self.comparisons: list[Comparison] = []
        self._item = item
        self._rules = rules
        self._baseline = baseline

    def __call__(self, programs: Any, **options: Any) -> Any:
        """Evaluate a program, or several by name or as a list of ``Case``, as ``evaluate_all`` does.

        Args:
            programs: A program, a mapping of name to program, or a list of ``Case``.
            options: Those of ``evaluate_all``; ``run_name`` is by default the test's id, and no progress is shown.

        Returns:
            The ``CaseResult`` of a single program; the ``Comparison`` of several.
        """
        found = evaluate_all(_named(programs), **self._options(options))
        return self._noted(found, programs)

    async def acall(self, programs: Any, **options: Any) -> Any:
        """Do the same in an async test."""
        found = await aevaluate_all(_named(programs), **self._options(options))
        return self._noted(found, programs)

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"run_name": self._item.nodeid, "display_progress": False, **options}

    def _noted(self, found: Comparison, programs: Any) -> Any:
        self.comparisons.append(found)
        self._item.add_report_section("call", "evaluation", shown(found))
        for case in found.cases:
            for name in ("score", "cost_usd", "errors", "run_id"):
                if (value := getattr(case, name)) is not None:
                    self._item.user_properties.append((f"evaluation.{printable(case.name)}.{name}", value))
        if failed := [case for case in found.cases if case.status == FAILED]:
            pytest.fail("; ".join(f"{case.name} failed: {case.row()['error']}" for case in failed), pytrace=False)
        return found if _are_several(programs) else found.cases[0]

    def judge(self) -> str:
        """Say what does not hold; empty where all does."""
        if not self.comparisons:
            return "nothing was judged: the test has evaluated nothing"
        if self._rules is None:
            return ""
        checks, changes = list[Check](), list[str]()
        for found in self.comparisons:
            if self._baseline is None:
                for case in found.cases:
                    checks += self._rules.judge(subject_of(case))
            else:
                judged, changed = self._against_baseline(found, self._baseline)
                checks += judged
                changes += changed
        if all(check.verdict == HELD for check in checks):
            return ""
        return "\n".join(
            ["a bound does not hold", "", _plain(showing.table(checks)), *showing.reasons(checks), *changes]
        )

    def _against_baseline(self, found: Comparison, name: str) -> tuple[list[Check], list[str]]:
        """Judge the stored runs, since the examples of the baseline are there alone."""
        rules, changes = self._rules, list[str]()
        if rules is None:
            return [], []
        try:
            checks, pairs = call_with_timeout(lambda: _stored(found, rules, name), _SECONDS)
        except Exception as error:  # noqa: BLE001 - a store fails in many ways, and the test says which
            return [showing.unknown(found.baseline, f"not worse than {name}", str(error))], []
        if any(check.verdict != HELD for check in checks):
            for pair in pairs:
                changes += ["", _plain(text.changes_table(comparing.compare(pair), _MOST))]
        return checks, changes


def _stored(found: Comparison, rules: Rules, name: str) -> tuple[list[Check], list[list[Node]]]:
    """Judge a comparison by what the store has of it.

    Returns:
        The checks, and the pairs of runs that were compared.

    Raises:
        ConnectionError: Where the store does not answer.
        ValueError: Where it has not got the run, or has no other one to compare it with.
    """
    if problem := look(mlflow.get_tracking_uri()).problem:
        raise ConnectionError(problem)
    if found.run_id is None or not flush(_SECONDS / 2):
        raise ConnectionError("the store has not taken the evaluation, so it cannot be compared there")
    runs = choosing.Runs()
    node = runs.find(found.run_id)
    other = runs.baseline(name, node)
    return choosing.judge(node, rules, baseline=other), choosing.compared(node, other)


def subject_of(case: CaseResult) -> Subject:
    """Return what bounds can be put to, of a case in memory."""
    scores = tuple(case.scores.values())
    tokens = None if case.input_tokens is None else case.input_tokens + (case.output_tokens or 0)
    values = {
        "score": sum(scores) / len(scores) if scores else None,
        "cost": case.cost_usd,
        "tokens": tokens,
        "input_tokens": case.input_tokens,
        "output_tokens": case.output_tokens,
        "errors": case.errors,
        "failures": case.errors,
        "examples": case.examples,
        "latency_p50": case.latency_p50,
        "latency_p95": case.latency_p95,
    }
    known = {name: float(value) for name, value in values.items() if value is not None}
    unfinished = f"{len(case.not_run)} not run" if case.not_run else ""
    return Subject(case.name, known, case.run_id, scores, unfinished=unfinished)


def _are_several(programs: Any) -> bool:
    return isinstance(programs, (Mapping, list, tuple))


def _named(programs: Any) -> Any:
    if _are_several(programs):
        return programs
    return [Case(getattr(programs, "__name__", type(programs).__name__), programs)]


def shown(found: Comparison) -> str:
    """Return a comparison as a text, with the worst examples of each case below it."""
    parts = [str(found)]
    for case in found.cases:
        if worst := _worst(case):
            parts += ["", f"{case.name}, the worst examples:", _plain(worst)]
    return "\n".join(parts)


def _worst(case: CaseResult) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    rows = [
        (example, prediction, number_of(score)) for example, prediction, score in getattr(case.result, "results", ())
    ]
    scored = sorted((row for row in rows if row[2] is not None), key=lambda row: row[2] or 0.0)
    if not scored or (scored[0][2] or 0.0) == (scored[-1][2] or 0.0) >= 1:
        return None
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("example", "answer", "score"):
        table.add_column(name)
    for example, prediction, score in scored[:_MOST]:
        cells = text.shortened(dict(example.items())), text.shortened(dict(prediction.items())), f"{score:g}"
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _plain(table: Any) -> str:
    """Return a table of rich's as plain text."""
    from dspy_mlflow_async.cli.console import make_console

    written = io.StringIO()
    console = make_console(written)
    console.width = _WIDTH
    console.print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())
