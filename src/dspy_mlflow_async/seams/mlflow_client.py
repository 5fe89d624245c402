"""MLflow's client of runs and experiments, as far as ``mlflow-tracing`` alone has one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.tracking._tracking_service import utils
from mlflow.tracking._tracking_service.client import TrackingServiceClient
from mlflow.tracking._tracking_service.utils import _resolve_tracking_uri, is_tracking_uri_set

from dspy_mlflow_async.seams.installed import has_runs, missing_for, needs_whole
from dspy_mlflow_async.seams.patching import Undo, patch

__all__ = ["MlflowClient", "is_tracking_uri_set", "missing_here", "name_default_store"]

DEFAULT_FOLDER = "mlruns"  # mlflow.store.tracking.DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
_HAS_DATA = "_has_existing_mlruns_data"


def missing_here() -> str | None:
    """Say why the store that the user has named cannot be opened; None where it can, or nobody has named one yet."""
    return missing_for(_resolve_tracking_uri(None)) if is_tracking_uri_set() else None


def name_default_store() -> Undo:
    """Let MLflow name its default store where it fails to, since ``mlflow-tracing`` lacks what opens a store in files.

    MLflow imports that to see whether one is there; this looks at the names of files alone.

    Returns:
        The undo.
    """
    if find_spec("sqlparse") or getattr(utils, _HAS_DATA, None) in (None, _has_files):
        return lambda: None
    return patch(utils, **{_HAS_DATA: _has_files})


def _has_files() -> bool:
    return any(each.parent.name.isdigit() for each in Path(DEFAULT_FOLDER).glob("*/meta.yaml"))


if TYPE_CHECKING or has_runs():
    from mlflow import MlflowClient
else:

    class MlflowClient(TrackingServiceClient):
        """Part of MLflow's client that ``mlflow-tracing`` brings, by the same names."""

        def __init__(self, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:  # noqa: ARG002
            super().__init__(_resolve_tracking_uri(tracking_uri))

        def __getattr__(self, name: str) -> Any:
            """Refuse whatever it lacks."""
            if name.startswith("_"):
                raise AttributeError(name)
            raise ImportError(needs_whole(f"MlflowClient.{name}"))
