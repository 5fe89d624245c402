"""Our threads import nothing once warm: they would wait for whoever holds a lock of the imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", ["sqlite", "server"])
@pytest.mark.long
def test_threads_of_ours_import_nothing_once_warm(tmp_path, kind, request):
    """Calls and evaluations with runs go on while somebody holds the lock of MLflow's import hooks.

    Nor does the caller import anything at the start of a trace, nor anybody LiteLLM for its prices: MLflow's own do.
    """
    uri = f"sqlite:///{tmp_path / 'new.db'}" if kind == "sqlite" else request.getfixturevalue("server").uri
    environment = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}"}
    program = subprocess.run(
        [sys.executable, str(HERE / "importing.py"), str(tmp_path), uri],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert program.returncode == 0, program.stderr
    answer = json.loads((tmp_path / "answer.json").read_text())

    assert [] == answer["imports"]
    assert {"warm": [True, True], "again": [True, [True]]} == {key: answer[key] for key in ("warm", "again")}
    assert not answer["litellm"]
    assert all(answer["costs"]), answer["costs"]
    assert len(answer["costs"]) == 8
