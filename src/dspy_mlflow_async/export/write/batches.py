"""Grouping of operations into batches that may be written together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dspy_mlflow_async.export.operations import Operation, SpansOperation, TraceOperation
from dspy_mlflow_async.seams.mlflow_traces import resource_of


def is_late(operation: Any) -> bool:
    """Return whether an operation holds spans of a trace that was written before."""
    return isinstance(operation, TraceOperation) and operation.stage == "late"


def is_shared(operation: Any) -> bool:
    """Return whether an operation holds spans of a trace to which several processes add theirs."""
    return isinstance(operation, SpansOperation) or (isinstance(operation, TraceOperation) and operation.is_shared)


def grouped(operations: Sequence[Operation]) -> Iterable[list[Operation]]:
    """Group operations in few groups of one sort each, which keep the order of what has the same key.

    A trace that comes again needs another group. Late ones are by themselves, since they cannot be written in one
    transaction; spans of a trace that others own may come one by one, and so may what is said of traces later and
    operations on runs, each in groups of their own.
    """
    groups: list[tuple[str, list[Operation]]] = []
    last: dict[str, int] = {}  # by key: the group with its latest operation
    for operation in operations:
        is_trace = isinstance(operation, TraceOperation)
        sort = (
            "late"
            if is_late(operation)
            else "trace"
            if is_trace or isinstance(operation, SpansOperation)
            else type(operation).__name__
        )
        # What is said of a trace twice in one request has no order.
        first = last[operation.key] + is_trace if operation.key in last else 0
        index = next((index for index in range(first, len(groups)) if groups[index][0] == sort), len(groups))
        if index == len(groups):
            groups.append((sort, []))
        groups[index][1].append(operation)
        last[operation.key] = index
    return (group for _, group in groups)


def by_experiment(operations: Sequence[Any]) -> Iterable[tuple[str, list[Any]]]:
    """Return the spans of all operations, by the experiment that they go to."""
    groups: dict[str, list[Any]] = {}
    for operation in operations:
        groups.setdefault(operation.experiment_id or "0", []).extend(operation.spans)
    return groups.items()


def by_request(operations: Sequence[Any]) -> Iterable[list[Any]]:
    """Group operations whose spans a server takes in one request, which is of one experiment and of one resource."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for operation in operations:
        key = (operation.experiment_id, operation.workspace, resource_of(operation.spans))
        groups.setdefault(key, []).append(operation)
    return groups.values()
