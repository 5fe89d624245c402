"""An audit of one store: all traces once, oldest first, then the runs."""

from __future__ import annotations

import re
from collections.abc import Callable

from dspy_mlflow_async.cli.audit.call_checks import Calls
from dspy_mlflow_async.cli.audit.content_checks import Contents
from dspy_mlflow_async.cli.audit.findings import Audit
from dspy_mlflow_async.cli.audit.run_checks import Runs
from dspy_mlflow_async.cli.audit.store import Store
from dspy_mlflow_async.cli.audit.trace_checks import check, is_idle
from dspy_mlflow_async.cli.audit.traces import Trace

_SHOWN_EACH = 100  # traces between two signs of progress


def audit(
    store: Store,
    *,
    idle_seconds: float = 3600.0,
    marker: re.Pattern[str] | None = None,
    examples: int = 5,
    progress: Callable[[int], None] = lambda _: None,
) -> Audit:
    """Look at all of a store, and return what was found.

    In memory are a batch of traces, those that overlap, and some hundred bytes for each trace of an evaluation.

    Args:
        store: What to look at.
        idle_seconds: For how long nothing must have been heard of a trace or run, to be called left.
        marker: What stands in the inputs of all spans of one call, and of no other's.
        examples: How many examples of each kind are kept.
        progress: Told how many traces have been looked at.
    """
    result, contents, calls, runs = Audit(examples), Contents(), Calls(), Runs(store, idle_seconds)
    for row in store.traces():
        trace = Trace(row)
        result.add(check(trace, idle_seconds=idle_seconds, marker=marker))
        result.add(contents.check(trace))
        result.add(calls.check(trace))
        result.add(runs.note(trace))
        result.traces += 1
        result.young += row.state == "IN_PROGRESS" and not is_idle(trace.last_sign_ms, idle_seconds)
        if result.traces % _SHOWN_EACH == 0:
            progress(result.traces)
    progress(result.traces)
    result.add(runs.check())
    result.runs = len(store.runs)
    return result
