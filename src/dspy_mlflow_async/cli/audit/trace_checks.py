"""Checks of one trace by itself: is it one whole tree, of one call, with its tokens?"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from dspy_mlflow_async.cli.audit.findings import Finding, Kind
from dspy_mlflow_async.cli.audit.traces import INPUTS, MILLISECOND, OUTPUTS, Span, Trace, found, parse
from dspy_mlflow_async.seams.mlflow_bulk_reads import SESSION

_APART = 5 * MILLISECOND  # clocks and callbacks: what is nearer than this is at the same time
_TOTAL = "total_tokens"
_COUNTS = ("input_tokens", "output_tokens", _TOTAL)
_ENDS_OF_IDS = tuple(f'{letters}\\"' for letters in ("id", "ID", "Id", "iD"))  # of keys, in a JSON text in another
_LATE = ('outcome": "\\"late\\"', 'late": "true')  # attributes, as they are written
_ID = re.compile(r"(?:session|request|conversation|correlation|example)_?id", re.IGNORECASE)


def check(trace: Trace, *, idle_seconds: float, marker: re.Pattern[str] | None = None) -> Iterator[Finding]:
    """Yield what is wrong with one trace, whatever stands beside it.

    Args:
        trace: The trace.
        idle_seconds: For how long nothing must have been heard of an unfinished one.
        marker: What stands in the inputs of all spans of one call, and of no other's.
    """
    yield from _shape(trace)
    yield from _strays(trace, marker)
    yield from _unfinished(trace, idle_seconds)
    yield from _doubled(trace)
    yield from _late(trace)
    yield from _tokens(trace)


def is_idle(last_sign_ms: int, idle_seconds: float) -> bool:
    """Return whether nothing has been heard of something for so long."""
    return time.time() * 1000 - last_sign_ms >= idle_seconds * 1000


def _shape(trace: Trace) -> Iterator[Finding]:
    roots = [span for span in trace.tops if not span.parent_id]
    orphans = [span for span in trace.tops if span.parent_id]
    if len(roots) > 1:
        yield found(Kind.FRAGMENT, trace, f"{len(roots)} roots: {', '.join(span.name for span in roots[:4])}")
    elif len(roots) == 1 and roots[0].is_adapter:
        yield found(Kind.FRAGMENT, trace, f"{roots[0].name} without the call that it is a step of")
    for span in trace.spans:
        if span.is_predict and not span.children and span.is_ok and span.end_ns:
            yield found(Kind.FRAGMENT, trace, "Predict.forward without its adapter and LM calls")
    if roots or any(span.is_adapter or span.is_lm for span in orphans):
        lost = orphans
    else:
        lost = [] if _may_be_remote(orphans) else orphans
    for span in lost:
        yield found(Kind.NO_PARENT, trace, f"{span.name} is below {span.parent_id}, which is not in the trace")


def _may_be_remote(orphans: list[Span]) -> bool:
    """Return whether their parents may stand in a caller's trace, in another process."""
    return not any(span.is_module for span in orphans)


def _strays(trace: Trace, marker: re.Pattern[str] | None) -> Iterator[Finding]:
    root = trace.root
    if root is None:
        return
    ids = _ids(root)
    if SESSION in trace.row.metadata:
        ids.setdefault("sessionid", set()).add(trace.row.metadata[SESSION])
    markers = set(marker.findall(root.text(INPUTS))) if marker is not None else set()
    for span in trace.spans:
        if span is root:
            continue
        parent = trace.by_id.get(span.parent_id or "")
        if parent is not None and _is_outside(span, parent) and not _is_marked_late(span):
            yield found(Kind.STRAY, trace, f"{span.name} did not begin while {parent.name}, its parent, was open")
        elif ids and any(key in ids and not values <= ids[key] for key, values in _ids(span).items()):
            yield found(Kind.STRAY, trace, f"{span.name} has the id of another session or request in its inputs")
        elif marker is not None and markers and not set(marker.findall(span.text(INPUTS))) <= markers:
            yield found(Kind.STRAY, trace, f"{span.name} has another call's marker in its inputs")


def _is_outside(span: Span, parent: Span) -> bool:
    return span.start_ns < parent.start_ns - _APART or bool(parent.end_ns and span.start_ns > parent.end_ns + _APART)


def _is_marked_late(span: Span) -> bool:
    return span.text("outcome") == '"late"' or span.text("late") == "true"


