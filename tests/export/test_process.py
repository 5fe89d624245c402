"""Writing from a child process: nothing is lost, whichever of the two is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest
from stores import call, read, wait_until
from test_spool import PROGRAM, finish

from dspy_mlflow_async import export


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def process_mode(make):
    installed = make(mode="process")
    yield installed
    pid = installed.queue.child.pid
    installed.undo()
    wait_until(lambda: pid is None or not is_alive(pid), 30)


def test_traces_arrive_whole(process_mode):
    """The child writes what the program spools; flush waits for it, and the books are told."""
    ids = [call() for _ in range(50)]

    assert export.flush(100)
    traces = process_mode.read()
    assert set(ids) == set(traces)
    assert {4} == {len(trace.data.spans) for trace in traces.values()}
    assert {9} == {trace.info.token_usage["total_tokens"] for trace in traces.values()}
    assert export.ExportStats(started=50, ended=50, stored=50) == export.stats()
    assert 0 == sum(info.records for info in export.spools())


def test_feedback_and_late_spans_follow(process_mode):
    """Everything about a trace goes the same way, in order."""
    from mlflow.entities import Feedback

    with mlflow.start_span("root") as root:
        pass
    export.release(root.trace_id, assessments=[Feedback(name="score", value=1.0)])
    mlflow.start_span_no_context("late", parent_span=root).end()

    assert export.flush(100)
    trace = process_mode.read()[root.trace_id]
    assert ["late", "root"] == sorted(span.name for span in trace.data.spans)
    assert 1 == len(trace.info.assessments)


def test_an_open_trace_becomes_visible(make):
    """Also from the child."""
    installed = make(mode="process", visible_after=0.2)
    with mlflow.start_span("root") as root:
        with mlflow.start_span("first"):
            pass
        wait_until(lambda: root.trace_id in installed.read(), 60)
    assert export.flush(100)
    assert 2 == len(installed.read()[root.trace_id].data.spans)


@pytest.mark.long
def test_the_child_is_killed(process_mode):
    """Another takes its place, and everything is there once."""
    ids = [call() for _ in range(5)]
    assert export.flush(100)
    for _ in range(2):
        ids += [call() for _ in range(40)]
        os.kill(process_mode.queue.child.pid, signal.SIGKILL)
        ids += [call() for _ in range(40)]

    assert export.flush(100)
    traces = process_mode.read()
    assert set(ids) == set(traces)
    assert {9} == {trace.info.token_usage["total_tokens"] for trace in traces.values()}
    assert 165 == export.stats().stored


@pytest.mark.long
@pytest.mark.parametrize("what", ["durable", ""])
def test_the_program_is_killed(store_uri, tmp_path, what):
    """The child brings what had ended to the store, and ends; `durable` is for power cuts."""
    experiment_id = mlflow.create_experiment(f"killed-{os.urandom(4).hex()}")
    program = PROGRAM.replace("durable=", "mode='process', durable=")
    body = """
from dspy_mlflow_async.export import installation
assert export.flush(100)
print(installation.pipeline().queue(uri).child.pid, flush=True)
while True: print(call(), flush=True)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    process = subprocess.Popen(
        [sys.executable, "-c", program + body, store_uri, experiment_id, what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    ids = [process.stdout.readline().strip()]
    pid = int(process.stdout.readline())
    ids += [process.stdout.readline().strip() for _ in range(150)]
    process.kill()
    rest, _ = finish(process)
    ids += [line for line in rest if len(line) == len(ids[0])]

    wait_until(lambda: not is_alive(pid), 60)
    assert set(ids) <= set(read(store_uri, experiment_id))
    assert [] == [info for info in export.spools() if info.records]


def test_threads_and_a_running_loop(process_mode):
    """The child is no fork: threads and event loops do not matter."""
    import asyncio

    async def one():
        return call()

    async def many():
        return await asyncio.gather(*(one() for _ in range(20)))

    ids = []
    threads = [threading.Thread(target=lambda: ids.extend(asyncio.run(many()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert export.flush(100)
    assert set(ids) == set(process_mode.read())
    assert 60 == len(ids)


def test_a_refusal_in_the_child_is_counted_here(process_mode):
    """The dead letters are written by the child, the books are ours."""
    mlflow.tracking.MlflowClient(process_mode.uri).delete_experiment(process_mode.experiment_id)
    call()

    assert export.flush(100)
    assert 1 == export.stats().dead
    assert 1 == sum(info.dead for info in export.spools())


@pytest.mark.long
def test_flush_does_not_wait_for_a_store_that_is_away(make, server):
    """The child says that it has found nobody there, and finds what comes back as soon as somebody flushes."""
    installed = make(uri=server.uri, mode="process")
    ids = [call()]
    assert export.flush(100)
    server.kill()
    try:
        ids.append(call())
        begun = time.monotonic()
        assert not export.flush()
        assert time.monotonic() - begun < 30
        assert 1 == export.stats().spooled
    finally:
        server.start()

    assert export.flush(100)
    assert set(ids) == set(installed.read())


def test_a_trace_that_is_left_out_after_all(make):
    """A copy on disk, kept while the trace waits, is none that the child sends."""
    installed = make(mode="process", durable=True)
    token = export.KEEPS.set(lambda _: False)
    try:
        with mlflow.start_span("root") as root:
            child = mlflow.start_span_no_context("child", parent_span=root)
    finally:
        export.KEEPS.reset(token)
    assert 1 == export.spools()[0].traces
    sent = call()
    wait_until(lambda: sent in installed.read(), 60)
    assert {sent} == set(installed.read())
    child.end()

    assert export.flush(100)
    assert {sent} == set(installed.read())
    assert 0 == sum(info.records for info in export.spools())


TWO = """
assert export.flush(100)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(30): print(call(), flush=True)
print("flushed", export.flush(100), flush=True)
sys.stdin.readline()
"""


@pytest.mark.long
def test_two_programs_have_one_child(store_uri, spool_dir):
    """Who finds another's child at work needs none; when that is gone with its parent, the next one takes over."""
    experiment_id = mlflow.create_experiment(f"two-{os.urandom(4).hex()}")
    program = PROGRAM.replace("durable=", "mode='process', durable=") + TWO
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}

    def begin():
        return subprocess.Popen(
            [sys.executable, "-c", program, store_uri, experiment_id, ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def until(process, word):
        lines = []
        while not (line := process.stdout.readline().strip()).startswith(word):
            assert line, "the program has ended"
            lines.append(line)
        return lines

    def go_on(process):
        process.stdin.write("\n")
        process.stdin.flush()

    def children():
        return [
            path.parent.name
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if (arguments := path.read_bytes().split(b"\0")) and str(spool_dir).encode() in b" ".join(arguments)
        ]

    with contextlib.ExitStack() as stack:
        one = stack.enter_context(begin())
        ids = until(one, "ready")  # its child is at work
        two = stack.enter_context(begin())
        ids += until(two, "ready")
        assert 1 == len(children())
        for process in (one, two):
            go_on(process)
            ids += until(process, "flushed")
        assert 1 == len(children())
        go_on(one)
        one.wait(30)
        wait_until(lambda: not children(), 30)
        go_on(two)

    assert set(ids) == set(read(store_uri, experiment_id))
    assert 62 == len(ids)
