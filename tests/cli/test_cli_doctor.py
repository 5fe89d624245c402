"""The doctor: one sentence for each thing that is well or not, and an exit code."""

import base64
import http.server
import sqlite3
import threading

import dspy
import pytest

import dspy_mlflow_async
from dspy_mlflow_async.cli.doctor import checks, diagnose
from dspy_mlflow_async.cli.doctor.findings import Diagnosis, Finding, Level
from dspy_mlflow_async.seams import listed
from dspy_mlflow_async.seams.check import Seam

LOSE_A_SEAM = """
import importlib
del importlib.import_module("mlflow.tracing.context")._UserTraceContext
"""


def texts(findings, level=Level.PROBLEM):
    return [finding.text for finding in findings if finding.level is level]


def test_doctor_is_content_here(command):
    """On a machine where all is well: 0, the versions, the self-test and the known holes; plain when piped."""
    done = command("doctor")

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"dspy-mlflow-async {dspy_mlflow_async.__version__}" in done.stdout
    assert "3 calls in DSPy's worker threads stand under the call that made them" in done.stdout
    assert "Unbatchify" in done.stdout
    assert "All is well." in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.long
def test_doctor_finds_that_worker_threads_have_no_context(command):
    """The self-test fails where the tracing context does not reach DSPy's worker threads."""
    before = """
from dspy_mlflow_async import hooks
hooks.patch_worker_pool = lambda *args, **kwargs: lambda: None
"""
    done = command("doctor", before=before)

    assert done.returncode == 1
    assert "PROBLEM self-test: one call gave 4 traces" in done.stdout
    assert "1 to be mended." in done.stdout


@pytest.mark.long
def test_a_package_that_is_not_installed_is_no_problem(command):
    """Without psutil, as on a clean install, what needs it is a note that says what to install, and all is well."""
    done = command("doctor", before='import sys; sys.modules["psutil"] = None')

    assert done.returncode == 0, done.stdout
    assert "needs psutil, which is not installed" in done.stdout
    assert "pip install psutil" in done.stdout
    assert "PROBLEM" not in done.stdout


def test_doctor_speaks_where_a_seam_has_gone(command):
    """Where a name that the tracer imports has gone, the doctor names it and what comes of it, and ends with 1."""
    done = command("doctor", before=LOSE_A_SEAM)

    assert done.returncode == 1
    assert "PROBLEM seam: mlflow.tracing.context:_UserTraceContext has gone" in done.stdout
    assert "PROBLEM tracer: without these names nothing of ours can be traced" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_missing_seam_is_a_problem_and_an_optional_one_is_not(monkeypatch):
    """A name that has gone is a problem that says what no longer works; one that may be absent is only counted."""
    gone = Seam("mlflow.tracing.provider:no_such_name", "carries the context")
    optional = Seam("mlflow.no_such_module:name", "is nice to have", is_optional=True)
    monkeypatch.setattr(listed, "SEAMS", (gone, optional))

    problem, summary = checks.seams()

    assert problem.level is Level.PROBLEM
    assert "mlflow.tracing.provider:no_such_name has gone" in problem.text
    assert "it carries the context" in problem.text
    assert "0 of 2 names are present; these versions lack 1 that we can do without" == summary.text
    assert "absent  mlflow.no_such_module:name: is nice to have" in summary.details


@pytest.mark.long
def test_seams_are_shown_with_verbose(command):
    """``--verbose`` names each seam with its reason."""
    done = command("doctor", "--verbose")

    assert all(f"{seam.path}: {seam.reason}" in done.stdout for seam in listed.SEAMS)


def test_tracer_that_is_off_is_a_note():
    """Where ``autolog`` was not called, the doctor says how."""
    assert "autolog() switches it on" in texts(checks.tracer(), Level.NOTE)[0]


def test_tracer_that_is_on_is_well():
    """Where it was called, all is well."""
    dspy_mlflow_async.autolog(silent=True)

    assert [Level.OK] == [finding.level for finding in checks.tracer()]


def test_tracer_that_a_later_configure_removed_is_a_problem():
    """``dspy.configure(callbacks=[])`` after ``autolog()`` removes it: the doctor says so, and what to do."""
    dspy_mlflow_async.autolog(silent=True)
    dspy.configure(callbacks=[])

    (problem,) = texts(finding for finding in diagnose().findings if finding.topic == "tracer")

    assert "a later dspy.configure(callbacks=[...]) has replaced the list" in problem
    assert "Call dspy_mlflow_async.autolog() after it" in problem


def test_tracer_that_a_context_hides_is_a_problem():
    """So is a ``dspy.context(callbacks=[])`` around the code that asks."""
    dspy_mlflow_async.autolog(silent=True)

    with dspy.context(callbacks=[]):
        (problem,) = texts(checks.tracer())

    assert "dspy.context(callbacks=[...]) around this code hides it" in problem


def test_sqlite_store_is_looked_at_and_not_made(tmp_path):
    """A file that is not there is fine where it can be made, and is not made by looking."""
    path = tmp_path / "mlflow.db"

    (finding,) = checks.store(f"sqlite:///{path}")

    assert finding.level is Level.OK
    assert "MLflow makes it with the first trace" in finding.text
    assert not path.exists()


