"""With ``mlflow-tracing`` alone: traces reach a server that runs elsewhere, and what is not to be had says so.

``DSPY_MLFLOW_ASYNC_SERVER_PYTHON`` names a Python that has the whole of MLflow, for the server.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

EXTRA = 'pip install "dspy-mlflow-async[mlflow]"'
PROGRAMS = Path(__file__).parent / "programs.py"


def _has(package):
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


if _has("mlflow"):
    pytest.skip("the whole of MLflow is installed: see tox -e light", allow_module_level=True)

needs_tracing_alone = pytest.mark.skipif(_has("mlflow-skinny"), reason="mlflow-skinny has runs")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A whole MLflow's server, in a process of another environment."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [os.environ["DSPY_MLFLOW_ASYNC_SERVER_PYTHON"], "-m", "mlflow", "server", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MLFLOW_"))}
    environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True
        ) as process,
    ):
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            threading.Event().wait(0.1)  # a server cannot be waited for otherwise
        yield f"http://127.0.0.1:{port}"
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def run(tmp_path):
    """Runs Python in a process and a folder of its own, with a spool in it."""
    unset = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"DSPY_MLFLOW_ASYNC_SPOOL": str(tmp_path / "spool")}

    def run(*arguments, **more):
        return subprocess.run(
            [sys.executable, "-W", "ignore", *arguments],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            env={**environment, **more},
            cwd=tmp_path,
        )

    return run


def errors_of(done):
    """Its standard error, less the complaint of LiteLLM's transport when a program with DSPy 3.3 alone ends, too."""
    complaint = (
        r"Exception ignored in: <function LiteLLMAiohttpTransport\.__del__ .*\nTraceback.*\n(  .*\n)+TypeError: .*\n"
    )
    return re.sub(complaint, "", done.stderr)


def result_of(done):
    """What a program has printed last; fails with its log where it has failed, or where anything was raised inside."""
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in errors_of(done), done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_traces_reach_a_server(server, run):
    """Async calls, a wrapped program, worker threads and a request: whole trees, as with the whole of MLflow."""
    found = result_of(run(PROGRAMS, "traces", server))

    assert {"answers": ["yes"] * 7, "is_stored": True, "stored": 5, "errors": 0, "lost": 0} == found["ours"]
    assert found["names"] == found["expected"]


def test_an_experiment_is_found_by_name(server, run):
    """`MLFLOW_EXPERIMENT_NAME` is looked up, and made, by the writer."""
    found = result_of(run(PROGRAMS, "traces", server, MLFLOW_EXPERIMENT_NAME="named"))

    assert found["ours"]["stored"] == 5
    assert found["names"] == found["expected"]


def test_traces_are_captured_without_a_store(run):
    """`testing.capture_traces` needs no tracking URI, and opens nothing."""
    found = result_of(run(PROGRAMS, "capture"))

    assert [["Predict.forward", ["ChatAdapter.format", "Echo.__call__", "ChatAdapter.parse"]]] == found


def test_an_evaluation_of_dspys_own_is_traced(server, run):
    """`dspy.Evaluate` gives its score, and each trace its feedback."""
    found = result_of(run(PROGRAMS, "evaluate", server))

    assert {"score": 100.0, "feedback": [1.0, 1.0, 1.0]} == found


def test_asgi_gives_each_request_its_trace(server, run):
    """The middleware makes one trace of a request."""
    assert ["GET"] == result_of(run(PROGRAMS, "asgi", server))


def test_a_spool_is_replayed(server, run, tmp_path):
    """What was kept on disk while the server was away reaches it by ``replay``."""
    away = run(PROGRAMS, "leave", "http://127.0.0.1:9")
    [folder] = [path for path in (tmp_path / "spool").iterdir() if path.is_dir()]
    replayed = run("-m", "dspy_mlflow_async.cli", "replay", "--folder", folder, "--tracking-uri", server)

    assert away.returncode == 0, away.stderr[-3000:]
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert "3 whole traces" in replayed.stdout


def test_the_doctor_is_content(server, run):
    """It notes what the light install leaves out, and finds nothing to mend."""
    done = run("-m", "dspy_mlflow_async.cli", "doctor", "--tracking-uri", server)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "without the whole of MLflow" in done.stdout
    assert EXTRA in done.stdout


def test_the_doctor_says_what_the_default_store_needs(run):
    """Without a tracking URI MLflow takes an SQL store: the doctor names what that needs, and tests the rest."""
    done = run("-m", "dspy_mlflow_async.cli", "doctor")

    assert done.returncode == 1
    assert (
        f"PROBLEM store: An SQL store (sqlite) needs the whole of MLflow, which is not installed: {EXTRA}"
        in done.stdout
    )
    assert "stand under the call that made them" in done.stdout
    assert "Traceback" not in errors_of(done)


@needs_tracing_alone
@pytest.mark.parametrize("name", ["AsyncEvaluate", "Case", "evaluate_all", "aevaluate_all", "run"])
def test_what_needs_runs_names_the_extra(name):
    """Evaluations and runs say in one sentence what brings them."""
    import dspy_mlflow_async

    with pytest.raises(ImportError) as caught:
        getattr(dspy_mlflow_async, name)

    assert f"dspy_mlflow_async.{name} needs the whole of MLflow, which is not installed: {EXTRA}" == str(caught.value)


@pytest.mark.parametrize("arguments", [["demo"], ["report", "abc"]], ids=lambda arguments: arguments[0])
def test_commands_that_need_runs_name_the_extra(run, arguments):
    """`demo` and `report` end with one sentence."""
    done = run("-m", "dspy_mlflow_async.cli", *arguments)

    assert done.returncode == 2
    assert done.stderr.startswith(f"dspy-mlflow-async {arguments[0]}: ")
    assert done.stderr.rstrip().endswith(f"needs the whole of MLflow, which is not installed: {EXTRA}")
    assert 1 == len(done.stderr.splitlines())


@needs_tracing_alone
@pytest.mark.parametrize("call", ["autolog", "TracingCallback"])
@pytest.mark.parametrize("setting", ["log_evals", "log_compiles"])
def test_settings_that_need_runs_name_the_extra(server, run, call, setting):
    """What is to log runs logs none, says so in one line, and goes on tracing."""
    done = run(PROGRAMS, "settings", server, call, setting)

    assert [1, 0] == result_of(done)
    assert f"dspy-mlflow-async: {setting} of {call} needs the whole of MLflow, which is not installed: {EXTRA}" in (
        done.stderr.splitlines()
    )


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "postgresql+psycopg2://me:secret@127.0.0.1:9/db"])
def test_an_sql_store_names_the_extra(run, uri):
    """`autolog` says at once what the store needs; traces wait on disk, and nothing is raised inside."""
    done = run(PROGRAMS, "leave", uri)
    kind = uri.partition(":")[0]

    assert [3, 3, 0] == result_of(done)
    assert f"An SQL store ({kind}) needs the whole of MLflow, which is not installed: {EXTRA}" in done.stderr
    assert "secret" not in done.stderr
