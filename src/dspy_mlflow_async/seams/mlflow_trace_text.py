"""Text in which a server of MLflow's is told of a trace, made without the objects of protobuf.

For the export room. MLflow makes objects of protobuf's, a dict of those, a text of that, a dict of the text, and the
text that it sends of that dict. Checked on mlflow 3.12.0, 3.17.2 and 3.18.0.
"""

from __future__ import annotations

import functools
import json
import time
from typing import Any

from google.protobuf.json_format import MessageToDict
from mlflow.entities import Trace, TraceData, TraceInfo
from mlflow.entities.trace_location import TraceLocation
from mlflow.entities.trace_state import TraceState
from mlflow.tracing import constant

from dspy_mlflow_async.seams.listed import taken

__all__ = ["can_write_text", "text_of_start"]

StartTraceV3: Any = taken("mlflow.protos.service_pb2:StartTraceV3")
message_to_json: Any = taken("mlflow.utils.proto_json_utils:message_to_json")
can_write_text = None not in (StartTraceV3, message_to_json)

_MOST_METADATA = getattr(constant, "MAX_CHARS_IN_TRACE_INFO_METADATA", 0)
_MOST_TAG_KEY = getattr(constant, "MAX_CHARS_IN_TRACE_INFO_TAGS_KEY", 0)
_MOST_TAG_VALUE = getattr(constant, "MAX_CHARS_IN_TRACE_INFO_TAGS_VALUE", 0)
_STATES = {state: state.value for state in (TraceState.OK, TraceState.ERROR, TraceState.IN_PROGRESS)}
_OPTIONAL = ("client_request_id", "request_preview", "response_preview")
_LATEST = 4_000_000_000_000  # milliseconds, in the year 2096
_encode = json.JSONEncoder().encode


def text_of_start(info: TraceInfo) -> str:
    """Return what `start_trace` sends of a trace, as JSON."""
    if writes_same_texts() and (said := _told(info)) is not None:
        return _encode({"trace": {"trace_info": said}})
    return _by_mlflow(info)


def _by_mlflow(info: TraceInfo) -> str:
    trace = Trace(info=info, data=TraceData(spans=[]))
    return str(message_to_json(StartTraceV3(trace=trace.to_proto())))


def _told(info: TraceInfo) -> dict[str, Any] | None:
    """Return what is told of a trace; None where that takes more than is done here."""
    location, state, began, lasted = (
        info.trace_location,
        _STATES.get(info.state),
        info.request_time,
        info.execution_duration,
    )
    if (
        type(info) is not TraceInfo
        or type(location) is not TraceLocation
        or info.assessments
        or state is None
        or location.mlflow_experiment is None
        or not (type(began) is int and 0 <= began < _LATEST)
        or not (lasted is None or (type(lasted) is int and 0 <= lasted < _LATEST))
    ):
        return None
    seconds, rest = divmod(began, 1000)
    told = {
        "trace_id": info.trace_id,
        "trace_location": _location(location.mlflow_experiment.experiment_id),
        "request_time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + (f".{rest:03d}Z" if rest else "Z"),
        "state": state,
    }
    if lasted is not None:
        seconds, rest = divmod(lasted, 1000)
        told["execution_duration"] = f"{seconds}.{rest:03d}s" if rest else f"{seconds}s"
    if info.trace_metadata:
        told["trace_metadata"] = _cut(info.trace_metadata, _MOST_METADATA, _MOST_METADATA)
    if info.tags:
        told["tags"] = _cut(info.tags, _MOST_TAG_KEY, _MOST_TAG_VALUE)
    for name in _OPTIONAL:
        if (text := getattr(info, name)) is not None:
            told[name] = text
    return told


def _cut(texts: dict[str, Any], most_key: int, most_value: int) -> dict[str, str]:
    return {key[:most_key]: str(value)[:most_value] for key, value in texts.items()}


@functools.lru_cache(maxsize=64)
def _location(experiment_id: str) -> dict[str, Any]:
    """Return an experiment as MLflow tells it."""
    location = TraceLocation.from_experiment_id(experiment_id).to_proto()
    return dict(MessageToDict(location, preserving_proto_field_name=True))


# --- whether these are MLflow's ---------------------------------------------------------------------------------------


@functools.cache
def writes_same_texts() -> bool:
    """Return whether samples are told as MLflow tells them."""
    try:
        infos = [TraceInfo(**each) for each in _samples()]
        return all(json.loads(_by_mlflow(info))["trace"]["trace_info"] == _told(info) for info in infos)
    except Exception:  # noqa: BLE001 - a future MLflow may do anything; then its own functions tell
        return False


def _samples() -> list[dict[str, Any]]:
    plain = {
        "trace_id": "tr-sample",
        "trace_location": TraceLocation.from_experiment_id("12"),
        "request_time": 1_700_000_000_120,
        "state": TraceState.OK,
    }
    long = 3 * max(_MOST_METADATA, _MOST_TAG_KEY, _MOST_TAG_VALUE) * "é"
    texts = {"mlflow.é": '\u2028 \\ " \x7f \N{GRINNING FACE}', long: long, "": "", "number": 5}
    previews = {"request_preview": "", "response_preview": "é" * 20_000, "client_request_id": "mine"}
    return [
        plain,
        plain | {"execution_duration": 0, "state": TraceState.ERROR, "request_time": 999_999_999_000},
        plain | {"execution_duration": 61_000, "state": TraceState.IN_PROGRESS, "request_time": 0},
        plain | {"execution_duration": 1_007, "trace_metadata": texts, "tags": texts, **previews},
    ]