def test_sqlite_store_in_no_folder_is_a_problem(tmp_path):
    """A file in a folder that does not exist cannot be made."""
    assert "does not exist; make it" in texts(checks.store(f"sqlite:///{tmp_path}/none/mlflow.db"))[0]


def test_file_that_is_no_store_is_a_problem(tmp_path):
    """A sqlite file without MLflow's tables, and a file that is no sqlite, are named with the way out."""
    other, text = tmp_path / "other.db", tmp_path / "text.db"
    sqlite3.connect(other).close()
    other.write_bytes(b"")
    text.write_text("no database at all, and long enough to be read as one" * 20)

    for path in (other, text):
        assert "MLFLOW_TRACKING_URI" in texts(checks.store(f"sqlite:///{path}"))[0]


def test_store_of_these_tests_is_well(store_uri):
    """MLflow's current store is the one that is asked after."""
    import mlflow

    mlflow.search_experiments()

    (finding,) = checks.store()

    assert (Level.OK, f"{store_uri} is there and can be written") == (finding.level, finding.text)


@pytest.fixture
def server():
    """A server that answers every path with a status and a body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.authorization = self.headers["Authorization"]
            self.send_response(self.server.status)
            self.end_headers()
            self.wfile.write(b"3.99.0")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.status = 200
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join(20)


@pytest.mark.parametrize(
    ("status", "level", "words"),
    [
        (200, Level.OK, "answers, MLflow 3.99.0"),
        (401, Level.PROBLEM, "MLFLOW_TRACKING_USERNAME"),
        (404, Level.PROBLEM, "is it an MLflow server?"),
    ],
)
def test_server_that_answers(server, status, level, words):
    """A server is asked for its version; one that refuses or is no MLflow server is a problem."""
    server.status = status

    (finding,) = checks.store(f"http://127.0.0.1:{server.server_port}")

    assert level is finding.level
    assert words in finding.text


@pytest.mark.parametrize(
    ("user_info", "environment", "sent"),
    [
        ("ada:s3cr%3At@", {}, "Basic " + base64.b64encode(b"ada:s3cr:t").decode()),
        ("", {"USERNAME": "ada", "PASSWORD": "s3cr:t"}, "Basic " + base64.b64encode(b"ada:s3cr:t").decode()),
        ("", {"TOKEN": "s3cr:t"}, "Bearer s3cr:t"),
        ("", {}, None),
    ],
)
def test_server_is_asked_as_mlflow_would(server, user_info, environment, sent, monkeypatch):
    """Credentials of the URI or the environment reach the server, and never the finding."""
    for name, value in environment.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)

    (finding,) = checks.store(f"http://{user_info}127.0.0.1:{server.server_port}")

    assert Level.OK is finding.level, finding.text
    assert sent == server.authorization
    assert "s3cr" not in str(finding)


def test_no_finding_shows_a_password():
    """A finding is made to be pasted: URIs in it, and in its details, lose their passwords."""
    uri = "postgresql://ada:s3cret@127.0.0.1:1/none"

    (finding,) = checks.store(uri)

    assert Level.PROBLEM is finding.level
    assert "postgresql://ada:***@127.0.0.1:1/none" in finding.text
    assert "s3cret" not in str(Finding(Level.NOTE, "spool", f"for {uri}", (uri,)).details)


def test_server_that_is_not_there_is_a_problem():
    """A server that cannot be reached is a problem that says how to start it."""
    assert "mlflow server" in texts(checks.store("http://127.0.0.1:9"))[0]


def test_spool_that_is_not_empty(monkeypatch):
    """What waits on disk is a problem with the command that sends it; what is refused or on its way is a note."""
    from pathlib import Path

    from dspy_mlflow_async import export

    spools = [
        export.SpoolInfo(Path("a"), "http://a", records=5, traces=3),
        export.SpoolInfo(Path("b"), None, records=2, in_use=True),
        export.SpoolInfo(Path("c"), "http://c", dead=4, damaged=1),
        export.SpoolInfo(Path("d"), "http://d"),
    ]
    monkeypatch.setattr(export, "spools", lambda: spools)

    findings = list(checks.spool())

    assert [
        "a holds 5 records (3 traces) that http://a has not got; send them with: dspy-mlflow-async replay"
    ] == texts(findings)
    assert 3 == len(texts(findings, Level.NOTE))


def test_version_that_is_too_old_is_a_problem(monkeypatch):
    """A DSPy below the floor is named with the command that mends it."""
    real = checks.version
    monkeypatch.setattr(checks, "version", lambda name: "3.0.0" if name == "dspy" else real(name))

    assert ["dspy 3.0.0 is too old: pip install --upgrade 'dspy>=3.3.1'"] == texts(checks.versions())


def test_diagnosis_prints_a_line_for_each_finding():
    """``print(diagnose())`` reads like the command's output."""
    diagnosis = Diagnosis((Finding(Level.OK, "a", "fine"), Finding(Level.PROBLEM, "b", "broken")))

    assert "ok      a: fine\nPROBLEM b: broken" == str(diagnosis)
    assert not diagnosis.is_well
