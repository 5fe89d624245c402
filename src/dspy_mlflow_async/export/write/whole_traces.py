"""Sending of whole traces, many in one request, to a server that takes them: one that was started with our store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dspy_mlflow_async.export.operations import TraceOperation
from dspy_mlflow_async.export.write.batches import by_request, is_shared
from dspy_mlflow_async.export.write.errors import Outcome, Verdict, classify, is_away
from dspy_mlflow_async.seams import mlflow_http, mlflow_store, mlflow_traces, mlflow_whole_traces

# How long the answer of a server holds that takes none: it may be another one some day.
_ASK_AGAIN_SECONDS = 600.0


class WholeTraces:
    """Sender to one server. Safe for threads: all it keeps is what it has learnt of the server."""

    def __init__(self) -> None:
        self._is_taken: bool | None = None
        self._asked_at = 0.0

    def write(self, client: Any, operations: Sequence[Any], statuses: list[mlflow_http.Status]) -> list[Outcome]:
        """Send complete new traces.

        Returns:
            Outcomes of those that are stored, or that have met a server which is away. All others are for the way that
            every server takes.
        """
        if not mlflow_whole_traces.can_send(client.store):
            return []
        outcomes: list[Outcome] = []
        for group in by_request(list(filter(_is_fit, operations))):
            statuses.clear()
            try:
                with mlflow_store.workspace_scope(group[0].workspace):
                    stored = self._send(client.store, group[0].experiment_id or "0", group, statuses)
            except Exception as error:  # noqa: BLE001 - judged; what is wrong with a trace shows in the other way
                if classify(error, statuses) is Verdict.AWAY:
                    return outcomes + [Outcome(operation, Verdict.AWAY, error) for operation in group]
                stored = set()
            outcomes += [Outcome(operation, Verdict.STORED) for operation in group if operation.key in stored]
        return outcomes

    def _send(
        self, store: Any, experiment_id: str, group: Sequence[TraceOperation], statuses: Sequence[mlflow_http.Status]
    ) -> set[str]:
        if not self._takes(store, experiment_id, statuses):
            return set()
        try:
            stored = mlflow_whole_traces.send(store, experiment_id, group)
        except ValueError:  # one of them has a number that is too large for what is sent, for example
            group = [operation for operation in group if mlflow_whole_traces.can_be_sent(operation)]
            stored = mlflow_whole_traces.send(store, experiment_id, group) if group else set()
        if stored is None and not (statuses and is_away(statuses[-1])):
            self._is_taken, self._asked_at = False, time.monotonic()
        return stored or set()

    def _takes(self, store: Any, experiment_id: str, statuses: Sequence[mlflow_http.Status]) -> bool:
        """Return whether the server takes whole traces: asked once, and at times again where it does not."""
        if self._is_taken is None or (not self._is_taken and time.monotonic() - self._asked_at > _ASK_AGAIN_SECONDS):
            is_taken = mlflow_whole_traces.asks(store, experiment_id)
            if is_taken or not (statuses and is_away(statuses[-1])):
                self._is_taken, self._asked_at = is_taken, time.monotonic()
        return bool(self._is_taken)


def _is_fit(operation: Any) -> bool:
    is_new = isinstance(operation, TraceOperation) and operation.stage == "whole" and bool(operation.spans)
    return is_new and not is_shared(operation) and not mlflow_traces.has_attachments(operation.spans)
