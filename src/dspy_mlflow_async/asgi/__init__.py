"""Middleware for ASGI services: one trace for each request that calls DSPy, and none for those that do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_mlflow_async.seams.listed import lost_ground

__all__ = ["TracingMiddleware"]

if TYPE_CHECKING or not lost_ground():
    from dspy_mlflow_async.asgi.middleware import TracingMiddleware
else:
    from dspy_mlflow_async.fallback import TracingMiddleware
