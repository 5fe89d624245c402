"""What a finished call must leave behind in its context: nothing."""

import importlib

from mlflow.tracing.context import _USER_TRACE_CONTEXT
from mlflow.tracing.provider import get_current_otel_span
from opentelemetry.trace import INVALID_SPAN

from dspy_mlflow_async.context import frame

dspy_settings = importlib.import_module("dspy.dsp.utils.settings")  # an object of this name hides the module


def assert_context_is_clean():
    """No frame, no current span, no setting of ours."""
    assert frame.current() is None
    assert INVALID_SPAN is get_current_otel_span()
    assert _USER_TRACE_CONTEXT.get() is None
    assert dspy_settings.thread_local_overrides.get().get("usage_tracker") is None
