"""The pytest plugin in a worker of pytest-xdist, a process of its own, with pytest-asyncio; `run.py tour` runs it."""

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

pytest.importorskip("nbclient", reason="`python3 run.py tour` runs this")
pytestmark = pytest.mark.timeout(200)

PLUGIN = "dspy_mlflow_async.pytest_plugin"
TEST = """
import dspy
import pytest

devset = [dspy.Example(question=f"number {n}", answer=f"number {n}").with_inputs("question") for n in range(4)]

class Program(dspy.Module):
    async def aforward(self, question):
        return dspy.Prediction(answer=question if int(question[-1]) < 3 else "something else")

def exact(example, prediction, trace=None):
    return example.answer == prediction.answer

@pytest.mark.evaluate(min={"score": 0.8})
@pytest.mark.parametrize("number", range(3))
async def test_it(evaluation, number):
    result = await evaluation.acall(Program(), devset=devset, metric=exact)
    assert result.score == 75.0
"""


def test_workers_send_comparisons_home(tmp_path):
    """Tests in two workers at once fail by their mark, each with its table and its worst examples."""
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\naddopts = --strict-markers\n"
    )
    (tmp_path / "test_it.py").write_text(TEST)
    is_found = any(each.value == PLUGIN for each in entry_points(group="pytest11"))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *([] if is_found else ["-p", PLUGIN])]
    environment = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "DSPY_MLFLOW_ASYNC_SPOOL": f"{tmp_path}/spool",
    }
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert 1 == done.returncode, done.stdout + done.stderr
    assert "3 failed" in done.stdout
    assert 3 == done.stdout.count("FAILED: Program: score is 0.75 ± 0.25, and must be ≥ 0.8.")
    assert 3 == len(
        re.findall(r"question=number 3, answer=number 3 +answer=something else +0$", done.stdout, re.MULTILINE)
    )
