"""Spans of DSPy's calls that wait for a store, as texts and numbers, and as spans again for whoever asks for one.

Python's garbage collector looks at each object that may hold others, again and again while traces wait. At a tuple of
texts and numbers it looks once; at one of tuples once for each level.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from opentelemetry.trace import Status, StatusCode

from dspy_mlflow_async.seams.made_once import MadeOnce
from dspy_mlflow_async.seams.mlflow_call_span import CallLiveSpan, CallSpan, CallTracer

_OK, _ERROR = StatusCode.OK, StatusCode.ERROR
_STATUSES = tuple(map(Status, (StatusCode.UNSET, _OK, _ERROR)))  # by the number of the code
_ROOT = -1


class PackedSpans(MadeOnce):
    """MLflow's spans of calls that have ended, packed until somebody looks at one.

    Args:
        begun_by: What has begun all of them.
        packed: OpenTelemetry's id of their trace, how many there are, and what there is to each.
    """

    __slots__ = ("_begun_by", "_packed")

    def __init__(self, begun_by: CallTracer, packed: tuple[Any, ...]) -> None:
        super().__init__()
        self._begun_by = begun_by
        self._packed = packed

    def __len__(self) -> int:
        """Return how many there are."""
        return int(self._packed[1])

    def make(self) -> list[Any]:
        """Make all of them."""
        return _unpacked(self._begun_by, self._packed)


def packed(spans: Sequence[Any]) -> Sequence[Any]:
    """Pack the spans of a trace; return them as they are where there is more to one than is packed.

    Args:
        spans: Spans that have ended, each behind the one that it began under.
    """
    begun_by: Any = None
    parts: list[Any] = [0, len(spans)]
    places: dict[int, int] = {}
    for place, live in enumerate(spans):
        if type(live) is not CallLiveSpan or _has_more(live):
            return spans
        span: Any = live._span
        above = _ROOT if span.above is None else places.get(id(span.above))
        if place == 0:
            begun_by, parts[0] = span.begun_by, span.trace_number
        if above is None or span.begun_by is not begun_by:
            return spans
        places[id(span)] = place
        status, recorded = span._status, span.recorded
        code = status.status_code
        parts += (
            span.number,
            above,
            span._name,
            span._start_time,
            span._end_time,
            1 if code is _OK else 2 if code is _ERROR else 0,
            status.description,
            _same(tuple(recorded)),
        )
        parts += recorded.values()
    return PackedSpans(begun_by, tuple(parts)) if spans else spans


def _has_more(live: CallLiveSpan) -> bool:
    """Return whether a span has events, links or files."""
    made, span = live.__dict__, live._span
    if len(made) > 1 and (made.get("_attachments") or made.get("_links")):
        return True
    return bool(span.is_shown and (span.__dict__.get("_events") or span.__dict__.get("_links")))


@functools.lru_cache(maxsize=1024)
def _same(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return one tuple for all spans that have attributes of these names."""
    return names


def _unpacked(begun_by: CallTracer, packed: tuple[Any, ...]) -> list[Any]:
    rest = iter(packed)
    trace_number, count = next(rest), next(rest)
    spans: list[Any] = []
    for _ in range(count):
        number, above, name, start, end, code, description, names = itertools.islice(rest, 8)
        span = object.__new__(CallSpan)
        span.begun_by, span.trace, span.trace_number, span.number = begun_by, None, trace_number, number
        span.above = None if above == _ROOT else spans[above]._span
        span.recorded, span.is_shown = dict(zip(names, rest)), False  # noqa: B905 - others follow
        span._name, span._start_time, span._end_time = name, start, end
        span._status = _STATUSES[code] if description is None else Status(StatusCode(code), description)
        live = object.__new__(CallLiveSpan)
        live._span = span
        spans.append(live)
    return spans
