"""MLflow's provider: tracing switched off for one function in the context of the call, not for all threads.

``trace_disabled`` swaps the provider of the whole process while ``log_model``, ``load_model`` or the check of a
``predict_fn`` runs: whatever others trace meanwhile is lost. Checked on mlflow 3.11.1, 3.17.2 and 3.18.0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import CodeType, FunctionType
from typing import Any

from mlflow.tracing import provider as trace_provider
from opentelemetry import trace as otel

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.patching import Undo, patch, together

# Whether a function that MLflow does not want traced is running here.
DISABLED: ContextVar[bool] = ContextVar("dspy_mlflow_async_disabled", default=False)
_NO_TRACERS = otel.NoOpTracerProvider()


def no_op_tracer() -> Any:
    """Return the tracer that MLflow has where tracing is disabled."""
    return _NO_TRACERS.get_tracer(__name__)


def patch_trace_disabled() -> Undo:
    """Make ``trace_disabled`` hold in the context of the call alone, for all functions that MLflow has decorated so.

    Returns:
        The undo.
    """
    decorator: Any = taken("mlflow.tracing.provider:trace_disabled")
    code = _wrapper_code(decorator)
    if code is None or _CODE is None:
        return lambda: None
    wrapper_type = type(trace_provider.provider)
    get_tracer = wrapper_type.get_or_init_tracer

    def get_or_init_tracer(self: Any, module_name: str) -> Any:
        return no_op_tracer() if DISABLED.get() else get_tracer(self, module_name)

    undo_tracer = patch(wrapper_type, get_or_init_tracer=get_or_init_tracer)
    changed = [each for each in _functions_with(code) if each is not decorator]
    for function in changed:
        function.__code__ = _CODE
    decorator_code = decorator.__code__
    constants = tuple(_CODE if each is code else each for each in decorator_code.co_consts)
    decorator.__code__ = decorator_code.replace(co_consts=constants)

    def undo() -> None:
        decorator.__code__ = decorator_code
        for function in [*changed, *_functions_with(_CODE)]:  # also those that were decorated meanwhile
            if function.__code__ is _CODE:
                function.__code__ = code

    return together(undo_tracer, undo)


def run_disabled(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function with tracing disabled in this context."""
    before = DISABLED.get()
    DISABLED.set(True)
    try:
        return function(*args, **kwargs)
    finally:
        DISABLED.set(before)


def _trace_disabled(f: Any) -> Any:
    """Hold the code that takes the place of that in ``trace_disabled``, over the same free variable."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        # A function of MLflow's runs this, with MLflow's globals.
        from dspy_mlflow_async.seams.mlflow_suppression import run_disabled

        return run_disabled(f, args, kwargs)

    return wrapper


def _wrapper_code(decorator: Any) -> CodeType | None:
    """Tell the code of what a decorator returns; None where it has none over the one variable ``f``."""
    constants = getattr(getattr(decorator, "__code__", None), "co_consts", ())
    found = next((each for each in constants if isinstance(each, CodeType) and each.co_name == "wrapper"), None)
    return found if found is not None and found.co_freevars == ("f",) else None


_CODE = _wrapper_code(_trace_disabled)


def _functions_with(code: CodeType) -> list[Any]:
    """Find the functions in MLflow's modules that run this code.

    They stay the objects that they are, so that who has imported one before has the change, too, and pickles it by its
    name.
    """
    found = {
        id(value): value
        for name, module in sys.modules.copy().items()
        if name.partition(".")[0] == "mlflow"
        for value in list(vars(module).values())
        if isinstance(value, FunctionType) and value.__code__ is code
    }
    return list(found.values())
