"""Answers of servers that are none, and refusals that are not MLflow's: nothing counts as stored, nothing as dead."""

import mlflow
import pytest
from stores import Page, call, wait_until

from dspy_mlflow_async import export
from dspy_mlflow_async.seams import mlflow_store

SPANS, TRACES = b"/v1/traces", b"/mlflow/traces"
pytestmark = pytest.mark.skipif(not mlflow_store.finalizes(), reason="before MLflow 3.12 spans go first")


def arrived(installed, ids):
    return {trace_id: len(trace.data.spans) for trace_id, trace in installed.read().items()} == dict.fromkeys(ids, 4)


@pytest.mark.long
@pytest.mark.parametrize(
    "page",
    [
        Page(path=SPANS),
        Page(path=SPANS, body=b"{}", kind="application/json"),
        Page(path=SPANS, body=b"", kind=""),
        Page(path=SPANS, body=b"", kind="text/plain"),
        Page(path=SPANS, body=b"200 OK", kind="text/plain"),
        Page(path=SPANS, body=b"\x0a\x02\x08\x03", kind="application/x-protobuf"),  # 3 spans rejected
        Page(path=SPANS, body=b"<html>", kind="application/x-protobuf"),
        Page(path=TRACES),
        Page(path=TRACES, body=b"{}", kind="application/json"),
        Page(path=TRACES, body=b"", kind=""),
        Page(),
        Page(body=b"{}", kind="application/json"),
    ],
    ids=repr,
)
def test_a_success_that_is_not_mlflows_stores_nothing(make, proxy, page):
    """A maintenance page, an empty answer, or one that rejects spans: traces wait, and arrive when MLflow answers."""
    installed = make(uri=proxy.uri)
    first = call()
    assert export.flush(60)
    proxy.fault = page
    ids = [call() for _ in range(3)]

    assert not export.flush(10)
    assert (1, 0, 0) == ((stats := export.stats()).stored, stats.dead, stats.dropped)
    proxy.fault = None
    wait_until(lambda: export.flush(10), 60)
    assert arrived(installed, [first, *ids])
    assert 4 == export.stats().stored


@pytest.mark.long
@pytest.mark.parametrize(
    "page",
    [
        Page(404),
        Page(404, b'{"detail": "Not Found"}', "application/json"),
        Page(404, b'{"error_code": "no such backend"}', "application/json"),
        Page(400),
        Page(400, b'{"message": "The plain HTTP request was sent to HTTPS port"}', "application/json"),
        Page(405),
        Page(413),
        Page(404, path=SPANS),
        Page(400, path=SPANS),
        Page(404, path=TRACES),
        Page(400, path=TRACES),
        Page(302),
    ],
    ids=repr,
)
def test_a_refusal_that_is_not_mlflows_kills_nothing(make, proxy, page):
    """What an ingress answers while its service is rolled out says nothing of the traces: no dead letters."""
    installed = make(uri=proxy.uri)
    first = call()
    assert export.flush(60)
    proxy.fault = page
    ids = [call() for _ in range(3)]

    assert not export.flush(10)
    assert (1, 0, 0) == ((stats := export.stats()).stored, stats.dead, stats.dropped)
    proxy.fault = None
    wait_until(lambda: export.flush(10), 60)
    assert arrived(installed, [first, *ids])
    assert 0 == sum(info.dead for info in export.spools())


def test_mlflows_own_refusal_is_meant(make, proxy):
    """A deleted experiment is refused by MLflow itself, behind a proxy too, and goes to the dead letters."""
    installed = make(uri=proxy.uri)
    call()
    assert export.flush(60)
    mlflow.MlflowClient(proxy.uri).delete_experiment(installed.experiment_id)
    call()

    assert export.flush(60)
    assert (1, 1) == ((stats := export.stats()).stored, stats.dead)


def test_feedback_that_was_given_while_a_trace_was_open_is_stored_once(make, proxy):
    """MLflow gives it no id before it is stored: a trace that is sent again must not bring it a second time."""
    installed = make(uri=proxy.uri)
    call()
    assert export.flush(60)
    proxy.fault = Page(path=SPANS)
    with mlflow.start_span("judged") as span:
        returned = mlflow.log_feedback(trace_id=span.trace_id, name="score", value=1.0)

    assert not export.flush(5)
    proxy.fault = None
    wait_until(lambda: export.flush(10), 60)
    assert 1 == len(installed.read()[span.trace_id].info.assessments)
    assert returned.assessment_id is None
