"""``dspy-mlflow-async audit`` on stores that MLflow's tracer and ours wrote, and on stores with faults put in."""

import contextlib
import importlib
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import audit_cases
import dspy
import mlflow
import pytest
from audit_cases import Desk, evaluate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.tracking._tracking_service.utils import _get_store
from packaging.version import Version
from runtools import Candidates, NoBar, devset
from typer.testing import CliRunner

import dspy_mlflow_async
from dspy_mlflow_async.cli import app
from dspy_mlflow_async.cli.audit.auditing import audit
from dspy_mlflow_async.cli.audit.findings import MEANINGS, Kind
from dspy_mlflow_async.cli.audit.store import Store
from dspy_mlflow_async.seams import mlflow_bulk_reads
from dspy_mlflow_async.seams.mlflow_store import renew_connections
from echo import Chain, EchoLM

pytestmark = pytest.mark.timeout(400)  # whoever is first makes the stores
BEFORE_3_13 = Version(mlflow.__version__).release < (3, 13)  # once a root has ended MLflow forgets the spans below it


@pytest.fixture(scope="module")
def theirs(store_uri, tmp_path_factory):
    """MLflow's own tracer has run its cases, in a process of its own, in which its patches of optimizers end."""
    command = [sys.executable, "-W", "ignore", audit_cases.__file__, "theirs", store_uri]
    environment = os.environ | {"MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false"}
    done = subprocess.run(
        command, cwd=tmp_path_factory.mktemp("theirs"), env=environment, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return store_uri


@pytest.fixture(scope="module")
def written(store_uri, tmp_path_factory):
    """A function that runs something with our tracer, to leave its traces in this module's store."""
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("artifacts"))
    patch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    patch.setattr("tqdm.tqdm", NoBar)
    config = importlib.import_module("dspy.dsp.utils.settings").main_thread_config
    before = dict(config)

    def write(program, *arguments):
        mlflow.tracing.reset()
        try:
            program(*arguments)
        finally:
            mlflow.tracing.reset()
            config.update(before)
        return store_uri

    yield write
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
    patch.undo()


@pytest.fixture(scope="module")
def ours(written):
    """Our tracer has run all cases."""
    return written(audit_cases.run_all, audit_cases.ours, audit_cases.CASES)


@pytest.fixture(scope="module")
def good(written):
    """The store that faults are put into."""
    return written(write_good_store)


def write_good_store():
    """What faults are put into: calls, sessions, an evaluation and a compile, all by our tracer."""
    mlflow.set_experiment("good")
    dspy.configure(lm=EchoLM(answer=lambda field, marker: f"{field} of {marker}"), callbacks=[])
    audit_cases.ours()
    Chain()(question="@one What is it?")
    Chain()(question="@two Where is it?")
    Desk()(questions=["@p", "@q"])
    with dspy_mlflow_async.request(session_id="s1"):
        WithSession()(question="@three", session_id="s1")
    evaluate("e", 1, 3)
    audit_cases.judged(audit_cases.ours)
    Candidates([("x0", 1), ("x1", 2)]).compile(audit_cases.Program(), trainset=devset("t", 1, 1))
    dspy_mlflow_async.flush()
    dspy_mlflow_async.autolog(disable=True)


class WithSession(dspy.Module):
    """Hands its session on."""

    def __init__(self):
        super().__init__()
        self.answer = dspy.Predict("question, session_id -> answer")

    def forward(self, question, session_id):
        return self.answer(question=question, session_id=session_id)


def counts(uri, experiment, **options):
    found = audit(Store(uri, [experiment]), **{"idle_seconds": 0} | options).counts
    return {str(kind): count for kind, count in found.items()}


# --- what tracers leave ----------------------------------------------------------------------------------------------

THEIRS = {
    "parallel": {"fragment"},
    "parallel_between": {"fragment"},
    "evaluations_at_once": {"other_run"},
    "compiles_at_once": {"other_run", "shared_steps"},
    "evaluation_in_a_span": {"fewer_traces"},
    "metric_without_a_name": {"fewer_feedbacks"},
    "judged": set(),
    "switched_in_a_call": {"no_parent", "unfinished"},
    "outliving_its_caller": {"no_parent"} if BEFORE_3_13 else {"late"},
}


