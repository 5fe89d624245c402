"""Traces of a batch are sent by repeating the first request: as MLflow sends them, and with MLflow's errors."""

import itertools
import json
import shutil
import subprocess
import sys
import threading

import mlflow
import pytest
import requests
from mlflow.entities import LiveSpan, Trace, TraceData
from mlflow.protos.service_pb2 import StartTraceV3
from mlflow.tracing.utils.otlp import resource_to_otel_proto
from mlflow.tracking.request_header import registry as request_headers
from mlflow.utils.proto_json_utils import message_to_json
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from stores import Page, Tables, call, wait_until

from dspy_mlflow_async import export
from dspy_mlflow_async.export.write import errors, prepare
from dspy_mlflow_async.export.write.writer import Writer
from dspy_mlflow_async.seams import mlflow_http, mlflow_span_message, mlflow_store, mlflow_trace_text
from mlflow_server import mlflow_server
from rows.compare import differences
from rows.corpus import twin

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not mlflow_store.finalizes(), reason="before MLflow 3.12 spans go first"),
]
LANES = 4  # that send at the same time
REFUSAL = b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}'
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\n2\r\n{}\r\n0\r\n\r\n"


class Bytes(Page):
    """What something before the server answers, byte by byte."""

    @property
    def answer(self):
        return self.body


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    pause = errors.Backoff.pause
    monkeypatch.setattr(errors.Backoff, "pause", lambda self: min(0.2, pause(self)))


@pytest.fixture
def ordinary(kept_proxy, monkeypatch):
    """Paths of the requests that are made of the server by requests."""
    paths, send = [], requests.Session.send

    def sent(self, request, **options):
        if request.url.startswith(kept_proxy.uri):
            paths.append(request.path_url)
        return send(self, request, **options)

    monkeypatch.setattr(requests.Session, "send", sent)
    return paths


def arrived(installed, ids):
    return {trace_id: len(trace.data.spans) for trace_id, trace in installed.read().items()} == dict.fromkeys(ids, 4)


def told_headers(requests_seen):
    """Of each request, its path, and its headers but for the length of the body."""
    for request, _ in requests_seen:
        lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        yield lines[0], sorted(line.lower() for line in lines[1:] if not line.lower().startswith("content-length"))


def until_together(most):
    """Faults of a proxy: requests wait until so many have come."""
    have_come = threading.Event()
    for number in itertools.count(1):
        if number == most:
            have_come.set()
        yield have_come


def test_a_batch_costs_no_ordinary_request(make, kept_proxy, ordinary, monkeypatch):
    """They are as the first was, but for what they are about; a token that has changed goes with the next batch."""
    installed = make(uri=kept_proxy.uri)
    call()
    assert export.flush(60)
    seen, ways, ids = {}, [], []
    kept_proxy.fault = until_together(LANES)  # so that each of the lanes has opened a connection in the first batch
    for token in ("one", "one", "two", "two"):
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
        installed.stop_writing()
        ids += [call() for _ in range(12)]
        ordinary.clear(), kept_proxy.answers.clear()
        installed.queue.work()
        ways.append(bool(ordinary))
        seen.setdefault(token, []).extend(told_headers(kept_proxy.answers))
    # Afterwards: the server closes a connection that has been idle for five seconds, and to read may take as long.
    assert set(ids) <= set(installed.read())
    assert [True, False, True, False] == ways
    for token, told in seen.items():
        starts = [headers for line, headers in told if line == "POST /api/3.0/mlflow/traces HTTP/1.1"]
        spans = [headers for line, headers in told if line == "POST /v1/traces HTTP/1.1"]
        assert [starts[0]] * 24 == starts
        assert f"authorization: bearer {token}" in starts[0]
        more = {"content-type: application/x-protobuf", f"x-mlflow-experiment-id: {installed.experiment_id}"}
        assert [sorted({*starts[0]} - {"content-type: application/json"} | more)] * len(spans) == spans


def test_spans_are_sent_as_they_came(make, kept_proxy, monkeypatch):
    """No immutable span is made of one of a call, which would cost as much as what is sent of it."""
    installed = make(uri=kept_proxy.uri)
    call()
    assert export.flush(60)
    made, still = [], LiveSpan.to_immutable_span
    monkeypatch.setattr(LiveSpan, "to_immutable_span", lambda span: made.append(span) or still(span))
    ids = [call() for _ in range(5)]
    assert export.flush(60)

    assert [] == made
    assert set(ids) <= set(installed.read())
    assert arrived(installed, [*installed.read()])


class AskingHeaders:
    """A plugin that asks the server for what it puts into the headers, as some do for a token."""

    is_asking = threading.local()

    def in_context(self):
        return not getattr(self.is_asking, "now", False)

    def request_headers(self):
        self.is_asking.now = True
        try:
            return {"X-Experiment": mlflow.MlflowClient().get_experiment("0").name}
        finally:
            self.is_asking.now = False


def test_headers_of_a_plugin_that_asks_the_server(make, kept_proxy, monkeypatch):
    """It waits for nobody, its requests are not the ones that are repeated, and each of ours has its header."""
    registered = request_headers._request_header_provider_registry._registry
    monkeypatch.setattr(request_headers._request_header_provider_registry, "_registry", [*registered, AskingHeaders()])
    installed = make(uri=kept_proxy.uri)
    ids = [call() for _ in range(8)]
    assert export.flush(60)
    installed.stop_writing()
    ids += [call() for _ in range(8)]
    kept_proxy.answers.clear()
    installed.queue.work()

    assert arrived(installed, ids)
    told = [(line.split()[1], headers) for line, headers in told_headers(kept_proxy.answers) if line.startswith("POST")]
    assert 8 == [path for path, _ in told].count("/api/3.0/mlflow/traces")
    assert [] == [path for path, headers in told if "x-experiment: default" not in headers]


