"""Runs cells: for each, round after round, every contestant in a fresh process, A B C A B C."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks import endpoint, machine, meters, results, sample
from benchmarks.cells import Cell
from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.programs import span_count
from benchmarks.sample import EXPERIMENT, Spec
from benchmarks.stores import Server, Sink, SqliteStores, count

_ATTEMPTS = 2  # DSPy's progress bars race with each other when evaluations run at once: rare, and nobody's fault here
_PATIENCE = 120.0  # seconds, for imports on a slow disk
_LIBRARIES = {
    # Nothing is asked of anybody outside this machine.
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    # Threads of numerical libraries would be forked, and are not what is measured.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


_LISTS = ("logs", "once", "hot_only")  # of a cell's parameters; JSON has no tuples


class Watcher(Protocol):
    """Who is told how far the run is."""

    def began(self, cell: Cell, samples: int) -> None:
        """A cell begins."""

    def sampled(self, cell: Cell, contestant: Contestant, round_number: int) -> None:
        """A sample is over."""

    def ended(self, cell: dict[str, Any]) -> None:
        """A cell is over."""


class Laboratory:
    """The stores, the servers, the endpoint and the processes of one run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._sqlite = SqliteStores(folder)
        self._servers: dict[str, Server] = {}  # by the store behind them
        self._endpoint: str | None = None
        self._number = 0
        methods = multiprocessing.get_all_start_methods()
        self.start_method = "forkserver" if "forkserver" in methods and sys.platform != "darwin" else "spawn"
        self._context = multiprocessing.get_context(self.start_method)
        if self.start_method == "forkserver":
            self._context.set_forkserver_preload(["benchmarks.preload"])
        self.unavailable: dict[str, str] = {}

    def prepare(self) -> None:
        """Make what the first sample would wait for: an empty store, and the process that all others are forks of."""
        self._sqlite.prepare()
        process = self._context.Process(target=sample.nothing)
        process.start()
        process.join(_PATIENCE)

    def close(self) -> None:
        """Stop what was started."""
        self._stack.close()

    def sample(self, cell: Cell, contestant: Contestant) -> dict[str, Any] | None:
        """Measure once; again where that failed.

        Returns:
            The sample as it goes into the results, or None where the contestant cannot take part.
        """
        outcome: dict[str, Any] = {}
        for attempt in range(1, _ATTEMPTS + 1):
            outcome = self._attempt(cell, contestant)
            if "unavailable" in outcome:
                if cell.driver != "async-evaluate":
                    self.unavailable[contestant.id] = outcome["unavailable"]
                return None
            if "error" not in outcome:
                return outcome["figures"] | {
                    "attempts": attempt,
                    "is_warm": outcome["is_warm"],
                    "seconds": outcome["seconds"],
                }
        return {"error": outcome["error"], "attempts": _ATTEMPTS}

    def _attempt(self, cell: Cell, contestant: Contestant) -> dict[str, Any]:
        self._number += 1
        folder = self._folder / f"{self._number:04}"
        folder.mkdir()
        try:
            spec, database = self._prepare(cell, contestant, folder)
            outcome = self._in_process(spec)
            if "figures" in outcome and database is not None:
                figures = outcome["figures"]
                found = count(database, spec.experiment, figures["since_ms"], span_count(cell.depth, cell.width))
                figures |= {"found": found.traces, "whole": found.whole, "found_spans": found.spans}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return outcome

    def _prepare(self, cell: Cell, contestant: Contestant, folder: Path) -> tuple[Spec, Path | None]:
        spec = Spec(cell, contestant.id, Sink.uri, folder)
        if cell.latency_ms:
            if self._endpoint is None:
                self._endpoint = self._stack.enter_context(endpoint.running())
            spec = dataclasses.replace(spec, endpoint=self._endpoint)
        if cell.store == "sqlite":
            database = self._sqlite.copy_to(folder / "mlflow.db")
            return dataclasses.replace(spec, uri=f"sqlite:///{database}"), database
        if cell.store == "server":
            server = self._running_server(contestant.server_store)
            experiment = f"{EXPERIMENT}-{self._number}"
            return (
                dataclasses.replace(spec, uri=server.uri, experiment=experiment, server_pid=server.pid),
                server.database,
            )
        return spec, None

    def _running_server(self, store: str) -> Server:
        if store not in self._servers:
            folder = self._folder / f"server-{store}"
            folder.mkdir()
            server = Server(self._sqlite.copy_to(folder / "mlflow.db"), store)
            self._stack.callback(server.stop)
            server.start()
            self._servers[store] = server
        return self._servers[store]

    def _in_process(self, spec: Spec) -> dict[str, Any]:
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=sample.run, args=(spec, there))
        process.start()
        there.close()
        try:
            if not here.poll(spec.cell.timeout):
                return {"error": f"no result within {spec.cell.timeout:.0f} s"}
            return here.recv()
        except EOFError:
            process.join(10)
            return {"error": f"the process died with exit code {process.exitcode}"}
        finally:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join(10)
            here.close()


