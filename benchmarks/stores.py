"""The stores that traces go to, and how many of them arrived, read without any tracer's help."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_START_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class Found:
    """What a store has of one sample.

    Attributes:
        traces: Traces of any shape.
        whole: Traces with one root and as many spans as they should have.
        spans: Spans in all of them.
    """

    traces: int
    whole: int
    spans: int


def count(database: Path, experiment: str, since_ms: int, spans: int) -> Found:
    """Read a MLflow sqlite file.

    Args:
        database: The file.
        experiment: The name of the experiment.
        since_ms: Traces that began earlier do not count: they are warm-up.
        spans: How many spans a whole trace has.
    """
    query = """
        SELECT COUNT(spans.span_id), SUM(spans.span_id IS NOT NULL AND spans.parent_span_id IS NULL)
        FROM trace_info
        JOIN experiments ON experiments.experiment_id = trace_info.experiment_id
        LEFT JOIN spans ON spans.trace_id = trace_info.request_id
        WHERE experiments.name = ? AND trace_info.timestamp_ms >= ?
        GROUP BY trace_info.request_id
    """
    # Not read-only: of a process that has ended within a transaction, the next to look rolls back what is in the file.
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=rw", uri=True, timeout=30)) as connection:
        rows = connection.execute(query, (experiment, since_ms)).fetchall()
    whole = sum(1 for count, roots in rows if (count, roots) == (spans, 1))
    return Found(len(rows), whole, sum(count for count, _ in rows))


class SqliteStores:
    """Fresh sqlite files, copied from one with MLflow's schema: making that takes seconds."""

    def __init__(self, folder: Path) -> None:
        self._empty = folder / "empty.db"

    def prepare(self) -> None:
        """Make the file that the others are copies of."""
        if not self._empty.exists():
            code = "import mlflow, sys; mlflow.set_tracking_uri(sys.argv[1]); mlflow.search_experiments()"
            subprocess.run(
                [sys.executable, "-c", code, f"sqlite:///{self._empty}"],
                check=True,
                timeout=_START_SECONDS * 2,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def copy_to(self, path: Path) -> Path:
        """A new empty store."""
        self.prepare()
        shutil.copyfile(self._empty, path)
        return path


class Server:
    """A real ``mlflow server`` over a sqlite file, on loopback, with one worker.

    Args:
        database: The file.
        scheme: Of the URI by which the server opens it: which store of MLflow's, or of a plugin's, it has.
    """

    def __init__(self, database: Path, scheme: str) -> None:
        self.database = database
        self._scheme = scheme
        self._folder = database.parent
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process to ask for its CPU time."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            RuntimeError: If it does not.
        """
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
            "--backend-store-uri",
            f"{self._scheme}:///{self.database}",
            "--default-artifact-root",
            str(self._folder / "artifacts"),
            "--workers",
            "1",
        ]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=self._folder
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = (self._folder / "server.log").read_text()[-2000:]
                self.stop()
                raise RuntimeError(f"mlflow server did not start:\n{said}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200  # noqa: PLR2004
        return False

    def stop(self) -> None:
        """End it with all its workers."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
            self._process = None


class Sink:
    """A store that takes everything, keeps nothing and costs nothing, in the process that is measured."""

    uri = "sink://here"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_open = threading.Event()
        self._is_open.set()
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self._spans: dict[str, int] = {}
        self._started: set[str] = set()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Take nothing for as long as the block lasts: who brings something waits."""
        self._is_open.clear()
        try:
            yield
        finally:
            self._is_open.set()

    def found(self, spans: int) -> Found:
        """What has arrived."""
        whole = sum(1 for trace_id in self._started if self._spans.get(trace_id) == spans)
        return Found(len(self._started), whole, sum(self._spans.values()))

    def register(self) -> None:
        """Make MLflow know it, the way that plugins do."""
        from mlflow.entities import Experiment
        from mlflow.store.tracking.abstract_store import AbstractStore
        from mlflow.tracking._tracking_service import utils

        sink = self
        experiment = Experiment("1", "bench", "sink", "active")

        class SinkStore(AbstractStore):  # type: ignore[misc]
            def get_experiment(self, experiment_id: str) -> Any:  # noqa: ARG002 - MLflow's signature
                return experiment

            def get_experiment_by_name(self, experiment_name: str) -> Any:  # noqa: ARG002 - MLflow's signature
                return experiment

            def start_trace(self, trace_info: Any) -> Any:
                sink._is_open.wait()
                with sink._lock:
                    sink._started.add(trace_info.trace_id)
                return trace_info

            def log_spans(self, location: str, spans: Sequence[Any], tracking_uri: Any = None) -> Any:  # noqa: ARG002 - MLflow's signature
                sink._is_open.wait()
                with sink._lock:
                    for span in spans:
                        sink._spans[span.trace_id] = sink._spans.get(span.trace_id, 0) + 1
                return spans

            async def log_spans_async(self, location: str, spans: Sequence[Any]) -> Any:
                return self.log_spans(location, spans)

        utils._tracking_store_registry.register("sink", lambda **_: SinkStore())
