"""Store of a tracking URI: its abilities, many traces in one transaction, and what MLflow keeps beside traces.

For the export room. Checked on mlflow 3.11.1 and 3.17.2.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

from google.protobuf.empty_pb2 import Empty
from mlflow.entities.model_registry import PromptVersion
from mlflow.entities.trace_state import TraceState
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracing.client import TracingClient
from mlflow.tracing.constant import TraceMetadataKey
from mlflow.tracking._tracking_service.utils import _get_store, _resolve_tracking_uri
from mlflow.utils.uri import is_databricks_uri
from mlflow.utils.workspace_context import get_request_workspace
from packaging.version import Version

from dspy_mlflow_async.seams.installed import require_for
from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.mlflow_client import MlflowClient
from dspy_mlflow_async.seams.mlflow_experiment import is_in_notebook_of_databricks
from dspy_mlflow_async.seams.mlflow_http import is_repeatable, repeat, repeatable
from dspy_mlflow_async.seams.mlflow_span_message import message_of, writes_same_messages
from dspy_mlflow_async.seams.mlflow_span_text import still
from dspy_mlflow_async.seams.mlflow_trace_text import can_write_text, text_of_start
from dspy_mlflow_async.seams.patching import over

__all__ = [
    "TracingClient",
    "abandon_connections",
    "absolute_uri",
    "client_of",
    "end_stored_trace",
    "finalizes",
    "first_experiment",
    "is_databricks_uri",
    "is_sql",
    "is_unsupported",
    "link_prompts",
    "log_spans",
    "one_transaction",
    "renew_connections",
    "request_workspace",
    "resolve_tracking_uri",
    "shared_view",
    "start_trace",
    "supports_span_batches",
    "tracing_client",
    "upload_attachments",
    "upload_spans_as_artifact",
    "workspace_scope",
    "write_session",
]

# What a trace is sent to a server with, whose answer is then not read. Without any of them it is read.
RestStore: Any = taken("mlflow.store.tracking.rest_store:RestStore")
StartTraceV3: Any = taken("mlflow.protos.service_pb2:StartTraceV3")
_V3_TRACE_REST_API_PATH_PREFIX: Any = taken("mlflow.utils.rest_utils:_V3_TRACE_REST_API_PATH_PREFIX")
_can_skip_answer = can_write_text and None not in (
    RestStore,
    taken("mlflow.store.tracking.rest_store:RestStore._call_endpoint"),
    _V3_TRACE_REST_API_PATH_PREFIX,
)
_send_spans: Any = taken("mlflow.store.tracking.rest_store:RestStore.log_spans")
_TRACE_HEADERS = "Content-Type: application/json\r\n"
_SPANS_PATH, _SPANS_HEADERS = "/v1/traces", "Content-Type: application/x-protobuf\r\nx-mlflow-experiment-id: {}\r\n"


def resolve_tracking_uri(tracking_uri: str | None = None) -> str:
    """Return the URI as MLflow will use it: one queue and one spool per *resolved* URI. There is no public resolver."""
    return str(_resolve_tracking_uri(tracking_uri))


def absolute_uri(uri: str) -> str:
    """Return a URI that means the same store from every working directory; files and folders may be relative."""
    driver, separator, path = uri.partition(":///")
    if driver.startswith("sqlite") and separator:
        is_relative = path and not path.startswith(("/", ":memory:", "file:"))
        return f"{driver}:///{Path.cwd() / path}" if is_relative else uri
    if "://" in uri or is_databricks_uri(uri):
        return uri
    return (Path.cwd() / uri.removeprefix("file:")).as_uri()


def tracing_client(uri: str) -> TracingClient:
    """Return MLflow's client for the traces of a resolved URI, which opens a store that is not open yet.

    Raises:
        ImportError: Where what is installed cannot open it, with a sentence that says what does.
    """
    require_for(uri)
    return TracingClient(uri)


@functools.cache
def client_of(uri: str) -> Any:
    """Return MLflow's client for the runs of a resolved URI: one for the process, which opens a store if need be.

    A new one asks Spark where the models are registered, unless it is told, by an import that fails every time. Nothing
    here asks for models.
    """
    require_for(uri)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    tracking = getattr(client, "_tracking_client", None)
    # When a run ends, MLflow prints where it is, and for that asks Spark and Databricks by imports that fail.
    names = {"is_in_databricks_notebook": is_in_notebook_of_databricks, "get_workspace_url": _workspace_url}
    log_url = taken("mlflow.tracking._tracking_service.client:TrackingServiceClient._log_url")
    if tracking is not None and isinstance(log_url, FunctionType):
        tracking._log_url = functools.partial(over(log_url, log_url.__globals__ | names), tracking)
    return client


_workspace_url = functools.cache(taken("mlflow.utils.databricks_utils:get_workspace_url", lambda: None))


@contextlib.contextmanager
def workspace_scope(workspace: str | None) -> Iterator[None]:
    """Send the workspace header with the calls inside, as MLflow's exporter does."""
    if not workspace:
        yield
        return
    scope = taken("mlflow.utils.workspace_context:ServerWorkspaceContext")
    with scope(workspace) if scope else contextlib.nullcontext():
        yield


