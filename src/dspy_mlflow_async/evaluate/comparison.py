"""Results of ``evaluate_all``: one per case, and how the cases compare."""

from __future__ import annotations

import io
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dspy_mlflow_async.evaluate.statistics import Difference
from dspy_mlflow_async.printable import counted, printable
from dspy_mlflow_async.runs.description import table as markdown_table
from dspy_mlflow_async.runs.feedback import text_of
from dspy_mlflow_async.seams.installed import needs_whole

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from dspy_mlflow_async.remote.workers import WorkerReport

FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"
_MAX_ERROR = 200  # characters
_WIDTH = 10_000  # columns where nobody looks: a log, a file, a pipe
# What goes first where a terminal is too narrow for all.
_LEAST_WANTED = ("p95 s", "examples", "tokens", "p50 s", "cost $", "not run")


@dataclass(frozen=True, slots=True)
class ExampleCounts:
    """Examples of a case, counted.

    Attributes:
        examples: How many were run, failed ones included.
        errors: How many failed.
        first_error: What the first of these in the devset raised, as text, or None.
        not_run: The places in the devset of those that a budget left out.
    """

    examples: int = 0
    errors: int = 0
    first_error: str | None = None
    not_run: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Latency:
    """Durations of a case's predictions, in seconds, or None.

    Attributes:
        p50: Their median.
        p95: Their 95th percentile.
    """

    p50: float | None = None
    p95: float | None = None