@pytest.mark.long
@pytest.mark.parametrize("case", audit_cases.FAULTY, ids=lambda case: case.__name__)
def test_what_mlflows_own_leaves(theirs, case):
    """Fragments, lost feedback, shared steps, strays and traces under another's run are found, and nothing else."""
    assert THEIRS[case.__name__] == counts(theirs, f"theirs-{case.__name__}").keys()


@pytest.mark.parametrize("case", audit_cases.CASES, ids=lambda case: case.__name__)
def test_what_ours_leaves(ours, case):
    """Nothing is wrong; that a call outlived its caller is said, as it is marked."""
    expected = {"outlived"} if case is audit_cases.outliving_its_caller else set()
    assert expected == counts(ours, f"ours-{case.__name__}").keys()


@pytest.mark.parametrize(
    "experiment", ["good", "theirs-parallel", "theirs-evaluations_at_once", "theirs-switched_in_a_call"]
)
def test_through_the_client(good, theirs, monkeypatch, experiment):
    """Where there are no tables to read, as with a server, MLflow's client gives the same findings."""
    by_rows = counts(theirs, experiment)
    monkeypatch.setattr(mlflow_bulk_reads, "has_rows", lambda uri: False)
    assert by_rows == counts(theirs, experiment)


# --- faults, one by one ----------------------------------------------------------------------------------------------


class Broken:
    """The good store, open to be broken.

    Args:
        connection: sqlite's.
    """

    def __init__(self, connection):
        self.sql = connection.execute
        (self.experiment,) = self.sql("select experiment_id from experiments where name = 'good'").fetchone()

    def trace(self, name, number=0):
        """The id of the n-th trace with this root."""
        found = self.sql(
            "select trace_id from spans where experiment_id = ? and parent_span_id is null and name = ? "
            "order by start_time_unix_nano",
            (self.experiment, name),
        ).fetchall()
        return found[number][0]

    def span(self, trace, name, number=0):
        """The id of the n-th span of this name."""
        found = self.sql(
            "select span_id from spans where trace_id = ? and name = ? order by start_time_unix_nano", (trace, name)
        ).fetchall()
        return found[number][0]

    def run(self, name):
        """The id of the first run of this name, and where its artifacts are."""
        return self.sql(
            "select run_uuid, artifact_uri from runs where experiment_id = ? and name = ? order by start_time",
            (self.experiment, name),
        ).fetchone()

    def of_run(self, run_id, number=0):
        """The id of the n-th trace of a run that has feedback."""
        return self.sql(
            "select distinct m.request_id from trace_request_metadata m "
            "join assessments a on a.trace_id = m.request_id "
            "where m.key = 'mlflow.sourceRun' and m.value = ? order by 1",
            (run_id,),
        ).fetchall()[number][0]

    def feedback(self, trace):
        """The id of a trace's feedback; what the example expected stands beside it."""
        return self.sql(
            "select assessment_id from assessments where trace_id = ? and assessment_type = 'feedback'", (trace,)
        ).fetchone()[0]

    def copy(self, table, key, value, **changes):
        """Insert copies of rows with other values; None leaves a column out."""
        names = [row[1] for row in self.sql(f"pragma table_info({table})") if row[1] != "duration_ns"]
        for row in self.sql(f"select {', '.join(names)} from {table} where {key} = ?", (value,)).fetchall():
            new = dict(zip(names, row, strict=True)) | changes
            marks = ", ".join("?" * len(new))
            self.sql(f"insert into {table} ({', '.join(new)}) values ({marks})", tuple(new.values()))

    def copy_trace(self, trace, new):
        """A second trace with the same content."""
        self.copy("trace_info", "request_id", trace, request_id=new)
        for table in ("trace_tags", "trace_request_metadata"):
            self.copy(table, "request_id", trace, request_id=new)
        self.copy("spans", "trace_id", trace, trace_id=new)

    def set_tokens(self, trace, **tokens):
        """Change a trace's totals, or take them away, where this MLflow has them: in columns, or in the metadata."""
        names = {row[1] for row in self.sql("pragma table_info(trace_info)")}
        if "total_tokens" in names:
            columns = ", ".join(f"{name} = ?" for name in tokens)
            self.sql(f"update trace_info set {columns} where request_id = ?", (*tokens.values(), trace))
            return
        where = "where request_id = ? and key = 'mlflow.trace.tokenUsage'"
        (before,) = self.sql(f"select value from trace_request_metadata {where}", (trace,)).fetchone()
        after = {name: count for name, count in (json.loads(before) | tokens).items() if count is not None}
        if after:
            self.sql(f"update trace_request_metadata set value = ? {where}", (json.dumps(after), trace))
        else:
            self.sql(f"delete from trace_request_metadata {where}", (trace,))

    def edit(self, trace, span, old, new):
        """Replace a part of a span's content."""
        (content,) = self.sql("select content from spans where trace_id = ? and span_id = ?", (trace, span)).fetchone()
        changed = re.sub(old, lambda _: new, content, count=1)
        assert changed != content
        self.sql("update spans set content = ? where trace_id = ? and span_id = ?", (changed, trace, span))


