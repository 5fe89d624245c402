"""MLflow's server from within: its stores by URIs of ours, and a route for whole traces beside the one for spans.

For the processes of a server alone. Checked on mlflow 3.12.0, 3.17.2 and 3.18.0.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import sys
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.mlflow_whole_traces import ROUTE, VERSION, decode_infos
from dspy_mlflow_async.seams.patching import over, patch

__all__ = [
    "accept_uris",
    "add_route",
    "open_registry_store",
    "open_tracking_store",
    "open_workspace_store",
    "when_app_is_made",
]

logger = logging.getLogger("dspy_mlflow_async")

Store = Callable[[Any, str, Sequence[Any], Sequence[Any]], list[str]]

_API = "mlflow.server.otel_api"
_EXPERIMENT = "x-mlflow-experiment-id"
_AUTH = "mlflow.server.auth"
_OK = 200


def open_tracking_store(uri: str, artifact_uri: str | None) -> Any:
    """Open MLflow's store of a database."""
    return taken("mlflow.tracking._tracking_service.utils:_get_sqlalchemy_store")(uri, artifact_uri)


def open_registry_store(uri: str) -> Any:
    """Open MLflow's store of models in a database."""
    return taken("mlflow.tracking._model_registry.utils:_get_sqlalchemy_store")(uri)


def open_workspace_store(uri: str) -> Any:
    """Open MLflow's store of workspaces in a database."""
    return taken("mlflow.tracking._workspace.registry:_get_sqlalchemy_workspace_store")(uri)


def accept_uris(plain: Callable[[str], str]) -> None:
    """Let MLflow take URIs of ours where it asks what database one is of, in the command that was given one.

    Args:
        plain: Makes of a URI the one that MLflow knows.
    """
    for path, module in (
        ("mlflow.utils.uri:extract_db_type_from_uri", "mlflow.utils.uri"),
        ("mlflow.store.db.utils:create_sqlalchemy_engine", "mlflow.store.db.utils"),
    ):
        original, name = taken(path), path.partition(":")[2]
        if isinstance(original, FunctionType) and not hasattr(original, "takes_ours"):
            patch(sys.modules[module], **{name: _taking(original, plain)})


def _taking(original: Callable[[str], Any], plain: Callable[[str], str]) -> Callable[[str], Any]:
    def take(db_uri: str) -> Any:
        return original(plain(db_uri))

    take.takes_ours = True  # type: ignore[attr-defined]
    return take


def when_app_is_made(act: Callable[[Any], None]) -> None:
    """Call ``act`` with MLflow's module of the route for spans once that is imported, before an app has its routes."""
    if register := taken("mlflow.utils.import_hooks:register_post_import_hook"):
        register(act, _API)


def add_route(api: Any, store: Store) -> None:
    """Add the route for whole traces.

    Args:
        api: The module of the route for spans.
        store: Stores traces of one experiment, given MLflow's store, the experiment, traces and spans, and returns the
            ids of those that are stored.
    """
    export, add = taken(f"{_API}:export_traces"), getattr(getattr(api, "otel_router", None), "add_route", None)
    if not isinstance(export, FunctionType) or add is None or "_get_tracking_store" not in export.__globals__:
        logger.warning("dspy-mlflow-async: no whole traces are taken: MLflow's route for spans has changed")
        return

    async def receive(request: Any) -> Any:
        if request.method == "GET":
            return _answer(api, {"whole_traces": VERSION})
        received = _Received()
        mine = over(export, export.__globals__ | {"_get_tracking_store": lambda: received})
        said = {name.replace("_", "-"): name for name in inspect.signature(export).parameters if name != "request"}
        answer = await mine(request=request, **{name: request.headers.get(header) for header, name in said.items()})
        if answer.status_code != _OK:
            return answer
        args = (api._get_tracking_store, store, request.headers[_EXPERIMENT], await request.body(), received.spans)
        return _answer(api, {"stored": await asyncio.to_thread(_store, *args)})

    add(ROUTE, receive, methods=["GET", "POST"])


class _Received:
    """Stand for a store that keeps what MLflow has made of the spans in a request."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def log_spans(self, _location: str, spans: list[Any], *_: Any, **__: Any) -> list[Any]:
        self.spans += spans
        return spans

    async def log_spans_async(self, location: str, spans: list[Any]) -> list[Any]:
        return self.log_spans(location, spans)


def _store(opened: Callable[[], Any], store: Store, experiment_id: str, body: bytes, spans: Sequence[Any]) -> list[str]:
    infos = decode_infos(body)
    # MLflow's users may be denied assessments, which it looks for in the request for one trace alone.
    infos = [info for info in infos if not (info.assessments and _AUTH in sys.modules)]
    drop = taken("mlflow.server.handlers:_drop_blocked_trace_tags")
    for info in infos if drop is not None else ():
        info.tags = drop(info.tags)
    return store(opened(), experiment_id, infos, spans)


def _answer(api: Any, said: dict[str, Any]) -> Any:
    return api.Response(content=json.dumps(said), media_type="application/json")