@dataclass(frozen=True, slots=True)
class CaseUsage:
    """Tokens and cost of a case, of program and metric together.

    Attributes:
        input_tokens: None where no provider reported any.
        output_tokens: The same.
        cost_usd: In US dollars, or None where a price is not known.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None


@dataclass(frozen=True, slots=True)
class CaseResult:
    """Result of one case.

    Attributes:
        name: Its name.
        status: ``finished``, ``failed``, or ``stopped`` where a budget left examples out.
        result: What ``AsyncEvaluate`` returned, or None for a failed case, and for one of which nothing was run.
        error: What a failed case raised, or None.
        run_id: MLflow's id of its run, or None where the store did not create one.
        score: In percent, or None.
        standard_error: Of the score, in percentage points, or None.
        scores: The scores as numbers, not in percent, by place in the devset.
        difference: From the baseline; None for the baseline itself, and where devset or metric differ.
        counts: How many examples were run, failed and were left out.
        latency: How long predictions took.
        usage: What they used.
    """

    name: str
    status: str
    result: Any = None
    error: BaseException | None = None
    run_id: str | None = None
    score: float | None = None
    standard_error: float | None = None
    scores: Mapping[int, float] = field(default_factory=dict, repr=False)
    difference: Difference | None = None
    counts: ExampleCounts = ExampleCounts()
    latency: Latency = Latency()
    usage: CaseUsage = CaseUsage()

    @property
    def examples(self) -> int:
        """Number of examples that were run, failed ones included."""
        return self.counts.examples

    @property
    def errors(self) -> int:
        """Number of examples that failed."""
        return self.counts.errors

    @property
    def first_error(self) -> str | None:
        """Error that the first of these in the devset raised, as text, or None."""
        return self.counts.first_error

    @property
    def not_run(self) -> tuple[int, ...]:
        """Places in the devset of those that a budget left out."""
        return self.counts.not_run

    @property
    def latency_p50(self) -> float | None:
        """Median duration of a prediction, in seconds, or None."""
        return self.latency.p50

    @property
    def latency_p95(self) -> float | None:
        """95th percentile of it."""
        return self.latency.p95

    @property
    def input_tokens(self) -> int | None:
        """Tokens of program and metric together, or None where no provider reported any."""
        return self.usage.input_tokens

    @property
    def output_tokens(self) -> int | None:
        """The same of what the LMs have returned."""
        return self.usage.output_tokens

    @property
    def cost_usd(self) -> float | None:
        """Cost in US dollars, or None where a price is not known."""
        return self.usage.cost_usd

    def row(self) -> dict[str, Any]:
        """Return its row of the comparison, by column."""
        difference = self.difference
        return {
            "case": self.name,
            "status": self.status,
            "score": self.score,
            "standard_error": self.standard_error,
            "difference": difference and difference.mean,
            "difference_low": difference and difference.low,
            "difference_high": difference and difference.high,
            "examples": self.examples,
            "errors": self.errors,
            "not_run": len(self.not_run),
            "latency_p50_seconds": self.latency_p50,
            "latency_p95_seconds": self.latency_p95,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cost_usd": self.cost_usd,
            "run_id": self.run_id,
            "error": None if self.error is None else f"{type(self.error).__name__}: {text_of(self.error)}",
            "first_error": self.first_error,
        }


@dataclass(frozen=True, slots=True)
class Comparison(Mapping[str, CaseResult]):
    """The results of ``evaluate_all`` by name of the case; ``print`` and notebooks show how they compare.

    Attributes:
        cases: A result per case, in the order in which they were given.
        baseline: The name of the case that the others are compared with.
        run_id: MLflow's id of the parent run, or None where the store did not create one.
        stopped_by: Which budget was reached, in words, or None.
        unpriced: The models that ``max_cost`` could not count, since MLflow does not know their price.
        workers: The processes that have evaluated the examples, with their books; empty where this one has.
    """

    cases: tuple[CaseResult, ...]
    baseline: str
    run_id: str | None = None
    stopped_by: str | None = None
    unpriced: tuple[str, ...] = ()
    workers: tuple[WorkerReport, ...] = ()

    def __getitem__(self, name: str) -> CaseResult:
        for case in self.cases:
            if case.name == name:
                return case
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter([case.name for case in self.cases])

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def best(self) -> CaseResult | None:
        """The case with the highest score, the first of equals; None where none has one.

        One that a budget has stopped is not the best by the examples that it got to, unless it is so with all.
        """
        scored = [case for case in self.cases if case.score is not None]
        scored = [case for case in scored if case.status != STOPPED] or scored
        return max(scored, key=lambda case: case.score or 0.0, default=None)

    @property
    def not_run(self) -> dict[str, tuple[int, ...]]:
        """The places in the devset of the examples that a budget left out, for the cases that have some."""
        return {case.name: case.not_run for case in self.cases if case.not_run}

    def rows(self) -> list[dict[str, Any]]:
        """Return the comparison, a row per case."""
        return [case.row() for case in self.cases]

    def to_pandas(self) -> pd.DataFrame:
        """Return the comparison as a table, a row per case, indexed by its name."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(needs_whole("Comparison.to_pandas")) from error
        return pd.DataFrame(self.rows()).set_index("case")

    def to_markdown(self) -> str:
        """Return the comparison as a table in Markdown, for the description of its run, or a pull request."""
        columns = _columns(self.cases)
        table = markdown_table(list(columns), zip(*columns.values(), strict=True), numbers=True)
        return "\n\n".join([table, *self._notes()])

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        width = shutil.get_terminal_size().columns if _is_terminal() else _WIDTH
        console = Console(file=text, width=width, color_system=None)
        console.print(self._table(width))
        for note in self._notes():
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())

    def _repr_html_(self) -> str:
        """Return the comparison as HTML, for notebooks."""
        from html import escape

        columns = _columns(self.cases)
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        best = self.best
        body = ""
        for place, case in enumerate(self.cases):
            cells = "".join(f"<td>{escape(column[place])}</td>" for column in columns.values())
            style = ' style="font-weight:bold"' if case is best else ""
            body += f"<tr{style}>{cells}</tr>"
        notes = "".join(f"<p>{escape(note)}</p>" for note in self._notes())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"

    def _table(self, width: int) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table, columns = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False), _columns(self.cases)
        for name in _LEAST_WANTED:
            if _width_of(columns) > width:
                columns.pop(name, None)
        for name in columns:
            is_name = name == "case"
            table.add_column(name, justify="left" if is_name else "right", no_wrap=True, overflow="ellipsis")
        for cells in zip(*columns.values(), strict=True):
            table.add_row(*map(Text, cells))
        return table

    def _notes(self) -> list[str]:
        notes = []
        best = self.best
        if best is not None and len(self.cases) > 1:
            notes.append(f"Best: {best.name}, {best.score:.1f}.")
            if any(case.difference for case in self.cases):
                notes.append(f"Differences are from {self.baseline}, with 95% intervals.")
        if self.stopped_by is not None:
            left_out = sum(map(len, self.not_run.values()))
            notes.append(f"Stopped by {self.stopped_by}; {counted(left_out, 'example was', 'examples were')} not run.")
        if self.unpriced:
            notes.append(f"MLflow knows no price for {', '.join(self.unpriced)}: max_cost has not counted that.")
        for case in self.cases:
            if case.error is not None:
                notes.append(f"{case.name} failed: {case.row()['error']}")
            if case.first_error is not None:
                all_failed = case.errors == case.examples > 1
                said = f"all {errors_text(case.errors, case.first_error)}" if all_failed else None
                notes.append(f"{case.name}: {said or errors_text(case.errors, case.first_error)}")
        if self.run_id is not None:
            notes.append(f"Run: {self.run_id}")
            if self.stopped_by is not None:
                notes.append(f'Go on with evaluate_all(..., resume="{self.run_id}").')
        return [printable(note, one_line=True) for note in notes]


