"""``replay`` sends what a dead server did not take, once, and says what it did."""

import re

import pytest

pytestmark = pytest.mark.timeout(180)

# A program whose store is not there: its trace goes to the spool.
LEAVE_A_TRACE = """
import sys, dspy, mlflow, dspy_mlflow_async
from dspy.utils.dummies import DummyLM
mlflow.set_tracking_uri({uri!r})
dspy.configure(lm=DummyLM([{{"answer": "42"}}]))
dspy_mlflow_async.autolog(silent=True, exit_timeout=0.5)
with mlflow.start_span("outside"):
    dspy.Predict("question -> answer")(question="q")
"""


def test_replay_says_that_there_is_nothing(command, tmp_path):
    """An empty spool is no error."""
    done = command("replay", env={"DSPY_MLFLOW_ASYNC_SPOOL": str(tmp_path / "spool")})

    assert done.returncode == 0, done.stderr
    assert "0 records (0 whole traces) sent." in done.stdout


def test_replay_names_a_folder_that_is_none(command):
    """A wrong folder is a usage error."""
    done = command("replay", "--folder", "nowhere")

    assert done.returncode == 2
    assert "is not a folder" in re.sub(r"\s+", " ", done.stderr)


def test_replay_sends_a_spooled_trace_once(command, tmp_path):
    """What a store that was away has missed is counted by --dry-run, sent to the named store, and then gone."""
    spool = {"DSPY_MLFLOW_ASYNC_SPOOL": str(tmp_path / "spool")}
    store = f"sqlite:///{tmp_path}/mlflow.db"
    command("replay", "--dry-run", before=LEAVE_A_TRACE.format(uri="http://127.0.0.1:9"), env=spool)
    (folder,) = [path for path in (tmp_path / "spool").iterdir() if path.is_dir()]

    counted = command("replay", "--dry-run", env=spool)
    sent = command("replay", "--folder", str(folder), "--tracking-uri", store, env=spool)
    again = command("replay", "--folder", str(folder), "--tracking-uri", store, env=spool)

    assert "1 records (1 whole traces) would be sent." in counted.stdout, counted.stdout + counted.stderr
    assert "1 records (1 whole traces) sent." in sent.stdout, sent.stdout + sent.stderr
    assert "0 records (0 whole traces) sent." in again.stdout
    assert (0, 0) == (sent.returncode, again.returncode)
