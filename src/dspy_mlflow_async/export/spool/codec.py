"""Operations as JSON and back, complete enough to write them from another process, another day."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import asdict
from typing import Any

import orjson
from mlflow.entities import Assessment, Metric, Param, RunTag, TraceInfo, TraceLocation, TraceState
from mlflow.entities.model_registry import PromptVersion
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import Link as OtelLink
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

from dspy_mlflow_async.export.operations import (
    Creation,
    Operation,
    RunOperation,
    SpansOperation,
    TraceOperation,
    TraceUpdate,
)
from dspy_mlflow_async.export.write.late_runs import is_stand_in
from dspy_mlflow_async.seams import mlflow_traces
from dspy_mlflow_async.seams.mlflow_call_span import (
    attachments_of,
    number_of,
    parent_number_of,
    resource_of_span,
    trace_number_of,
)
from dspy_mlflow_async.seams.mlflow_live import attributes_of

VERSION = 2
# 2 has runs that are not there yet. Records without them are written as 1, which earlier versions of this package read.
_READABLE = frozenset({1, 2})


class UnreadableError(ValueError):
    """Error of a whole record that this version cannot decode: another one wrote it, and can read it."""


def encode(operation: Operation) -> bytes:
    """Encode an operation as one line of JSON, without the line's end."""
    record: dict[str, Any] = {
        "v": VERSION if is_stand_in(operation.key) else 1,
        "kind": _KINDS[type(operation)],
        "key": operation.key,
    }
    record["counted"] = operation.counted
    if isinstance(operation, TraceOperation):
        record |= _encode_spans(operation) | {
            "info": _encode_info(operation.info),
            "stage": operation.stage,
            "is_shared": operation.is_shared,
            "prompts": [[prompt.name, prompt.version] for prompt in operation.prompts],
        }
    elif isinstance(operation, SpansOperation):
        record |= _encode_spans(operation)
    elif isinstance(operation, TraceUpdate):
        record |= {
            "assessments": [assessment.to_dictionary() for assessment in operation.assessments],
            "metadata": operation.metadata,
            "tags": operation.tags,
            "workspace": operation.workspace,
        }
    elif isinstance(operation, RunOperation):
        record |= {
            "creation": None if operation.creation is None else asdict(operation.creation),
            "metrics": [[m.key, _sayable(m.value), m.timestamp, m.step] for m in operation.metrics],
            "params": [[p.key, p.value] for p in operation.params],
            "tags": [[t.key, t.value] for t in operation.tags],
            "datasets": [dataset.to_dictionary() for dataset in operation.datasets],
            "path": operation.path,
            "content": base64.b64encode(operation.content).decode(),
            "status": operation.status,
            "end_time_ms": operation.end_time_ms,
            "workspace": operation.workspace,
        }
    return dumps(record)


# Written first, by `encode`; orjson leaves no blanks, the standard library does.
_HEAD = re.compile(rb'"key":\s?"((?:[^"\\]|\\.)*)",\s?"counted":\s?(\d)')
_HEAD_BYTES = 4096


def peek(data: bytes) -> tuple[str, int]:
    """Tell what a line belongs to, and what of the counters it carries, without decoding the whole of it.

    Returns:
        The key and the count; an empty key and 0 where the line does not tell.
    """
    found = _HEAD.search(data, 0, _HEAD_BYTES)
    if found is None:
        return "", 0
    try:
        return str(loads(b'"' + found[1] + b'"')), int(found[2])
    except ValueError:
        return "", 0


def decode(data: bytes) -> Operation:
    """Decode the operation of a line.

    Raises:
        UnreadableError: If the line is of another version.
        ValueError: If it is no record of ours.
    """
    record = loads(data)
    if record.get("v") not in _READABLE:
        raise UnreadableError(f"spool record of version {record.get('v')!r}, this is version {VERSION}")
    common: dict[str, Any] = {"key": record["key"], "counted": record["counted"], "size": len(data)}
    kind = record["kind"]
    if kind == "trace":
        return TraceOperation(
            **common,
            **_decode_spans(record),
            info=_decode_info(record["info"]),
            stage=record["stage"],
            is_shared=record.get("is_shared", False),
            # MLflow makes them itself in this way, whatever the type checker thinks of the class
            prompts=[PromptVersion(name, int(version), template="") for name, version in record["prompts"]],
        )
    if kind == "spans":
        return SpansOperation(**common, **_decode_spans(record))
    if kind == "follow_up":
        return TraceUpdate(
            **common,
            metadata=record["metadata"],
            tags=record["tags"],
            workspace=record["workspace"],
            assessments=[Assessment.from_dictionary(a) for a in record["assessments"]],
        )
    if kind == "run":
        return RunOperation(
            **common,
            creation=None if (creation := record.get("creation")) is None else Creation(**creation),
            metrics=[Metric(key, float(value), at, step) for key, value, at, step in record["metrics"]],
            params=[Param(key, value) for key, value in record["params"]],
            tags=[RunTag(key, value) for key, value in record["tags"]],
            datasets=tuple(_decode_dataset(dataset) for dataset in record.get("datasets", ())),
            path=record["path"],
            content=base64.b64decode(record["content"]),
            status=record["status"],
            end_time_ms=record["end_time_ms"],
            workspace=record["workspace"],
        )
    raise ValueError(f"spool record of unknown kind {kind!r}")


