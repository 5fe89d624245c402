"""The tour in examples/tour.ipynb, executed in a real kernel, and what a notebook shows of traces.

``python3 run.py tour`` runs this, and keeps the outputs in the notebook, so that it reads on a code host. It is no part
of the default tests, which only look at what is kept: without nbclient it is skipped.
"""

import re
from pathlib import Path

import pytest

from mlflow_server import mlflow_server

nbclient = pytest.importorskip("nbclient", reason="`python3 run.py tour` installs nbclient and runs this")
nbformat = pytest.importorskip("nbformat")
pytestmark = pytest.mark.timeout(500)

TOUR = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"
PROGRAM = """
import os
import dspy
import mlflow
from dspy.utils import DummyLM
dspy.configure(lm=DummyLM([{"answer": "Paris"}] * 9))
"""
# MLflow's own exporter shows what it has written by the end of the cell.
CALL = "dspy.Predict('q -> answer')(q='?');\nmlflow.flush_trace_async_logging()"


def execute(notebook, folder):
    """Execute all cells in a kernel of its own; an exception in one ends it."""
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", record_timing=False, coalesce_streams=True
    )
    client.execute(cwd=str(folder))
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """The kernel's: a spool and a cache of its own, and no store but the one that a cell names."""
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("DSPY_CACHEDIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DSPY_MLFLOW_ASYNC_STRICT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_tour(tmp_path, environment):
    """Every cell runs, says nothing on standard error, and shows what the text beside it promises."""
    notebook = nbformat.read(TOUR, as_version=4)
    cells = execute(notebook, tmp_path)
    outputs = [output for cell in cells for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    data = [output.data for output in outputs if "data" in output]

    assert [] == [output for output in outputs if output.get("name") == "stderr"]
    assert re.search(r"^Ottawa\nLima\n2 traces\nResearch.forward  \d+ tokens$", printed, re.MULTILINE)
    assert 4 == len(re.findall(r"^ +\w+\.__call__  \d+ tokens$", printed, re.MULTILINE))
    assert "Predict: 6/6, score 66.7" in printed  # plain lines: there is no ipywidgets here
    assert "'is_right': False" in printed
    assert re.search(r"^evaluate_all: run \w{32}$|^compared: run \w{32}$", printed, re.MULTILINE)
    assert "BootstrapFewShotWithRandomSearch {" in printed
    assert any("<table>" in each.get("text/html", "") and "research" in each["text/html"] for each in data)
    assert 2 == sum("image/png" in each for each in data)
    assert data[-1]["text/plain"].startswith("(True, ")
    assert data[-1]["text/plain"].endswith(", 0)")
    nbformat.write(notebook, TOUR)


def test_mlflow_shows_our_traces_as_its_own(tmp_path, environment):
    """With a tracking server, MLflow displays a trace below the cell that made it, by either tracer alike."""
    folder = tmp_path / "server"
    with mlflow_server(folder, f"sqlite:///{tmp_path}/mlflow.db") as server:
        shown = {}
        for tracer in ("mlflow.dspy.autolog()", "import dspy_mlflow_async; dspy_mlflow_async.autolog()"):
            notebook = nbformat.v4.new_notebook()
            sources = (
                f"{PROGRAM}mlflow.set_tracking_uri('{server.uri}')\n{tracer}",
                CALL,
            )
            notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
            *_, cell = execute(notebook, tmp_path)
            shown[tracer] = [
                {kind: re.sub(r"tr-\w+", "ID", text) for kind, text in output.data.items() if isinstance(text, str)}
                for output in cell.outputs
                if output.output_type == "display_data"
            ]

    theirs, ours = shown.values()
    assert 1 == len(theirs)
    assert "iframe" in theirs[0]["text/html"]
    assert theirs[0].keys() == ours[0].keys()
    assert theirs[0]["text/html"] == ours[0]["text/html"]
    assert 1 == len(ours)
