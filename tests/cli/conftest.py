"""The command as a user runs it: in a process of its own, its output piped."""

import os
import subprocess
import sys

import pytest


@pytest.fixture
def command(tmp_path):
    """A function that runs ``dspy-mlflow-async`` with arguments, in an empty folder, and returns the ended process."""
    return _runner(tmp_path)


@pytest.fixture(scope="session")
def good_demo(tmp_path_factory):
    """A demo of a tracer that works: the ended process, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("demo")
    return _runner(folder)("demo", "--folder", "here"), folder


def _runner(folder):
    def run(*arguments, before="", env=None, timeout=170):
        # ``before`` is Python that runs in the same process before the command does.
        code = (
            f"import sys\n{before}\nfrom dspy_mlflow_async.cli import main\nsys.argv[1:] = {list(arguments)!r}\nmain()"
        )
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            cwd=folder,
            env={
                **{name: value for name, value in os.environ.items() if name != "COLUMNS"},
                "DSPY_MLFLOW_ASYNC_SPOOL": str(folder / "spool"),
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "PYTHONIOENCODING": "utf-8",
                **(env or {}),
            },
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
            check=False,
        )

    return run
