"""Kinds of findings, each with its cause and its cure, and what an audit has counted of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

if sys.version_info >= (3, 11):
    from enum import StrEnum
else:
    from enum import Enum

    class StrEnum(str, Enum):
        """Python 3.11's, as far as it is needed here."""

        __str__ = str.__str__


class Kind(StrEnum):
    """Kind of a finding, by the word that ``--json`` has for it."""

    FRAGMENT = "fragment"
    NO_PARENT = "no_parent"
    STRAY = "stray"
    UNFINISHED = "unfinished"
    NO_RUN = "no_run"
    OTHER_RUN = "other_run"
    FEWER_TRACES = "fewer_traces"
    FEWER_FEEDBACKS = "fewer_feedbacks"
    FEWER_ROWS = "fewer_rows"
    DOUBLED = "doubled"
    LATE = "late"
    SHARED_STEPS = "shared_steps"
    RUNNING = "running"
    TOKENS = "tokens"
    MISPLACED_FEEDBACK = "misplaced_feedback"
    SECRET = "secret"  # noqa: S105 - a word
    CUT = "cut"
    OUTLIVED = "outlived"


# Kinds that are true of the calls themselves, and no fault of the store: they do not count for the exit code.
NOTES = frozenset({Kind.CUT, Kind.OUTLIVED})

_OURS = "Trace with dspy_mlflow_async.autolog(), which keeps the parent in the context of the call."


@dataclass(frozen=True, slots=True)
class Meaning:
    """Words for one kind.

    Attributes:
        title: What was found, as a plural.
        cause: How that comes about.
        cure: What to do about it.
    """

    title: str
    cause: str
    cure: str


