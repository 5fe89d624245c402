"""Every private name of MLflow (and of OpenTelemetry below it) that the export room touches, with its reason.

Checked on mlflow 3.11.1 and 3.17.2. Nothing here keeps state of ours, except two context-local switches.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from mlflow.entities import Span
from mlflow.entities.model_registry import PromptVersion
from mlflow.environment_variables import MLFLOW_ENABLE_ASYNC_TRACE_LOGGING
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracing import provider as tracing_provider
from mlflow.tracing.attachments import Attachment
from mlflow.tracing.client import TracingClient
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey, TraceTagKey
from mlflow.tracing.display import get_display_handler
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.fluent import _EVAL_REQUEST_ID_TO_TRACE_ID, _set_last_active_trace_id
from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor
from mlflow.tracing.trace_manager import InMemoryTraceManager, _Trace
from mlflow.tracing.utils import (
    add_size_stats_to_trace_metadata,
    aggregate_cost_from_spans,
    aggregate_usage_from_spans,
    encode_span_id,
    generate_assessment_id,
    get_experiment_id_for_trace,
    maybe_get_request_id,
    should_compute_cost_client_side,
    update_trace_state_from_span_conditionally,
)
from mlflow.tracing.utils.otlp import should_export_otlp_metrics
from mlflow.tracing.utils.truncation import set_request_response_preview
from mlflow.tracking._tracking_service.utils import _get_store, _resolve_tracking_uri
from mlflow.tracking.request_header import registry as request_headers
from mlflow.utils import rest_utils
from mlflow.utils.databricks_utils import is_in_databricks_notebook
from mlflow.utils.uri import is_databricks_uri
from mlflow.utils.workspace_context import get_request_workspace
from opentelemetry import context as otel_context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from packaging.version import Version

__all__ = [
    "InMemoryTrace",
    "MlflowV3SpanExporter",
    "MlflowV3SpanProcessor",
    "TracingClient",
    "abandon_connections",
    "absolute_uri",
    "adopt_trace",
    "aggregate_cost_from_spans",
    "aggregate_usage_from_spans",
    "bound_http",
    "complete_metadata",
    "computes_cost",
    "display",
    "displays",
    "encode_span_id",
    "ended_root",
    "experiment_of",
    "exports_metrics",
    "finish_root",
    "finished_span",
    "generate_assessment_id",
    "get_experiment_id_for_trace",
    "is_databricks_uri",
    "is_evaluating",
    "is_replaceable",
    "is_unsupported",
    "limited_http",
    "link_prompts",
    "manager_lock",
    "one_transaction",
    "original_processor",
    "patch_processor_factory",
    "peek_trace",
    "pop_trace",
    "replace_processors",
    "request_workspace",
    "reset_processor_locks",
    "resolve_tracking_uri",
    "restore_attachment",
    "restore_span",
    "retire",
    "supports_span_batches",
    "suppressed_instrumentation",
    "trace_id_of",
    "upload_attachments",
    "upload_spans_as_artifact",
    "wants_async",
    "weigh",
    "workspace_of",
    "workspace_scope",
]

# The in-memory record of a trace: we keep it past `pop_trace`, to serialise in the writer and not in the caller.
InMemoryTrace = _Trace


def resolve_tracking_uri(tracking_uri: str | None = None) -> str:
    """The URI as MLflow will use it: one queue and one spool per *resolved* URI. There is no public resolver."""
    return str(_resolve_tracking_uri(tracking_uri))


def absolute_uri(uri: str) -> str:
    """A resolved URI that means the same store from every working directory; files and folders may be relative."""
    driver, separator, path = uri.partition(":///")
    if driver.startswith("sqlite") and separator:
        is_relative = path and not path.startswith(("/", ":memory:", "file:"))
        return f"{driver}:///{Path.cwd() / path}" if is_relative else uri
    if "://" in uri or is_databricks_uri(uri):
        return uri
    return (Path.cwd() / uri.removeprefix("file:")).as_uri()


# --- the trace manager -----------------------------------------------------------------------------------------


def trace_id_of(otel_trace_id: int) -> str | None:
    """MLflow's id of the trace, if the manager knows it."""
    return InMemoryTraceManager.get_instance().get_mlflow_trace_id_from_otel_id(otel_trace_id)


