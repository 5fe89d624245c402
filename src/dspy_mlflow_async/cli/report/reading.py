"""Tree of a run and the runs below it, read from MLflow's store."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dspy_mlflow_async.cli.report.scores import number_of
from dspy_mlflow_async.evaluate import journal, stored_runs
from dspy_mlflow_async.evaluate.statistics import standard_error
from dspy_mlflow_async.runs.usage import cost_of
from dspy_mlflow_async.seams import mlflow_artifact_reads
from dspy_mlflow_async.spans.door import MAX_DOCUMENT_BYTES, Door
from dspy_mlflow_async.spans.secret_texts import mask

EVALUATE_ALL, COMPILE, EVALUATION, RUN = "evaluate_all", "compile", "evaluation", "run"
_BEST_SCORE = "dspy.best_score."
_TRACES_PER_PAGE = 500


@dataclass(frozen=True, slots=True)
class Traces:
    """The traces of one run.

    Attributes:
        count: How many there are.
        errors: How many ended with an error.
        tokens: Input and output tokens together, or None where none has any.
    """

    count: int = 0
    errors: int = 0
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """A run, and the runs below it.

    Attributes:
        run: MLflow's run.
        kind: ``evaluate_all``, ``compile``, ``evaluation`` or ``run``.
        children: The runs directly below it, oldest first.
        traces: Its own traces, without its children's.
        score: In percent, or None.
        failures: What examples of an evaluation have raised, in devset order.
        series: What its spark line shows: a compile's scores by step, an evaluation's in devset order, the children's.
        done: How many examples of an evaluation that was not finished have ended; None for any other.
        unfinished_tokens: What those have used.
        unfinished_cost: The same in US dollars, where the prices are known.
        standard_error: Of the score, in percentage points.
        difference: From the baseline of its ``evaluate_all``, with its interval.
    """

    run: Any
    kind: str
    children: tuple[Node, ...] = ()
    traces: Traces = field(default_factory=Traces)
    score: float | None = None
    series: tuple[float, ...] = ()
    failures: tuple[str, ...] = ()
    done: int | None = None
    unfinished_tokens: int | None = None
    unfinished_cost: float | None = None
    standard_error: float | None = None
    difference: tuple[float, float | None, float | None] | None = None

    @property
    def name(self) -> str:
        """MLflow's name of the run."""
        return mask(str(self.run.info.run_name or self.run.info.run_id))

    @property
    def seconds(self) -> float | None:
        """Duration in seconds, or None while it is running."""
        info = self.run.info
        return None if not info.end_time else (info.end_time - info.start_time) / 1000

    @property
    def errors(self) -> int:
        """Number of failed examples of an evaluation, and of traces with an error of any other run."""
        counted = self.run.data.metrics.get("errors")
        return int(counted) if counted is not None else len(self.failures) or self.traces.errors

    @property
    def stopped(self) -> str:
        """Budget that has stopped it, and how many examples that left out, in words; empty where none has."""
        tags = self.run.data.tags
        budget = tags.get(stored_runs.STOPPED_TAG, "").partition(":")[0]
        return f"{budget}, {tags.get(stored_runs.NOT_RUN_TAG, '?')} not run" if budget else ""

    @property
    def tokens(self) -> int | None:
        """Number of tokens, as counted by the evaluation or the compile, else by its traces."""
        data = self.run.data
        counted = [data.metrics[key] for key in ("input_tokens", "output_tokens") if key in data.metrics]
        if counted:
            return int(sum(counted))
        return self.traces.tokens if self.unfinished_tokens is None else self.unfinished_tokens

    @property
    def cost(self) -> float | None:
        """Cost in US dollars, or None where it is not known."""
        value = self.run.data.metrics.get("cost_usd")
        return self.unfinished_cost if value is None else float(value)

    @property
    def progress(self) -> str:
        """Progress of an evaluation that was not finished, as ``7 of 30 done``; empty for any other."""
        if self.done is None:
            return ""
        return f"{self.done} of {self.run.data.tags.get('dspy.devset_size', '?')} done"

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Node]]:
        """Yield this node and all below it, each with its depth, parents first."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)


def read(run_id: str) -> Node:
    """Read a run and all below it.

    Raises:
        ValueError: Where there is no such run.
    """
    return node_of(stored_runs.find_run(run_id))


def result_table(run: Any) -> list[dict[str, Any]]:
    """Return the rows of an evaluation's result table; empty where it has none."""
    content = mlflow_artifact_reads.read(run, "result_table.json")
    if content is None:
        return []
    table = json.loads(content)
    plain = Door().plain(MAX_DOCUMENT_BYTES)  # the table may be somebody else's
    return [dict(zip(table["columns"], plain(row), strict=True)) for row in table["data"]]