def a_second_root(store):
    trace = store.trace("Chain.forward")
    store.sql("update spans set parent_span_id = null where span_id = ?", (store.span(trace, "Predict.forward", 1),))


def a_piece_of_its_own(store):
    trace = store.trace("Desk.forward")
    piece = store.span(trace, "Predict.forward")
    store.copy_trace(trace, "tr-piece")
    store.sql("delete from spans where trace_id = ? and (span_id = ? or parent_span_id = ?)", (trace, piece, piece))
    store.sql("delete from spans where trace_id = 'tr-piece' and span_id != ? and parent_span_id != ?", (piece, piece))
    store.sql("delete from spans where trace_id = 'tr-piece' and parent_span_id is null")
    store.sql("update spans set parent_span_id = null where trace_id = 'tr-piece' and span_id = ?", (piece,))
    store.set_tokens("tr-piece", input_tokens=10, output_tokens=2, total_tokens=12)


def a_call_without_its_steps(store):
    trace = store.trace("Chain.forward")
    store.sql("delete from spans where parent_span_id = ?", (store.span(trace, "Predict.forward", 1),))


def no_parent(store):
    trace = store.trace("Chain.forward")
    store.sql("delete from spans where span_id = ?", (store.span(trace, "Predict.forward"),))


def anothers_span(store):
    trace, other = store.trace("Chain.forward"), store.trace("Chain.forward", 1)
    root = store.span(trace, "Chain.forward")
    store.copy(
        "spans",
        "span_id",
        store.span(other, "Predict.forward"),
        trace_id=trace,
        span_id="00000000000000aa",
        parent_span_id=root,
    )
    store.copy("spans", "span_id", store.span(other, "ChatAdapter.format"), trace_id=trace,
               span_id="00000000000000ab", parent_span_id="00000000000000aa")  # fmt: skip


def anothers_session(store):
    trace = store.trace("WithSession.forward")
    store.edit(trace, store.span(trace, "Predict.forward"), r'session_id\\":\\"s1', 'session_id\\":\\"s2')


def anothers_marker(store):
    trace = store.trace("Chain.forward")
    store.edit(trace, store.span(trace, "Predict.forward"), "@one", "@other")


def in_progress(store):
    store.sql("update trace_info set status = 'IN_PROGRESS' where request_id = ?", (store.trace("Chain.forward"),))


def an_open_span(store):
    trace = store.trace("Chain.forward")
    store.sql("update spans set end_time_unix_nano = null where span_id = ?", (store.span(trace, "ChatAdapter.parse"),))


def no_run(store):
    trace = store.of_run(store.run("eval")[0])
    store.sql("delete from trace_request_metadata where key = 'mlflow.sourceRun' and request_id = ?", (trace,))


def a_run_that_is_not_there(store):
    trace = store.of_run(store.run("eval")[0])
    store.sql(
        "update trace_request_metadata set value = 'ab' where key = 'mlflow.sourceRun' and request_id = ?", (trace,)
    )


def anothers_run(store):
    trace = store.of_run(store.run("eval")[0])
    store.sql(
        "update trace_request_metadata set value = ? where key = 'mlflow.sourceRun' and request_id = ?",
        (store.run("eval_0")[0], trace),
    )