def peek_trace(trace_id: str) -> _Trace | None:
    """The in-memory record of a trace. ``get_trace`` is public but holds the manager's lock while one looks."""
    with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
        return trace


def pop_trace(otel_trace_id: int, trace_id: str) -> None:
    """Forget a trace. ``InMemoryTraceManager.pop_trace`` would convert every span in the caller's thread."""
    manager = InMemoryTraceManager.get_instance()
    with manager._lock:
        manager._otel_id_to_mlflow_trace_id.pop(otel_trace_id, None)
        manager._traces.pop(trace_id, None)


def adopt_trace(otel_trace_id: int, trace_id: str, trace: _Trace) -> None:
    """Make the manager know a trace (again): its cache evicts (1,000 entries), and late spans come after the end."""
    manager = InMemoryTraceManager.get_instance()
    with manager._lock:
        manager._otel_id_to_mlflow_trace_id[otel_trace_id] = trace_id
        if trace_id not in manager._traces:
            manager._traces[trace_id] = trace


def manager_lock() -> Any:
    """The manager's lock, taken around ``fork`` so that the child does not inherit it locked."""
    return InMemoryTraceManager.get_instance()._lock


def experiment_of(trace: _Trace) -> str | None:
    """The experiment of a trace; None for a remote one, whose location is None."""
    try:
        return trace.info.experiment_id
    except AttributeError:
        return None


def ended_root(trace: _Trace) -> ReadableSpan | None:
    """OpenTelemetry's span at the root of a trace, which MLflow's span keeps to itself; None while it is open."""
    root = next((span for span in list(trace.span_dict.values()) if span.parent_id is None), None)
    return None if root is None or root.end_time_ns is None else root._span


def workspace_of(trace: _Trace | None) -> str | None:
    """The workspace the trace began in (from mlflow 3.12 on it is kept with the trace)."""
    if trace is None:
        return None
    return getattr(trace, "workspace", None) or get_request_workspace()


@contextlib.contextmanager
def workspace_scope(workspace: str | None) -> Iterator[None]:
    """Send the workspace header with the calls inside, as MLflow's exporter does."""
    if not workspace:
        yield
        return
    from mlflow.utils import workspace_context

    scope = getattr(workspace_context, "ServerWorkspaceContext", None)
    with scope(workspace) if scope else contextlib.nullcontext():
        yield


def finish_root(processor: Any, trace: _Trace, root: Any) -> None:
    """``BaseMlflowSpanProcessor._update_trace_info`` without its totals, which are computed when written."""
    info = trace.info
    info.request_time = root.start_time // 1_000_000
    info.execution_duration = (root.end_time - root.start_time) // 1_000_000
    update_trace_state_from_span_conditionally(trace, root)
    attributes = root.attributes or {}
    info.trace_metadata.update(
        {
            TraceMetadataKey.INPUTS: processor._truncate_metadata(attributes.get(SpanAttributeKey.INPUTS)),
            TraceMetadataKey.OUTPUTS: processor._truncate_metadata(attributes.get(SpanAttributeKey.OUTPUTS)),
        }
    )
    _set_last_active_trace_id(info.trace_id)
    if evaluation_id := info.tags.get(TraceTagKey.EVAL_REQUEST_ID):
        # The evaluation harness asks for the trace by this id.
        _EVAL_REQUEST_ID_TO_TRACE_ID[evaluation_id] = info.trace_id


def weigh(spans: Iterable[Any]) -> int:
    """About how many bytes these spans hold. The mapping's own iteration copies under a lock; ``_dict`` does not."""
    size = 0
    for span in spans:
        size += 600
        attributes = span._span._attributes
        for value in tuple(getattr(attributes, "_dict", attributes or {}).values()):
            size += len(value) if isinstance(value, str) else 16
        for attachment in span._attachments.values():
            size += len(attachment.content_bytes)
    return size


# --- what MLflow's exporter does besides storing ------------------------------------------------------------------


def wants_async() -> bool:
    """``MlflowV3SpanExporter._should_enable_async_logging`` of 3.17; 3.11 is synchronous unless told otherwise."""
    if MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.is_set():
        return bool(MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.get())
    return bool(MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.get()) and not _is_in_databricks_notebook()


