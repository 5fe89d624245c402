"""The public names as a user writes them: read by the type checker, never run."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import dspy

import dspy_mlflow_async
from dspy_mlflow_async import (
    ThreadPoolExecutor,
    TracingCallback,
    autolog,
    flush,
    propagate,
    stats,
    suppress,
)
from dspy_mlflow_async.cli.doctor import Diagnosis, diagnose
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
from dspy_mlflow_async.testing import capture_traces, tree

version: str = dspy_mlflow_async.__version__


# --- autolog --------------------------------------------------------------------------------------------------------

autolog()
autolog(True, False, True, False, False, False, False)
autolog(
    log_traces=True,
    log_traces_from_compile=True,
    log_traces_from_eval=False,
    log_compiles=True,
    log_evals=True,
    silent=True,
    propagate_threads=True,
    max_value_bytes=10_000,
    mask_contents=False,
    redact=lambda value: "…" if isinstance(value, bytes) else value,
)
autolog(disable=True)


# --- one callback, where it is wanted -------------------------------------------------------------------------------

callback = TracingCallback(log_traces=True, log_traces_from_eval=False, redact=None)
with dspy.context(callbacks=[callback]):
    dspy.Predict("question -> answer", callbacks=[callback])


# --- blocks and threads ---------------------------------------------------------------------------------------------

with suppress():
    pass


def count(words: str, least: int = 0) -> int:
    """A function of the user's."""
    return max(len(words.split()), least)


async def count_later(words: str) -> int:
    """A coroutine function of the user's."""
    return count(words)


counted: int = propagate(count)("one two")
with ThreadPoolExecutor(max_workers=2, thread_name_prefix="mine") as pool:
    future: concurrent.futures.Future[int] = pool.submit(count, "one two", least=1)
    numbers: list[int] = list(pool.map(count, ["one", "two"]))


# --- books ----------------------------------------------------------------------------------------------------------

stored: bool = flush(timeout=10.0)
started: int = stats().started
errors: int = stats().internal_errors


# --- tests and tools ------------------------------------------------------------------------------------------------

with capture_traces() as traces:
    shape: tuple[Any, ...] = tree(traces[0], "outcome", lambda span: span.span_type, sort=True)

diagnosis: Diagnosis = diagnose(tracking_uri="http://127.0.0.1:5000", self_test=False)
well: bool = diagnosis.is_well

with LocalEndpoint(lambda body: {"content": str(body["model"]), "latency": 0.1}, latency=0.02) as endpoint:
    base: str = endpoint.api_base
    asked: list[dict[str, Any]] = [request.body for request in endpoint.requests]
