"""Traces that were handed on not long ago, so that late spans and late feedback still find their place."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator

from dspy_mlflow_async.export.assemble.open_trace import ABANDONED_AFTER, OpenTrace

# How many. MLflow's own cache is as large.
RECENT = 1_000
# As many at the most, where children that outlive their traces are still open.
_MOST_RECENT = 10_000


class RecentTraces:
    """The last traces that were handed on, without their spans, and those whose children are still open.

    Whoever changes it holds the assembler's lock.
    """

    def __init__(self) -> None:
        self._by_otel_id: OrderedDict[int, OpenTrace] = OrderedDict()
        self._by_trace_id: dict[str, OpenTrace] = {}

    def __len__(self) -> int:
        return len(self._by_otel_id)

    def __iter__(self) -> Iterator[OpenTrace]:
        return iter(list(self._by_otel_id.values()))

    def get(self, otel_id: int) -> OpenTrace | None:
        """Return a trace by OpenTelemetry's id."""
        return self._by_otel_id.get(otel_id)

    def named(self, trace_id: str) -> OpenTrace | None:
        """Return a trace by MLflow's id."""
        return self._by_trace_id.get(trace_id)

    def add(self, entry: OpenTrace) -> None:
        """Remember a trace, and forget the oldest where there are too many."""
        otel_id = entry.identity.otel_id
        if (earlier := self._by_otel_id.get(otel_id)) is not None:
            entry.children.ids |= earlier.children.ids
        self._by_otel_id[otel_id] = entry
        self._by_otel_id.move_to_end(otel_id)
        self._by_trace_id[entry.identity.trace_id] = entry
        while len(self._by_otel_id) > RECENT:
            oldest_id, oldest = next(iter(self._by_otel_id.items()))
            if _is_awaited(oldest) and len(self._by_otel_id) <= _MOST_RECENT:
                # Look again when as many others have come.
                self._by_otel_id.move_to_end(oldest_id)
                break
            del self._by_otel_id[oldest_id]
            self._by_trace_id.pop(oldest.identity.trace_id, None)

    def update(self, other: RecentTraces) -> None:
        """Take over what another assembler remembers."""
        self._by_otel_id.update(other._by_otel_id)
        self._by_trace_id.update(other._by_trace_id)

    def clear(self) -> None:
        """Forget all of them."""
        self._by_otel_id.clear()
        self._by_trace_id.clear()


def _is_awaited(entry: OpenTrace) -> bool:
    """Return whether spans of a trace that was handed on are still open, and may yet end."""
    return bool(entry.children.ids) and time.monotonic() - entry.began < ABANDONED_AFTER