# A process does not move there, and every look fails an import, which takes a millisecond.
_is_in_databricks_notebook = functools.cache(is_in_databricks_notebook)


def is_evaluating() -> bool:
    """Whether MLflow's evaluation harness waits for this very trace."""
    return bool(maybe_get_request_id(is_evaluate=True))


def displays() -> bool:
    """Whether somebody looks: a notebook, or Databricks serving. Otherwise no trace is built for showing."""
    if "IPython" in sys.modules and not type(get_display_handler()).disabled:
        return bool(sys.modules["IPython"].get_ipython())
    return "IS_IN_DB_MODEL_SERVING_ENV" in os.environ


def display(trace: Any) -> None:
    """Show a finished trace in the notebook, and keep it for the response of Databricks serving."""
    if not is_evaluating():
        get_display_handler().display_traces([trace])
    try:
        from mlflow.tracing.export.inference_table import maybe_add_trace_to_serving_buffer
    except ImportError:  # mlflow < 3.12 has none
        return
    maybe_add_trace_to_serving_buffer(trace)


def complete_metadata(trace: Any) -> None:
    """Previews and size statistics, as MLflow adds them at export."""
    set_request_response_preview(trace.info, trace.data)
    add_size_stats_to_trace_metadata(trace)


def computes_cost() -> bool:
    """Whether the client is the one to compute the cost (Databricks, SageMaker)."""
    return bool(should_compute_cost_client_side())


def upload_spans_as_artifact(client: TracingClient, info: Any, data: Any) -> None:
    """The way for stores without ``log_spans`` (file store, servers before 3.4)."""
    client._upload_trace_data(info, data)


def upload_attachments(client: TracingClient, info: Any, attachments: dict[str, Any]) -> None:
    """Attachments go to the artifact store, wherever the spans are."""
    client._upload_attachments(info, attachments)


def link_prompts(client: TracingClient, trace_id: str, prompts: Sequence[PromptVersion]) -> None:
    """Link prompt versions in the writer's thread; MLflow starts a thread for each trace."""
    client.link_prompt_versions_to_trace(trace_id=trace_id, prompts=prompts)


def restore_span(otel_span: ReadableSpan, attachments: dict[str, Any], links: list[Any] | None) -> Span:
    """A span from its parts; ``Span.from_dict`` differs between versions and loses attachments."""
    span = Span(otel_span)
    span._attachments = attachments
    if links:
        span._links = links
    return span


def restore_attachment(attachment_id: str, content_type: str, content: bytes) -> Attachment:
    """An attachment with the id that the span's text refers to; the constructor makes a new one."""
    attachment = Attachment(content_type=content_type, content_bytes=content)
    attachment._id = attachment_id
    return attachment


# --- the processor ---------------------------------------------------------------------------------------------


def patch_processor_factory(make: Callable[[str, Callable[[str], Any]], Any]) -> Callable[[], None]:
    """Let ``make(tracking_uri, original)`` build the span processor whenever MLflow builds its provider.

    Returns:
        The undo.
    """
    original = tracing_provider._get_mlflow_span_processor

    def _get_mlflow_span_processor(tracking_uri: str) -> Any:
        return make(tracking_uri, original)

    tracing_provider._get_mlflow_span_processor = _get_mlflow_span_processor

    def undo() -> None:
        if tracing_provider._get_mlflow_span_processor is _get_mlflow_span_processor:
            tracing_provider._get_mlflow_span_processor = original

    return undo


def is_replaceable(processor: Any) -> bool:
    """Whether this is MLflow's own processor for a tracking server: Databricks, UC and serving are left alone."""
    return (
        type(processor) is MlflowV3SpanProcessor
        and type(processor.span_exporter) is MlflowV3SpanExporter
        and not is_databricks_uri(processor.span_exporter._client.tracking_uri)
    )


