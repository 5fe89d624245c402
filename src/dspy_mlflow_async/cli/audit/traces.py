"""A stored trace as the checks look at it: its spans by parent, their contents parsed as they are asked for."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from dspy_mlflow_async.cli.audit.findings import Finding, Kind
from dspy_mlflow_async.seams.mlflow_bulk_reads import SpanRow, TraceRow
from dspy_mlflow_async.spans.secret_texts import mask

INPUTS, OUTPUTS, USAGE = "mlflow.spanInputs", "mlflow.spanOutputs", "mlflow.chat.tokenUsage"
# As MLflow and we write it; another writer's is parsed as a whole.
_ATTRIBUTES, _USAGE = '"attributes": {"', f'"{USAGE}": "'
BETWEEN, _NO_LINKS = '", "', '"}, "links": []}'
_SAYS_NOTHING = tuple(
    f'"events": [], "status": {{"code": "STATUS_CODE_{code}", "message": {message}}}, '
    for code in ("OK", "UNSET", "ERROR")
    for message in ('""', "null")
)
MILLISECOND = 1_000_000  # in nanoseconds
_MAX_DEPTH = 200


def parse(text: str) -> Any:
    """Return what a JSON text says; a text that is none is itself the value."""
    try:
        return orjson.loads(text)
    except ValueError:
        try:
            return json.loads(text)  # NaN, or a number of many digits
        except ValueError:
            return text


class Span:
    """One span of a stored trace; what it contains is parsed once something of it is asked for."""

    __slots__ = ("_content", "children", "end_ns", "kind", "name", "parent_id", "row", "span_id", "start_ns")

    def __init__(self, row: SpanRow) -> None:
        self.row = row
        self.span_id, self.parent_id, self.name, kind, self.start_ns, self.end_ns, _ = row
        self.kind = kind or ""
        self._content: dict[str, Any] | None = None
        self.children: list[Span] = []

    @property
    def content(self) -> dict[str, Any]:
        """All of it, as MLflow writes it; empty where that is no JSON object."""
        if self._content is None:
            content = parse(self.row.content)
            self._content = content if type(content) is dict else {}
        return self._content

    @property
    def attributes(self) -> dict[str, str]:
        """Its attributes, each as a JSON text."""
        return self.content.get("attributes") or {}

    @property
    def attribute_texts(self) -> str | None:
        """Attributes as they are written, ``KEY": "TEXT``, with ``BETWEEN`` between them.

        None where it has more to say, in events, links, or the message of its status, or was written otherwise.
        """
        content = self.row.content
        begin = content.find(_ATTRIBUTES)
        is_all = content.endswith(_SAYS_NOTHING, 0, max(begin, 0)) and content.endswith(_NO_LINKS)
        return content[begin + len(_ATTRIBUTES) : -len(_NO_LINKS)] if is_all else None

    def value(self, key: str) -> Any:
        """Return an attribute's value, or None."""
        if f'"{key}"' not in self.row.content:
            return None
        text = self.attributes.get(key)
        return None if text is None else parse(text)

    def text(self, key: str) -> str:
        """Return the JSON text of an attribute; empty where there is none."""
        return self.attributes.get(key) or ""

    @property
    def usage(self) -> Mapping[str, int]:
        """Tokens that it has used; empty where it says none."""
        content = self.row.content
        begin = content.find(_USAGE)
        if begin < 0 and USAGE not in content:
            return {}
        begin += len(_USAGE)
        usage = parse(content[begin : content.find("}", begin) + 1].replace('\\"', '"'))
        if type(usage) is not dict:
            usage = self.value(USAGE)
        return usage if type(usage) is dict else {}

    @property
    def is_ok(self) -> bool:
        """Return whether it ended without an error."""
        return str(self.content.get("status", {}).get("code", "")).endswith("OK")

    @property
    def is_adapter(self) -> bool:
        """Return whether it is a step of an adapter, which a DSPy call is always above."""
        return self.kind == "PARSER" and self.name.endswith((".format", ".parse"))

    @property
    def is_lm(self) -> bool:
        """Return whether it is a call of an LM."""
        return self.name.endswith(".__call__") and self.kind in {"CHAT_MODEL", "LLM"}

    @property
    def is_module(self) -> bool:
        """Return whether it is a call of a DSPy module."""
        return self.name.endswith(".forward")

    @property
    def is_predict(self) -> bool:
        """Return whether it is a call of ``dspy.Predict`` itself."""
        return self.name == "Predict.forward"

    def walk(self, depth: int = 0) -> Iterator[Span]:
        """Yield this span and all below it."""
        yield self
        if depth < _MAX_DEPTH:
            for child in self.children:
                yield from child.walk(depth + 1)


class Trace:
    """One stored trace.

    Attributes:
        row: What the store has of it.
        spans: Its spans in the order in which they began.
        by_id: The same by id.
        tops: Spans that no span of the trace is above.
        says_more: Whether there are spans of which ``attribute_texts`` has nothing.
    """

    __slots__ = ("__dict__", "by_id", "row", "says_more", "spans", "tops")

    def __init__(self, row: TraceRow) -> None:
        self.row = row
        self.spans = sorted(map(Span, row.spans or ()), key=operator.attrgetter("start_ns"))
        self.by_id = {span.span_id: span for span in self.spans}
        self.tops: list[Span] = []
        self.says_more = False
        for span in self.spans:
            parent = self.by_id.get(span.parent_id) if span.parent_id else None
            (self.tops if parent is None else parent.children).append(span)

    @property
    def root(self) -> Span | None:
        """The one span that has no parent, and should be the only one; else the first."""
        return next((span for span in self.tops if not span.parent_id), self.tops[0] if self.tops else None)

    @functools.cached_property
    def attribute_texts(self) -> set[str]:
        """All attributes of its spans, as they are written, ``KEY": "TEXT``; see ``says_more``."""
        texts = [text for span in self.spans if (text := span.attribute_texts) is not None]
        self.says_more = len(texts) < len(self.spans)
        return set(BETWEEN.join(texts).split(BETWEEN))

    @functools.cached_property
    def end_ns(self) -> int:
        """End of its root; where that has not ended, of its last span. In nanoseconds since the epoch."""
        root = self.root
        if root is not None and root.end_ns:
            return root.end_ns
        return max((span.end_ns or span.start_ns for span in self.spans), default=self.row.start_ms * MILLISECOND)

    @functools.cached_property
    def last_sign_ms(self) -> int:
        """Last time that anything of it was heard of, in milliseconds since the epoch."""
        return max([self.row.start_ms, *((span.end_ns or span.start_ns) // MILLISECOND for span in self.spans)])


def found(kind: Kind, trace: Trace, detail: str) -> Finding:
    """Return a finding about a trace."""
    return Finding(kind, mask(detail), trace.row.experiment_id, trace.row.trace_id)
