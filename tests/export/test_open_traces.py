"""Traces that are open: a flush and the end of the process show what has ended of them, and their end completes it."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import mlflow
import pytest
from stores import call, check_sum, read, wait_until
from test_spool import place  # noqa: F401 - a fixture

from dspy_mlflow_async import export
from mlflow_server import free_port

AGENT = """
import asyncio, gc, os, signal, sys, threading
import dspy, mlflow
import dspy_mlflow_async
from echo import EchoLM

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
uri, experiment_id = sys.argv[1:3]
mlflow.set_tracking_uri(uri)
mlflow.tracing.set_destination(mlflow.entities.trace_location.MlflowExperimentLocation(experiment_id))
dspy.configure(lm=EchoLM())
dspy_mlflow_async.autolog()
never = threading.Event()

class Agent(dspy.Module):
    def __init__(self, third):
        super().__init__()
        self.step, self.third = dspy.Predict("question -> answer"), third

    def forward(self, question):
        for number in range(2):
            self.step(question=f"{question}{number}")
        return self.third()

def wait():
    print("third step", flush=True)
    never.wait(60)

"""

ENDS = {
    # name: program, exit code, state and spans of the one trace
    "SIGTERM in the third step": ("Agent(wait)(question='@a')", -signal.SIGTERM, "IN_PROGRESS", 8),
    "SIGHUP in the third step": ("Agent(wait)(question='@a')", -signal.SIGHUP, "IN_PROGRESS", 8),
    "KeyboardInterrupt": ("Agent(wait)(question='@a')", 1, "ERROR", 9),  # the code that `python -c` gives it
    "the end beside a daemon thread": (
        """
begun = threading.Event()
threading.Thread(target=Agent(lambda: (begun.set(), never.wait()))._call, daemon=True).start()
begun.wait(30)
""".replace("._call", ", kwargs={'question': '@a'}"),
        0,
        "IN_PROGRESS",
        8,
    ),
    "a generator that is left early": (
        """
@mlflow.trace
def steps():
    for number in range(9):
        dspy.Predict("question -> answer")(question=f"@a{number}")
        yield number
left = steps()
next(left), next(left)
""",
        0,
        None,  # Python may collect the generator at its end, or not
        None,
    ),
    "a task that is cancelled when the loop closes": (
        """
async def main():
    begun = asyncio.Event()
    async def third():
        begun.set()
        await asyncio.sleep(60)
    class Async(dspy.Module):
        async def aforward(self):
            step = dspy.Predict("question -> answer")
            await step.acall(question="@a0"), await step.acall(question="@a1")
            await third()
    task = asyncio.create_task(Async().acall())
    await begun.wait()
asyncio.run(main())
""",
        0,
        "ERROR",
        9,
    ),
    "sys.exit in a thread": (
        """