def replace_processors(replacement: Callable[[Any], Any | None]) -> list[tuple[Any, Any]]:
    """Exchange processors inside the providers in use, so that their open spans end in the new one.

    ``provider.set`` or ``reset`` would build a new provider, and open spans would end in the old.

    Returns:
        The exchanged pairs, old and new.
    """
    pairs: list[tuple[Any, Any]] = []
    wrapper = tracing_provider.provider
    state = getattr(tracing_provider, "_trace_disabled_state", {})  # a provider put aside by `trace_disabled`
    for provider in (wrapper.get(), state.get("saved_provider")):
        if not isinstance(provider, TracerProvider):
            continue
        active = provider._active_span_processor
        with active._lock:
            fresh = []
            for old in active._span_processors:
                new = replacement(old)
                fresh.append(old if new is None else new)
                if new is not None:
                    pairs.append((old, new))
            active._span_processors = tuple(fresh)
    return pairs


def retire(processor: Any) -> list[ReadableSpan]:
    """Flush a processor of MLflow's that is no longer used, and stop its threads.

    Returns:
        Roots it had put off because children were still open.
    """
    exporter = processor.span_exporter
    with getattr(exporter, "_deferred_lock", contextlib.nullcontext()):
        deferred = getattr(exporter, "_deferred_root_spans", {})
        roots = list(deferred.values())
        deferred.clear()

    def flush() -> None:
        from mlflow.tracing.processor import base_mlflow

        with contextlib.suppress(Exception):  # MLflow's own traces: it logs what it loses
            if getattr(processor, "_batch_delegate", None) is not None:
                base_mlflow.retire_batch_processor(processor)
            elif queue := getattr(exporter, "_async_queue", None):
                queue.flush(terminate=True)
                queue._stop_event.clear()  # a terminated queue would write in the caller, should it be used again

    if getattr(processor, "_batch_delegate", None) is not None or exporter._is_async_enabled:
        threading.Thread(target=flush, name="dspy-mlflow-async-retire", daemon=True).start()
    return roots


def reset_processor_locks(processor: Any) -> None:
    """After ``fork``: another thread of the parent may have held them."""
    if hasattr(processor, "_deduplication_lock"):
        processor._deduplication_lock = threading.RLock()
    if hasattr(processor, "_pending_on_end_condition"):
        processor._pending_on_end_condition = threading.Condition(threading.Lock())
        processor._pending_on_end_count = 0


# --- stores ----------------------------------------------------------------------------------------------------

_FINALIZES = hasattr(TraceMetadataKey, "TRACE_INFO_FINALIZED")


def supports_span_batches(client: TracingClient) -> bool | None:
    """Whether ``start_trace`` may come first, and spans of many traces together; None where the server has not said.

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


class _OneSession:
    """A session shared by several writes: a rollback by one of them must not silently undo the others."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def rollback(self) -> None:
        raise MlflowException("a write of the batch was refused; written one by one instead")


@contextlib.contextmanager
def one_transaction(client: TracingClient) -> Iterator[Any | None]:
    """A view of a SQL store in which everything is one transaction and an experiment is read once.

    ``start_trace`` opens two sessions, reads the experiment and commits each time: two thirds of its 6 ms.
    Whatever goes wrong undoes the whole transaction and is raised; the caller then writes one by one.

    Yields:
        An object with the store's methods, or None where the store is no SQL store.
    """
    store = client.store
    if not _FINALIZES or not hasattr(store, "ManagedSessionMaker") or not hasattr(store, "_start_trace_once"):
        yield None
        return
    _load_prices()
    view = copy.copy(store)
    experiments: dict[str, Any] = {}

    def get_experiment(experiment_id: str) -> Any:
        if experiment_id not in experiments:
            experiments[experiment_id] = store.get_experiment(experiment_id)
        return experiments[experiment_id]

    with store.ManagedSessionMaker(read_only=False) as session:
        shared = _OneSession(session)

        @contextlib.contextmanager
        def make_session(read_only: bool = True) -> Iterator[Any]:  # noqa: ARG001 - MLflow's signature
            yield shared

        view.ManagedSessionMaker = make_session
        view.get_experiment = get_experiment
        # No retry inside the transaction: the whole of it is what must be retried.
        view._run_with_deadlock_retry = lambda fn, *args, **kwargs: fn(*args, **kwargs)
        yield view


@functools.cache
def _load_prices() -> None:
    """Import what the store imports to price the first span: seconds, for which everybody else's writes would wait."""
    with contextlib.suppress(Exception):  # not installed, or broken: then MLflow has prices of its own
        importlib.import_module("litellm")


