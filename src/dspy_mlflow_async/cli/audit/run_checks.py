"""Checks of runs: has each evaluation its traces, feedbacks and rows, each compile its steps, and has each ended?"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dspy_mlflow_async.cli.audit.call_checks import JUDGE_TAG, JUDGED
from dspy_mlflow_async.cli.audit.findings import Finding, Kind
from dspy_mlflow_async.cli.audit.store import RunFacts, Store
from dspy_mlflow_async.cli.audit.trace_checks import is_idle
from dspy_mlflow_async.cli.audit.traces import INPUTS, Trace, found
from dspy_mlflow_async.seams.mlflow_bulk_reads import SOURCE_RUN, TraceRow

_FEEDBACK, _BY_METRICS = "feedback", ("CODE", "LLM_JUDGE", "AI_JUDGE")
_STEP = re.compile(r"(?P<key>.+)_(?P<step>\d+)")


_NEVER = 2**62  # milliseconds: of what has not ended


class Noted(NamedTuple):
    """Facts that are kept of each trace that names a run."""

    trace_id: str
    start_ms: int
    feedbacks: tuple[str, ...]
    is_judge: bool


class Runs:
    """Runs as the traces tell of them, and afterwards the checks of these.

    Args:
        store: What is looked at.
        idle_seconds: For how long nothing must have been heard of a run that has not ended.
    """

    def __init__(self, store: Store, idle_seconds: float) -> None:
        self._store = store
        self._idle_seconds = idle_seconds
        self._traces: dict[str, list[Noted]] = defaultdict(list)
        self._last_sign: dict[str, int] = {}
        self._without: list[Noted] = []
        self._evaluations = [facts for facts in store.runs.values() if facts.is_evaluation]
        self._times = _merged([(facts.start_ms, facts.end_ms or _NEVER) for facts in self._evaluations])
        self._interned: dict[tuple[str, ...], tuple[str, ...]] = {}

    def note(self, trace: Trace) -> Iterator[Finding]:
        """Note which run a trace names, and yield a finding where there is no such run."""
        row = trace.row
        run_id = row.metadata.get(SOURCE_RUN)
        if not run_id:
            # Only what an evaluation may miss is kept.
            if self._is_beside_an_evaluation(row.start_ms, row.start_ms + (row.duration_ms or 0)):
                self._without.append(self._noted(row))
            return
        self._last_sign[run_id] = max(self._last_sign.get(run_id, 0), trace.last_sign_ms)
        facts = self._store.find_run(run_id)
        if facts is None:
            yield found(Kind.NO_RUN, trace, f"there is no run {run_id}")
        elif facts.is_evaluation:
            self._traces[run_id].append(self._noted(row))

    def _is_beside_an_evaluation(self, begin: int, end: int) -> bool:
        place = bisect.bisect_right(self._times, (end, _NEVER)) - 1
        return place >= 0 and self._times[place][1] >= begin

    def _noted(self, row: TraceRow) -> Noted:
        names = tuple(
            each.name for each in row.assessments if each.kind == _FEEDBACK and each.source_type in _BY_METRICS
        )
        is_judge = JUDGE_TAG in row.tags or JUDGED in row.metadata
        return Noted(row.trace_id, row.start_ms, self._interned.setdefault(names, names), is_judge)

    def check(self) -> Iterator[Finding]:
        """Yield what is wrong with the runs, once all traces have been noted."""
        for facts in self._evaluations:
            rows = self._store.result_table(facts) if facts.status == "FINISHED" else None
            if rows:
                yield from self._evaluation(facts, rows)
        yield from self._steps()
        yield from self._running()

    # --- evaluations ----------------------------------------------------------------------------------------------

    def _evaluation(self, facts: RunFacts, rows: list[dict[str, Any]]) -> Iterator[Finding]:
        if facts.size is not None and len(rows) < facts.size:
            yield _of_run(Kind.FEWER_ROWS, facts, f"{len(rows)} rows for {facts.size} examples")
        if any("trace_id" in row for row in rows):
            yield from self._by_id(facts, rows)
        else:
            yield from self._by_inputs(facts, rows)

    def _by_id(self, facts: RunFacts, rows: list[dict[str, Any]]) -> Iterator[Finding]:
        """Check an evaluation whose table names the trace of each example."""
        own = {noted.trace_id: noted for noted in self._traces[facts.run_id]}
        named = [str(row["trace_id"]) for row in rows if row.get("trace_id")]
        missing = [trace_id for trace_id in named if trace_id not in own]
        elsewhere = {row.trace_id: row for row in self._store.traces_by_id(missing)} if missing else {}
        for row in elsewhere.values():
            other = row.metadata.get(SOURCE_RUN)
            if not other or self._store.find_run(other) is not None:  # else it is found already
                yield _misplaced(row, facts)
        lost = len(missing) - len(elsewhere)
        if lost:
            yield _of_run(Kind.FEWER_TRACES, facts, f"{lost} of {len(rows)} traces are not in the store")
        known = own | {row.trace_id: self._noted(row) for row in elsewhere.values()}
        judged = [str(row["trace_id"]) for row in rows if row.get("trace_id") in known and not row.get("error")]
        unheard = [each for each in judged if not _said(known[each], facts)]
        if unheard:
            yield _of_run(Kind.FEWER_FEEDBACKS, facts, f"{len(unheard)} of {len(judged)} traces have no feedback")
        at = set(named)
        for noted in own.values():
            if noted.trace_id not in at and noted.is_judge and _said(noted, facts):
                yield _of_trace(noted, facts, "the judge's own trace has the feedback")
            elif noted.trace_id in at and _said(noted, facts) > 1:
                yield _of_trace(noted, facts, f"it has {_said(noted, facts)} feedbacks of {facts.metric}")

    def _by_inputs(self, facts: RunFacts, rows: list[dict[str, Any]]) -> Iterator[Finding]:
        """Check an evaluation whose examples are known by their inputs alone, as MLflow's own tracer leaves it."""
        own = self._traces[facts.run_id]
        if len(own) == len(rows) and all(noted.feedbacks for noted in own):
            return
        beside = [
            other
            for other in self._evaluations
            if other is not facts
            and other.start_ms <= (facts.end_ms or _NEVER)
            and facts.start_ms <= (other.end_ms or _NEVER)
        ]
        matched, rest = self._match(own, rows)
        others = [noted for other in beside for noted in self._traces[other.run_id]]
        without = [noted for noted in self._without if noted.start_ms <= (facts.end_ms or _NEVER)]
        needed = len(rows) - len(matched)
        strayed, _ = self._match(others, rest) if needed and beside else ([], rest)
        lonely, rest = self._match(without, rest) if needed else ([], rest)
        for noted in strayed:
            yield Finding(Kind.OTHER_RUN, f"made under {facts.name}", facts.experiment_id, noted.trace_id, facts.run_id)
        for noted in lonely:
            yield Finding(Kind.NO_RUN, f"made under {facts.name}", facts.experiment_id, noted.trace_id, facts.run_id)
        found_ = matched + strayed + lonely
        if len(found_) < len(rows) and (found_ or own or self._has_as_children(without, rest)):
            yield _of_run(Kind.FEWER_TRACES, facts, f"{len(found_)} traces for {len(rows)} examples")
        unheard = [noted for noted in found_ if not noted.feedbacks]
        if unheard:
            yield _of_run(Kind.FEWER_FEEDBACKS, facts, f"{len(unheard)} of {len(found_)} traces have no feedback")
        if not beside:
            ids = {noted.trace_id for noted in matched}
            for noted in own:
                if noted.trace_id not in ids and noted.feedbacks and unheard:
                    yield _of_trace(noted, facts, f"feedback {noted.feedbacks[0]} on no example's trace")

    def _has_as_children(self, traces: Sequence[Noted], rows: list[dict[str, Any]]) -> bool:
        """Return whether examples were predicted inside a span of the user's, and so have no trace of their own."""
        for row in self._store.traces_by_id([noted.trace_id for noted in traces]):
            root = Trace(row).root
            for child in root.children if root is not None and not root.is_module else ():
                inputs = child.value(INPUTS)
                if isinstance(inputs, dict) and inputs and any(_has_inputs(each, inputs) for each in rows):
                    return True
        return False

    def _match(self, traces: Sequence[Noted], rows: list[dict[str, Any]]) -> tuple[list[Noted], list[dict[str, Any]]]:
        """Return the traces whose inputs are those of a row, and the rows that have none."""
        left = list(rows)
        matched = []
        by_id = {noted.trace_id: noted for noted in traces if not noted.is_judge}
        for row in self._store.traces_by_id(list(by_id)):
            root = Trace(row).root
            inputs = root.value(INPUTS) if root is not None else None
            if isinstance(inputs, dict) and inputs:
                place = next((n for n, each in enumerate(left) if _has_inputs(each, inputs)), None)
                if place is not None:
                    matched.append(by_id[row.trace_id])
                    del left[place]
        return matched, left

    # --- compiles, and what has not ended -----------------------------------------------------------------------------

    def _steps(self) -> Iterator[Finding]:
        keys: dict[str, set[str]] = defaultdict(set)
        for facts in self._store.runs.values():
            name = _STEP.fullmatch(facts.name)
            parent = self._store.runs.get(facts.parent_id or "")
            if name is not None and parent is not None and name["key"] in parent.metrics:
                keys[parent.run_id].add(name["key"])
        for facts in self._store.runs.values():
            if facts.optimizer is not None:
                keys[facts.run_id] |= {key for key in facts.metrics if key.startswith("eval")}
        for run_id, names in keys.items():
            for key in sorted(names):
                history = self._store.client.get_metric_history(run_id, key)
                steps = sorted(point.step for point in history)
                if steps and steps != list(range(len(steps))):
                    shown = ", ".join(map(str, steps[:8]))
                    yield _of_run(Kind.SHARED_STEPS, self._store.runs[run_id], f"{key} has the steps {shown}")

    def _running(self) -> Iterator[Finding]:
        for facts in self._store.runs.values():
            if facts.status not in {"RUNNING", "SCHEDULED"}:
                continue
            parent = self._store.find_run(facts.parent_id) if facts.parent_id else None
            has_lost_parent = parent is not None and parent.end_ms is not None
            if has_lost_parent or is_idle(self._last_sign_of(facts), self._idle_seconds):
                yield _of_run(Kind.RUNNING, facts, f"{facts.name} is {facts.status}")

    def _last_sign_of(self, facts: RunFacts) -> int:
        signs = [facts.start_ms, self._last_sign.get(facts.run_id, 0)]
        for key in facts.metrics:
            signs += [point.timestamp for point in self._store.client.get_metric_history(facts.run_id, key)]
        children = [each for each in self._store.runs.values() if each.parent_id == facts.run_id]
        return max([*signs, *(each.end_ms or self._last_sign_of(each) for each in children)])


def _merged(times: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return intervals of time in order, those that overlap as one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(times):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def _said(noted: Noted, facts: RunFacts) -> int:
    return sum(facts.metric in (None, name) for name in noted.feedbacks)


def _has_inputs(row: dict[str, Any], inputs: dict[str, Any]) -> bool:
    return all(f"example_{key}" in row and _plain(row[f"example_{key}"]) == _plain(v) for key, v in inputs.items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _misplaced(row: TraceRow, facts: RunFacts) -> Finding:
    other = row.metadata.get(SOURCE_RUN)
    detail = f"made under {facts.name}" + (f", stands under {other}" if other else "")
    return Finding(Kind.OTHER_RUN if other else Kind.NO_RUN, detail, row.experiment_id, row.trace_id, facts.run_id)


def _of_run(kind: Kind, facts: RunFacts, detail: str) -> Finding:
    return Finding(kind, detail, facts.experiment_id, None, facts.run_id)


def _of_trace(noted: Noted, facts: RunFacts, detail: str) -> Finding:
    return Finding(Kind.MISPLACED_FEEDBACK, detail, facts.experiment_id, noted.trace_id, facts.run_id)
