"""Runs that a gate is put to, found by id, name or age, and what they are compared with."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dspy_mlflow_async.cli.gate.checks import Baseline, Check, Rules, Subject
from dspy_mlflow_async.cli.report import comparing, reading
from dspy_mlflow_async.cli.report.reading import COMPILE, EVALUATE_ALL, EVALUATION, Node
from dspy_mlflow_async.cli.report.scores import number_of
from dspy_mlflow_async.evaluate import stored_runs
from dspy_mlflow_async.evaluate.statistics import paired_difference
from dspy_mlflow_async.printable import mask_uris
from dspy_mlflow_async.seams.installed import needs_whole
from dspy_mlflow_async.seams.mlflow_runs import MLFLOW_PARENT_RUN_ID

PREVIOUS = "previous"  # in place of a name: the run of the same name before this one
_SEED = 0  # the same gate says the same twice
_OVER = "FINISHED"
_RUNNING = ("RUNNING", "SCHEDULED")
_METRIC_TAG = "dspy.metric"
_ONE_PAGE = 100
_ID_LENGTH, _ID_CHARACTERS = 32, frozenset("0123456789abcdef")


class Runs:
    """Runs of a store, found as a person names them.

    Args:
        experiments: Ids or names of the experiments in which names are looked for; by default the one that MLflow's
            environment variables name, or all.

    Raises:
        ValueError: Where there is no such experiment.
    """

    def __init__(self, experiments: Sequence[str] = ()) -> None:
        self._client = MlflowClient()
        named = [os.environ.get(variable) for variable in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")]
        self._experiments = [self._experiment(each) for each in experiments or [*filter(None, named)][:1]]

    def _experiment(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                experiment = self._client.get_experiment(name)
            except MlflowException:
                raise ValueError(f"there is no experiment {name!r}") from None
        return str(experiment.experiment_id)

    def newest(self) -> Node:
        """Return the newest run of an evaluation or a compile.

        Raises:
            ValueError: Where there is none.
        """
        found = stored_runs.newest(1, self._experiments or None)
        if not found:
            raise ValueError(mask_uris(f"there is no run of an evaluation or a compile in {mlflow.get_tracking_uri()}"))
        return _read(found[0])

    def find(self, name: str) -> Node:
        """Return the run that is called so: by its id, its name, or ``RUN/CASE`` for a case of it.

        Raises:
            ValueError: Where there is none, or several experiments have one.
        """
        return self._resolve(name, lambda text: self._by_name(text, self._experiments), "run")

    def baseline(self, name: str, of: Node) -> Node:
        """Return what a run is to be compared with.

        Args:
            name: ``previous``, the name of a case beside it or in it, or what ``find`` takes; of several with a name
                the newest finished one counts, in the run's own experiment unless other ones were named.
            of: The run.

        Raises:
            ValueError: Where there is none.
        """
        here = self._experiments or [of.run.info.experiment_id]
        if name == PREVIOUS:
            found = self._by_name(str(of.run.info.run_name), here, before=of.run)
            if found is None:
                raise ValueError(f"there is no finished run called {of.name!r} before this one, to compare it with")
            return _read(found)
        parent = of if of.kind == EVALUATE_ALL else self._parent(of)
        if parent is not None and name in map(_case_name, parent.children):
            return _case_of(parent, name)
        return self._resolve(name, lambda text: self._by_name(text, here, other_than=of.run), "other finished run")

    def _resolve(self, name: str, search: Callable[[str], Any], what: str) -> Node:
        def look(text: str) -> Any:
            return stored_runs.find_run(text) if _is_id(text) else search(text)

        if (run := look(name)) is not None:
            return _read(run)
        of, slash, case = name.rpartition("/")
        if slash and (run := look(of)) is not None:
            return _case_of(_read(run), case)
        where = f"in {mlflow.get_tracking_uri()}" if what == "run" else "in its experiment; --experiment names another"
        raise ValueError(mask_uris(f"there is no {what} {name!r}, by id or by name, {where}"))

    def _parent(self, node: Node) -> Node | None:
        run_id = node.run.data.tags.get(MLFLOW_PARENT_RUN_ID)
        if run_id is None or stored_runs.CASE_TAG not in node.run.data.tags:
            return None
        return _read(stored_runs.find_run(run_id))

    def _by_name(self, name: str, experiments: Sequence[str], before: Any = None, other_than: Any = None) -> Any:
        """Return the newest run of a name; a finished one, and another than the one given, where one is given."""
        quote = "'" if "'" not in name else '"'
        if not name or quote in name:
            return None
        found = list(
            self._client.search_runs(
                [*experiments] or [each.experiment_id for each in self._client.search_experiments()],
                f"attributes.run_name = {quote}{name}{quote}",
                max_results=_ONE_PAGE,
                order_by=["attributes.start_time DESC"],
            )
        )
        known = before or other_than
        if known is not None:
            found = [run for run in found if run.info.run_id != known.info.run_id and run.info.status == _OVER]
        if before is not None:
            found = [run for run in found if run.info.start_time <= before.info.start_time]
        if len({run.info.experiment_id for run in found}) > 1:
            raise ValueError(f"several experiments have a run called {name!r}: choose by --experiment, or give its id")
        return found[0] if found else None


def _read(run: Any) -> Node:
    return reading.node_of(run, count_traces=False)


def _is_id(name: str) -> bool:
    return name.startswith("pending-") or (len(name) == _ID_LENGTH and set(name) <= _ID_CHARACTERS)


def _case_name(node: Node) -> str:
    return str(node.run.data.tags.get(stored_runs.CASE_TAG, node.run.info.run_name))


def _case_of(parent: Node, name: str) -> Node:
    """Return a case of a run.

    Raises:
        ValueError: Where there is none.
    """
    for child in parent.children:
        if _case_name(child) == name:
            return child
    names = ", ".join(map(_case_name, parent.children)) or "none"
    raise ValueError(f"{parent.name} has no case {name!r}; it has: {names}")


def cases_of(node: Node, wanted: Sequence[str] = ()) -> list[Node]:
    """Return what is judged of a run: its cases, the evaluations below it, or itself.

    Args:
        node: The run.
        wanted: Names of its cases; none for all.

    Raises:
        ValueError: Where a case is not there.
    """
    if wanted:
        return [_case_of(node, name) for name in wanted]
    if node.kind in {EVALUATION, COMPILE} or not node.children:
        return [node]
    return [each for child in node.children for each in cases_of(child)]


def pair(cases: Sequence[Node], other: Node) -> list[Node | None]:
    """Return for each case what of another run it is compared with: its namesake, or the only one that there is.

    Returns:
        A run per case; None for one that is itself what the others are compared with.

    Raises:
        ValueError: Where a case has no namesake.
    """
    there = cases_of(other)
    if len(there) == 1:
        return [None if case.run.info.run_id == there[0].run.info.run_id else there[0] for case in cases]
    return [_case_of(other, _case_name(case)) for case in cases]


def compared(node: Node, baseline: Node) -> list[list[Node]]:
    """Return the pairs of evaluations that a comparison is made of, the baseline's first, without their children."""
    judged = cases_of(node)
    pairs = zip(pair(judged, baseline), judged, strict=True)
    return [[replace(other, children=()), replace(each, children=())] for other, each in pairs if other is not None]