def abandon_connections(tracking_uri: str) -> None:
    """After ``fork``: SQL connections belong to the parent. They are forgotten here, not closed."""
    with contextlib.suppress(Exception):  # a store without an engine, or one that cannot be reached
        _get_store(tracking_uri).engine.dispose(close=False)


# --- HTTP ------------------------------------------------------------------------------------------------------

_http_limit: ContextVar[float | None] = ContextVar("dspy_mlflow_async_http_limit", default=None)
_http_headers: ContextVar[dict[str, Any] | None] = ContextVar("dspy_mlflow_async_http_headers", default=None)
_http_status: ContextVar[list[int] | None] = ContextVar("dspy_mlflow_async_http_status", default=None)


def bound_http() -> Callable[[], None]:
    """Let ``limited_http`` work: MLflow's retries (7, up to some minutes) are set per process, not per call.

    Returns:
        The undo.
    """
    original = rest_utils._get_http_response_with_retries

    def _get_http_response_with_retries(
        method: str,
        url: str,
        max_retries: int,
        backoff_factor: Any,
        backoff_jitter: Any,
        retry_codes: Any,
        raise_on_status: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        limit = _http_limit.get()
        if limit is not None:
            max_retries, raise_on_status = 0, False
            kwargs["timeout"] = min(limit, kwargs.get("timeout") or limit)
        response = original(
            method, url, max_retries, backoff_factor, backoff_jitter, retry_codes, raise_on_status, *args, **kwargs
        )
        seen = _http_status.get()
        if seen is not None:
            seen.append(response.status_code)
        return response

    original_headers = request_headers.resolve_request_headers

    def resolve_request_headers(given: Any = None) -> Any:
        # MLflow asks every provider for every request; Databricks' tries some imports that fail, a fifth of the cost.
        known = _http_headers.get()
        if known is None or given is not None:
            return original_headers(given)
        if not known:
            known.update(original_headers())
        return dict(known)

    rest_utils._get_http_response_with_retries = _get_http_response_with_retries
    request_headers.resolve_request_headers = resolve_request_headers

    def undo() -> None:
        if rest_utils._get_http_response_with_retries is _get_http_response_with_retries:
            rest_utils._get_http_response_with_retries = original
        if request_headers.resolve_request_headers is resolve_request_headers:
            request_headers.resolve_request_headers = original_headers

    return undo


@contextlib.contextmanager
def limited_http(seconds: float) -> Iterator[list[int]]:
    """One attempt for each request inside, bounded in time, with the header providers asked once.

    Yields:
        The HTTP statuses seen; an ``MlflowException`` of the OTLP endpoint does not carry its own.
    """
    statuses: list[int] = []
    limit, seen, headers = _http_limit.set(seconds), _http_status.set(statuses), _http_headers.set({})
    try:
        yield statuses
    finally:
        _http_headers.reset(headers)
        _http_limit.reset(limit)
        _http_status.reset(seen)


@contextlib.contextmanager
def suppressed_instrumentation() -> Iterator[None]:
    """Keep OpenTelemetry's instrumentation of HTTP and SQL from tracing the writing of traces."""
    token = otel_context.attach(otel_context.set_value(otel_context._SUPPRESS_INSTRUMENTATION_KEY, True))
    try:
        yield
    finally:
        otel_context.detach(token)


def is_unsupported(error: Exception) -> bool:
    """Whether the store says that it does not take spans (file store, also behind a server)."""
    return isinstance(error, NotImplementedError) or (
        isinstance(error, RestException) and "REST OTLP span logging is not supported" in error.message
    )


def finished_span(span: ReadableSpan) -> Span:
    """MLflow's view of a span that its trace manager no longer knows."""
    return Span(span)


def exports_metrics() -> bool:
    """Whether MLflow's processor would export OpenTelemetry metrics."""
    return bool(should_export_otlp_metrics())


def original_processor(tracking_uri: str) -> Any:
    """MLflow's own processor, to be put back."""
    return tracing_provider._get_mlflow_span_processor(tracking_uri)


def request_workspace() -> str | None:
    """The workspace of the current request, if there is one."""
    return get_request_workspace()
