"""A real Celery worker, its pools and its ways to end: the traces of all tasks that ended arrive by themselves."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from stores import read
from test_spool import place  # noqa: F401 - a fixture

from dspy_mlflow_async import export

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Celery's prefork pool needs fork")
TASKS = 6


@pytest.fixture
def worker(place, tmp_path, monkeypatch):  # noqa: F811
    """Start a worker with these arguments; gives the process, and the app to send tasks with."""
    for name in ("queue", "results", "control"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("CELERY_FOLDER", str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.delitem(sys.modules, "celery_tasks", raising=False)
    tasks = importlib.import_module("celery_tasks")  # the producer's side: no store, and so no tracer
    started = []

    def start(*arguments):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "DSPY_MLFLOW_ASYNC_STRICT"))}
        environment |= {
            "CELERY_STORE": place[0],
            "CELERY_EXPERIMENT": place[1],
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]),
        }
        command = [sys.executable, "-m", "celery", "-A", "celery_tasks", "worker", "--without-gossip", *arguments]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path)
        started.append(process)
        return process, tasks.answer

    yield start
    for process in started:
        process.kill()
        process.wait(30)


def pids_of(task, count=TASKS):
    """Run tasks, and wait for their results."""
    results = [task.delay(f"@q{number}") for number in range(count)]
    return [result.get(timeout=60) for result in results]


def log_of(folder):
    return (folder / "log").read_text()


@pytest.mark.parametrize("how", ["warm", "cold"])
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
@pytest.mark.long
def test_every_task_that_ended_arrives(worker, place, tmp_path, pool, how):  # noqa: F811
    """Warm or cold, the shutdown of each pool leaves no trace behind and nothing for anybody to do."""
    process, task = worker("--pool", pool, "--concurrency", "2")
    pids = pids_of(task)
    process.send_signal({"warm": signal.SIGTERM, "cold": signal.SIGQUIT}[how])
    process.wait(60)

    assert (process.pid in pids) == (pool != "prefork")
    assert TASKS == len(read(*place)), log_of(tmp_path)
    assert 0 == sum(info.records for info in export.spools())


@pytest.mark.long
def test_max_tasks_per_child(worker, place, tmp_path):  # noqa: F811
    """Processes that are replaced after each task lose nothing."""
    process, task = worker("--concurrency", "2", "--max-tasks-per-child", "1")
    pids = pids_of(task)
    process.terminate()
    process.wait(60)

    assert TASKS == len(set(pids)) == len(read(*place)), log_of(tmp_path)


@pytest.mark.long
def test_a_process_of_the_pool_that_is_killed(worker, place, tmp_path):  # noqa: F811
    """Celery's hard time limit and the kernel kill; the worker brings what the process had on the disk."""
    process, task = worker("--concurrency", "1")
    pids = pids_of(task)
    os.kill(pids[-1], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while len(read(*place)) < TASKS and time.monotonic() < deadline:
        time.sleep(0.2)

    assert TASKS == len(read(*place)), log_of(tmp_path)
    assert process.poll() is None


@pytest.mark.long
def test_nothing_travels_with_a_message(worker, place):  # noqa: F811
    """A task is a trace of its own, with a root of its own, whatever is open where it is sent."""
    process, task = worker("--pool", "solo")
    with mlflow.start_span("the producer's") as span:
        task.delay("@q").get(timeout=60)
    process.terminate()
    process.wait(60)
    (trace,) = [trace for trace in read(*place).values() if trace.data.spans[0].name == "Predict.forward"]

    assert trace.info.trace_id != span.trace_id
    assert [None] == [span.parent_id for span in trace.data.spans if span.name == "Predict.forward"]
