"""MLflow's HTTP requests: with timeouts, excluded from instrumentation, and sent again where only the body differs.

For the export room. Checked on mlflow 3.11.1 and 3.17.2.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FunctionType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from google.protobuf.message import DecodeError
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode
from mlflow.tracking.request_header import registry as request_headers
from mlflow.utils import rest_utils
from mlflow.utils.workspace_context import get_request_workspace
from opentelemetry import context as otel_context
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from requests import sessions
from requests.utils import get_environ_proxies, get_netrc_auth

from dspy_mlflow_async.seams.http_repeated import NOT_UNDERSTOOD, Repeater, repeater_of
from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.patching import Undo, over, patch, together

__all__ = [
    "NoAnswerError",
    "Status",
    "bound_http",
    "is_limited",
    "is_repeatable",
    "limited_http",
    "repeat",
    "repeatable",
    "suppressed_instrumentation",
]


class Status(int):
    """HTTP status of an answer.

    Attributes:
        is_mlflows: Whether MLflow itself refused, in JSON with one of its error codes. A page, and JSON of another
            make, come from what stands before it.
    """

    is_mlflows: bool

    def __new__(cls, status: int, *, is_mlflows: bool = False) -> Status:  # noqa: PYI034 - typing has Self from 3.11 on
        """Make a status of a number."""
        self = super().__new__(cls, status)
        self.is_mlflows = is_mlflows
        return self


class NoAnswerError(OSError):
    """Error of an answer with success that came from no MLflow server."""


class _Known:
    """Facts that need not be found out for each request of a block, and of the blocks inside it.

    MLflow asks every header provider for every request, and Databricks' tries some imports that fail. Requests goes
    through the whole environment three times to learn of proxies. Together a quarter of what a request costs.
    """

    def __init__(self) -> None:
        self.headers: dict[str, Any] | None = None
        self.proxies: dict[str, dict[str, str]] = {}  # by host
        self.facts: tuple[Any, ...] | None = None  # see `_facts`


class _Block:
    """Settings of the requests of one ``limited_http`` block."""

    def __init__(self, seconds: float, known: _Known) -> None:
        self.seconds = seconds
        self.statuses: list[Status] = []
        self.known = known


_OF_DATABRICKS: Any = taken("mlflow.tracking.request_header.registry:DatabricksRequestHeaderProvider")
_PROVIDERS: Any = taken("mlflow.tracking.request_header.registry:_request_header_provider_registry")
verify_rest_response: Any = taken("mlflow.utils.rest_utils:verify_rest_response")
_OK, _BAD_REQUEST = 200, 400
_OTLP_PATH, _DATABRICKS_OTLP = "/v1/traces", "/otel/"
_START_TRACE_PATH = "/api/3.0/mlflow/traces"

_block: ContextVar[_Block | None] = ContextVar("dspy_mlflow_async_http", default=None)
_repeatable: ContextVar[tuple[Any, str] | None] = ContextVar("dspy_mlflow_async_repeatable", default=None)


def bound_http() -> Undo:
    """Make ``limited_http`` work: MLflow's retries (7, up to some minutes) are set per process, not per call.

    Returns:
        The undo.
    """
    undos = []
    if respond := taken("mlflow.utils.rest_utils:_get_http_response_with_retries"):
        undos.append(patch(rest_utils, _get_http_response_with_retries=_limiting(respond)))
    if resolve := taken("mlflow.tracking.request_header.registry:resolve_request_headers"):
        undos.append(patch(request_headers, resolve_request_headers=_asking_once(resolve)))
    if find := taken("requests.sessions:get_environ_proxies"):
        undos.append(patch(sessions, get_environ_proxies=_looking_once(find)))
    return together(*undos)


def _limiting(respond: Callable[..., Any]) -> Callable[..., Any]:
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
        block = _block.get()
        if block is not None:
            max_retries, raise_on_status = 0, False
            kwargs["timeout"] = min(block.seconds, kwargs.get("timeout") or block.seconds)
        response = respond(
            method, url, max_retries, backoff_factor, backoff_jitter, retry_codes, raise_on_status, *args, **kwargs
        )
        if block is not None:
            block.statuses.append(Status(response.status_code, is_mlflows=_is_refusal(response)))
            if response.status_code == _OK and not _is_answer(method, urlsplit(url).path, response):
                kind = response.headers.get("Content-Type") or "nothing"
                raise NoAnswerError(f"{urlsplit(url).path} was answered with {kind}, and not as MLflow answers")
            store, endpoint = _repeatable.get() or (None, "")
            # A plugin that is asked for credentials may send requests of its own, of which nothing is learnt.
            if store is not None and url.endswith(endpoint) and _learnt_of(block, store) is None:
                is_plain = kwargs.get("auth") is None and verify_rest_response is not None
                _learn(block, store, repeater_of(response, endpoint, kwargs["timeout"]) if is_plain else None)
        return response

    return _get_http_response_with_retries


class _Learnt(NamedTuple):
    """Way to repeat a request.

    Attributes:
        facts: What it depends on.
        repeater: What repeats it; None where that cannot be.
        until: When it is to be learnt anew, on the monotonic clock.
    """

    facts: tuple[Any, ...]
    repeater: Repeater | None
    until: float


_LEARNT_SECONDS = 60.0
# By store and workspace.
_learnt: weakref.WeakKeyDictionary[Any, dict[str | None, _Learnt]] = weakref.WeakKeyDictionary()


def _facts(block: _Block, store: Any) -> tuple[Any, ...]:
    """Return all that MLflow and requests make a request from, but for what it is about: found out once for a block.

    To look is cheaper than to make a request; connections are those of one process.
    """
    known = block.known
    if known.facts is None:  # no lock: plugins run here, and two threads find the same
        creds = store.get_host_creds()
        known.facts = (
            os.getpid(),
            block.seconds,
            dict(os.environ),
            vars(creds),
            request_headers.resolve_request_headers(),
            get_environ_proxies(creds.host),
            get_netrc_auth(creds.host),
        )
    return known.facts


def _learnt_of(block: _Block, store: Any) -> _Learnt | None:
    learnt = _learnt.get(store, {}).get(get_request_workspace())
    is_valid = learnt is not None and learnt.until > time.monotonic() and learnt.facts == _facts(block, store)
    return learnt if is_valid else None


def _learn(block: _Block, store: Any, repeater: Repeater | None) -> None:
    until = time.monotonic() + _LEARNT_SECONDS
    _learnt.setdefault(store, {})[get_request_workspace()] = _Learnt(_facts(block, store), repeater, until)


@contextlib.contextmanager
def repeatable(store: Any, endpoint: str) -> Iterator[None]:
    """Learn of MLflow's request inside how to make others like it.

    Args:
        store: Sends it.
        endpoint: The path that MLflow is asked to send to.
    """
    token = _repeatable.set((store, endpoint))
    try:
        yield
    finally:
        _repeatable.reset(token)


def is_repeatable(store: Any) -> bool:
    """Return whether a request can be made like one before."""
    block = _block.get()
    learnt = None if block is None else _learnt_of(block, store)
    return learnt is not None and learnt.repeater is not None


def repeat(store: Any, path: str, headers: str, body: bytes) -> bool:
    """Send a body as MLflow would, with a request like one before.

    Args:
        store: Has sent that.
        path: Below the server's address.
        headers: Lines about the body, but for its length.
        body: What to send.

    Returns:
        Whether the server has taken it; False where the request is for MLflow to make.

    Raises:
        MlflowException: What MLflow raises where there is no answer, or one that refuses.
        NoAnswerError: Where no MLflow server has answered.
    """
    block = _block.get()
    learnt = None if block is None else _learnt_of(block, store)
    if block is None or learnt is None or learnt.repeater is None:
        return False
    url = learnt.repeater.base + path
    try:
        answer = learnt.repeater.post(path, headers, body)
    except OSError as error:
        raise MlflowException(f"API request to {url} failed with exception {error!r}") from error
    if answer is None:
        return False
    if answer is NOT_UNDERSTOOD:
        _learn(block, store, None)
        return False
    if answer.status_code != _OK:
        response = answer.as_response(url)
        block.statuses.append(Status(answer.status_code, is_mlflows=_is_refusal(response)))
        verify_rest_response(response, path)
        return True
    block.statuses.append(Status(_OK))
    if not _is_answer("POST", path, answer):
        kind = answer.headers["Content-Type"] or "nothing"
        raise NoAnswerError(f"{urlsplit(url).path} was answered with {kind}, and not as MLflow answers")
    return True


def _is_refusal(response: Any) -> bool:
    if response.status_code < _BAD_REQUEST:
        return False
    try:
        said = response.json()
    except ValueError:
        return False
    return isinstance(said, dict) and said.get("error_code") in ErrorCode.keys()  # noqa: SIM118 - a protobuf enum


def _is_answer(method: str, path: str, response: Any) -> bool:
    """Return whether a success is one of MLflow's: maintenance pages and captive portals say 200, too.

    Sources: mlflow.server.otel_api (protobuf, before 3.5 JSON), mlflow.server.handlers (JSON objects).
    """
    content = response.content
    if path.endswith(_OTLP_PATH) and _DATABRICKS_OTLP not in path:
        kind = response.headers.get("Content-Type", "")
        if kind.startswith("application/x-protobuf"):
            return _accepts_all(content)
        return kind.startswith("application/json") and b"partialSuccess" in content
    if method == "POST" and path.endswith(_START_TRACE_PATH):
        return content.lstrip()[:1] == b"{" and b'"trace"' in content
    return "/mlflow/" not in path or content.lstrip()[:1] == b"{"


def _accepts_all(content: bytes) -> bool:
    answer = ExportTraceServiceResponse()
    try:
        answer.ParseFromString(content)
    except DecodeError:
        return False
    return not answer.partial_success.rejected_spans


def _asking_once(resolve: Callable[..., Any]) -> Callable[..., Any]:
    def resolve_request_headers(given: Any = None) -> Any:
        block = _block.get()
        if block is None:
            is_ours = threading.current_thread().name.startswith("dspy-mlflow-async")
            return (_asking_those_present(resolve) if is_ours else resolve)(given)
        if block.known.headers is None:
            with _apart_from(block):
                block.known.headers = dict(_asking_those_present(resolve)())
        return block.known.headers | (given or {})

    return resolve_request_headers


@contextlib.contextmanager
def _apart_from(block: _Block) -> Iterator[None]:
    """Bound what plugins ask of a server, and learn nothing of it: their requests may lack what they are asked for."""
    tokens = _block.set(_Block(block.seconds, _Known())), _repeatable.set(None)
    try:
        yield
    finally:
        _block.reset(tokens[0])
        _repeatable.reset(tokens[1])


def _asking_those_present(resolve: Callable[..., Any]) -> Callable[..., Any]:
    """Return MLflow's function without the provider of Databricks' headers, where this is no Databricks.

    Each time that is asked, it tries some imports, and would wait for whatever other threads import.
    """
    if not isinstance(resolve, FunctionType) or None in (_OF_DATABRICKS, _PROVIDERS) or _is_in_databricks():
        return resolve
    providers = [provider for provider in _PROVIDERS if not isinstance(provider, _OF_DATABRICKS)]
    return over(resolve, resolve.__globals__ | {"_request_header_provider_registry": providers})


@functools.cache
def _is_in_databricks() -> bool:
    return bool(_OF_DATABRICKS().in_context())


def _looking_once(find: Callable[..., Any]) -> Callable[..., Any]:
    def get_environ_proxies(url: str, no_proxy: Any = None) -> Any:
        block = _block.get()
        if block is None or no_proxy is not None:
            return find(url, no_proxy)
        host = urlsplit(url).netloc
        if host not in block.known.proxies:
            block.known.proxies[host] = find(url)
        return dict(block.known.proxies[host])

    return get_environ_proxies


@contextlib.contextmanager
def limited_http(seconds: float) -> Iterator[list[Status]]:
    """Make one attempt for each request inside, bounded in time, with headers and proxies found out once.

    Inside another block, and in threads that work for it, what is known already is not found out again.

    Yields:
        The HTTP statuses seen; an ``MlflowException`` of the OTLP endpoint does not carry its own.
    """
    around = _block.get()
    block = _Block(seconds, around.known if around is not None else _Known())
    token = _block.set(block)
    try:
        yield block.statuses
    finally:
        _block.reset(token)


def is_limited() -> bool:
    """Return whether a ``limited_http`` block is open here: the exporter is at work."""
    return _block.get() is not None


@contextlib.contextmanager
def suppressed_instrumentation() -> Iterator[None]:
    """Keep OpenTelemetry's instrumentation of HTTP and SQL from tracing the writing of traces."""
    key = taken("opentelemetry.context:_SUPPRESS_INSTRUMENTATION_KEY", "suppress_instrumentation")
    token = otel_context.attach(otel_context.set_value(key, True))
    try:
        yield
    finally:
        otel_context.detach(token)