def upload_spans_as_artifact(client: TracingClient, info: Any, data: Any) -> None:
    """Upload spans to stores without ``log_spans`` (file store, servers before 3.4)."""
    client._upload_trace_data(info, data)


def upload_attachments(client: TracingClient, info: Any, attachments: dict[str, Any]) -> None:
    """Upload attachments to the artifact store, wherever the spans are."""
    client._upload_attachments(info, attachments)


def link_prompts(client: TracingClient, trace_id: str, prompts: Sequence[PromptVersion]) -> None:
    """Link prompt versions in the writer's thread; MLflow starts a thread for each trace."""
    client.link_prompt_versions_to_trace(trace_id=trace_id, prompts=prompts)


_FINALIZES = hasattr(TraceMetadataKey, "TRACE_INFO_FINALIZED")


def finalizes() -> bool:
    """Return whether `start_trace` has the last word on a trace, whatever its spans say (from mlflow 3.12 on)."""
    return _FINALIZES


def supports_span_batches(client: TracingClient) -> bool | None:
    """Return whether spans of many traces go together after ``start_trace``; None where the server has not said.

    MLflow would keep that answer for as long as the process lives, and take no spans: it is asked again.

    Before 3.12 a store adds the token counts of later spans to what ``start_trace`` wrote, and refuses spans of
    several traces in one call; then spans go first, trace by trace, and ``start_trace`` has the last word.
    """
    store = client.store
    if hasattr(store, "get_host_creds"):
        version = store._get_server_version(store.get_host_creds())
        if version is None:
            getattr(store._get_server_version, "cache_clear", lambda: None)()
            return None
        return bool(version >= Version("3.12.0.dev0"))
    return _FINALIZES


def start_trace(client: TracingClient, info: Any, *, reads_answer: bool) -> Any:
    """Call ``client.start_trace``. To read a server's answer takes as long as to write the request.

    Args:
        client: The client of the store.
        info: The trace.
        reads_answer: Whether the caller needs what the store has added, which is where the trace's artifacts lie.

    Returns:
        The trace as it is stored; ``info`` itself where the answer is not read.
    """
    store = client.store
    if reads_answer or not _can_skip_answer or type(store).start_trace is not RestStore.start_trace:
        return client.start_trace(info)
    body = text_of_start(info)
    if not repeat(store, _V3_TRACE_REST_API_PATH_PREFIX, _TRACE_HEADERS, body.encode()):
        with repeatable(store, _V3_TRACE_REST_API_PATH_PREFIX):
            store._call_endpoint(StartTraceV3, body, endpoint=_V3_TRACE_REST_API_PATH_PREFIX, response_proto=Empty())
    return info


def log_spans(client: TracingClient, experiment_id: str, spans: Sequence[Any]) -> None:
    """Call ``client.log_spans``; a server is sent them as it was sent traces before, in the same batch.

    Args:
        client: The client of the store.
        experiment_id: Where the spans go.
        spans: Spans of one resource that have ended, live or immutable.
    """
    store = client.store
    if (
        is_repeatable(store)
        and experiment_id.isdecimal()
        and _send_spans is not None
        and type(store).log_spans is RestStore.log_spans
        and writes_same_messages()
        and repeat(store, _SPANS_PATH, _SPANS_HEADERS.format(experiment_id), message_of(spans))
    ):
        return
    client.log_spans(experiment_id, list(map(still, spans)))


