"""Checks of what a trace shows: secrets in clear, by the patterns of masking, and values that were cut."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from dspy_mlflow_async.cli.audit.findings import Finding, Kind
from dspy_mlflow_async.cli.audit.traces import Span, Trace, found, parse
from dspy_mlflow_async.spans.secret_names import MASK, is_secret
from dspy_mlflow_async.spans.secret_texts import mask

_CUT = re.compile(r"\[cut: (?:\d+ of )?\d+ \w+\]")
_NAMED_SECRETS = ("CHAT_MODEL", "LLM", "TOOL")  # spans whose arguments may be credentials by name, as in masking
_SHORTEST_SECRET = 6
_NO_SECRETS = (f'"{MASK}"', '""', "null", '"None"', "true", "false")
_KEPT = 8192  # characters of the texts of which it is remembered what they show
# MLflow's own, and ours: they hold no text of a program's.
_PLAIN = frozenset(
    {
        *("mlflow.traceRequestId", "mlflow.spanType", "mlflow.spanLogLevel", "mlflow.chat.tokenUsage", "outcome"),
        *("mlflow.message.format", "program_hash", "temperature", "max_tokens", "cache", "cache_hit", "model_type"),
    }
)


def check(trace: Trace) -> Iterator[Finding]:
    """Yield the places of secrets, never themselves, and the spans with values that were cut."""
    for place, value in (*trace.row.tags.items(), *trace.row.metadata.items()):
        if mask(value) != value:
            yield found(Kind.SECRET, trace, f"tag or metadata {place}")
    for said in trace.row.assessments:
        if any(True for _ in _secrets([said.value, said.rationale], "", by_name=False)):
            yield found(Kind.SECRET, trace, f"feedback {said.name}")
    for span in trace.spans:
        yield from _span(trace, span)


def _span(trace: Trace, span: Span) -> Iterator[Finding]:
    is_cut = False
    by_name = span.kind in _NAMED_SECRETS and not span.is_module
    for key, text in span.attributes.items():
        if len(text) < _SHORTEST_SECRET or key in _PLAIN:
            continue
        paths, has_cut = (_looked_at if len(text) <= _KEPT else _look_at)(text, by_name)
        is_cut = is_cut or has_cut
        if by_name and not paths and is_secret(key) and text not in _NO_SECRETS:
            paths = ("",)
        for path in paths:
            yield found(Kind.SECRET, trace, f"{span.name}, {key.removeprefix('mlflow.')}{path}")
    if is_cut:
        yield found(Kind.CUT, trace, span.name)
    said = [*(span.content.get("events") or ()), (span.content.get("status") or {}).get("message")]
    if any(True for _ in _secrets(said, "", by_name=False)):
        yield found(Kind.SECRET, trace, f"{span.name}, its events or status")


def _look_at(text: str, by_name: bool) -> tuple[tuple[str, ...], bool]:
    """Return where an attribute's JSON text shows secrets, and whether a part of it was cut."""
    return tuple(_secrets(parse(text), "", by_name=by_name)), "[cut: " in text and _CUT.search(text) is not None


# Models, signatures and instructions are the same in many traces, and inputs in several spans of one.
_looked_at = functools.lru_cache(maxsize=2048)(_look_at)


def _secrets(value: Any, path: str, *, by_name: bool) -> Iterator[str]:
    """Yield the places of what masking would have masked."""
    if type(value) is str:
        if len(value) >= _SHORTEST_SECRET and mask(value) != value:
            yield path
    elif type(value) is dict:
        for key, item in value.items():
            if by_name and type(item) is str and item not in {"", MASK, "None", "null"} and is_secret(key):
                yield f"{path}.{key}"
            elif type(item) in (str, dict, list):
                yield from _secrets(item, f"{path}.{key}", by_name=by_name)
    elif type(value) is list:
        for place, item in enumerate(value):
            if type(item) in (str, dict, list):
                yield from _secrets(item, f"{path}[{place}]", by_name=by_name)
