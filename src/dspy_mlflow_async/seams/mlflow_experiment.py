"""Experiment of what begins here, told without asking the store: where only that can tell, by a stand-in.

MLflow looks up ``MLFLOW_EXPERIMENT_NAME`` at the start of each trace, which opens the store in the caller's thread.
"""

from __future__ import annotations

import functools
from typing import Any

from mlflow.environment_variables import MLFLOW_EXPERIMENT_ID, MLFLOW_EXPERIMENT_NAME
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.tracing.constant import SpanAttributeKey
from mlflow.tracing.provider import _MLFLOW_TRACE_USER_DESTINATION
from mlflow.tracing.utils import get_otel_attribute
from mlflow.tracking import fluent
from mlflow.utils.workspace_context import get_request_workspace

from dspy_mlflow_async.seams.listed import taken

__all__ = [
    "default_experiment_id",
    "experiment_here",
    "experiment_in_force",
    "experiment_of_trace",
    "is_in_notebook_of_databricks",
    "is_stand_in",
    "look_up",
    "real_experiment_id",
]

# None with mlflow-tracing alone, which cannot import it.
default_registry: Any = taken("mlflow.tracking.default_experiment:registry")
_registered: Any = taken("mlflow.tracking.default_experiment.registry:_default_experiment_provider_registry", ())
DEFAULT_EXPERIMENT_ID: str = taken("mlflow.tracking.default_experiment:DEFAULT_EXPERIMENT_ID", "0")
_STAND_IN = "pending-experiment:"
_EXISTS = ErrorCode.Name(RESOURCE_ALREADY_EXISTS)
_known: dict[
    tuple[str, str | None, str], str
] = {}  # ids, by store, workspace and name; single operations on a dict are atomic

# A process does not move there, and every look fails some imports: 0.8 ms, and a lock that a forked child inherits.
is_in_notebook_of_databricks = functools.cache(
    taken("mlflow.utils.databricks_utils:is_in_databricks_notebook", lambda: False)
)


def experiment_here() -> tuple[str | None, str | None]:
    """Return the id and the name of the experiment that a run gets here, as far as that is known without the store."""
    if fluent._active_experiment_id:
        return str(fluent._active_experiment_id), None
    if name := MLFLOW_EXPERIMENT_NAME.get():
        return None, name
    return MLFLOW_EXPERIMENT_ID.get(), None


def default_experiment_id() -> str | None:
    """Return the experiment where nobody has set one. Plugins are asked every time, as MLflow does."""
    # The one that MLflow brings is for notebooks of Databricks.
    if default_registry is None or (len(list(_registered)) == 1 and not is_in_notebook_of_databricks()):
        return str(DEFAULT_EXPERIMENT_ID)
    found = default_registry.get_experiment_id()
    return None if found is None else str(found)


def experiment_of_trace(root: Any, uri: str) -> str | None:
    """Return the experiment of a trace that begins with this root, or a stand-in: ``get_experiment_id_for_trace``."""
    if experiment_id := get_otel_attribute(root, SpanAttributeKey.EXPERIMENT_ID):
        return str(experiment_id)
    return experiment_in_force(uri)


def experiment_in_force(uri: str) -> str | None:
    """Return the experiment of a trace that begins here, or a stand-in."""
    if experiment_id := getattr(_MLFLOW_TRACE_USER_DESTINATION.get(), "experiment_id", None):
        return str(experiment_id)
    if (run := fluent._get_latest_active_run()) is not None:
        known = getattr(run, "known_experiment_id", run.info.experiment_id)  # None for a run on its way
        if known is not None:
            return str(known)
    here, name = experiment_here()
    if name is not None:
        return _known.get((uri, get_request_workspace(), name)) or _STAND_IN + name
    return here or default_experiment_id()


def is_stand_in(experiment_id: Any) -> bool:
    """Return whether only the store can tell which experiment this is."""
    return isinstance(experiment_id, str) and experiment_id.startswith(_STAND_IN)


def real_experiment_id(client: Any, experiment_id: str, workspace: str | None) -> str:
    """Return the store's id of an experiment, which is made if there is none of its name.

    Args:
        client: MLflow's client of the store, called in the scope of the workspace.
        experiment_id: The id, or what stands for it.
        workspace: The workspace of the trace, or None.
    """
    if not is_stand_in(experiment_id):
        return experiment_id
    name = experiment_id.removeprefix(_STAND_IN)
    found = look_up(client, name)
    _known[client.tracking_uri, workspace, name] = found
    return found


def look_up(client: Any, name: str) -> str:
    """Return the id of the experiment of this name, which is made if there is none."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != _EXISTS:
                raise
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    return str(found.experiment_id)
