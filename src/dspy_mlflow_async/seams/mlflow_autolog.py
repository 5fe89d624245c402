"""MLflow's own DSPy integration: what ours takes the place of, and what others know it by."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mlflow.dspy.callback import MlflowCallback

__all__ = ["MlflowCallback"]

FLAVOR = "dspy"


def is_own_autolog_on() -> bool:
    """Whether ``mlflow.dspy.autolog()`` is on."""
    from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS

    config = AUTOLOGGING_INTEGRATIONS.get(FLAVOR)
    return bool(config) and not config.get("disable", True)


def turn_own_autolog_off() -> None:
    """What ``mlflow.dspy.autolog(disable=True)`` does, less ``dspy.configure``, which other threads may not call."""
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


def own_autolog_module() -> Any:
    """The module behind ``mlflow.dspy.autolog``, whose name the function of that name hides."""
    return importlib.import_module("mlflow.dspy.autolog")


def add_dependencies_schema(schema: dict[str, Any] | None) -> None:
    """Put a served model's dependencies schema where MLflow tags the trace with it."""
    if not schema:
        return
    from mlflow.pyfunc.context import get_prediction_context

    context = get_prediction_context()
    if context is not None:
        context.update(**schema)
