"""Runs cases one by one, each in a process of its own that is forked from this one: ``python -m drill.stage``.

This one has imported DSPy and MLflow, and not us. It reads a case from each line of its input and answers with a line.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

SECONDS = 90.0
OURS, THEIRS = "ours", "theirs"  # whose tracing is on


def main(empty_store: str) -> None:
    """Serve until the input ends."""
    _import_theirs(json.loads(sys.stdin.readline()))
    from drill import distort

    distort.functions_by_name()
    out = os.fdopen(os.dup(1), "w")
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        folder = Path(case["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(empty_store, folder / "store.db")
        child = os.fork()
        if child == 0:
            _be_a_case(case, folder)
        print(json.dumps({"in_time": _wait(child)}), file=out, flush=True)


def _import_theirs(homes: list[str]) -> None:
    """Import what the program needs, which each case then has for nothing, and where the names are."""
    import dspy
    import pandas as pd

    import drill.program  # noqa: F401

    del dspy, pd
    for home in homes:
        with contextlib.suppress(ImportError):
            importlib.import_module(home)
    assert threading.active_count() == 1, threading.enumerate()


def _wait(child: int) -> bool:
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return True
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _be_a_case(case: dict[str, Any], folder: Path) -> None:
    answer: dict[str, Any] = {}
    try:
        log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        os.environ["DSPY_MLFLOW_ASYNC_SPOOL"] = str(folder / "spool")
        os.environ.pop("DSPY_MLFLOW_ASYNC_STRICT", None)
        answer = _play(case)
    except BaseException:  # noqa: BLE001 - told to whoever asked
        answer = {"broken": traceback.format_exc()}
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
    try:
        atexit._run_exitfuncs()
    finally:
        os._exit(0)


def _play(case: dict[str, Any]) -> dict[str, Any]:
    import mlflow

    from drill import distort, program

    mlflow.set_tracking_uri("sqlite:///store.db")
    if case["path"]:
        try:
            distort.distort(case["path"], case["way"])
        except distort.NotPossibleError as error:
            return {"impossible": str(error)}
    if case["whose"] == THEIRS:
        import mlflow.dspy

        return program.run(lambda: mlflow.dspy.autolog(log_evals=True), mlflow.flush_trace_async_logging)
    answer = program.run(_autolog, _flush, _further)
    from dspy_mlflow_async.cli.doctor import diagnose

    return {**answer, "doctor": [str(each) for each in diagnose().findings]}


def _autolog() -> None:
    import dspy_mlflow_async

    dspy_mlflow_async.autolog(log_evals=True)


def _further(program: Any) -> list[Any]:
    """What else of ours a user may have around a program."""
    import mlflow

    import dspy_mlflow_async as ours

    found = []
    with ours.request("request", user="u"):
        found.append(program(question="second").answer)
    found.append(ours.wrap(program, name="wrapped", session_id="s")(question="third").answer)
    with ours.run("run"):
        mlflow.log_metric("further", 1.0)
        found.append(ours.propagate(program)(question="fourth").answer)
    with ours.suppress():
        found.append(program(question="first").answer)
    with ours.ThreadPoolExecutor(1) as pool:
        found.append(pool.submit(lambda: ours.stats().started >= 0).result())
    return found


def _flush() -> Any:
    import dspy_mlflow_async

    return dspy_mlflow_async.flush(20)


if __name__ == "__main__":
    main(sys.argv[1])
