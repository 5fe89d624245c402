"""MLflow's runs: the stack behind ``mlflow.active_run()``, and the values that its DSPy flavor logs into a run."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import mlflow
from mlflow.dspy.util import _flatten_dspy_module_state, sanitize_params
from mlflow.entities import LifecycleStage, LoggedModelOutput, Run, RunData, RunInfo, RunStatus, RunTag
from mlflow.environment_variables import (
    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING,
    MLFLOW_RUN_ID,
)
from mlflow.exceptions import MlflowException
from mlflow.tracking import fluent
from mlflow.tracking.context import registry as context_registry
from mlflow.tracking.fluent import ActiveRun  # `mlflow.ActiveRun`, which mlflow-tracing keeps to itself
from mlflow.utils.mlflow_tags import MLFLOW_AUTOLOGGING, MLFLOW_LOGGED_ARTIFACTS, MLFLOW_PARENT_RUN_ID

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.mlflow_experiment import experiment_here
from dspy_mlflow_async.seams.mlflow_prices import cost_in_usd
from dspy_mlflow_async.seams.mlflow_store import client_of, resolve_tracking_uri
from dspy_mlflow_async.seams.patching import Undo, patch

MLFLOW_RUN_NOTE = "mlflow.note.content"  # which MLflow documents, for descriptions set by hand

__all__ = [
    "MLFLOW_AUTOLOGGING",
    "MLFLOW_LOGGED_ARTIFACTS",
    "MLFLOW_PARENT_RUN_ID",
    "MLFLOW_RUN_NOTE",
    "ActiveRun",
    "cost_in_usd",
    "experiment_here",
    "fluent",
    "mlflow",
    "sanitize_params",
]

# Looked up by MLflow in this module at every use, so an object of the same interface can stand in for it.
STACK_NAME = "_active_run_stack"


def has_run_stack() -> bool:
    """Return whether this MLflow keeps its active runs where ``runs.active`` replaces them."""
    stack = getattr(fluent, STACK_NAME, None)
    return all(hasattr(stack, name) for name in ("get", "get_all_thread_values"))


def run_stack() -> Any:
    """Return the object in which MLflow keeps the active runs of every thread."""
    return getattr(fluent, STACK_NAME)


def _client() -> Any:
    return client_of(resolve_tracking_uri())


def resolve_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return these tags, and those that MLflow gives every run: user, source, commit."""
    absent = _absent_contexts()
    if "IPython" not in sys.modules:  # no notebook, and each look would try to import it
        absent = [*absent, context_registry.JupyterNotebookRunContext]
    return dict(context_registry.resolve_tags(dict(tags), ignore=absent))


@functools.cache
def _absent_contexts() -> list[Any]:
    """Return Databricks' sources of tags where this is no Databricks, which a process does not move to.

    Each look there tries some imports, and waits for whatever other threads import.
    """
    of_databricks = (
        context_registry.DatabricksNotebookRunContext,
        context_registry.DatabricksJobRunContext,
        context_registry.DatabricksClusterRunContext,
        context_registry.DatabricksCommandRunContext,
        context_registry.DatabricksRepoRunContext,
    )
    return [context for context in of_databricks if not context().in_context()]


def run_from(run_id: str, experiment_id: str, name: str, user_id: str, artifact_uri: str, start_time: int) -> ActiveRun:
    """Return an open run as an active one, from plain data, without asking the store."""
    info = RunInfo(
        run_id=run_id,
        experiment_id=experiment_id,
        user_id=user_id,
        status=RunStatus.to_string(RunStatus.RUNNING),
        start_time=start_time,
        end_time=None,
        lifecycle_stage=LifecycleStage.ACTIVE,
        artifact_uri=artifact_uri,
        run_name=name,
    )
    return ActiveRun(Run(info, RunData()))


class PendingRun(ActiveRun):
    """Stands for a run that the store has not told us of, and shows it as soon as it is there.

    Args:
        run_id: Its id, or a stand-in.
        experiment_id: Its experiment, where that is known.
        name: Its name.
        start_time_ms: Milliseconds since the epoch.
        find: Gives MLflow's run, or None while it is not there.
    """

    replaces_tables = True  # it holds nothing yet

    def __init__(
        self,
        run_id: str,
        experiment_id: str | None,
        name: str | None,
        start_time_ms: int,
        find: Callable[[str], Run | None],
    ) -> None:
        self._find = find
        self._experiment_id = experiment_id
        self._stand_in = RunInfo(
            run_id=run_id,
            experiment_id=experiment_id or "0",  # MLflow's default; it refuses None, and puts the traces there
            user_id="",
            status=RunStatus.to_string(RunStatus.RUNNING),
            start_time=start_time_ms,
            end_time=None,
            lifecycle_stage=LifecycleStage.ACTIVE,
            run_name=name,
        )
        super().__init__(Run(self._stand_in, RunData()))

    @property
    def info(self) -> RunInfo:
        """Info of the run, as far as it is known."""
        found = self._find(self._stand_in.run_id)
        return self._stand_in if found is None else found.info

    @property
    def known_experiment_id(self) -> str | None:
        """Experiment of the run, or None where only the store can tell."""
        return self._experiment_id if not self.is_there else self.info.experiment_id

    @property
    def is_there(self) -> bool:
        """Return whether the store has it, as far as this process knows."""
        return self._find(self._stand_in.run_id) is not None


