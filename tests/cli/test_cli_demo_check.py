"""The demo's verification, on stores that have been tampered with: it finds what is missing, moved or foreign."""

import contextlib
import json
import shutil
import sqlite3

import mlflow
import pytest

from dspy_mlflow_async.cli.demo import acts
from dspy_mlflow_async.cli.demo.check import check
from dspy_mlflow_async.cli.demo.plan import Node, difference
from dspy_mlflow_async.cli.demo.script import load_tickets
from dspy_mlflow_async.cli.demo.stage import read_traces

pytestmark = [pytest.mark.timeout(180), pytest.mark.xdist_group("good-demo")]

PLANNED = [plan for act in acts.ACTS for plan in act.plan(load_tickets())]


@pytest.fixture
def store(good_demo, tmp_path):
    """A function that changes a copy of a good demo's store by SQL, and checks what MLflow then reads."""
    _, folder = good_demo
    path = tmp_path / "mlflow.db"
    shutil.copyfile(folder / "here" / "mlflow.db", path)

    def change_and_check(change=None, **kwargs):
        if change is not None:
            with contextlib.closing(sqlite3.connect(path)) as connection, connection:
                change(connection)
        uri = f"sqlite:///{path}"
        experiment = mlflow.MlflowClient(tracking_uri=uri).search_experiments(order_by=["creation_time DESC"])[0]
        return check(read_traces(uri, experiment.experiment_id), PLANNED, **kwargs)

    return change_and_check


def spans_of(connection, marker, name):
    """Row id and content of the spans with this name whose trace's root has the marker in its inputs."""
    rows = connection.execute("SELECT rowid, trace_id, parent_span_id, content FROM spans").fetchall()
    traces = {trace for _, trace, parent, content in rows if parent is None and f"#{marker})" in content}
    return [
        (rowid, json.loads(content))
        for rowid, trace, _, content in rows
        if trace in traces and json.loads(content)["name"] == name
    ]


def write(connection, rowid, content):
    connection.execute("UPDATE spans SET content = ? WHERE rowid = ?", (json.dumps(content), rowid))


@pytest.mark.long
def test_good_store_has_no_problems(store):
    """Nothing is found where nothing is wrong."""
    assert [] == store().problems


def test_missing_span_is_found(store):
    """A span less is a finding. (MLflow >= 3.12 knows how many spans a trace has, and shows none of it.)"""

    def change(connection):
        rowid, _ = spans_of(connection, "gather/03", "LM.__call__")[0]
        connection.execute("DELETE FROM spans WHERE rowid = ?", (rowid,))

    problems = store(change).problems

    assert any(problem.startswith("Call #gather/03") for problem in problems)


def test_renamed_span_is_found(store):
    """A span that the plan does not have is a finding that names it, and the planned one that is missing."""

    def change(connection):
        rowid, content = spans_of(connection, "gather/03", "ChatAdapter.parse")[0]
        content["name"] = "ChatAdapter.other"
        write(connection, rowid, content)

    (problem,) = store(change).problems

    assert problem.startswith("Call #gather/03: its tree is not the planned one; missing: SupportDesk.forward > ")
    assert "not planned: SupportDesk.forward > " in problem
    assert "ChatAdapter.other" in problem


def test_difference_sees_through_equal_siblings():
    """Two trees with the same spans, one of them under another of several equal parents, are not equal."""
    leaf = Node("leaf")
    planned = Node("root", (Node("parent", (leaf,)), Node("parent", (leaf,))))
    found = Node("root", (Node("parent", (leaf, leaf)), Node("parent")))

    assert "" == difference(planned, planned)
    assert "wrong one of several equal parents" in difference(planned, found)


def test_missing_trace_is_found(store):
    """A whole trace less is a finding."""

    def change(connection):
        trace_id = connection.execute("SELECT trace_id FROM spans WHERE content LIKE '%#direct/07)%'").fetchone()[0]
        connection.execute("DELETE FROM spans WHERE trace_id = ?", (trace_id,))
        connection.execute("DELETE FROM trace_info WHERE request_id = ?", (trace_id,))

    assert "Call #direct/07 has no trace." in store(change).problems


def test_moved_span_is_found(store):
    """A predictor's LM call under the other predictor of the same trace is a finding."""

    def change(connection):
        first, second = spans_of(connection, "parallel/05", "LM.__call__")[:2]
        first[1]["parent_span_id"], second[1]["parent_span_id"] = (
            second[1]["parent_span_id"],
            first[1]["parent_span_id"],
        )
        for rowid, content in (first, second):
            write(connection, rowid, content)

    problems = store(change).problems

    assert any("Call #parallel/05" in problem and "did not make it" in problem for problem in problems)


def test_foreign_values_are_found(store):
    """Another call's words in a span are a finding, even where the tree is right."""

    def change(connection):
        rowid, content = spans_of(connection, "reasoned/02", "LM.__call__")[0]
        write(connection, rowid, json.loads(json.dumps(content).replace("#reasoned/02", "#reasoned/09")))

    problems = store(change).problems

    assert any("Call #reasoned/02" in problem and "#reasoned/09" in problem for problem in problems)


def test_orphan_is_found(store):
    """A span whose parent is not in the trace is a finding."""

    def change(connection):
        rowid, content = spans_of(connection, "gather/08", "ChatAdapter.parse")[0]
        content["parent_span_id"] = "AAAAAAAAAAE="
        write(connection, rowid, content)

    problems = store(change).problems

    assert any("Call #gather/08" in problem and "not one tree" in problem for problem in problems)


def test_lost_session_is_found(store):
    """A trace that lost the session of its context is a finding."""

    def change(connection):
        trace_id = connection.execute("SELECT trace_id FROM spans WHERE content LIKE '%#gather/01)%'").fetchone()[0]
        connection.execute(
            "DELETE FROM trace_request_metadata WHERE request_id = ? AND key = 'mlflow.trace.session'", (trace_id,)
        )
        if "session_id" in [column[1] for column in connection.execute("PRAGMA table_info(trace_info)")]:
            connection.execute("UPDATE trace_info SET session_id = NULL WHERE request_id = ?", (trace_id,))

    assert "Call #gather/01: its session is None instead of 'gather'." in store(change).problems


def test_stranger_is_found(store):
    """A trace of nobody's is a finding."""

    def change(connection):
        rowid, content = spans_of(connection, "direct/01", "Predict.forward")[0]
        write(connection, rowid, json.loads(json.dumps(content).replace("#direct/01", "")))

    problems = store(change).problems

    assert any("belongs to no call" in problem for problem in problems)
    assert "Call #direct/01 has no trace." in problems


def test_tokens_are_compared_with_the_bill(store):
    """Where the endpoint has counted other tokens, that is a finding for each call."""
    billed = {plan.marker: 1 for plan in PLANNED}

    problems = store(billed=billed).problems

    assert len(PLANNED) == len([problem for problem in problems if "the endpoint has counted 1" in problem])