thread = threading.Thread(target=Agent(lambda: sys.exit(3)), kwargs={"question": "@a"})
thread.start(), thread.join()
""",
        0,
        "ERROR",
        9,
    ),
}


def begin(body, place):  # noqa: F811
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "DSPY_MLFLOW_ASYNC_STRICT"))}
    return subprocess.Popen(
        [sys.executable, "-c", AGENT + body, *place],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )


@pytest.mark.long
@pytest.mark.parametrize("name", ENDS)
def test_what_had_ended_is_shown_at_the_end(place, name):  # noqa: F811
    """However a program ends in the middle of a trace, the spans that had ended are in the store, and that is said."""
    body, code, state, spans = ENDS[name]
    process = begin(body, place)
    if "wait" in body.partition("\n")[0]:
        assert "third step\n" == process.stdout.readline()
        process.send_signal(signal.SIGINT if code == 1 else -code)
    _, err = process.communicate(timeout=90)

    # Python ends itself by the signal where nobody has caught it, unless its parent ignores that.
    assert process.returncode in ({1, -signal.SIGINT} if code == 1 else {code}), err
    (trace,) = read(*place).values()
    if state is None:
        assert 8 <= len(trace.data.spans)
        return
    assert (state, spans) == (trace.info.state.value, len(trace.data.spans)), err
    assert (state == "IN_PROGRESS") == ("1 trace was still open when the process ended" in err)


def test_flush_shows_open_traces_and_their_end_completes_them(sqlite):
    """True means that what had ended is stored; what is open is counted, seen in the store, and completed later."""
    with mlflow.start_span("root") as root:
        with mlflow.start_span("first"):
            pass
        assert export.flush(60)
        (shown,) = sqlite.read().values()
        stats = export.stats()
        with mlflow.start_span("second"):
            pass

    assert ("IN_PROGRESS", ["first"]) == (shown.info.state.value, [span.name for span in shown.data.spans])
    assert (1, 1, 0) == (stats.open, stats.in_progress, stats.stored)
    assert export.flush(60)
    (whole,) = sqlite.read().values()
    assert root.trace_id == whole.info.trace_id
    assert ("OK", 3) == (whole.info.state.value, len(whole.data.spans))
    assert export.ExportStats(started=1, ended=1, stored=1) == export.stats()
    check_sum(export.stats())


def test_a_trace_that_may_be_left_out_is_not_shown(sqlite):
    """Sampling by outcome decides at the end of a trace, before anything of it is seen; late spans go the same way."""
    token = export.KEEPS.set(lambda _: False)
    try:
        with mlflow.start_span("root"), mlflow.start_span("child"):
            pass
        with mlflow.start_span("root"):
            with mlflow.start_span("child"):
                pass
            assert export.flush(60)
            assert 0 == export.stats().in_progress
        with mlflow.start_span("left out") as root:
            pass
        mlflow.start_span_no_context("late", parent_span=root).end()
        assert export.flush(60)
    finally:
        export.KEEPS.reset(token)

    assert {} == sqlite.read()


@pytest.mark.long
def test_what_was_not_shown_since_the_store_was_away_is_shown_later(make, server):
    """A view of an open trace takes no place on the disk during an outage; the next flush shows all of it."""
    installed = make(uri=server.uri)
    call()
    assert export.flush(60)
    server.kill()
    try:
        root = mlflow.start_span_no_context("root")
        mlflow.start_span_no_context("first", parent_span=root).end()
        assert not export.flush(30)
    finally:
        server.start()
    wait_until(lambda: export.flush(10), 60)
    open_trace = installed.read()[root.trace_id]

    assert ("IN_PROGRESS", ["first"]) == (open_trace.info.state.value, [span.name for span in open_trace.data.spans])
    root.end()
    assert export.flush(60)
    assert "OK" == installed.read()[root.trace_id].info.state.value


def test_a_root_that_ends_while_its_trace_is_shown(sqlite, monkeypatch):
    """The whole trace comes behind what is shown of it, never before: the store keeps the last word."""
    is_showing, may_go_on = threading.Event(), threading.Event()
    emit = sqlite.pipeline.emit

    def emit_slowly(uri, operation, is_sync):
        if operation.stage == "partial":
            is_showing.set()
            may_go_on.wait(30)
        emit(uri, operation, is_sync)

    monkeypatch.setattr(sqlite.pipeline, "emit", emit_slowly)
    root = mlflow.start_span_no_context("root")
    flushing = threading.Thread(target=export.flush, args=(60,))
    flushing.start()
    assert is_showing.wait(30)
    ending = threading.Thread(target=root.end)
    ending.start()
    ending.join(0.2)
    assert ending.is_alive()
    may_go_on.set()
    ending.join(30)
    flushing.join(60)

    assert export.flush(60)
    assert ["OK"] == [trace.info.state.value for trace in sqlite.read().values()]


def test_open_at_the_end_beside_a_store_that_is_away(tmp_path):
    """What is shown of an open trace goes to the disk then, and `replay` brings it."""
    spool = tmp_path / "own spool"
    body = f"os.environ['DSPY_MLFLOW_ASYNC_SPOOL'] = {str(spool)!r}\nAgent(wait)(question='@a')"
    process = begin(body, (f"http://127.0.0.1:{free_port()}", "0"))
    assert "third step\n" == process.stdout.readline()
    process.terminate()
    _, err = process.communicate(timeout=90)
    (segment,) = spool.glob("*/*.seg")

    assert -signal.SIGTERM == process.returncode, err
    assert ['"stage":"partial"'] == re.findall(r'"stage":"\w+"', segment.read_text())