def judge(node: Node, rules: Rules, cases: Sequence[str] = (), baseline: Node | None = None) -> list[Check]:
    """Put rules to a run.

    Args:
        node: The run.
        rules: The rules.
        cases: Names of the cases of it that are judged; none for all.
        baseline: What each is compared with, where anything.

    Raises:
        ValueError: Where a case is not there, or has nothing to be compared with.
    """
    judged = cases_of(node, cases)
    others = [None] * len(judged) if baseline is None else pair(judged, baseline)
    if baseline is not None and not any(others):
        raise ValueError(f"{node.name} cannot be compared with itself")
    checks = []
    for each, other in zip(judged, others, strict=True):
        subject = subject_of(each, each.name if each is node else f"{node.name}/{each.name}")
        checks += rules.judge(subject, None if other is None else compare(each, subject, other))
    return checks


def subject_of(node: Node, name: str | None = None) -> Subject:
    """Return what bounds can be put to, of a run."""
    data, status = node.run.data, str(node.run.info.status)
    rows = reading.result_table(node.run) if node.kind == EVALUATION else []
    scores = node.series if node.kind == EVALUATION else ()
    durations = [seconds for row in rows if (seconds := number_of(row.get("duration_seconds"))) is not None]
    score = None if node.score is None else node.score / 100
    if scores and len(scores) == len(rows):
        score = math.fsum(scores) / len(scores)  # the metric is rounded
    examples = data.metrics.get("examples") if node.done is None else node.done
    own = {
        "score": score,
        "cost": node.cost,
        "tokens": node.tokens,
        "seconds": node.seconds,
        "errors": node.errors,
        "failures": node.errors,
        "examples": examples,
        "latency_p50": data.metrics.get("latency_p50_seconds"),
        "latency_p95": data.metrics.get("latency_p95_seconds"),
    }
    values = {**data.metrics, **{key: float(value) for key, value in own.items() if value is not None}}
    is_running = status in _RUNNING
    words = ["still running" if is_running else status if status != _OVER else "", node.progress, node.stopped]
    return Subject(
        name or node.name,
        {key: value for key, value in values.items() if not math.isnan(value)},
        str(node.run.info.run_id),
        scores,
        tuple(sorted(durations)),
        ", ".join(filter(None, words)),
        is_running,
    )


def compare(node: Node, subject: Subject, other: Node) -> Baseline:
    """Compare an evaluation with another, on the examples that both have."""
    there = subject_of(other, other.name if other.name != node.name else f"{other.name} of {_begun(other)}")
    metrics = [each.run.data.tags.get(_METRIC_TAG) for each in (node, other)]
    if metrics[0] != metrics[1]:
        said = f"{subject.name} was scored by {metrics[0]}, and {there.name} by {metrics[1]}: use one metric for both"
        return Baseline(there, problem=said)
    for each, name in ((node, subject.name), (other, there.name)):
        if each.kind != EVALUATION or each.done is not None or not each.series:
            return Baseline(there, problem=f"{name} has no result table, so the scores of its examples are not known")
    rows = comparing.compare([replace(other, children=()), replace(node, children=())]).rows
    before, after = (
        {place: score for place, row in enumerate(rows) if (score := row.scores[which]) is not None} for which in (0, 1)
    )
    try:
        difference = paired_difference(after, before, seed=_SEED)
    except ImportError:  # mlflow-skinny brings no numpy
        return Baseline(there, problem=needs_whole("A comparison"))
    return Baseline(there, difference, len(after.keys() - before.keys()), len(before.keys() - after.keys()))


def _begun(node: Node) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(node.run.info.start_time / 1000))