def a_lost_trace(store):
    trace = store.of_run(store.run("eval")[0])
    for table, key in (("spans", "trace_id"), ("assessments", "trace_id"), ("trace_tags", "request_id"),
                       ("trace_request_metadata", "request_id"), ("trace_info", "request_id")):  # fmt: skip
        store.sql(f"delete from {table} where {key} = ?", (trace,))


def a_lost_feedback(store):
    store.sql("delete from assessments where trace_id = ?", (store.of_run(store.run("eval")[0]),))


def a_lost_row(store):
    path = Path(store.run("eval")[1].removeprefix("file://")) / "result_table.json"
    whole = path.read_bytes()
    table = json.loads(whole)
    path.write_text(json.dumps(table | {"data": table["data"][:-1]}))
    return lambda: path.write_bytes(whole)


def a_twin_below(store):
    trace = store.trace("Chain.forward")
    span = store.span(trace, "ChatAdapter.parse")
    (start,) = store.sql("select start_time_unix_nano from spans where span_id = ?", (span,)).fetchone()
    store.copy(
        "spans", "span_id", span, span_id="00000000000000aa", parent_span_id=span, start_time_unix_nano=start + 1
    )


def a_twin_beside(store):
    trace = store.trace("Chain.forward")
    store.copy("spans", "span_id", store.span(trace, "ChatAdapter.parse"), span_id="00000000000000aa")


def a_trace_twice(store):
    store.copy_trace(store.trace("Chain.forward"), "tr-again")


def late(store):
    trace = store.trace("Chain.forward")
    span = store.span(trace, "EchoLM.__call__", 1)
    store.sql("update spans set end_time_unix_nano = end_time_unix_nano + 1000000000 where span_id = ?", (span,))
    store.edit(trace, span, '"outcome": ', '"another": ')


def shared_steps(store):
    store.sql("update metrics set step = 5 where key = 'eval' and step = 1")


def left_running(store):
    store.sql("update runs set status = 'RUNNING', end_time = null where run_uuid = ?", (store.run("eval")[0],))


def wrong_tokens(store):
    store.set_tokens(store.trace("Chain.forward"), total_tokens=1)


def lost_tokens(store):
    store.set_tokens(store.trace("Chain.forward"), input_tokens=None, output_tokens=None, total_tokens=None)


def a_second_feedback(store):
    store.copy(
        "assessments", "assessment_id", store.feedback(store.of_run(store.run("eval")[0])), assessment_id="a-second"
    )


def feedback_on_the_judge(store):
    (trace,) = store.sql(
        "select t.request_id from trace_tags t join trace_info i on i.request_id = t.request_id "
        "where t.key = 'mlflow.trace.sourceScorer' and i.experiment_id = ?",
        (store.experiment,),
    ).fetchone()
    (run,) = store.sql(
        "select value from trace_request_metadata where key = 'mlflow.sourceRun' and request_id = ?", (trace,)
    ).fetchone()
    store.copy(
        "assessments", "assessment_id", store.feedback(store.of_run(run)), assessment_id="a-second", trace_id=trace
    )


def a_cut_value(store):
    trace = store.trace("Chain.forward")
    store.edit(trace, store.span(trace, "ChatAdapter.parse"), r"draft of @one", "draft… [cut: 20 of 28 characters]")


def a_secret(store):
    trace = store.trace("Chain.forward")
    store.edit(trace, store.span(trace, "ChatAdapter.parse"), "draft of @one", f"draft ghp_{'a1B2' * 9}")


def a_named_secret(store):
    trace = store.trace("Chain.forward")
    store.edit(
        trace, store.span(trace, "EchoLM.__call__"), r'"temperature":', r'"api_key": "\"hush-hush\"", "temperature":'
    )