def end_stored_trace(uri: str, trace_id: str, duration_ms: int) -> None:
    """End a trace that its process has left in progress, as failed: its spans stay as they are.

    Args:
        uri: The resolved tracking URI.
        trace_id: MLflow's id.
        duration_ms: How long it took, as far as anybody knows.
    """
    client = tracing_client(uri)
    info = client.get_trace_info(trace_id)
    info.state, info.execution_duration = TraceState.ERROR, duration_ms
    client.start_trace(info)  # of a trace that is there, the store takes the new state


class _OneSession:
    """Session shared by several writes: a rollback by one of them must not silently undo the others."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def rollback(self) -> None:
        raise MlflowException("a write of the batch was refused; written one by one instead")


def is_sql(store: Any) -> bool:
    """Return whether a store is a database of this process's own."""
    return hasattr(store, "ManagedSessionMaker")


def first_experiment(store: Any) -> str:
    """Return the id of an experiment that is not deleted."""
    return str(store.search_experiments(max_results=1)[0].experiment_id)


def _writes_by_one_call(store: Any) -> bool:
    """Return whether a SQL store writes a trace as we know it; a plugin's store may have a method of its own."""
    of_mlflow = taken("mlflow.store.tracking.sqlalchemy_store:SqlAlchemyStore._start_trace_once")
    return of_mlflow is not None and hasattr(store, "_start_trace_once")


@contextlib.contextmanager
def one_transaction(client: TracingClient) -> Iterator[Any | None]:
    """Yield a view of a SQL store in which everything is one transaction and an experiment is read once.

    ``start_trace`` opens two sessions, reads the experiment and commits each time: two thirds of its 6 ms.
    Whatever goes wrong undoes the whole transaction and is raised; the caller then writes one by one.

    Yields:
        An object with the store's methods, or None where the store is no SQL store.
    """
    store = client.store
    if not _FINALIZES or not is_sql(store) or not _writes_by_one_call(store):
        yield None
        return
    with write_session(store) as session:
        yield shared_view(store, session)


def write_session(store: Any) -> Any:
    """Return a context with a session of a SQL store, committed at its end, or undone by an exception."""
    try:
        return store.ManagedSessionMaker(read_only=False)
    except TypeError:  # before mlflow 3.13 every session may write
        return store.ManagedSessionMaker()


def shared_view(store: Any, session: Any) -> Any:
    """Return a view of a SQL store in which all is written in one session, and an experiment is read once."""
    view = copy.copy(store)
    experiments: dict[str, Any] = {}

    def get_experiment(experiment_id: str) -> Any:
        if experiment_id not in experiments:
            experiments[experiment_id] = store.get_experiment(experiment_id)
        return experiments[experiment_id]

    shared = _OneSession(session)

    @contextlib.contextmanager
    def make_session(read_only: bool = True) -> Iterator[Any]:  # noqa: ARG001 - MLflow's signature
        yield shared

    view.ManagedSessionMaker = make_session
    view.get_experiment = get_experiment
    # No retry inside the transaction: the whole of it is what must be retried.
    view._run_with_deadlock_retry = lambda fn, *args, **kwargs: fn(*args, **kwargs)
    return view


def abandon_connections(tracking_uri: str) -> None:
    """Forget SQL connections after ``fork``: they belong to the parent, and are not closed here."""
    with contextlib.suppress(Exception):  # a store without an engine, or one that cannot be reached
        _get_store(tracking_uri).engine.dispose(close=False)


def renew_connections(tracking_uri: str) -> None:
    """Close the connections of a SQL store that rest in its pool, after one that may only read.

    SQLite opens a file that it may not write for reading, and a connection to a standby of PostgreSQL stays one; the
    pool keeps either for ever.
    """
    with contextlib.suppress(Exception):  # a store without an engine
        _get_store(tracking_uri).engine.dispose()


def is_unsupported(error: Exception) -> bool:
    """Return whether the store says that it does not take spans (file store, also behind a server)."""
    return isinstance(error, NotImplementedError) or (
        isinstance(error, RestException) and "REST OTLP span logging is not supported" in error.message
    )


def request_workspace() -> str | None:
    """Return the workspace of the current request, if there is one."""
    return get_request_workspace()
