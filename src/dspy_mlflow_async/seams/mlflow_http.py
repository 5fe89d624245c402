"""MLflow's HTTP requests: bounded, and traced by nobody.

For the export room. Checked on mlflow 3.11.1 and 3.17.2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from mlflow.tracking.request_header import registry as request_headers
from mlflow.utils import rest_utils
from opentelemetry import context as otel_context

from dspy_mlflow_async.seams.patching import patch

__all__ = [
    "bound_http",
    "limited_http",
    "suppressed_instrumentation",
]


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

    undo_responses = patch(rest_utils, _get_http_response_with_retries=_get_http_response_with_retries)
    undo_headers = patch(request_headers, resolve_request_headers=resolve_request_headers)

    def undo() -> None:
        undo_responses()
        undo_headers()

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