FAULTS = {
    a_second_root: {"fragment": 1},
    a_piece_of_its_own: {"fragment": 1},
    a_call_without_its_steps: {"fragment": 1},
    no_parent: {"no_parent": 3},
    anothers_span: {"stray": 2},  # it, and its own child
    anothers_session: {"stray": 1},
    anothers_marker: {"stray": 1},
    in_progress: {"unfinished": 1},
    an_open_span: {"unfinished": 1},
    no_run: {"no_run": 1},
    a_run_that_is_not_there: {"no_run": 1},
    anothers_run: {"other_run": 1},
    a_lost_trace: {"fewer_traces": 1},
    a_lost_feedback: {"fewer_feedbacks": 1},
    a_lost_row: {"fewer_rows": 1},
    a_twin_below: {"doubled": 1},
    a_twin_beside: {"doubled": 1},
    a_trace_twice: {"doubled": 1},
    late: {"late": 1},
    shared_steps: {"shared_steps": 1},
    left_running: {"running": 1},
    wrong_tokens: {"tokens": 1},
    lost_tokens: {"tokens": 1},
    a_second_feedback: {"misplaced_feedback": 1},
    feedback_on_the_judge: {"misplaced_feedback": 1},
    a_cut_value: {"cut": 1},
    a_secret: {"secret": 1},
    a_named_secret: {"secret": 1},
}


@contextlib.contextmanager
def broken(uri, *faults):
    """The store with faults in it, which is whole again afterwards."""
    path = uri.removeprefix("sqlite:///")
    whole = sqlite3.connect(":memory:")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.backup(whole)
        undos = [fault(Broken(connection)) for fault in faults]
        connection.commit()
    renew_connections(uri)
    try:
        yield
    finally:
        for undo in filter(None, undos):
            undo()
        renew_connections(uri)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            whole.backup(connection)
        whole.close()


def test_good_store(good):
    """Nothing is wrong with what the faults are put into, also by the markers."""
    assert {} == counts(good, "good", marker=re.compile(r"@\w+"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault(good, fault):
    """A fault that is put into a good store is found, and nothing else."""
    with broken(good, fault):
        assert FAULTS[fault] == counts(good, "good", marker=re.compile(r"@\w+"))


def test_every_kind_is_tried():
    """Each kind of finding has its words, and stands among the faults or, of late spans, among the cases."""
    tried = {kind for found in FAULTS.values() for kind in found}

    assert set(Kind) == set(MEANINGS)
    assert {str(kind) for kind in Kind} == tried | {"outlived"}


def an_old_trace(store):
    store.sql("update trace_info set timestamp_ms = 1 where request_id = ?", (store.trace("Chain.forward"),))


@pytest.mark.skipif(BEFORE_3_13, reason="before MLflow 3.13 there are no archives")
def test_archived_traces(good, tmp_path):
    """Spans that MLflow has moved into its archive are read there; where that is gone, the audit goes on."""
    archive = tmp_path / "archive"
    with broken(good, an_old_trace, a_secret):
        moved = _get_store(good).archive_traces(
            resolved_trace_archival_location=archive.as_uri(), broader_retention="300d"
        )
        found = counts(good, "good")
        archive.rename(tmp_path / "elsewhere")
        without = counts(good, "good")

    assert (1, {"secret": 1}) == (moved, found)
    assert "secret" not in without


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    calls=st.lists(st.sampled_from(("chain", "parallel", "session")), min_size=1, max_size=5),
    workers=st.integers(1, 4),
    fault=st.sampled_from((in_progress, wrong_tokens, no_parent, a_twin_beside, a_secret)),
)
def test_any_store(good, written, calls, workers, fault):
    """Whatever calls run at once, our store is right; with a fault in it, that one is found beside them."""

    def call(numbered):
        number, name = numbered
        if name == "chain":
            Chain()(question=f"@c{number}")
        elif name == "parallel":
            Desk()(questions=[f"@d{number}", f"@e{number}"])
        else:
            with dspy_mlflow_async.request(session_id=f"s{number}"):
                WithSession()(question=f"@s{number}", session_id=f"s{number}")

    def write(name):
        random.seed(os.urandom(8))  # Hypothesis sets the seed, by which OpenTelemetry makes its ids
        mlflow.set_experiment(name)
        dspy.configure(lm=EchoLM(), callbacks=[])
        audit_cases.ours()
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(call, enumerate(calls)))
        dspy_mlflow_async.flush()
        dspy_mlflow_async.autolog(disable=True)

    name = f"any-{len(mlflow.search_experiments())}"
    written(write, name)

    found = audit(Store(good, [name]), idle_seconds=0)
    assert ({}, {}) == (found.counts, found.examples)
    with broken(good, fault):
        assert FAULTS[fault] == counts(good, "good")


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["audit", *arguments])


