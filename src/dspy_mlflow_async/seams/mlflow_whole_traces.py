"""Whole traces in one request: the spans of many, as MLflow sends them, and what `start_trace` is told of each.

Both halves: a client sends to a server with our route, and the route takes apart what came. Checked on mlflow 3.12.0,
3.17.2 and 3.18.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

from mlflow.entities import TraceInfo

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.mlflow_span_message import varint
from dspy_mlflow_async.seams.patching import over

__all__ = ["ROUTE", "asks", "can_be_sent", "can_send", "decode_infos", "encode_infos", "send"]

RestStore: Any = taken("mlflow.store.tracking.rest_store:RestStore")
TraceInfoV3: Any = taken("mlflow.protos.service_pb2:TraceInfoV3")
http_request: Any = taken("mlflow.utils.rest_utils:http_request")
_send_spans: Any = taken("mlflow.store.tracking.rest_store:RestStore.log_spans")

# Below MLflow's route for spans, so that whoever guards that one guards this as well, by the same header.
ROUTE = "/v1/traces/dspy-mlflow-async"
VERSION = 1  # of what is sent
_EXPERIMENT = "x-mlflow-experiment-id"
# The key of a field of bytes, number 1000, which no message of OpenTelemetry's has: a reader passes over it.
_KEY = bytes([0xC2, 0x3E])
_CONTINUES, _LENGTH_DELIMITED = 0x80, 2


def can_send(store: Any) -> bool:
    """Return whether a store is a server, and MLflow sends to it as we know it."""
    is_known = None not in (RestStore, TraceInfoV3, http_request) and isinstance(_send_spans, FunctionType)
    return is_known and type(store) is RestStore


def asks(store: Any, experiment_id: str) -> bool:
    """Ask a server whether it takes whole traces."""
    headers = {_EXPERIMENT: experiment_id}
    answer = http_request(host_creds=store.get_host_creds(), endpoint=ROUTE, method="GET", extra_headers=headers)
    return bool(_said(answer).get("whole_traces") == VERSION)


def can_be_sent(trace: Any) -> bool:
    """Return whether MLflow can write the spans of a trace as a message."""
    try:
        for span in trace.spans:
            span.to_otel_proto()
    except ValueError:
        return False
    return True


def send(store: Any, experiment_id: str, traces: Sequence[Any]) -> set[str] | None:
    """Send whole traces to a server.

    Args:
        store: MLflow's store.
        experiment_id: The experiment of all of them.
        traces: Operations with the spans, and with what `start_trace` would be told of each.

    Returns:
        The ids of those that are stored, with all that belongs to them; None where the server does not take any.

    Raises:
        ValueError: Where one of them cannot be written as a message. Then nothing is sent.
    """
    infos = [trace.info for trace in traces]
    answers = []

    def request(*, endpoint: str, data: bytes, **more: Any) -> Any:  # noqa: ARG001 - MLflow's
        answers.append(http_request(endpoint=ROUTE, data=data + encode_infos(infos), **more))
        return answers[-1]

    names = {"http_request": request, "verify_rest_response": lambda *_, **__: None}
    over(_send_spans, _send_spans.__globals__ | names)(
        store, experiment_id, [span for trace in traces for span in trace.spans]
    )
    stored = _said(answers[-1]).get("stored") if answers else None
    return set(stored) if isinstance(stored, list) else None


def _said(answer: Any) -> dict[str, Any]:
    """Return what our route has answered; nothing where something else has."""
    try:
        said = answer.json() if answer.status_code == 200 else None  # noqa: PLR2004 - HTTP
    except ValueError:
        said = None
    return said if isinstance(said, dict) else {}


def encode_infos(infos: Sequence[Any]) -> bytes:
    """Return traces as fields that may follow a message of spans; those that MLflow does not take are left out."""
    parts = []
    for info in infos:
        with contextlib.suppress(Exception):
            message = info.to_proto().SerializeToString()
            parts += [_KEY, varint(len(message)), message]
    return b"".join(parts)


def decode_infos(body: bytes) -> list[TraceInfo]:
    """Return the traces in such a message, as far as they can be read."""
    infos = []
    with contextlib.suppress(ValueError):
        for message in _fields(body):
            with contextlib.suppress(Exception):
                infos.append(TraceInfo.from_proto(TraceInfoV3.FromString(message)))
    return infos


def _fields(body: bytes) -> Iterator[bytes]:
    """Yield the contents of the fields that are ours; the message has none but such as have a length."""
    place = 0
    while place < len(body):
        begin = place
        key, place = _read_varint(body, place)
        is_ours = body[begin:place] == _KEY
        length, place = _read_varint(body, place)
        if key & 7 != _LENGTH_DELIMITED or place + length > len(body):
            raise ValueError("no message of spans")
        if is_ours:
            yield body[place : place + length]
        place += length


def _read_varint(body: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while place < len(body):
        digit = body[place]
        place += 1
        number |= (digit & 0x7F) << shift
        if digit < _CONTINUES:
            return number, place
        shift += 7
    raise ValueError("no message of spans")