MEANINGS = {
    Kind.FRAGMENT: Meaning(
        "traces that are fragments of one call",
        "A call went on in another thread or task, where the tracer did not know of it: its steps became traces of "
        "their own, or were lost.",
        _OURS + " For threads of your own, see propagate() and ThreadPoolExecutor.",
    ),
    Kind.NO_PARENT: Meaning(
        "spans without their parent",
        "The parent was never stored: its call was not ended, its trace was dropped, or it stands in another store.",
        "Flush before the process ends, and look for an outage with `dspy-mlflow-async replay --dry-run`. "
        "A caller in another service is no fault: its span is in its own trace.",
    ),
    Kind.STRAY: Meaning(
        "spans of another call in a tree",
        "What was current for one call leaked to the next: a span that had not been taken off, or a thread that two "
        "calls share.",
        _OURS,
    ),
    Kind.UNFINISHED: Meaning(
        "unfinished traces",
        "The process ended, or was killed, before the call did; or its end handler never ran.",
        "`--fix` ends those that nobody works on. docs/export.md says how to lose nothing when a process is killed.",
    ),
    Kind.NO_RUN: Meaning(
        "traces without the run they were made under",
        "The active run belongs to a thread, and the call ran in another; or the run was removed for good.",
        "Open runs with dspy_mlflow_async.run(), which follows the calls, or evaluate under our tracer.",
    ),
    Kind.OTHER_RUN: Meaning(
        "traces under another's run",
        "MLflow gives a trace to the newest active run of any thread, so evaluations that run at once mix.",
        "Trace with dspy_mlflow_async.autolog(log_evals=True): each evaluation keeps its own.",
    ),
    Kind.FEWER_TRACES: Meaning(
        "evaluations with fewer traces than examples",
        "Traces were lost: tracing was off for a moment in the whole process, the queue was full, or the store away.",
        "Look into the spool with `dspy-mlflow-async replay --dry-run`. If you sample traces, this is expected.",
    ),
    Kind.FEWER_FEEDBACKS: Meaning(
        "evaluations with fewer feedbacks than examples",
        "The metric's score found no trace to go to: the metric has no name, or ran where MLflow did not know the "
        "trace.",
        "Trace with dspy_mlflow_async.autolog(log_evals=True); evaluate again.",
    ),
    Kind.FEWER_ROWS: Meaning(
        "evaluations with fewer rows than examples",
        "The result table was overwritten by another evaluation in the same run, or the evaluation was stopped.",
        "Give each evaluation a run of its own; for one that a budget has stopped, resume it.",
    ),
    Kind.DOUBLED: Meaning(
        "doubled spans",
        "Two tracers watched the same call, or the same spans were imported twice.",
        "Leave one tracer: dspy_mlflow_async.autolog() replaces MLflow's own where that is on.",
    ),
    Kind.LATE: Meaning(
        "late spans that nothing marks as such",
        "A thread or task went on after its caller had returned, or had been cancelled.",
        "Wait for what you start. Our tracer marks such spans as late: they are no part of the answer.",
    ),
    Kind.SHARED_STEPS: Meaning(
        "score series whose steps are not 0, 1, 2…",
        "Two optimizers counted their steps on one counter, or logged into one run.",
        "Compile under dspy_mlflow_async.autolog(log_compiles=True): each compile counts for itself.",
    ),
    Kind.RUNNING: Meaning(
        "runs left RUNNING",
        "The process that had opened them ended without ending them.",
        "`--fix` ends those that nobody works on.",
    ),
    Kind.TOKENS: Meaning(
        "token totals that are not the sum of their LM calls",
        "Calls in other threads were not counted, or were counted twice, where the total was made.",
        "Trace with dspy_mlflow_async.autolog(), which counts each LM call by itself.",
    ),
    Kind.MISPLACED_FEEDBACK: Meaning(
        "feedback on a trace that the metric did not judge",
        "The metric's score went to the newest trace, which was another call's, or the judge's own.",
        "Trace with dspy_mlflow_async.autolog(log_evals=True), which names the judged trace.",
    ),
    Kind.SECRET: Meaning(
        "secrets in clear",
        "A program, a prompt or an error showed a credential to a tracer that does not mask, or whose masking is off.",
        "Exchange the credential first, then delete these traces. What our tracer stores is masked.",
    ),
    Kind.CUT: Meaning(
        "values that were cut",
        "They were longer than `max_value_bytes`.",
        "Give autolog() a larger `max_value_bytes` if you need them whole.",
    ),
    Kind.OUTLIVED: Meaning(
        "late spans, marked as such",
        "A thread or task went on after its caller had returned, or had been cancelled.",
        "Nothing is wrong with the store. Wait for what you start if you want it in the answer.",
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding.

    Attributes:
        kind: What kind it is.
        detail: What exactly, in a few words; never a value of the user's that may be secret.
        experiment_id: Where.
        trace_id: Of which trace, or None.
        run_id: Of which run, or None.
    """

    kind: Kind
    detail: str
    experiment_id: str
    trace_id: str | None = None
    run_id: str | None = None

    def link(self, base: str) -> str:
        """Return the address in MLflow's UI."""
        if self.trace_id is not None:
            return f"{base}/#/experiments/{self.experiment_id}/traces?selectedEvaluationId={self.trace_id}"
        return f"{base}/#/experiments/{self.experiment_id}/runs/{self.run_id}"


@dataclass(slots=True)
class Audit:
    """Findings of an audit so far: counts of each kind, and the first examples of each.

    Attributes:
        examples_kept: How many examples of a kind are kept.
        traces: How many traces were looked at.
        runs: How many runs.
        young: How many traces and runs are unfinished, but showed a sign of life a moment ago.
        left: What ``--fix`` would end.
    """

    examples_kept: int = 5
    traces: int = 0
    runs: int = 0
    young: int = 0
    counts: dict[Kind, int] = field(default_factory=dict)
    examples: dict[Kind, list[Finding]] = field(default_factory=dict)
    left: list[Finding] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> None:
        """Count findings, and keep the first of each kind."""
        for finding in findings:
            self.counts[finding.kind] = self.counts.get(finding.kind, 0) + 1
            kept = self.examples.setdefault(finding.kind, [])
            if len(kept) < self.examples_kept:
                kept.append(finding)
            if finding.kind in (Kind.UNFINISHED, Kind.RUNNING):
                self.left.append(finding)

    @property
    def kinds(self) -> list[Kind]:
        """Kinds that were found, faults first."""
        return [kind for kind in Kind if kind in self.counts]

    @property
    def has_faults(self) -> bool:
        """Return whether anything is wrong with the store."""
        return any(kind not in NOTES for kind in self.counts)
