"""Handle of a run, which logs by the run's id and never through MLflow's fluent stack of active runs."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from mlflow.entities import Metric, Param, RunTag

from dspy_mlflow_async import export
from dspy_mlflow_async.runs import drawing
from dspy_mlflow_async.runs.artifacts import fonts_are_known, in_background, table_json
from dspy_mlflow_async.runs.datasets import dataset_input
from dspy_mlflow_async.runs.structure import structure
from dspy_mlflow_async.seams.mlflow_runs import (
    MLFLOW_LOGGED_ARTIFACTS,
    MLFLOW_RUN_NOTE,
    PendingRun,
    fluent,
    forget_system_metrics,
    remember_last_run,
    start_system_metrics,
)
from dspy_mlflow_async.spans import outcome as outcomes
from dspy_mlflow_async.spans.door import Door

logger = logging.getLogger("dspy_mlflow_async")

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"
_STATUS_BY_OUTCOME = {outcomes.CANCELLED: KILLED, outcomes.ABANDONED: KILLED, outcomes.ERROR: FAILED}
MAX_KEY_LENGTH = 250  # mlflow.utils.validation.MAX_ENTITY_KEY_LENGTH
MAX_PARAM_LENGTH = 6000  # mlflow.utils.validation.MAX_PARAM_VAL_LENGTH
MAX_TAG_LENGTH = 8000  # mlflow.utils.validation.MAX_TAG_VAL_LENGTH
_ODD_CHARACTER = re.compile(r"[^\w\-./ ]" if os.name == "nt" else r"[^\w\-./: ]")
_INDEX = re.compile(r"\[(['\"]?)([^\]]{0,250})\1\]")


def storable_key(key: str) -> str:
    """A key that MLflow takes: one that it does not would keep everything beside it from being stored.

    ``hops[0].signature`` becomes ``hops.0.signature``, and any other odd character an underscore.
    Source: ``mlflow.utils.validation``.
    """
    key = _INDEX.sub(r".\2", key[: 4 * MAX_KEY_LENGTH])
    key = _ODD_CHARACTER.sub("_", key)[:MAX_KEY_LENGTH]
    parts = [part for part in key.split("/") if part not in {"", ".", ".."}]
    key = "/".join(parts) or "_"
    return f"__{key[2:]}" if key.startswith("..") else key


class _Keys:
    """The keys under which a run holds things, by kind. Threads share it: single operations on a dict are atomic."""

    def __init__(self) -> None:
        self._owners: dict[tuple[str, str], str] = {}

    def of(self, kind: Literal["metric", "param", "tag"], keys: Iterable[str]) -> dict[str, str]:
        """Map each key to one that MLflow takes: always the same one, and no two of a kind the same."""
        ordered = sorted(keys, key=lambda key: storable_key(key) != key)  # what needs no other keeps its own
        return {key: self._one(kind, key) for key in ordered}

    def _one(self, kind: str, key: str) -> str:
        wanted = storable_key(key)
        numbered = (f"{wanted[: MAX_KEY_LENGTH - 6]}_{number}" for number in itertools.count(2))
        return next(
            each for each in itertools.chain([wanted], numbered) if self._owners.setdefault((kind, each), key) == key
        )


def run_status(exception: BaseException | None) -> str:
    """The status of a run whose work ended with ``exception``, or without one."""
    return FINISHED if exception is None else _STATUS_BY_OUTCOME[outcomes.outcome_of(exception)]


class RunHandle:
    """A run that metrics, params, tags and artifacts are logged into by id, in the background until it is settled.

    Args:
        run: MLflow's run.
        is_own: Whether it was created for this and ends with it; otherwise it is somebody else's.
        is_new: Whether it holds nothing yet; by default what was created for this.

    Attributes:
        door: What all of it passes that a program, its data or its user have said.
    """

    def __init__(self, run: Any, *, is_own: bool, is_new: bool | None = None, door: Door | None = None) -> None:
        self.run = run
        self.door = door or Door.here()
        self.is_own = is_own
        self._is_new = is_own if is_new is None else is_new
        self.is_complete = True
        self._process_id = os.getpid()
        self._monitor: Any = None
        self._tables: list[dict[str, str]] = []
        self._later: list[tuple[str, bytes]] = []
        self._keys = _Keys()
        self._writer = export.run_writer(None)
        # What is logged keeps its order under the id that the run has now, should that be a stand-in.
        self.key = self.run_id

    @property
    def is_pending(self) -> bool:
        """Return whether the store has not confirmed the run yet."""
        return isinstance(self.run, PendingRun) and not self.run.is_there

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; while its creation waits, a stand-in."""
        return str(self.run.info.run_id)

    @property
    def experiment_id(self) -> str:
        """MLflow's id of its experiment."""
        return str(self.run.info.experiment_id)

    def metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Log metrics at ``step``; those that are None are left out."""
        now, keys = int(time.time() * 1000), self._keys.of("metric", values)
        metrics = [Metric(keys[key], float(value), now, step) for key, value in values.items() if value is not None]
        self._writer.log(self.key, metrics=metrics)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log params. Those that the run held before keep their value: MLflow refuses a second."""
        known = {} if self._is_new or self.is_pending else self._stored_params()
        keys = self._keys.of("param", values)
        fresh = [
            Param(keys[key], self.door.text(value, MAX_PARAM_LENGTH, name=key))
            for key, value in values.items()
            if keys[key] not in known
        ]
        self._writer.log(self.key, params=fresh)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; those that are None are left out."""
        keys = self._keys.of("tag", values)
        tags = [RunTag(keys[key], self._tag(key, value)) for key, value in values.items() if value is not None]
        self._writer.log(self.key, tags=tags)

    def _tag(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or key == MLFLOW_LOGGED_ARTIFACTS:
            return str(value)[:MAX_TAG_LENGTH]  # a number of ours, or what MLflow reads
        return self.door.text(value, MAX_TAG_LENGTH, name=key)

    def describe(self, markdown: str) -> None:
        """Give the run a description for MLflow's pages; one that the user has given a run of theirs stays."""
        if self.is_own or not self._has_description():
            self.tags({MLFLOW_RUN_NOTE: markdown})

    def _has_description(self) -> bool:
        try:
            return export.ask(lambda: MLFLOW_RUN_NOTE in fluent.get_run(self.run_id).data.tags)
        except Exception:  # noqa: BLE001 - the store is away: rather none than one overwritten
            return True

    def dataset(self, name: str, context: str, examples: Iterable[Any]) -> None:
        """Note a data set as an input of the run; the arguments are ``dataset_input``'s."""
        self._writer.dataset(self.key, dataset_input(name, context, examples, self.run, self.door))

    def document(self, path: str, content: bytes) -> None:
        """Store a JSON document as the artifact ``path``."""
        self.picture(path, self.door.document(content))

    def picture(self, path: str, content: bytes) -> None:
        """Store ``content``, which shows nothing that has not passed the door, as the artifact ``path``."""
        self._writer.artifact(self.key, path, content)

    def show_program(self, program: Any) -> None:
        """Store a picture of a program's modules, predictors and signatures, for a page and for Markdown."""
        rows = structure(program, self.door)
        if rows:
            self.later("program.svg", drawing.svg(rows, f"The program {rows[0].title}").encode())
            self.later("program.mmd", drawing.mermaid(rows).encode())

    def later(self, path: str, content: bytes) -> None:
        """Store it as ``picture`` does, but when the run is over: nobody waits for the request that it takes."""
        self._later.append((path, content))

    def plot(self, path: str, draw: Callable[[], bytes]) -> None:
        """Store a picture that is drawn now or, where Matplotlib has to look for fonts first, while nobody waits.

        Raises:
            ImportError: Where Matplotlib is not installed.
        """
        if fonts_are_known():
            self.picture(path, draw())
        else:
            in_background(lambda: self.picture(path, draw()))

    def table(self, path: str, columns: Mapping[str, list[Any]]) -> None:
        """Store a table as ``mlflow.log_table`` does, below the rows that the run held before."""
        earlier = None
        if not self._is_new and not getattr(self.run, "replaces_tables", False):
            try:
                self._tables, earlier = export.ask(lambda: _stored_tables(self.run_id, path))
            except Exception:  # noqa: BLE001 - the store is away: rather a second table than one overwritten
                stem, dot, ending = path.rpartition(".")
                path = f"{stem}_{int(time.time() * 1000)}{dot}{ending}"
        self.picture(path, table_json(columns, self.door, earlier))
        entry = {"path": path, "type": "table"}
        if entry not in self._tables:
            self._tables.append(entry)
            self.tags({MLFLOW_LOGGED_ARTIFACTS: json.dumps(self._tables)})  # mlflow.load_table looks there

    def end(self, status: str, *, is_leaving: bool = False) -> None:
        """End the run, if it is ours, and was not inherited by a forked process: there it is the parent's.

        Args:
            status: How it ends.
            is_leaving: Whether the process ends, which waits for all at once.
        """
        monitor = None
        if self.is_own and self._process_id == os.getpid():
            self._writer.end(self.key, status, int(time.time() * 1000))
            if not self.is_pending:
                remember_last_run(self.run_id)
            monitor = self._stop_system_metrics()
        if not is_leaving:
            was_pending = self.is_pending
            self.settle()
            if was_pending and self.is_own and not self.is_pending:
                remember_last_run(self.run_id)
        while self._later:
            self.picture(*self._later.pop())
        if monitor is not None and self.is_complete:
            monitor.join(1.0 if is_leaving else export.ASK_SECONDS)

    def start_system_metrics(self, *, is_resumed: bool = False) -> None:
        """Collect system metrics until the run ends, if the user has asked MLflow for them."""
        if self.is_pending:
            return
        try:
            self._monitor = start_system_metrics(self.run_id, is_resumed=is_resumed or not self._is_new)
        except Exception as error:  # noqa: BLE001 - MLflow says a word and goes on, too
            logger.warning("System metrics are not collected for the run %s: %s", self.run_id, error)

    def _stop_system_metrics(self) -> threading.Thread | None:
        monitor, self._monitor = self._monitor, None
        if monitor is None:
            return None
        forget_system_metrics(self.run_id)
        # It asks the store, for as long as that takes; a daemon does not hold up the end of the process.
        thread = threading.Thread(target=monitor.finish, name="dspy-mlflow-async-metrics", daemon=True)
        thread.start()
        return thread

    def settle(self) -> None:
        """Wait until the store has what was logged, for a bounded time; the rest goes on in the background."""
        try:
            is_stored = export.ask(lambda: self._writer.settle(self.key, export.ASK_SECONDS))
        except Exception:  # noqa: BLE001 - the store does not answer
            is_stored = False
        self.is_complete = self.is_complete and is_stored

    def _stored_params(self) -> Mapping[str, str]:
        try:
            return export.ask(lambda: dict(fluent.get_run(self.run_id).data.params))
        except Exception:  # noqa: BLE001 - the store is away
            return {}


def _stored_tables(run_id: str, path: str) -> tuple[list[dict[str, str]], Mapping[str, Any] | None]:
    """The tables that a run has, and the content of the one at ``path``."""
    import mlflow

    tables = json.loads(fluent.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    if {"path": path, "type": "table"} not in tables:
        return tables, None
    return tables, json.loads(mlflow.artifacts.load_text(f"runs:/{run_id}/{path}"))