@pytest.mark.parametrize(
    "fault",
    [
        503,
        Page(400, REFUSAL[:-2], "application/json"),
        Page(500, b'{"error_code": "INTERNAL_ERROR", "message": "oh"}', "application/json"),
        Page(),
        Page(body=b"{}", kind="application/json"),
        Page(302),
        "hang up",
        "cut",
        Bytes(body=CHUNKED),
        Bytes(body=b"HTTP/1.0 200 OK\r\n\r\n{}"),
        Bytes(body=b"nothing of the kind\r\n\r\n"),
    ],
    ids=repr,
)
def test_a_server_that_fails_in_the_middle_of_a_batch(make, kept_proxy, ordinary, fault):
    """Whatever it answers to a repeated request: nothing is lost, nothing is dead, and all is stored once."""
    installed = make(uri=kept_proxy.uri)
    ids = [call() for _ in range(8)]  # so that there is a connection for each of those that follow at once
    assert export.flush(60)
    installed.stop_writing()
    ids += [call() for _ in range(10)]
    kept_proxy.fault = itertools.chain([None] * 3, itertools.repeat(fault, 3), itertools.repeat(None))
    ordinary.clear()
    installed.write_again()

    wait_until(lambda: export.flush(10), 60)
    assert kept_proxy.faults
    assert arrived(installed, ids)
    assert export.ExportStats(started=18, ended=18, stored=18) == export.stats()


def test_mlflows_refusal_of_a_repeated_request_is_meant(make, kept_proxy):
    """One trace of a batch that MLflow refuses goes to the dead letters, and no other."""
    installed = make(uri=kept_proxy.uri)
    call()
    assert export.flush(60)
    installed.stop_writing()
    [call() for _ in range(5)]
    kept_proxy.fault = iter([None, None, Page(400, REFUSAL, "application/json"), *[None] * 50])
    installed.write_again()

    assert export.flush(60)
    assert (5, 1) == ((stats := export.stats()).stored, stats.dead)


def test_a_repeated_request_is_bounded_in_time(kept_proxy, traces, ordinary, sqlite):
    """A server that hangs is away, as it is for MLflow's own requests."""
    for seconds in (60, 4):  # what the server imports for the first takes it some seconds
        writer = Writer(kept_proxy.uri, request_seconds=seconds)
        assert [None] * 4 == [outcome.error for outcome in writer.write([*map(twin, traces[:4])])]
    ordinary.clear()
    kept_proxy.fault = itertools.repeat("hang")

    outcomes = writer.write([*map(twin, traces[:4])])

    assert {errors.Verdict.AWAY} == {outcome.verdict for outcome in outcomes}
    assert [] == ordinary


@pytest.mark.long
def test_what_is_sent_is_stored_as_mlflows_own(tmp_path, request, traces, monkeypatch):
    """Row by row, of traces of many kinds."""
    database = shutil.copyfile(request.getfixturevalue("_empty_store"), tmp_path / "server.db")
    with mlflow_server(tmp_path, f"sqlite:///{database}") as server:
        tables = Tables(database, server.uri)
        found = write(server.uri, traces)
        ours = tables.tables()
        tables.forget()
        with monkeypatch.context() as patch:
            patch.setattr(mlflow_http, "repeater_of", lambda *_: None)
            patch.setattr(mlflow_trace_text, "writes_same_texts", lambda: False)
            expected = write(server.uri, traces)

        assert expected == found
        assert [] == differences(tables.tables(), ours)
        assert len(ours["trace_info"]) > 0.7 * len(traces)


def write(uri, operations):
    outcomes, writer = [], Writer(uri)
    for start in range(0, len(operations), 32):
        outcomes += writer.write([*map(twin, operations[start : start + 32])])
    return {outcome.operation.key: outcome.verdict for outcome in outcomes}


def test_samples_need_no_resource_of_opentelemetrys():
    """It is made in threads, which the end of a process has no more: traces would go by slower functions."""
    script = """
from opentelemetry.sdk.resources import Resource
from dspy_mlflow_async.seams import mlflow_span_message
Resource.create = None
assert mlflow_span_message.writes_same_messages()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)

    assert (0, "") == (ended.returncode, ended.stderr)


def test_messages_and_texts_are_mlflows(traces):
    """Of spans and traces of many kinds: the same bytes, and the same JSON."""
    assert mlflow_span_message.writes_same_messages()
    assert mlflow_trace_text.writes_same_texts()
    for operation in map(twin, traces):
        prepare.prepare(operation)
        for span in operation.spans:
            request = ExportTraceServiceRequest()
            part = request.resource_spans.add()
            part.resource.CopyFrom(resource_to_otel_proto(span._span.resource))
            try:
                part.scope_spans.add().spans.append(span.to_otel_proto())
            except ValueError:  # a number that is too large
                with pytest.raises(ValueError, match=r"too large"):
                    mlflow_span_message.message_of([span])
                continue
            assert request.SerializeToString() == mlflow_span_message.message_of([span])
        trace = Trace(operation.info, TraceData([]))
        expected = json.loads(message_to_json(StartTraceV3(trace=trace.to_proto())))
        assert expected == json.loads(mlflow_trace_text.text_of_start(operation.info))
