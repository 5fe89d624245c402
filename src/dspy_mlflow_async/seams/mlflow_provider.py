"""MLflow's way to switch tracing off for one function, in the context of the call and not for all threads.

``trace_disabled`` swaps the provider of the whole process while ``log_model``, ``load_model`` or the check of a
``predict_fn`` runs: whatever others trace meanwhile is lost. Checked on mlflow 3.11.1, 3.17.2 and 3.18.0.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import CodeType, FunctionType
from typing import Any

from mlflow.tracing import provider as trace_provider
from opentelemetry import trace as otel

from dspy_mlflow_async.seams.patching import patch

# Whether a function that MLflow does not want traced is running here.
DISABLED: ContextVar[bool] = ContextVar("dspy_mlflow_async_disabled", default=False)
_NO_TRACERS = otel.NoOpTracerProvider()


def no_op_tracer() -> Any:
    """Return the tracer that MLflow has where tracing is disabled."""
    return _NO_TRACERS.get_tracer(__name__)


def patch_trace_disabled() -> Callable[[], None]:
    """Let ``trace_disabled`` hold in the context of the call alone, for all functions that MLflow has decorated so.

    Returns:
        The undo.
    """
    decorator = getattr(trace_provider, "trace_disabled", None)
    code = _wrapper_code(decorator)
    if code is None:
        return lambda: None
    wrapper_type = type(trace_provider.provider)
    get_tracer = wrapper_type.get_or_init_tracer

    def get_or_init_tracer(self: Any, module_name: str) -> Any:
        return no_op_tracer() if DISABLED.get() else get_tracer(self, module_name)

    undo_tracer = patch(wrapper_type, get_or_init_tracer=get_or_init_tracer)
    known: dict[Any, Any] = {decorator: _trace_disabled}

    def replacement(value: Any) -> Any | None:
        if value is not decorator and getattr(value, "__code__", None) is not code:
            return None
        if value not in known:
            known[value] = _disabled_here(value.__wrapped__, value)
        return known[value]

    _exchange(replacement)

    def undo() -> None:
        originals = {new: old for old, new in known.items()}
        _exchange(originals.get)
        undo_tracer()

    return undo


def _trace_disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Take the place of ``trace_disabled``."""
    return _disabled_here(function, function)


def _disabled_here(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``function`` run with tracing disabled in its own context; it passes for ``original``."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before = DISABLED.get()
        DISABLED.set(True)
        try:
            return function(*args, **kwargs)
        finally:
            DISABLED.set(before)

    return wrapper


def _wrapper_code(decorator: Any) -> CodeType | None:
    """Tell the code by which a function that was decorated is known; None where this MLflow decorates otherwise."""
    constants = getattr(getattr(decorator, "__code__", None), "co_consts", ())
    return next((each for each in constants if isinstance(each, CodeType) and each.co_name == "wrapper"), None)


def _exchange(replacement: Callable[[Any], Any | None]) -> None:
    """Put what ``replacement`` gives for a function, if anything, in its place in all of MLflow's modules."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "mlflow":
            for name, value in list(vars(module).items()):
                new = replacement(value) if isinstance(value, FunctionType) else None
                if new is not None:
                    setattr(module, name, new)
