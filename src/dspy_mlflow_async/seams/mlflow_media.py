"""MLflow's attachments: pictures, recordings and files kept beside a trace, in place of those in a span's values."""

from __future__ import annotations

import hashlib
from typing import Any

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.mlflow_spans import OpenSpan

try:  # mlflow >= 3.12
    from mlflow.environment_variables import MLFLOW_TRACE_EXTRACT_ATTACHMENTS
except ImportError:  # pragma: no cover - the lowest supported version stores media as they are
    MLFLOW_TRACE_EXTRACT_ATTACHMENTS = None

_can_extract = taken("mlflow.entities.span:LiveSpan._extract_attachments") is not None
CAN_ATTACH = MLFLOW_TRACE_EXTRACT_ATTACHMENTS is not None and _can_extract

# Where the root of a trace keeps what has been attached to it; OpenTelemetry's spans have a ``__dict__``.
_ATTACHED = "_dspy_mlflow_attached"


def extract_attachments(span: OpenSpan, plain: Any) -> Any:
    """Replace media in inputs or outputs by references, each kept once for a trace, however often it shows."""
    if not CAN_ATTACH or MLFLOW_TRACE_EXTRACT_ATTACHMENTS is None or not MLFLOW_TRACE_EXTRACT_ATTACHMENTS.get():
        return plain
    before = set(span.live._attachments)
    shown = span.live._extract_attachments(plain, True)
    new = [attachment for key, attachment in span.live._attachments.items() if key not in before]
    if not new:
        return shown
    # A picture stands on the module's, the adapter's and the LM's span, and in every call of a conversation.
    attached: dict[tuple[str, bytes], str] = span.root.__dict__.setdefault(_ATTACHED, {})
    replaced: dict[str, str] = {}
    for attachment in new:
        reference = attachment.ref(span.trace_id)
        digest = hashlib.sha256(attachment.content_bytes).digest()
        first = attached.setdefault((attachment.content_type, digest), reference)
        if first != reference:
            replaced[reference] = first
            del span.live._attachments[attachment.id]
    return _with_references(shown, replaced) if replaced else shown


def _with_references(value: Any, replaced: dict[str, str]) -> Any:
    if isinstance(value, str):
        return replaced.get(value, value)
    if isinstance(value, dict):
        return {key: _with_references(item, replaced) for key, item in value.items()}
    return [_with_references(item, replaced) for item in value] if isinstance(value, list) else value
