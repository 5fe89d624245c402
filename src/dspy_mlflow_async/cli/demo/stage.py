"""Setup of the demo: a sqlite store in a folder, a language model, and the tracer, for as long as a block lasts."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import dspy
import mlflow
import tqdm
from mlflow import MlflowClient
from mlflow.entities import Trace
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from dspy_mlflow_async import autolog
from dspy_mlflow_async.cli.demo.script import Script, Ticket, load_tickets, markers_in
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint

LATENCY = 0.15  # seconds for which each answer of the local endpoint is awaited
_NOISY = ("alembic", "mlflow", "dspy", "httpx", "LiteLLM")


@dataclass(frozen=True, slots=True)
class Stage:
    """Data set, store, experiment and language model that the acts and the check need.

    Attributes:
        tickets: The data set.
        store: The tracking URI.
        experiment_id: The experiment of this run of the demo.
        endpoint: The local endpoint, or None where the user has named a model.
        model: What the model is called.
    """

    tickets: tuple[Ticket, ...]
    store: str
    experiment_id: str
    endpoint: LocalEndpoint | None
    model: str

    def billed(self) -> Counter[str] | None:
        """Return tokens by marker, as the endpoint has counted them."""
        if self.endpoint is None:
            return None
        counts: Counter[str] = Counter()
        for request in self.endpoint.requests:
            for marker in markers_in(request.text):
                counts[marker] += request.usage.get("total_tokens", 0)
        return counts

    def traces(self) -> list[Trace]:
        """Return all traces of this run of the demo, read back from the store."""
        mlflow.flush_trace_async_logging()
        return read_traces(self.store, self.experiment_id)


def read_traces(store: str, experiment_id: str) -> list[Trace]:
    """Return all traces of an experiment, with their spans, through MLflow's client."""
    client = MlflowClient(tracking_uri=store)
    traces: list[Trace] = []
    token = None
    while True:
        page = client.search_traces(locations=[experiment_id], max_results=100, page_token=token)
        traces.extend(page)
        token = page.token
        if not token:
            return traces


@contextlib.contextmanager
def set_up(folder: Path, model: str | None, api_base: str | None) -> Iterator[Stage]:
    """Start the endpoint, create the experiment, configure DSPy and switch the tracer on.

    Args:
        folder: Where the store goes; made if need be.
        model: The user's model, by LiteLLM's name; None for the local endpoint's.
        api_base: The user's endpoint, or None.

    Raises:
        OSError: Where the folder cannot be written, its store is none of this MLflow's, or loopback has no port.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tickets = load_tickets()
    store = f"sqlite:///{(folder / 'mlflow.db').resolve().as_posix()}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(_bars_without_race())
        endpoint = None
        if model is None:
            endpoint = stack.enter_context(LocalEndpoint(Script(tickets), latency=LATENCY))
            lm = dspy.LM("openai/scripted", api_base=endpoint.api_base, api_key="none", cache=False, num_retries=0)
        else:
            lm = dspy.LM(model, **({"api_base": api_base} if api_base else {}), cache=False)
        mlflow.set_tracking_uri(store)
        experiment_id = _create_experiment(store, folder)
        mlflow.set_experiment(experiment_id=experiment_id)
        dspy.configure(lm=lm)
        autolog(silent=True, log_compiles=True, log_evals=True)
        stack.callback(autolog, disable=True)
        yield Stage(tickets, store, experiment_id, endpoint, lm.model)


def _create_experiment(store: str, folder: Path) -> str:
    name = f"demo {time.strftime('%Y-%m-%d %H:%M:%S')}.{time.time_ns() // 1_000_000 % 1000:03}"
    artifacts = (folder / "artifacts").resolve().as_uri()
    try:
        experiment_id: str = MlflowClient(tracking_uri=store).create_experiment(name, artifact_location=artifacts)
    except (MlflowException, SQLAlchemyError) as error:  # made by another version, or no database at all
        raise OSError(f"MLflow cannot use {store}: {error}") from error
    return experiment_id


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what MLflow says about its new tables, and DSPy about each evaluation, off the demo's output."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class _ForgivingSet(WeakSet[Any]):
    def remove(self, item: Any) -> None:
        self.discard(item)


@contextlib.contextmanager
def _bars_without_race() -> Iterator[None]:
    """Keep DSPy's progress bars from failing each other.

    ``ParallelExecutor`` clears tqdm's set of bars whenever it starts; a bar that another thread is just making, even
    a disabled one, then raises ``KeyError`` when it removes itself. It does so without a tracer, too.
    """
    before = tqdm.tqdm._instances
    tqdm.tqdm._instances = _ForgivingSet(before)
    try:
        yield
    finally:
        tqdm.tqdm._instances = before
