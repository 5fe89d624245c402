"""Checks of traces that ran at the same time: pieces of one call, and spans of each other's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import orjson

from dspy_mlflow_async.cli.audit.findings import Finding, Kind
from dspy_mlflow_async.cli.audit.traces import INPUTS, OUTPUTS, Span, Trace, found
from dspy_mlflow_async.seams.mlflow_bulk_reads import SESSION, SOURCE_RUN

JUDGE_TAG, JUDGED = "mlflow.trace.sourceScorer", "dspy_mlflow_async.judgedTrace"
_MOST = 256  # traces that are open at once, of which more than so many are not compared
_SHORTEST = 2  # characters of a text that tells anything
_TEXTS = 50  # texts of a value that are looked for
_OF_DSPY = (".forward", ".__call__", ".format", ".parse")


class Calls:
    """Window over traces in the order in which they began, as wide as they overlap."""

    def __init__(self) -> None:
        self._open: list[Trace] = []
        self._seen: dict[str, None] = {}

    def check(self, trace: Trace) -> Iterator[Finding]:
        """Yield what is wrong with a trace, or with one that it overlaps."""
        root = trace.root
        if root is None:
            return
        self._open = [each for each in self._open if each.end_ns >= root.start_ns][-_MOST:]
        for other in reversed(self._open):
            yield from self._pair(other, trace)
        self._open.append(trace)

    def _pair(self, first: Trace, second: Trace) -> Iterator[Finding]:
        if _are_doubles(first, second):
            yield found(Kind.DOUBLED, second, f"the trace is the same as {first.row.trace_id}")
            return
        for outer, inner in ((first, second), (second, first)):
            if inner.row.trace_id not in self._seen and _is_fragment(inner, outer):
                self._remember(inner.row.trace_id)
                yield found(
                    Kind.FRAGMENT, inner, f"{_root(inner).name} ran inside {_root(outer).name} of {outer.row.trace_id}"
                )
            for span in _unexplained(outer):
                if _begins_with(inner, span):
                    yield found(
                        Kind.STRAY, outer, f"{span.name} has the inputs of {inner.row.trace_id}, which ran beside it"
                    )

    def _remember(self, trace_id: str) -> None:
        self._seen[trace_id] = None
        if len(self._seen) > 4 * _MOST:
            del self._seen[next(iter(self._seen))]


def _root(trace: Trace) -> Span:
    return trace.root or trace.spans[0]


def _are_doubles(first: Trace, second: Trace) -> bool:
    a, b = _root(first), _root(second)
    return (a.start_ns, a.end_ns, a.name) == (b.start_ns, b.end_ns, b.name) and a.text(INPUTS) == b.text(INPUTS)


def _is_fragment(inner: Trace, outer: Trace) -> bool:
    """Return whether a trace is a piece of another's call: it fills a gap in it, with what went in and came out."""
    root, around = _root(inner), _root(outer)
    begin, end = root.start_ns, inner.end_ns
    if not (around.start_ns <= begin and end <= outer.end_ns) or not _may_be_one_call(inner, outer):
        return False
    if inner.row.request_id is not None and inner.row.request_id == outer.row.request_id:
        return True
    if root.is_adapter:
        return False  # found already, by itself
    if not around.name.endswith(".forward") or not (root.name.endswith(_OF_DSPY) or root.name.startswith("Tool.")):
        return False
    if root.name == around.name and around.children:
        return False  # two calls of one program
    before = [around.text(INPUTS), *(s.text(OUTPUTS) for s in outer.spans if s.end_ns and s.end_ns <= begin)]
    after = [around.text(OUTPUTS), *(s.text(INPUTS) for s in outer.spans if s.start_ns >= end)]
    if not _is_in(_texts(root.value(INPUTS)), before):
        return False
    outputs = _texts(root.value(OUTPUTS))
    if any(child.start_ns < end and (child.end_ns or end) > begin for child in around.children):
        # Something else ran meanwhile: then it must have given what nothing else in the call can have given.
        own = [around.text(INPUTS), *(s.text(OUTPUTS) for s in outer.spans if s is not around and s.start_ns < end)]
        return any(_is_in([text], after) and not _is_in([text], own) for text in outputs)
    return not any(after) or _is_in(outputs, after)


def _may_be_one_call(inner: Trace, outer: Trace) -> bool:
    if JUDGE_TAG in inner.row.tags or JUDGED in inner.row.metadata:
        return False
    a, b = inner.row.metadata, outer.row.metadata
    return all(a.get(key, "") == b.get(key, "") or not (a.get(key) and b.get(key)) for key in (SOURCE_RUN, SESSION))


def _unexplained(trace: Trace) -> list[Span]:
    """Return the inner calls none of whose inputs were the call's, or came out of another of its calls."""
    known = trace.__dict__.get("unexplained")
    if known is None:
        known = trace.__dict__["unexplained"] = list(_find_unexplained(trace))
    return known


def _find_unexplained(trace: Trace) -> Iterator[Span]:
    root = _root(trace)
    sources = [root.text(INPUTS), *(span.text(OUTPUTS) for span in trace.spans if span is not root)]
    for span in trace.spans:
        if span is not root and span.is_module:
            parent = trace.by_id.get(span.parent_id or "")
            if parent is not None and parent is not root and parent.text(INPUTS) == span.text(INPUTS):
                continue  # it stands or falls with its parent
            texts = _texts(span.value(INPUTS))
            if texts and not any(_is_in([text], sources) for text in texts):
                yield span


def _begins_with(trace: Trace, span: Span) -> bool:
    """Return whether these inputs are those of a trace that was there when the span began."""
    root = _root(trace)
    if not root.start_ns <= span.start_ns <= trace.end_ns:
        return False
    own = set(_texts(root.value(INPUTS)))
    return bool(own) and own >= set(_texts(span.value(INPUTS)))


def _texts(value: Any) -> list[str]:
    """Return the texts in a value, as far as they tell anything."""
    texts: list[str] = []
    waiting = [value]
    while waiting and len(texts) < _TEXTS:
        each = waiting.pop()
        if isinstance(each, str):
            if len(each) >= _SHORTEST:
                texts.append(each)
        elif isinstance(each, dict):
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)
    return texts


def _is_in(texts: list[str], sources: list[str]) -> bool:
    """Return whether one of the texts stands in one of these JSON texts, however that writes what is not ASCII."""
    for text in texts:
        forms = {text, json.dumps(text)[1:-1]}
        if len(forms) > 1:
            forms.add(orjson.dumps(text.encode("utf-8", "replace").decode()).decode()[1:-1])
        if any(form in source for form in forms for source in sources):
            return True
    return False