def _ids(span: Span) -> dict[str, set[str]]:
    if not any(each in span.row.content for each in _ENDS_OF_IDS):
        return {}
    inputs = parse(span.text(INPUTS))
    found_: dict[str, set[str]] = {}
    for fields in (inputs, *(inputs.values() if isinstance(inputs, dict) else ())):
        for key, value in fields.items() if isinstance(fields, dict) else ():
            if isinstance(value, (str, int)) and _ID.fullmatch(key):
                found_.setdefault(key.lower().replace("_", ""), set()).add(str(value))
    return found_


def _unfinished(trace: Trace, idle_seconds: float) -> Iterator[Finding]:
    open_spans = [span for span in trace.spans if not span.end_ns]
    if trace.row.state == "IN_PROGRESS":
        if is_idle(trace.last_sign_ms, idle_seconds):
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(trace.row.start_ms / 1000))
            yield found(Kind.UNFINISHED, trace, f"{name_of(trace)} is in progress since {since}")
    elif open_spans:
        yield found(Kind.UNFINISHED, trace, f"the trace has ended, but {open_spans[0].name} has not")


def name_of(trace: Trace) -> str:
    """Return the name that MLflow shows."""
    root = trace.root
    return trace.row.tags.get("mlflow.traceName") or (root.name if root is not None else trace.row.trace_id)


def _doubled(trace: Trace) -> Iterator[Finding]:
    for span in trace.spans:
        parent = trace.by_id.get(span.parent_id or "")
        if parent is not None and _are_twins(span, parent):
            yield found(Kind.DOUBLED, trace, f"{span.name} stands twice, one below the other")
    starts: dict[tuple[Any, ...], Span] = {}
    for span in trace.spans:
        key = (span.start_ns, span.end_ns, span.name)
        if key in starts and starts[key].text(INPUTS) == span.text(INPUTS):
            yield found(Kind.DOUBLED, trace, f"{span.name} stands twice, with the same times")
        starts[key] = span


def _are_twins(span: Span, parent: Span) -> bool:
    return (
        span.name == parent.name
        and span.start_ns - parent.start_ns <= _APART
        and (parent.end_ns or 0) - (span.end_ns or 0) <= _APART
        and span.text(INPUTS) == parent.text(INPUTS)
        and span.text(OUTPUTS) == parent.text(OUTPUTS)
    )


def _late(trace: Trace) -> Iterator[Finding]:
    root = trace.root
    if root is None or not root.end_ns:
        return
    may_be_marked = not trace.attribute_texts.isdisjoint(_LATE) or trace.says_more
    for span in trace.spans:
        if may_be_marked and _is_marked_late(span):
            yield found(Kind.OUTLIVED, trace, f"{span.name} ended after its root")
        elif (
            (span.end_ns or 0) > root.end_ns + _APART
            and span.start_ns <= root.end_ns + _APART
            and "outcome" not in span.attributes
        ):
            yield found(Kind.LATE, trace, f"{span.name} ended after its root")


def _tokens(trace: Trace) -> Iterator[Finding]:
    if trace.row.state == "IN_PROGRESS":
        return
    topmost = [usage for top in trace.tops for usage in _topmost(top)]
    of_calls = [usage for span in trace.spans if span.is_lm and (usage := span.usage)]
    if not topmost and not trace.row.tokens:
        return
    total = {key: trace.row.tokens.get(key, 0) for key in _COUNTS}
    sums = [_sum(topmost), _sum(of_calls)]
    if total not in sums:
        yield found(Kind.TOKENS, trace, f"{total[_TOTAL]} tokens, but its calls have {sums[bool(of_calls)][_TOTAL]}")
    elif of_calls and sums[0][_TOTAL] < sums[1][_TOTAL]:
        yield found(Kind.TOKENS, trace, f"{sums[0][_TOTAL]} tokens, but its LM calls have {sums[1][_TOTAL]}")


def _topmost(span: Span, depth: int = 0) -> Iterator[Mapping[str, int]]:
    if usage := span.usage:
        yield usage
    elif depth < 200:  # noqa: PLR2004 - deeper than any program
        for child in span.children:
            yield from _topmost(child, depth + 1)


def _sum(usages: list[Mapping[str, int]]) -> dict[str, int]:
    return {key: sum([int(usage.get(key) or 0) for usage in usages]) for key in _COUNTS}
