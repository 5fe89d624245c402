"""Check of the demo's traces, read back from MLflow, against its plan: every span must be where it belongs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow.entities import Span, Trace

from dspy_mlflow_async.cli.demo.plan import LM_CALL, PREDICT, Node, Planned, difference
from dspy_mlflow_async.cli.demo.script import markers_in

SESSION = "mlflow.trace.session"
_USAGE = "mlflow.chat.tokenUsage"


@dataclass(slots=True)
class Row:
    """Counts of one act, planned and found: traces, spans, and tokens (billed by the endpoint, None if unknown)."""

    planned_traces: int = 0
    found_traces: int = 0
    planned_spans: int = 0
    found_spans: int = 0
    billed_tokens: int | None = None
    found_tokens: int = 0


@dataclass(slots=True)
class Verdict:
    """The result of a check.

    Attributes:
        rows: One for each act, by name.
        problems: One sentence for each thing that is not as planned; empty if all is well.
        by_marker: The one right trace of each call.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    by_marker: dict[str, Trace] = field(default_factory=dict)


def check(
    traces: Sequence[Trace], planned: Sequence[Planned], billed: Mapping[str, int] | None = None, *, exact: bool = True
) -> Verdict:
    """Compare traces with the plan.

    Args:
        traces: All traces of the demo, with their spans.
        planned: All calls that were made.
        billed: Tokens by marker, as the endpoint counted them; None where it is not ours.
        exact: Whether adapter spans and the number of LM calls count too: a model that is not scripted may have
            been asked twice.
    """
    verdict = Verdict()
    plans = {plan.marker: plan for plan in planned}
    found: defaultdict[str, list[Trace]] = defaultdict(list)
    strangers: list[Trace] = []
    for trace in traces:
        owner = _owner(trace)
        (found[owner] if owner in plans else strangers).append(trace)
    for marker, plan in plans.items():
        row = verdict.rows.setdefault(plan.act, Row())
        row.planned_traces += 1
        row.planned_spans += sum(1 for _ in plan.tree.paths())
        if billed is not None:
            row.billed_tokens = (row.billed_tokens or 0) + billed.get(marker, 0)
        row.found_traces += len(found[marker])
        row.found_spans += sum(len(trace.data.spans) for trace in found[marker])
        row.found_tokens += sum(_tokens(trace) for trace in found[marker])
        if len(found[marker]) != 1:
            pieces = ", ".join(_root_names(trace) for trace in found[marker])
            said = f"{len(found[marker])} traces instead of one: {pieces}" if pieces else "no trace"
            verdict.problems.append(f"Call #{marker} has {said}.")
            continue
        trace = verdict.by_marker[marker] = found[marker][0]
        tokens = billed.get(marker, 0) if billed is not None else None
        verdict.problems.extend(f"Call #{marker}: {problem}" for problem in _problems(trace, plan, tokens, exact=exact))
    verdict.problems.extend(
        f"Trace {trace.info.trace_id} ({_root_names(trace)}) belongs to no call of the demo." for trace in strangers
    )
    return verdict


def _problems(trace: Trace, plan: Planned, billed: int | None, *, exact: bool) -> Iterator[str]:
    spans = {span.span_id: span for span in trace.data.spans}
    roots = [span for span in spans.values() if span.parent_id not in spans]
    if len(roots) != 1 or roots[0].parent_id is not None:
        yield f"its spans are not one tree, these have no parent in it: {', '.join(span.name for span in roots)}."
        return
    tree = _tree(roots[0], spans.values())
    if words := difference(*((plan.tree, tree) if exact else (plan.tree.without_adapters(), tree.without_adapters()))):
        yield f"its tree is not the planned one; {words}."
    for span in spans.values():
        yield from _span_problems(span, spans.get(span.parent_id or ""), plan.marker, exact=exact)
    session = trace.info.trace_metadata.get(SESSION)
    if session != (planned := plan.session or plan.act):
        yield f"its session is {session!r} instead of {planned!r}."
    total = (trace.info.token_usage or {}).get("total_tokens", 0)
    if total != _tokens(trace):
        yield f"MLflow says {total} tokens, its LM spans say {_tokens(trace)}."
    if billed is not None and _tokens(trace) != billed:
        yield f"its LM spans say {_tokens(trace)} tokens, the endpoint has counted {billed}."


def _span_problems(span: Span, parent: Span | None, marker: str, *, exact: bool) -> Iterator[str]:
    words = "\n".join(_texts([span.inputs, span.outputs]))
    if strangers := markers_in(words) - {marker}:
        yield f"span {span.name} holds values of another call: #{', #'.join(sorted(strangers))}."
    if exact and (span.end_time_ns is None or span.status.status_code != "OK" or span.get_attribute("outcome") != "ok"):
        yield f"span {span.name} has not ended well: {span.status.status_code}, {span.get_attribute('outcome')}."
    if span.name == LM_CALL:
        if parent is None or parent.name != PREDICT:
            yield f"an LM call stands under {parent.name if parent else 'nothing'} instead of a predictor."
        elif lost := [text for text in _texts(parent.inputs) if text not in words]:
            yield f"an LM call stands under a predictor that did not make it: its prompt lacks {lost[0]!r}."


def _owner(trace: Trace) -> str | None:
    """Return the marker of the call that a trace began with."""
    for span in trace.data.spans:
        markers = markers_in("\n".join(_texts(span.inputs)))
        if span.parent_id is None or len(trace.data.spans) == 1:
            return markers.pop() if len(markers) == 1 else None
    return None


def _root_names(trace: Trace) -> str:
    known = {span.span_id for span in trace.data.spans}
    return ", ".join(span.name for span in trace.data.spans if span.parent_id not in known) or "no span"


def _tree(span: Span, spans: Any) -> Node:
    return Node(span.name, tuple(_tree(child, spans) for child in spans if child.parent_id == span.span_id))


def _tokens(trace: Trace) -> int:
    usages = (span.get_attribute(_USAGE) for span in trace.data.spans if span.name == LM_CALL)
    return sum(usage["total_tokens"] for usage in usages if usage)


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value of plain JSON types, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
