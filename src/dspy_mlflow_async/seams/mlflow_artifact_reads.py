"""Artifacts of MLflow's runs, read without the progress bars that its fluent functions print."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from dspy_mlflow_async.seams.mlflow_store import tracing_client


def names(run: Any, folder: str) -> list[str]:
    """Return the paths of the files in a folder of a run's artifacts, in order; empty where there is none."""
    listed = get_artifact_repository(run.info.artifact_uri).list_artifacts(folder)
    return sorted(file.path for file in listed if not file.is_dir)


def read_attachment(tracking_uri: str, trace_id: str, attachment_id: str) -> bytes:
    """Return the content of a trace's attachment.

    Raises:
        LookupError: Where the trace says no place for it.
    """
    location = tracing_client(tracking_uri).get_trace_info(trace_id).tags["mlflow.artifactLocation"]
    return get_artifact_repository(location).download_trace_attachment(attachment_id)


def read(run: Any, path: str) -> bytes | None:
    """Return the content of an artifact of a run, or None where there is none, or where it cannot be read."""
    repository = get_artifact_repository(run.info.artifact_uri)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "artifact"
        try:
            # What download_artifacts calls for each file, behind its progress bar.
            repository._download_file(path, str(local))
            return local.read_bytes()
        except Exception:  # noqa: BLE001 - each kind of store has its own way to say that it is not there
            return None