def test_exit_code_and_json(good, theirs):
    """A good store gives 0; one with faults 1, with counts, cause, cure, examples and links; none at all 2."""
    good = run("--experiment", "good", "--tracking-uri", good)
    bad = run("--experiment", "theirs-parallel", "--json", "--ui", "http://mlflow:5000/", "--examples", "1")
    found = json.loads(bad.stdout)
    fragments = found["findings"]["fragment"]

    assert (0, True) == (good.exit_code, "nothing is wrong" in good.output)
    assert 1 == bad.exit_code
    assert (3, 2, 1) == (found["traces"], fragments["count"], len(fragments["examples"]))
    assert fragments["cause"]
    assert fragments["cure"]
    assert fragments["examples"][0]["link"].startswith("http://mlflow:5000/#/experiments/")
    assert 2 == run("--experiment", "no such thing").exit_code
    assert 2 == run("--run", "no such run").exit_code
    assert 2 == run("--since", "yesterday").exit_code
    assert 2 == run("--marker", "(").exit_code


def test_page(theirs, tmp_path):
    """The page names each finding with a link, and shows no mark-up of what it found."""
    done = run("--experiment", "theirs-switched_in_a_call", "--html", str(tmp_path / "audit.html"), "--idle", "0s")
    page = (tmp_path / "audit.html").read_text()

    assert 1 == done.exit_code
    assert "spans without their parent" in page
    assert 'href="http://127.0.0.1:5000/#/experiments/' in page


def test_secrets_are_named_by_their_place(good):
    """The place of a secret is said, and the secret itself nowhere."""
    with broken(good, a_secret, a_named_secret):
        said = run("--experiment", "good", "--json").stdout

    assert "ChatAdapter.parse, spanInputs.completion" in said
    assert "EchoLM.__call__, api_key" in said
    assert "a1B2" not in said
    assert "hush" not in said


def test_since_and_run(good):
    """What is too old, or belongs to another run, is not looked at."""
    with contextlib.closing(sqlite3.connect(good.removeprefix("sqlite:///"))) as connection:
        (run_id,) = connection.execute(
            "select t.value from tags t join runs r on r.run_uuid = t.value "
            "where t.key = 'mlflow.parentRunId' and r.experiment_id = ? order by r.start_time desc",
            (Broken(connection).experiment,),
        ).fetchone()
    store = Store(good, run_id=run_id)

    assert {"eval_0", "eval_1"} <= {facts.name for facts in store.runs.values()}
    assert audit(store).traces == sum(1 for _ in store.traces()) > 0
    assert 0 == audit(Store(good, ["good"], since_ms=2**42)).traces


def dump(uri):
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as connection:
        return set(connection.iterdump())


def test_fix_ends_what_was_left_and_nothing_else(good):
    """Unasked for, nothing changes; with --yes, the states of one run and one trace do."""
    with broken(good, in_progress, left_running):
        before = dump(good)
        asked = run("--experiment", "good", "--idle", "0s", "--fix")
        assert before == dump(good)
        assert "2 would be ended" in asked.output

        done = run("--experiment", "good", "--idle", "0s", "--fix", "--yes")
        changed = [line for line in dump(good) - before if "mlflow.trace" not in line]
        assert 2 == len([line for line in done.output.splitlines() if line.endswith(": ended")])
        assert ["runs", "trace_info"] == sorted(re.match(r'INSERT INTO "(\w+)"', line)[1] for line in changed)
        assert "'KILLED'" in "".join(changed)
        assert "'ERROR'" in "".join(changed)
        assert {} == counts(good, "good")


def test_what_is_at_work_is_left_alone(good):
    """A run or a trace of which something was heard a moment ago is no finding, and is not ended."""
    with broken(good, in_progress, left_running):
        result = audit(Store(good, ["good"]), idle_seconds=3600)

    assert ({}, [], 1) == (result.counts, result.left, result.young)
