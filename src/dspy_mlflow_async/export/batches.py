"""Which items may be written together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dspy_mlflow_async.export.items import Item, SpansItem, TraceItem


def is_late(item: Any) -> bool:
    """Whether an item holds spans of a trace that was written before."""
    return isinstance(item, TraceItem) and item.stage == "late"


def grouped(items: Sequence[Item]) -> Iterable[list[Item]]:
    """Consecutive items of one sort; a late or repeated trace begins a new group, so that order is kept.

    Spans of a trace that others own may come one by one, and need no group of their own.
    """
    group: list[Item] = []
    keys: set[str] = set()
    for item in items:
        is_trace = isinstance(item, (TraceItem, SpansItem))
        is_repeated = item.key in keys and not isinstance(item, SpansItem)
        if group and (is_trace != isinstance(group[0], (TraceItem, SpansItem)) or is_repeated or is_late(item)):
            yield group
            group, keys = [], set()
        group.append(item)
        keys.add(item.key)
    if group:
        yield group


def by_experiment(items: Sequence[Any]) -> Iterable[tuple[str, list[Any]]]:
    """The spans of all items, by the experiment that they go to."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(item.experiment_id or "0", []).extend(item.spans)
    return groups.items()
