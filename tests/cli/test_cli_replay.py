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


@pytest.mark.long
def test_replay_sends_a_spooled_trace_once(command, tmp_path):
    """What a store that was away has missed is counted by --dry-run, sent to the named store, and then gone."""
    spool = {"DSPY_MLFLOW_ASYNC_SPOOL": str(tmp_path / "spool")}
    store = f"sqlite:///{tmp_path}/mlflow.db"
    command("replay", "--dry-run", before=LEAVE_A_TRACE.format(uri="http://127.0.0.1:9"), env=spool)
    (folder,) = [path for path in (tmp_path / "spool").iterdir() if path.is_dir()]

    counted = command("replay", "--dry-run", env=spool)
    sent = command("replay", "--folder", str(folder), "--tracking-uri", store, env=spool)
    again = command("replay", "--folder", str(folder), "--tracking-uri", store, env=spool)

    assert "1 record (1 whole trace) would be sent." in counted.stdout, counted.stdout + counted.stderr
    assert "1 record (1 whole trace) sent." in sent.stdout, sent.stdout + sent.stderr
    assert "0 records (0 whole traces) sent." in again.stdout
    assert (0, 0) == (sent.returncode, again.returncode)


# A program whose traces the store has refused, since their experiment was deleted meanwhile; then it is restored.
LEAVE_DEAD_LETTERS = """
import mlflow, dspy_mlflow_async
mlflow.set_tracking_uri({uri!r})
experiment = mlflow.set_experiment("mine")
client = mlflow.MlflowClient()
client.delete_experiment(experiment.experiment_id)
dspy_mlflow_async.autolog(silent=True)
for _ in range(2):
    with mlflow.start_span("outside"):
        pass
dspy_mlflow_async.flush(60)
client.restore_experiment(experiment.experiment_id)
"""


@pytest.mark.long
def test_replay_of_dead_letters_says_first_what_it_would_send(command, tmp_path):
    """It lists the reasons; nobody there to agree is a refusal that says what to do; --yes sends, by --reason."""
    spool = {"DSPY_MLFLOW_ASYNC_SPOOL": str(tmp_path / "spool")}
    before = LEAVE_DEAD_LETTERS.format(uri=f"sqlite:///{tmp_path}/mlflow.db")

    listed = command("replay", "--dead-letters", "--dry-run", before=before, env=spool)
    asked = command("replay", "--dead-letters", env=spool)
    others = command("replay", "--dead-letters", "--reason", "no such words", "--yes", env=spool)
    sent = command("replay", "--dead-letters", "--reason", "'ACTIVE' state", "--yes", env=spool)

    assert "2 dead letters would be sent again." in listed.stdout, listed.stdout + listed.stderr
    assert re.search(r"  2, \d{4}-\d\d-\d\d: .*must be in the 'active' state", listed.stdout)
    assert (2, "") == (asked.returncode, asked.stdout.replace(listed.stdout.partition("0 records")[0], ""))
    assert "send it with --yes" in asked.stderr
    assert "0 records (0 whole traces) sent." in others.stdout
    assert "2 records (2 whole traces) sent." in sent.stdout, sent.stdout + sent.stderr


def test_a_reason_without_dead_letters_is_a_usage_error(command):
    """A choice of what is not asked for is refused."""
    assert 2 == command("replay", "--reason", "x").returncode
