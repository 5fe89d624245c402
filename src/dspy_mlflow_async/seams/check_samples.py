"""Sample objects of MLflow and DSPy, on which the check looks for the private attributes that only instances have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def instance_of(path: str) -> Any | None:
    """Make an instance of the class at ``module:Class``; None where that is not to be had without a store."""
    make = _MAKERS.get(path)
    try:
        return None if make is None else make()
    except Exception:  # noqa: BLE001 - a future version may do anything; its names are missed elsewhere
        return None


def _open_span() -> Any:
    from dspy_mlflow_async.seams.own_ids import probe_span

    return probe_span()


def _span() -> Any:
    from mlflow.entities.span import create_mlflow_span

    return create_mlflow_span(_open_span(), "tr-probe")


def _manager() -> Any:
    from mlflow.environment_variables import MLFLOW_TRACE_TIMEOUT_SECONDS
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    # Not the one that MLflow uses, which reads its settings when it is made; with a time-out it starts a thread.
    return None if MLFLOW_TRACE_TIMEOUT_SECONDS.get() else InMemoryTraceManager()


def _processor() -> Any:
    from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return MlflowV3SpanProcessor(span_exporter=InMemorySpanExporter(), export_metrics=False)


def _attachment() -> Any:
    from mlflow.tracing.attachments import Attachment

    return Attachment(content_type="text/plain", content_bytes=b"")


def _provider() -> Any:
    from dspy_mlflow_async.seams.own_ids import provider_of_probes

    return provider_of_probes()


def _processors() -> Any:
    from opentelemetry.sdk.trace import SynchronousMultiSpanProcessor

    make: Any = SynchronousMultiSpanProcessor  # it is not typed
    return make()


def _attributes() -> Any:
    from opentelemetry.attributes import BoundedAttributes

    return BoundedAttributes(10, {}, immutable=False)


def _once() -> Any:
    from opentelemetry.util._once import Once

    return Once()


_MAKERS: dict[str, Callable[[], Any]] = {
    "mlflow.entities.span:Span": _span,
    "mlflow.entities.span:LiveSpan": _span,
    "mlflow.tracing.attachments:Attachment": _attachment,
    "mlflow.tracing.processor.mlflow_v3:MlflowV3SpanProcessor": _processor,
    "mlflow.tracing.trace_manager:InMemoryTraceManager": _manager,
    "opentelemetry.attributes:BoundedAttributes": _attributes,
    "opentelemetry.sdk.trace:ReadableSpan": _open_span,
    "opentelemetry.sdk.trace:SynchronousMultiSpanProcessor": _processors,
    "opentelemetry.sdk.trace:TracerProvider": _provider,
    "opentelemetry.util._once:Once": _once,
}