def wait_in_fluent_calls(wait: Callable[[], None]) -> Undo:
    """Call ``wait`` before a fluent function takes the active run to log into; returns the undo."""
    get_or_start_run = taken("mlflow.tracking.fluent:_get_or_start_run")
    if get_or_start_run is None:
        return lambda: None

    @functools.wraps(get_or_start_run)
    def waiting(*args: Any, **kwargs: Any) -> Any:
        wait()
        return get_or_start_run(*args, **kwargs)

    return patch(fluent, _get_or_start_run=waiting)


def take_run_id() -> str | None:
    """Take the run out of ``MLFLOW_RUN_ID``, which ``mlflow run`` sets for its process: the first who asks gets it."""
    try:
        return os.environ.pop(MLFLOW_RUN_ID.name, None) or None
    except KeyError:  # another thread was faster
        return None


def resume_run(run_id: str, name: str | None, tags: Mapping[str, str]) -> ActiveRun:
    """Take a run up again as ``mlflow.start_run`` does, without making it active.

    Raises:
        MlflowException: Where it was deleted, or is in another experiment than the active one, or the store refuses.
    """
    client = _client()
    run = client.get_run(run_id)
    if run.info.lifecycle_stage == LifecycleStage.DELETED:
        raise MlflowException(f"run {run_id} of {MLFLOW_RUN_ID.name} is deleted")
    if fluent._active_experiment_id not in (None, run.info.experiment_id):
        raise MlflowException(f"run {run_id} of {MLFLOW_RUN_ID.name} is in another experiment than the active one")
    client.update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING), name=name)
    if tags:
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    return ActiveRun(client.get_run(run_id))


def remember_last_run(run_id: str) -> None:
    """Note a run for ``mlflow.last_active_run``, as ``mlflow.end_run`` does."""
    fluent._last_active_run_id.set(run_id)


def start_system_metrics(run_id: str, *, is_resumed: bool) -> Any | None:
    """Collect system metrics for a run, if the user has asked MLflow for them, as ``mlflow.start_run`` does.

    Returns:
        MLflow's monitor, whose ``finish`` ends it; None where nobody has asked.

    Raises:
        ImportError: Where psutil is missing.
    """
    if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
        return None
    if importlib.util.find_spec("psutil") is None:
        raise ImportError("system metrics need the package psutil")
    make_monitor = taken("mlflow.system_metrics.system_metrics_monitor:SystemMetricsMonitor")
    if make_monitor is None:
        raise ImportError("this MLflow has no SystemMetricsMonitor as we know it")
    monitor = make_monitor(run_id, resume_logging=is_resumed)
    # mlflow.end_run() finishes it, too
    taken("mlflow.tracking.fluent:run_id_to_system_metrics_monitor", {})[run_id] = monitor
    monitor.start()
    return monitor


def forget_system_metrics(run_id: str) -> None:
    """Take the monitor of a run out of MLflow's list."""
    taken("mlflow.tracking.fluent:run_id_to_system_metrics_monitor", {}).pop(run_id, None)


def log_dummy_model(run_id: str, flavor: str) -> None:
    """Log an empty model output, without which MLflow's UI hides the run of a GenAI experiment.

    Source: ``mlflow.dspy.util.log_dummy_model_outputs``, by run id.
    """
    model = fluent._create_logged_model(name="dspy", source_run_id=run_id, flavor=flavor)
    _client().log_outputs(run_id, models=[LoggedModelOutput(model_id=model.model_id, step=0)])


def program_params(program: Any) -> dict[str, Any]:
    """Return the state of a program as flat params. Source: ``mlflow.dspy.util.log_dspy_module_params``."""
    flat = _flatten_dspy_module_state(program.dump_state(), exclude_keys=("metadata", "lm", "traces", "train"))
    return {f"{type(program).__name__}.{key}": value for key, value in flat.items()}
