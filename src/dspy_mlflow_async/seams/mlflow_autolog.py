"""MLflow's own DSPy integration: the parts that ours replaces, and the names that others know it by."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import operator
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import cloudpickle
from mlflow.dspy.callback import MlflowCallback

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.patching import Undo

__all__ = ["MlflowCallback", "StatelessCallback"]

FLAVOR = "dspy"
_EVALUATION_CONFIG_HOME = "mlflow.models.evaluation.utils.trace"
_EVALUATION_CONFIG = "configure_autologging_for_evaluation"
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class StatelessCallback(MlflowCallback):
    """Stateless form of MLflow's callback, by which its ``autolog`` and model serving find their tracer.

    Others read these names; the state behind them lives in the context of the calls.
    """

    _call_id_to_span = _NOTHING
    _call_id_to_module = _NOTHING
    _call_id_to_metric_key = _NOTHING
    _evaluation_counter = _NOTHING
    _dependencies_schema: dict[str, Any] | None = None

    @property
    def dependencies_schema(self) -> dict[str, Any] | None:
        """Dependencies schema of a served model, a tag of its traces; MLflow's ``load_model`` sets it."""
        return self._dependencies_schema

    @dependencies_schema.setter
    def dependencies_schema(self, schema: dict[str, Any] | None) -> None:
        self._dependencies_schema = schema


class _Call:
    """Call that is made when this is unpickled; of the class itself nothing is in the pickle."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._reduced = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


def portable(ours: tuple[Callable[..., Any], tuple[Any, ...]], schema: dict[str, Any] | None) -> tuple[Any, ...]:
    """Reduce a tracer to a pickle that loads where this package is absent, too: as MLflow's own callback there.

    A model that ``mlflow.dspy.log_model`` has saved takes DSPy's callbacks along. The pickle names the standard library
    and, inside of one of two byte strings, this package or MLflow.

    Args:
        ours: What makes the tracer, and its arguments.
        schema: The dependencies schema, for MLflow's callback.

    Returns:
        What ``__reduce__`` returns.
    """
    is_absent = _Call(operator.is_, _Call(importlib.util.find_spec, __name__.partition(".")[0]), None)
    choices = cloudpickle.dumps(_Call(*ours[:1], *ours[1])), cloudpickle.dumps(_Call(MlflowCallback, schema))
    return pickle.loads, (_Call(operator.getitem, choices, is_absent),)


def is_own_autolog_on() -> bool:
    """Return whether ``mlflow.dspy.autolog()`` is on."""
    from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS

    config = AUTOLOGGING_INTEGRATIONS.get(FLAVOR)
    return bool(config) and not config.get("disable", True)


def turn_own_autolog_off() -> None:
    """Do as ``mlflow.dspy.autolog(disable=True)``, less ``dspy.configure``, which other threads may not call."""
    from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS
    from mlflow.utils.autologging_utils.safety import revert_patches

    revert_patches(FLAVOR)
    if FLAVOR in AUTOLOGGING_INTEGRATIONS:
        AUTOLOGGING_INTEGRATIONS[FLAVOR]["disable"] = True


def note_autolog(config: Mapping[str, Any]) -> None:
    """Tell MLflow how its DSPy integration is set, as ``mlflow.dspy.autolog`` does.

    ``mlflow.autolog()`` leaves alone what somebody has set, and ``mlflow.evaluate`` puts it back afterwards.
    """
    from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS

    AUTOLOGGING_INTEGRATIONS[FLAVOR] = dict(config)


def patch_evaluation_config(scoped: Callable[[], AbstractContextManager[None]]) -> Undo:
    """Put a block around MLflow's, in which its evaluations set autologging as they need it, and set it back.

    Args:
        scoped: Makes the block. What is told to ``mlflow.dspy.autolog`` inside is for the evaluation.

    Returns:
        The undo.

    Source: ``mlflow.models.evaluation.utils.trace``, used by ``mlflow.evaluate``, ``mlflow.genai.evaluate`` and
    ``mlflow.genai.optimize_prompts``.
    """
    home = sys.modules.get(_EVALUATION_CONFIG_HOME)  # mlflow.dspy has imported it, but in small installs
    original = getattr(home, _EVALUATION_CONFIG, None)
    if original is None:
        return lambda: None

    @functools.wraps(original)
    @contextlib.contextmanager
    def configure_autologging_for_evaluation(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with scoped(), original(*args, **kwargs) as given:
            yield given

    _exchange(original, configure_autologging_for_evaluation)
    return lambda: _exchange(configure_autologging_for_evaluation, original)


def _exchange(old: Any, new: Any) -> None:
    """Put ``new`` wherever a module of MLflow's has ``old`` under its name."""
    for name, module in sys.modules.copy().items():
        if name.startswith("mlflow.") and vars(module).get(_EVALUATION_CONFIG) is old:
            setattr(module, _EVALUATION_CONFIG, new)


def own_autolog_module() -> Any:
    """Return the module behind ``mlflow.dspy.autolog``, whose name the function of that name hides."""
    return importlib.import_module("mlflow.dspy.autolog")


def add_dependencies_schema(schema: dict[str, Any] | None) -> None:
    """Put a served model's dependencies schema where MLflow tags the trace with it."""
    if not schema:
        return
    context = taken("mlflow.pyfunc.context:get_prediction_context", lambda: None)()
    if context is not None:
        context.update(**schema)