def _decode_dataset(record: dict[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    tags = [InputTag(key, value) for key, value in record["tags"].items()]
    return DatasetInput(Dataset.from_dictionary(record["dataset"]), tags)


_KINDS: dict[type[Operation], str] = {
    TraceOperation: "trace",
    SpansOperation: "spans",
    TraceUpdate: "follow_up",
    RunOperation: "run",
}


def dumps(value: Any) -> bytes:
    """Encode as JSON by orjson, or by the standard library where that refuses (lone surrogates, huge integers)."""
    try:
        return orjson.dumps(value, default=_plain)
    except TypeError:
        return json.dumps(value, default=_plain, ensure_ascii=True).encode()


def loads(data: bytes) -> Any:
    """Decode what ``dumps`` made."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "items"):
        return dict(value.items())
    return str(value)


def _sayable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN and no infinities


# --- spans ---


def _encode_spans(operation: TraceOperation | SpansOperation) -> dict[str, Any]:
    resource = resource_of_span(mlflow_traces.otel_of(operation.spans[0])) if operation.spans else None
    return {
        "spans": [_encode_span(span) for span in operation.spans],
        "resource": dict(resource.attributes) if resource else {},
        "experiment_id": operation.experiment_id,
        "workspace": operation.workspace,
        "prepared": operation.prepared,
    }


def _encode_span(span: Any) -> dict[str, Any]:
    otel, attachments = mlflow_traces.otel_of(span), attachments_of(span)
    parent, status = parent_number_of(otel), otel.status
    record: dict[str, Any] = {
        "name": otel.name,
        "trace_id": f"{trace_number_of(otel):032x}",
        "span_id": f"{number_of(otel):016x}",
        "parent_id": None if parent is None else f"{parent:016x}",
        "start": otel.start_time,
        "end": otel.end_time,
        "status": [status.status_code.value, status.description],
        "attributes": dict(attributes_of(otel)),
    }
    if otel.events:
        record["events"] = [[e.name, e.timestamp, dict(e.attributes or {})] for e in otel.events]
    if otel.links:
        record["links"] = [
            [f"{x.context.trace_id:032x}", f"{x.context.span_id:016x}", dict(x.attributes or {})] for x in otel.links
        ]
    if attachments:
        record["attachments"] = [
            [a.id, a.content_type, base64.b64encode(a.content_bytes).decode()] for a in attachments.values()
        ]
    return record


def _decode_spans(record: dict[str, Any]) -> dict[str, Any]:
    resource = Resource(record["resource"])
    return {
        "spans": [_decode_span(span, resource) for span in record["spans"]],
        "experiment_id": record["experiment_id"],
        "workspace": record["workspace"],
        "prepared": record["prepared"],
    }


def _decode_span(record: dict[str, Any], resource: Resource) -> Any:
    code, description = record["status"]
    status = Status(StatusCode(code), description if code == StatusCode.ERROR.value else None)
    otel = ReadableSpan(
        name=record["name"],
        context=_context(record["trace_id"], record["span_id"]),
        parent=_context(record["trace_id"], record["parent_id"]) if record["parent_id"] else None,
        resource=resource,
        attributes=record["attributes"],
        events=[Event(name, attributes, at) for name, at, attributes in record.get("events", ())],
        links=[
            OtelLink(_context(trace_id, span_id), attributes)
            for trace_id, span_id, attributes in record.get("links", ())
        ],
        status=status,
        start_time=record["start"],
        end_time=record["end"],
    )
    attachments = {}
    for attachment_id, content_type, content in record.get("attachments", ()):
        attachments[attachment_id] = mlflow_traces.restore_attachment(
            attachment_id, content_type, base64.b64decode(content)
        )
    return mlflow_traces.restore_span(otel, attachments, None)


def _context(trace_id: str, span_id: str) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=TraceFlags(1))


# --- trace info ---


def _encode_info(info: TraceInfo) -> dict[str, Any]:
    return {
        "trace_id": info.trace_id,
        "location": info.trace_location.to_dict(),
        "request_time": info.request_time,
        "duration": info.execution_duration,
        "state": info.state.value,
        "request_preview": info.request_preview,
        "response_preview": info.response_preview,
        "client_request_id": info.client_request_id,
        "metadata": info.trace_metadata,
        "tags": info.tags,
        "assessments": [assessment.to_dictionary() for assessment in info.assessments],
    }


def _decode_info(record: dict[str, Any]) -> TraceInfo:
    return TraceInfo(
        trace_id=record["trace_id"],
        trace_location=TraceLocation.from_dict(record["location"]),
        request_time=record["request_time"],
        execution_duration=record["duration"],
        state=TraceState(record["state"]),
        request_preview=record["request_preview"],
        response_preview=record["response_preview"],
        client_request_id=record["client_request_id"],
        trace_metadata=record["metadata"],
        tags=record["tags"],
        assessments=[Assessment.from_dictionary(a) for a in record["assessments"]],
    )