def _columns(cases: Sequence[CaseResult]) -> dict[str, list[str]]:
    """Return the cells of the table; columns that say nothing are left out."""
    columns = {
        "case": [printable(case.name, one_line=True) for case in cases],
        "score": [_score(case) for case in cases],
        "difference": [_difference(case.difference) for case in cases],
        "examples": [str(case.examples) for case in cases],
        "errors": [str(case.errors) if case.errors else "" for case in cases],
        "not run": [str(len(case.not_run)) if case.not_run else "" for case in cases],
        "p50 s": [_number(case.latency_p50, ".2f") for case in cases],
        "p95 s": [_number(case.latency_p95, ".2f") for case in cases],
        "tokens": [_tokens(case) for case in cases],
        "cost $": [cost_text(case.cost_usd) for case in cases],
    }
    return {name: cells for name, cells in columns.items() if any(cells)}


def _is_terminal() -> bool:
    try:
        return sys.stdout.isatty()
    except (AttributeError, ValueError):  # none, or closed
        return False


def _width_of(columns: Mapping[str, list[str]]) -> int:
    """Return how many columns of a terminal the table takes: three blanks between two of them."""
    return sum(max(map(cell_width, [name, *cells])) for name, cells in columns.items()) + 3 * (len(columns) - 1)


def cell_width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    from rich.cells import cell_len

    return cell_len(text)


def _score(case: CaseResult) -> str:
    if case.score is None:
        return case.status if case.status == FAILED else "-"
    error = "" if case.standard_error is None else f" ± {case.standard_error:.1f}"
    return f"{case.score:.1f}{error}"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.1f}"
    return f"{difference.mean:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"


def cost_text(cost: float | None) -> str:
    """Format US dollars with four digits after the point, and more where two of them would else not be seen."""
    if cost is None:
        return ""
    digits = 4 if not 0 < cost < 0.001 else 1 - math.floor(math.log10(cost))  # noqa: PLR2004 - 0.0010 has two
    return f"{cost:.{digits}f}"


def errors_text(count: int, first: str) -> str:
    """Say how many examples failed and what the first raised, in a sentence."""
    said = " ".join(first.split())
    said = said if len(said) <= _MAX_ERROR else f"{said[: _MAX_ERROR - 1]}…"
    return f"One example failed: {said}" if count == 1 else f"{count} examples failed, the first with {said}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _tokens(case: CaseResult) -> str:
    if case.input_tokens is None and case.output_tokens is None:
        return ""
    return f"{(case.input_tokens or 0) + (case.output_tokens or 0):,}"
