"""Workers that are no forks of who asks, and gunicorn's: what had ended in them is stored, or on the disk."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from stores import read, wait_until
from test_spool import place  # noqa: F401 - a fixture

from dspy_mlflow_async import export

CALLS = 6
QUESTIONS = [f"@q{number}" for number in range(CALLS)]
_MARKER = re.compile(r"@q\d+")


@pytest.fixture
def worker_app(place, monkeypatch):  # noqa: F811
    """The module that workers import, told which store is theirs; it stays unimported here."""
    folder = Path(__file__).parent
    monkeypatch.setenv("WORKER_STORE", place[0])
    monkeypatch.setenv("WORKER_EXPERIMENT", place[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder.parent), str(folder)]))
    monkeypatch.syspath_prepend(str(folder))
    return "worker_app"


def call_work(call):
    """Called in a worker, which imports its module there; a fork server has the environment of its first client."""
    environment, question = call
    os.environ.update(environment)
    import worker_app

    return worker_app.work(question)


def found(place):  # noqa: F811
    return sorted(_MARKER.search(str(trace.data.spans[0].inputs))[0] for trace in read(*place).values())


@pytest.mark.parametrize("end", ["closed", "terminated", "killed"])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.long
def test_a_pool_that_is_not_forked(worker_app, place, method, end):  # noqa: F811
    """Closed, its workers have stored everything; however else they end, it is at least on the disk."""
    context = multiprocessing.get_context(method)
    names = ("WORKER_STORE", "WORKER_EXPERIMENT", "DSPY_MLFLOW_ASYNC_SPOOL")
    environment = {name: os.environ[name] for name in names}
    calls = [(environment, question) for question in QUESTIONS]
    if end == "killed":
        pool = ProcessPoolExecutor(2, mp_context=context)
        pids = set(pool.map(call_work, calls))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        pool.shutdown(cancel_futures=True)
    else:
        pool = context.Pool(2)
        pids = set(pool.map(call_work, calls))
        pool.close() if end == "closed" else pool.terminate()
        pool.join()

    assert os.getpid() not in pids
    if end != "closed":
        export.replay()
    assert QUESTIONS == found(place)
    assert [] == [info for info in export.spools() if info.records]


@pytest.mark.parametrize("end", ["stopped", "recycled", "killed"])
@pytest.mark.long
def test_gunicorns_synchronous_workers(worker_app, place, tmp_path, end):  # noqa: F811
    """Told to stop, replaced after some requests, or killed for being too slow: what they answered is stored."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", f"{worker_app}:app", "-b", f"127.0.0.1:{port}", "--workers", "2"]
    if end == "recycled":
        command += ["--max-requests", "2"]
    with (tmp_path / "log").open("w") as log:
        service = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
    try:
        wait_until(lambda: can_connect(port), 60)
        pids = set()
        for question in QUESTIONS:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/?{question}", timeout=60) as answer:
                pids.add(int(answer.read()))
        if end == "killed":
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        service.send_signal(signal.SIGTERM)
        assert 0 == service.wait(60), (tmp_path / "log").read_text()
    finally:
        service.kill()
        service.wait(30)

    if end == "recycled":
        assert len(pids) > 2
    if end == "killed":
        export.replay()
    assert QUESTIONS == found(place)
    assert [] == [info for info in export.spools() if info.records]


def can_connect(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
