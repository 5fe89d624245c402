"""Checks of what a trace shows: secrets in clear, by the patterns of masking, and values that were cut."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from dspy_mlflow_async.cli.audit.findings import Finding, Kind
from dspy_mlflow_async.cli.audit.traces import BETWEEN, Span, Trace, found, parse
from dspy_mlflow_async.spans.secret_names import LONGEST_NAME, MASK, is_secret, may_name_a_secret
from dspy_mlflow_async.spans.secret_texts import mask, may_hold_secrets

_CUT = re.compile(r"\[cut: (?:\d+ of )?\d+ \w+\]")
_CUT_BEGINS = "[cut: "
_NAMED_SECRETS = ("CHAT_MODEL", "LLM", "TOOL")  # spans whose arguments may be credentials by name, as in masking
_SHORTEST_SECRET = 6
_NO_SECRETS = (f'"{MASK}"', '""', "null", '"None"', "true", "false")
_KEPT = 8192  # characters of the texts of which it is remembered what they show
_REMEMBERED, _LONGEST_REMEMBERED = 10_000, 1000  # texts, and parts of some, and their characters
# MLflow's own, and ours: they hold no text of a program's.
_PLAIN = frozenset(
    {
        *("mlflow.traceRequestId", "mlflow.spanType", "mlflow.spanLogLevel", "mlflow.chat.tokenUsage", "outcome"),
        *("mlflow.message.format", "program_hash", "temperature", "max_tokens", "cache", "cache_hit", "model_type"),
    }
)


class Contents:
    """Search for what no trace should show, which remembers what it has found harmless.

    Prompts, signatures and names of fields are the same in many traces. So texts that are new are looked at in parts,
    which quotes separate: what a part may show, whatever stands beside it, is asked once. Only texts with a part that
    may show something, or with a key that is in parts itself, are read as a whole.
    """

    def __init__(self) -> None:
        self._harmless_texts: set[str] = set()
        self._harmless: set[str] = set()
        self._suspicious: set[str] = set()

    def check(self, trace: Trace) -> Iterator[Finding]:
        """Yield the places of secrets, never themselves, and the spans with values that were cut."""
        for place, value in (*trace.row.tags.items(), *trace.row.metadata.items()):
            if mask(value) != value:
                yield found(Kind.SECRET, trace, f"tag or metadata {place}")
        for said in trace.row.assessments:
            if any(True for _ in _secrets([said.value, said.rationale], "", by_name=False)):
                yield found(Kind.SECRET, trace, f"feedback {said.name}")
        to_read = self._suspicious_of(trace.attribute_texts)
        if to_read or trace.says_more:
            for span in trace.spans:
                text = span.attribute_texts
                if text is None or not to_read.isdisjoint(text.split(BETWEEN)):
                    yield from check_span(trace, span)

    def _suspicious_of(self, texts: set[str]) -> set[str]:
        """Return those of the texts of attributes that have to be read as a whole."""
        texts = texts - self._harmless_texts
        parts = set('"'.join(texts).split('"')) - self._harmless
        unknown = parts - self._suspicious
        suspicious = parts - unknown
        if unknown and not _are_harmless(unknown):
            suspicious |= {each for each in unknown if not _are_harmless({each})}
        to_read = {each for each in texts if _has_quote_in_key(each)}
        if suspicious:
            to_read |= {each for each in texts if not suspicious.isdisjoint(each.split('"'))}
        for known, new in (
            (self._harmless_texts, texts - to_read),
            (self._harmless, unknown - suspicious),
            (self._suspicious, unknown & suspicious),
        ):
            if len(known) > _REMEMBERED:
                known.clear()
            known.update([each for each in new if len(each) <= _LONGEST_REMEMBERED])
        return to_read


def check_span(trace: Trace, span: Span) -> Iterator[Finding]:
    """Yield the places of secrets in a span, by reading all of it, and whether it has values that were cut."""
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


# A quote within a text within the JSON text of an attribute, as it is written there, and a key with one.
_INNER_QUOTE = '\\\\\\"'
_KEY_WITH_QUOTE = re.compile(r'\\\\\\"(?:[^"]*[^"\\])?(?:\\{4})*\\"(?: |\\[nrt])*:')


def _has_quote_in_key(text: str) -> bool:
    """Return whether an attribute, ``KEY": "TEXT``, has a key that none of its parts between quotes is the whole of."""
    first = text.find('"')
    return text[first - 1 : first] == "\\" or (_INNER_QUOTE in text and _KEY_WITH_QUOTE.search(text) is not None)


_NUL, _ESCAPED_NUL = "\0", "\\\0"
_BEHIND = '"=\0 '  # what stands behind each part when several are looked at at once
_BEHIND_IN_JSON = '\\"=\\u0000 '


def _are_harmless(parts: set[str]) -> bool:
    """Return whether parts of the JSON text of attributes, which quotes separate, show nothing, whatever is beside.

    An attribute is itself a JSON text in that text, so there are two forms of writing to be undone.
    """
    # A quote within a text has a backslash before it, which belongs to the quote.
    joined = _NUL.join((*parts, "")).replace(_ESCAPED_NUL, _NUL).replace(_NUL, "\\u0000")
    inner = parse(f'"{joined}"')
    if type(inner) is not str or not inner.endswith(_NUL):
        return False
    shown = parse(f'"{inner.replace(_ESCAPED_NUL, _NUL).replace(_NUL, _BEHIND_IN_JSON)}"')
    if type(shown) is not str or not shown.endswith(_BEHIND):
        return False
    if _CUT_BEGINS in shown or may_hold_secrets(shown):
        return False
    names = [each for each in shown.split(_BEHIND) if len(each) <= LONGEST_NAME]
    return not (may_name_a_secret(_NUL.join(names)) and any(map(is_secret, names)))


def _look_at(text: str, by_name: bool) -> tuple[tuple[str, ...], bool]:
    """Return where an attribute's JSON text shows secrets, and whether a part of it was cut."""
    return tuple(_secrets(parse(text), "", by_name=by_name)), _CUT_BEGINS in text and _CUT.search(text) is not None


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
