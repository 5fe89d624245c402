"""Choice of the handler that DSPy calls: made once for each type, and told of what an interrupt has cut off."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import dspy
import dspy.utils.callback as dspy_callback
from mlflow.dspy.callback import MlflowCallback

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.patching import Undo, patch

# Of these DSPy decides by the type and the function. What else has callbacks is rare, or decided by what it holds.
_DECIDED_BY_TYPE = (dspy.Module, dspy.Adapter, dspy.Tool)

_Choose = Callable[[Any, Any, Any], Any]


class _Names:
    """Callback whose handlers are their own names."""

    def __getattr__(self, name: str) -> str:
        return name


_NAMES = _Names()


def patch_handlers() -> Undo:
    """Make DSPy's choice of a handler cheap for MLflow's callbacks, ours among them, and safe from interrupts.

    DSPy asks each instance for each of its calls, twice, whether it is an interpreter, which is a protocol: a tenth of
    what a short call costs. And it calls start handlers before its ``try``, so a KeyboardInterrupt in one of them
    leaves behind what the others have begun. Where this DSPy chooses its handlers elsewhere, it does.

    Returns:
        The undo.
    """
    start = taken("dspy.utils.callback:_get_on_start_handler")
    end = taken("dspy.utils.callback:_get_on_end_handler")
    if start is None or end is None:
        return lambda: None
    choose_start, choose_end = _remembering(start), _remembering(end)

    # Known by DSPy's names, so that what DSPy has wrapped pickles by them, and loads where this package is absent.
    @functools.wraps(start)
    def _get_on_start_handler(callback: Any, instance: Any, fn: Any) -> Any:
        if isinstance(callback, MlflowCallback):
            return choose_start(callback, instance, fn)
        return _ending_if_interrupted(start(callback, instance, fn), instance, fn)

    @functools.wraps(end)
    def _get_on_end_handler(callback: Any, instance: Any, fn: Any) -> Any:
        return (choose_end if isinstance(callback, MlflowCallback) else end)(callback, instance, fn)

    return patch(dspy_callback, _get_on_start_handler=_get_on_start_handler, _get_on_end_handler=_get_on_end_handler)


def _remembering(choose: _Choose) -> _Choose:
    """Wrap DSPy's own choice, to be asked once for each type and function."""
    names_of: dict[weakref.ref[type], dict[str, str]] = {}

    def remembered(callback: Any, instance: Any, fn: Any) -> Any:
        kind = type(instance)
        known = names_of.get(weakref.ref(kind))  # as a WeakKeyDictionary does, without a call in between
        name = known.get(fn.__name__) if known is not None else None
        if name is None:
            name = choose(_NAMES, instance, fn)
            if _is_decided_by_type(instance):
                names_of.setdefault(weakref.ref(kind, lambda gone: names_of.pop(gone, None)), {})[fn.__name__] = name
        return getattr(callback, name)

    return remembered


def _is_decided_by_type(instance: Any) -> bool:
    if isinstance(instance, dspy.BaseLM):
        return True
    return isinstance(instance, _DECIDED_BY_TYPE) and not hasattr(type(instance), "supports_decision_requests")


def _ending_if_interrupted(handler: Any, instance: Any, fn: Any) -> Any:
    def begin(**event: Any) -> None:
        try:
            handler(**event)
        except Exception:
            raise  # DSPy logs it and goes on, and the end comes
        except BaseException as error:
            _end_for_tracers(event["call_id"], instance, fn, error)
            raise

    return begin


def _end_for_tracers(call_id: str, instance: Any, fn: Any, error: BaseException) -> None:
    for callback in dspy.settings.get("callbacks", []) + getattr(instance, "callbacks", []):
        if isinstance(callback, MlflowCallback):
            end = dspy_callback._get_on_end_handler(callback, instance, fn)
            end(call_id=call_id, outputs=None, exception=error)
