"""Context-local settings of the traces that begin in a scope: destination, sampling, session and user."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import mlflow.tracing.provider as trace_provider
import mlflow.tracing.sampling as trace_sampling
from mlflow.entities import LifecycleStage
from mlflow.entities.trace_location import MlflowExperimentLocation
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.tracing.constant import TraceMetadataKey
from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult, TraceIdRatioBased

from dspy_mlflow_async.seams.mlflow_spans import forget_tracer
from dspy_mlflow_async.seams.patching import Undo, patch, together

SESSION = TraceMetadataKey.TRACE_SESSION
USER = TraceMetadataKey.TRACE_USER

# What `mlflow.tracing.set_destination(..., context_local=True)` sets; that function also rebuilds the provider.
DESTINATION: ContextVar[Any] = trace_provider._MLFLOW_TRACE_USER_DESTINATION._context_local_value
# What `@mlflow.trace(sampling_ratio_override=...)` sets; MLflow heeds it only where it has a sampler at all.
RATIO: ContextVar[float | None] = trace_sampling._SAMPLING_RATIO_OVERRIDE


def destination(experiment_id: str) -> Any:
    """Return the experiment as ``DESTINATION`` holds it."""
    return MlflowExperimentLocation(experiment_id)


def why_not(experiment_id: str) -> str | None:
    """Return why traces cannot go to an experiment, or None where they can.

    Raises:
        Exception: Whatever the store raises that does not answer the question.
    """
    from dspy_mlflow_async.seams.mlflow_client import MlflowClient

    try:
        experiment = MlflowClient().get_experiment(experiment_id)
    except MlflowException as error:
        if error.error_code in {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE)}:
            return "MLflow's store has no such experiment"
        raise
    return "it has been deleted" if experiment.lifecycle_stage == LifecycleStage.DELETED else None


# --- sampling by ratio --------------------------------------------------------------------------------------------


class RatioSampler(Sampler):
    """Sampler of the roots of traces for which ``RATIO`` is set; it leaves all else to the sampler that was there.

    Args:
        inner: The sampler that was there.
        left_out: Called for each trace that a ratio leaves out.
    """

    def __init__(self, inner: Sampler, left_out: Callable[[], None]) -> None:
        self.inner = inner
        self._left_out = left_out

    def should_sample(
        self, parent_context: Context | None, trace_id: int, name: str, *args: Any, **kwargs: Any
    ) -> SamplingResult:
        """Decide by the trace's id: the same trace is in or out wherever it is asked."""
        ratio = RATIO.get()
        if ratio is None or otel.get_current_span(parent_context).get_span_context().is_valid:
            return self.inner.should_sample(parent_context, trace_id, name, *args, **kwargs)
        result = TraceIdRatioBased(ratio).should_sample(parent_context, trace_id, name, *args, **kwargs)
        if result.decision is Decision.DROP:
            self._left_out()
        return result

    def get_description(self) -> str:
        """Return the inner sampler's description."""
        return f"RatioSampler({self.inner.get_description()})"


def has_sampler() -> bool:
    """Return whether ``RATIO`` counts in the provider that MLflow has now."""
    provider = trace_provider.provider.get()
    return not isinstance(provider, TracerProvider) or isinstance(provider.sampler, RatioSampler)


def patch_sampler(left_out: Callable[[], None]) -> Undo:
    """Make ``RATIO`` count: in the provider that MLflow has now, and in those that it makes later.

    Returns:
        The undo.
    """
    original = trace_provider._initialize_tracer_provider

    def _initialize_tracer_provider(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        _exchange(lambda sampler: RatioSampler(sampler, left_out))

    undo = patch(trace_provider, _initialize_tracer_provider=_initialize_tracer_provider)
    _exchange(lambda sampler: RatioSampler(sampler, left_out))
    return together(lambda: _exchange(None), undo)


def _exchange(replacement: Callable[[Sampler], Sampler] | None) -> None:
    provider = trace_provider.provider.get()
    if not isinstance(provider, TracerProvider):
        return
    sampler = provider.sampler
    if replacement is None:
        new = sampler.inner if isinstance(sampler, RatioSampler) else sampler
    else:
        new = sampler if isinstance(sampler, RatioSampler) else replacement(sampler)
    if new is sampler:
        return
    provider.sampler = new
    # OpenTelemetry keeps the tracers that it has handed out, each with the sampler of then (1.40 and later).
    for tracer in list(getattr(provider, "_tracers", {}).values()):
        tracer.sampler = new
    forget_tracer()
