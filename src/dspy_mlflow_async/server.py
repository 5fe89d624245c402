"""Entry points of an ``mlflow server --backend-store-uri dspy+sqlite:///…``, which takes many whole traces together.

MLflow imports this wherever the package is installed, in the middle of its own import: anything else is imported when
it is needed. What stands behind ``dspy+`` is a URI of MLflow's, and the store is MLflow's own, as are all pages and
requests but the one for whole traces.
"""

from __future__ import annotations

import os
from typing import Any

_PREFIX = "dspy+"
# What MLflow tells the processes of a server: the first to nobody else. From it they open each of their stores.
_BACKEND = "_MLFLOW_SERVER_FILE_STORE"
_URIS = (_BACKEND, "_MLFLOW_SERVER_REGISTRY_STORE", "MLFLOW_BACKEND_STORE_URI")
_IS_OURS = "_DSPY_MLFLOW_ASYNC_SERVER"  # for the processes that those start, which see plain URIs


def plain(uri: str) -> str:
    """Return the URI that MLflow knows."""
    return uri.removeprefix(_PREFIX)


def open_tracking_store(store_uri: str, artifact_uri: str | None = None) -> Any:
    """Open MLflow's store. The command ``mlflow server`` calls this before it starts the processes of the server.

    Args:
        store_uri: The URI, with ``dspy+`` before it.
        artifact_uri: Where new experiments keep their artifacts.
    """
    from dspy_mlflow_async.seams import mlflow_server

    mlflow_server.accept_uris(plain)
    return mlflow_server.open_tracking_store(plain(store_uri), artifact_uri)


def open_registry_store(store_uri: str, **_: Any) -> Any:
    """Open MLflow's store of models in the same database."""
    from dspy_mlflow_async.seams import mlflow_server

    return mlflow_server.open_registry_store(plain(store_uri))


def open_workspace_store(workspace_uri: str) -> Any:
    """Open MLflow's store of workspaces in the same database."""
    from dspy_mlflow_async.seams import mlflow_server

    return mlflow_server.open_workspace_store(plain(workspace_uri))


def _take_part() -> None:
    """In a process of such a server: let MLflow see plain URIs, which all its stores take, and add our route."""
    if os.environ.get(_BACKEND, "").startswith(_PREFIX):
        os.environ.update({name: plain(os.environ[name]) for name in _URIS if name in os.environ})
        os.environ[_IS_OURS] = "true"
    if _IS_OURS in os.environ:
        from dspy_mlflow_async.seams import mlflow_server

        mlflow_server.when_app_is_made(_add_route)


def _add_route(api: Any) -> None:
    from dspy_mlflow_async.export.write.received_traces import store_traces
    from dspy_mlflow_async.seams import mlflow_server

    mlflow_server.add_route(api, store_traces)


_take_part()
