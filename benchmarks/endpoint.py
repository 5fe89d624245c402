"""The LM over real HTTP, in a process of its own: ``python -m benchmarks.endpoint`` prints its address and serves."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.programs import ANSWER
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint, Reply


def answer(body: dict[str, Any]) -> Reply:
    """The scripted answer, after as many milliseconds as the model's name says: ``scripted-20``."""
    latency = int(body["model"].rpartition("-")[2]) / 1000
    return Reply(content=ANSWER, latency=latency, usage={"prompt_tokens": 100, "completion_tokens": 10})


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Its address, for as long as the block lasts.

    Raises:
        RuntimeError: If it does not start.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.endpoint"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError("the endpoint did not start")
        yield address
    finally:
        process.kill()
        process.communicate()


def _serve() -> None:
    with LocalEndpoint(answer, keep_requests=False) as endpoint:
        print(endpoint.api_base, flush=True)
        sys.stdin.read()  # until whoever started this is gone


if __name__ == "__main__":
    _serve()
