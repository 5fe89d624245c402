"""Measures what an audit costs: a sqlite store of many generated traces, read once; CPU a trace and memory.

``python3 run.py audit --traces 100000``. The traces are a real one's, of a program of two predictors (nine spans),
each with ids, times and texts of its own.
"""

import argparse
import json
import os
import resource
import shutil
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
sys.path.insert(0, str(Path(__file__).parents[1]))

import dspy
import mlflow

import dspy_mlflow_async
from dspy_mlflow_async.cli.audit.auditing import audit
from dspy_mlflow_async.cli.audit.store import Store
from echo import Chain, EchoLM

_WANTED_MS = 0.3
_TABLES = ("trace_info", "spans", "trace_tags", "trace_request_metadata")
_BATCH = 2000


def main():
    """Generate the store, audit it, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=20_000)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        uri = f"sqlite:///{folder}/mlflow.db"
        make_store(uri, options.traces)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cpu, wall = time.process_time(), time.perf_counter()
        result = audit(Store(uri))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    measured = {
        "traces": result.traces,
        "cpu_ms_per_trace": round(cpu * 1000 / result.traces, 3),
        "wall_seconds": round(wall, 1),
        "memory_grew_mib": round((after - before) / 1024, 1),
        "found": {str(kind): count for kind, count in result.counts.items()},
    }
    sys.stdout.write(json.dumps(measured) + "\n")
    return 0 if measured["cpu_ms_per_trace"] <= _WANTED_MS and not result.counts else 1


def make_store(uri, count):
    """Trace one call for real, and multiply it."""
    mlflow.set_tracking_uri(uri)
    dspy.configure(lm=EchoLM())
    dspy_mlflow_async.autolog(silent=True)
    Chain()(question="@marker-0000000 What becomes of the parcel that was sent on Monday?")
    dspy_mlflow_async.flush()
    dspy_mlflow_async.autolog(disable=True)
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        connection.execute("pragma synchronous=off")
        multiply(connection, count)


def multiply(connection, count):
    """Insert ``count - 1`` copies of the one trace, each a tenth of a second after the last."""
    (first,) = connection.execute("select request_id from trace_info").fetchone()
    rows = {}
    for table in _TABLES:
        names = [row[1] for row in connection.execute(f"pragma table_info({table})") if row[1] != "duration_ns"]
        key = "trace_id" if table == "spans" else "request_id"
        found = connection.execute(f"select {', '.join(names)} from {table} where {key} = ?", (first,)).fetchall()
        rows[table] = names, found
    for begin in range(1, count, _BATCH):
        for table, (names, found) in rows.items():
            copies = [
                tuple(changed(name, value, first, number) for name, value in zip(names, row, strict=True))
                for number in range(begin, min(begin + _BATCH, count))
                for row in found
            ]
            marks = ", ".join("?" * len(names))
            connection.executemany(f"insert into {table} ({', '.join(names)}) values ({marks})", copies)
        connection.commit()


def changed(name, value, first, number):
    """A column's value in copy ``number``."""
    if isinstance(value, str):
        text = value.replace("@marker-0000000", f"@marker-{number:07d}")
        return text.replace(first, f"{first[:-8]}{number:08x}") if first in text else text
    if name in {"timestamp_ms", "start_time_unix_nano", "end_time_unix_nano"}:
        return value + number * 100 * (1 if name == "timestamp_ms" else 1_000_000)
    return value


if __name__ == "__main__":
    sys.exit(main())
