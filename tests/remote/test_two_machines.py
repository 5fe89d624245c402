"""A Ray cluster of two machines that share nothing but the network between them, and an MLflow server on a third."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from machines import machines

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(500)

HERE = Path(__file__).resolve().parent
QUIET = {
    "DO_NOT_TRACK": "true",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


@pytest.fixture
def found(tmp_path):
    """What an evaluation in one process and one on both machines say and store, and the machines' folders."""
    with machines(tmp_path, "store", "head", "worker") as (store, head, worker):
        yield run(store, head, worker), tmp_path


def run(store, head, worker):
    store.start(
        "mlflow", "server", "--host", store.address, "--port", "5000", "--workers", "1",
        "--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", store.home / "artifacts",
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", **QUIET,
    )  # fmt: skip
    wait_for(store, "Application startup complete")
    own = {"MLFLOW_TRACKING_URI": f"http://{store.address}:5000", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    driver = head.start("python", HERE / "on_the_head.py", head.address, **own, **QUIET)
    assert driver.stdout.readline() == "up\n", head.log.read_text()[-3000:]
    worker.start(
        "ray", "start", "--address", f"{head.address}:6379", "--node-ip-address", worker.address, "--num-cpus", "1",
        "--object-store-memory", 100 * 2**20, "--disable-usage-stats", "--block", **QUIET,
    )  # fmt: skip
    said = driver.stdout.read()
    assert driver.wait(30) == 0, head.log.read_text()[-3000:]
    return json.loads(said.splitlines()[-1])


def wait_for(machine, text):
    deadline = time.monotonic() + 120
    while text not in machine.log.read_text():
        assert time.monotonic() < deadline, machine.log.read_text()[-3000:]
        threading.Event().wait(0.1)


def test_an_evaluation_over_two_machines_is_a_local_one(found):
    """Scores, tokens, whole traces and feedback under the run of the case, and nothing on the worker's own disk."""
    both, folder = found
    here, there = both["here"], both["there"]
    machines_at_work = {process.partition(":")[0]: examples for process, examples, _ in there["workers"]}
    left = {path.name for path in (folder / "worker").rglob("*") if "/ray/" not in str(path)}

    assert [["head", "10.77.0.2"], ["worker", "10.77.0.3"]] == both["nodes"]
    assert {"head", "worker"} == machines_at_work.keys()
    assert all(machines_at_work.values())
    assert 26 == sum(machines_at_work.values())
    assert ["finished", 92.31, 26, 1] == there["case"][:4]
    assert here["case"] == there["case"]
    assert ("FINISHED", True) == (there["run"], there["parent"])
    assert 26 == len(there["traces"])
    assert here["traces"] == there["traces"]
    assert not left & {"mlflow.db", "mlruns"}