def run(
    cells: Sequence[Cell], *, mode: str, watcher: Watcher, contestants: Sequence[str] = (), rounds: int | None = None
) -> dict[str, Any]:
    """Measure all cells.

    Args:
        cells: What to run, in this order.
        mode: The name of this selection: "full" or "quick".
        watcher: Is told how far it is.
        contestants: Ids of those that may take part; all by default.
        rounds: In place of each cell's own.

    Returns:
        The results, as ``schema.json`` describes them.
    """
    started = dt.datetime.now(dt.timezone.utc)
    began, steal = time.monotonic(), meters.steal()
    found = machine.describe()
    measured = []
    with _environment() as folder:
        laboratory = Laboratory(folder)
        try:
            laboratory.prepare()
            for cell in cells:
                measured.append(_run_cell(laboratory, cell, watcher, contestants, rounds))
                watcher.ended(measured[-1])
        finally:
            laboratory.close()
    seconds = time.monotonic() - began
    return {
        "schema": results.SCHEMA_VERSION,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "mode": mode,
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "start_method": laboratory.start_method,
        "machine": found
        | {
            "load_after": round(os.getloadavg()[0], 2),
            "steal": round((meters.steal() - steal) / (seconds * (os.cpu_count() or 1)), 4),
        },
        "contestants": [
            {
                "id": each.id,
                "title": each.title,
                "stores": each.stores,
                "is_ours": each.is_ours,
                "unavailable": laboratory.unavailable.get(each.id),
            }
            for each in CONTESTANTS.values()
        ],
        "cells": measured,
    }


def _run_cell(
    laboratory: Laboratory, cell: Cell, watcher: Watcher, contestants: Sequence[str], rounds: int | None
) -> dict[str, Any]:
    rounds = rounds or cell.rounds
    chosen = {
        number: [CONTESTANTS[each] for each in cell.contestants_of(number) if not contestants or each in contestants]
        for number in range(1, rounds + 1)
    }
    watcher.began(cell, sum(map(len, chosen.values())))
    began = time.monotonic()
    samples = []
    skipped: dict[str, str] = {}
    for round_number, taking_part in chosen.items():
        for contestant in taking_part:
            reason = laboratory.unavailable.get(contestant.id)
            measured = None if reason else laboratory.sample(cell, contestant)
            if measured is None:
                skipped[contestant.id] = reason or laboratory.unavailable.get(contestant.id) or "not in this version"
            else:
                samples.append({"contestant": contestant.id, "round": round_number} | measured)
            watcher.sampled(cell, contestant, round_number)
    return {
        "id": cell.id,
        "axis": cell.axis,
        "spans": span_count(cell.depth, cell.width),
        "parameters": {
            field.name: getattr(cell, field.name)
            for field in dataclasses.fields(cell)
            if field.name not in {"axis", "name", "contestants", "rounds", "timeout", *_LISTS}
        }
        | {name: list(getattr(cell, name)) for name in _LISTS},
        "rounds": rounds,
        "skipped": skipped,
        "seconds": round(time.monotonic() - began, 1),
        "samples": samples,
    }


@contextlib.contextmanager
def _environment() -> Iterator[Path]:
    """A folder for everything, and the environment variables that all processes of the run share."""
    with tempfile.TemporaryDirectory(prefix="dspy-mlflow-bench-", ignore_cleanup_errors=True) as folder:
        wanted = _LIBRARIES | {"DSPY_CACHEDIR": f"{folder}/dspy-cache"}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