def node_of(run: Any, *, count_traces: bool = True) -> Node:
    """Read a run of MLflow's and all below it.

    Args:
        run: The run.
        count_traces: Whether the traces of evaluations are counted: there may be ten thousand, and a page has 500.
    """
    children = [node_of(child, count_traces=count_traces) for child in stored_runs.children(run)]
    kind = _kind(run)
    if kind == EVALUATE_ALL:
        children = _in_order(run, children)
    rows = result_table(run) if kind == EVALUATION else []
    failures = tuple(_failures(run, kind, rows))
    series = tuple(_series(run, kind, tuple(children), rows))
    traces = _traces(run) if count_traces or kind in {RUN, COMPILE} else Traces()
    node = Node(run, kind, tuple(children), traces, _score(run, kind), series, failures)
    if kind == EVALUATION:
        error = standard_error([*series]) if series else None
        node = replace(node, standard_error=error) if rows else _unfinished(node)
    return node


def _unfinished(node: Node) -> Node:
    """Complete the node of an evaluation without results by what its journal tells."""
    outcomes = journal.finished(node.run)
    if not outcomes and node.run.info.status == "FINISHED":
        return node
    scores = [0.0 if outcome.has_failed else number_of(_score_in(outcome.score)) or 0.0 for outcome in outcomes]
    tokens: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        for by_model in (outcome.program_tokens, outcome.metric_tokens):
            for model, counted in by_model.items():
                tokens[model].update(counted)
    total = sum(counted.get("total_tokens", 0) for counted in tokens.values()) if tokens else None
    return replace(
        node,
        done=len(outcomes),
        score=100 * sum(scores) / len(scores) if node.score is None and scores else node.score,
        series=tuple(scores),
        standard_error=standard_error(scores) if scores else None,
        unfinished_tokens=total,
        unfinished_cost=cost_of(tokens) if tokens else None,
    )


def _score_in(score: Any) -> Any:
    return score.get("score") if hasattr(score, "get") else score


def _in_order(run: Any, children: list[Node]) -> list[Node]:
    """Order the cases as they were given, each with its difference from the baseline."""
    order = {name: place for place, name in enumerate(stored_runs.case_order(run))}
    table = mlflow_artifact_reads.read(run, "comparison.json")
    rows: dict[str, dict[str, Any]] = {}
    if table is not None:
        content = json.loads(table)
        named = (dict(zip(content["columns"], row, strict=True)) for row in content["data"])
        rows = {str(row["run_id"]): row for row in named if row.get("run_id")}
    found = []
    for child in children:
        row = rows.get(child.run.info.run_id, {})
        mean, low, high = (number_of(row.get(key)) for key in ("difference", "difference_low", "difference_high"))
        found.append(child if mean is None else replace(child, difference=(mean, low, high)))
    return sorted(found, key=lambda child: order.get(child.run.data.tags.get(stored_runs.CASE_TAG, ""), len(order)))


def _kind(run: Any) -> str:
    tags = run.data.tags
    if tags.get(stored_runs.KIND_TAG) == stored_runs.KIND:
        return EVALUATE_ALL
    if "dspy.optimizer" in tags or any(key.startswith(_BEST_SCORE) for key in tags):
        return COMPILE
    return EVALUATION if "dspy.metric" in tags or "eval" in run.data.metrics else RUN


def _score(run: Any, kind: str) -> float | None:
    if kind == EVALUATION:
        value = run.data.metrics.get("eval")
    elif kind == COMPILE:
        value = max((float(text) for key, text in run.data.tags.items() if key.startswith(_BEST_SCORE)), default=None)
    else:
        value = None
    return number_of(value)


def _failures(run: Any, kind: str, rows: list[dict[str, Any]]) -> list[str]:
    """Read failures from the result table, or of a case of evaluate_all that failed from its finished examples."""
    if kind != EVALUATION:
        return []
    if not rows:
        return [mask(error) for error in journal.errors(run)]
    return [str(row["error"]) for row in rows if row.get("error") is not None]


def _series(run: Any, kind: str, children: tuple[Node, ...], rows: list[dict[str, Any]]) -> list[float]:
    if kind == EVALUATION:
        scores = [number_of(row.get("score")) for row in rows]
        return [score for score in scores if score is not None]
    if kind == COMPILE:
        keys = [key.removeprefix(_BEST_SCORE) for key in run.data.tags if key.startswith(_BEST_SCORE)]
        history = [point for key in keys for point in MlflowClient().get_metric_history(run.info.run_id, key)]
        points = sorted(history, key=lambda point: (point.timestamp, point.step))
        return [point.value for point in points if number_of(point.value) is not None]
    return [child.score for child in children if child.score is not None]


def _traces(run: Any) -> Traces:
    count = errors = tokens = 0
    has_tokens, token = False, None
    while True:
        try:
            page = MlflowClient().search_traces(
                locations=[run.info.experiment_id],
                filter_string=f"metadata.`mlflow.sourceRun` = '{run.info.run_id}'",
                max_results=_TRACES_PER_PAGE,
                include_spans=False,
                page_token=token,
            )
        except MlflowException:  # a store without traces
            return Traces()
        for trace in page:
            count += 1
            errors += str(trace.info.state).endswith("ERROR")
            if usage := trace.info.token_usage:
                has_tokens = True
                tokens += usage.get("total_tokens", 0)
        token = page.token
        if not token:
            return Traces(count, errors, tokens if has_tokens else None)
