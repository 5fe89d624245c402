"""Real servers under load: each request its one whole trace, and nothing lost when they are told to stop.

``DSPY_MLFLOW_ASYNC_LOAD_SECONDS=30`` makes the load test as long as it should be now and then.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from importlib.metadata import version

import pytest
from mlflow.entities.trace_state import TraceState
from servers import EXAMPLES, MARKER, environment, load, marker_of, running, script, settled, stored

from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
from dspy_mlflow_async.testing import tree
from mlflow_server import mlflow_server

LOAD_SECONDS = float(os.environ.get("DSPY_MLFLOW_ASYNC_LOAD_SECONDS", "6"))

UVICORN = ["uvicorn", "fastapi_app:app", "--port", "{port}", "--log-level", "warning"]
GUNICORN = ["gunicorn", "fastapi_app:app", "-b", "127.0.0.1:{port}", "-w", "2", "--log-level", "warning"]
FROM_GUNICORN_26 = pytest.mark.skipif(
    int(version("gunicorn").partition(".")[0]) < 26,
    reason="the ASGI worker of gunicorn 25 says that the client has gone once it has the body",
)


@pytest.fixture(scope="module")
def endpoint():
    with LocalEndpoint(script, latency=0.1) as endpoint:
        yield endpoint


def markers_of(trace):
    return {marker for span in trace.data.spans for marker in MARKER.findall(json.dumps([span.inputs, span.outputs]))}


def asks_for_usage(body):
    """DSPy 3.3 wants to know of a stream's tokens only with ``track_usage``; LiteLLM then says that there are none."""
    return not body.get("stream") or (body.get("stream_options") or {}).get("include_usage", False)


def assert_whole(trace, asked, endpoint):
    """One tree, one marker, the right session, user, route and status, all spans ended, all tokens counted."""
    name, *_ = tree(trace)
    root = next(span for span in trace.data.spans if span.parent_id is None)
    assert {asked.marker} == markers_of(trace)
    assert f"POST {asked.path}" == name == trace.info.tags["mlflow.traceName"]
    assert asked.session == trace.info.trace_metadata["mlflow.trace.session"]
    assert asked.user == trace.info.trace_metadata["mlflow.trace.user"]
    assert "shop" == trace.info.tags["service"]
    assert all(span.end_time_ns for span in trace.data.spans)
    if asked.is_complete:
        assert (200, 200) == (asked.status, root.get_attribute("http.response.status_code"))
        assert ("ok", TraceState.OK, asked.trace_id) == (
            root.get_attribute("outcome"), trace.info.state, trace.info.trace_id
        )  # fmt: skip
        assert asked.marker in asked.text
        told = [
            request.usage["total_tokens"]
            for request in endpoint.requests
            if marker_of(request.body) == asked.marker and asks_for_usage(request.body)
        ]
        assert sum(told) == trace.info.token_usage["total_tokens"]


def assert_right(asked, traces, endpoint):
    """Every request that was answered has its trace, every trace its request, and there are no others."""
    by_marker = defaultdict(list)
    for trace in traces:
        (marker,) = markers_of(trace)
        by_marker[marker].append(trace)
    assert {1} == {len(found) for found in by_marker.values()}
    known = {one.marker: one for one in asked}
    assert set(by_marker) <= set(known)
    assert {one.marker for one in asked if one.is_complete} <= set(by_marker)
    for marker, (trace,) in by_marker.items():
        assert_whole(trace, known[marker], endpoint)


@pytest.mark.long
async def test_two_hundred_clients(endpoint, store, tmp_path):
    """Two hundred clients at once, of whom some hang up or break off and some hit a failing tool; then SIGTERM."""
    endpoint.requests.clear()
    with running(tmp_path, UVICORN, environment(tmp_path, endpoint, store)) as service:
        asked = await load(service.url, LOAD_SECONDS, 200)
        service.terminate()
        code = await asyncio.to_thread(service.exit_code)

        traces = settled(store, tmp_path)
        assert -15 == code, service.log[-3000:]
        assert_right(asked, traces, endpoint)

    done = Counter(one.kind for one in asked if one.is_complete)
    assert all(done[kind] > 10 for kind in ("ask", "agent", "stream")), done
    outcomes = Counter(
        next(span for span in trace.data.spans if span.parent_id is None).get_attribute("outcome") for trace in traces
    )
    assert outcomes["cancelled"] > 10, outcomes
    failing = [trace for trace in traces if any(span.name == "Tool.price" for span in trace.data.spans)]
    assert failing
    assert {"error"} == {
        span.get_attribute("outcome") for trace in failing for span in trace.data.spans if span.name == "Tool.price"
    }
    assert "dspy-mlflow-async failed" not in service.log


@pytest.mark.parametrize(
    ("command", "code"),
    [
        pytest.param([*GUNICORN, "-k", "uvicorn.workers.UvicornWorker"], 0, id="gunicorn-uvicorn"),
        pytest.param([*GUNICORN, "-k", "asgi", "--preload"], 0, id="gunicorn-asgi-preload", marks=FROM_GUNICORN_26),
        pytest.param([*UVICORN, "--workers", "2"], None, id="uvicorn-spawn"),
    ],
)
@pytest.mark.long
async def test_two_workers_told_to_stop_amid_work(endpoint, store, tmp_path, command, code):
    """SIGTERM while requests are under way: they are answered, and what was answered is stored, by each worker."""
    endpoint.requests.clear()
    with contextlib.ExitStack() as stack:
        uri = store
        if "uvicorn.workers.UvicornWorker" in command:
            uri = stack.enter_context(mlflow_server(tmp_path / "mlflow-server", store)).uri
        service = stack.enter_context(running(tmp_path, command, environment(tmp_path, endpoint, uri)))
        stop = threading.Timer(1.0, service.terminate)
        stop.start()
        asked = await load(service.url, 3.0, 20, kinds=("ask", "stream"))
        stop.join()
        left_with = await asyncio.to_thread(service.exit_code)

        assert_right(asked, settled(uri, tmp_path), endpoint)
        assert code is None or code == left_with, service.log[-3000:]
    assert [one for one in asked if one.is_complete]


async def test_a_store_that_is_away_at_the_end(endpoint, tmp_path):
    """With nobody to store them, traces are in the spool when SIGTERM has ended the server, within the bound."""
    nowhere = "http://127.0.0.1:9"
    with running(tmp_path, UVICORN, environment(tmp_path, endpoint, nowhere)) as service:
        asked = await load(service.url, 0.5, 5, kinds=("ask",))
        service.terminate()
        assert -15 == await asyncio.to_thread(service.exit_code)

    kept = b"".join(path.read_bytes() for path in (tmp_path / "spool").rglob("*") if path.is_file())
    assert [] == [one.marker for one in asked if one.is_complete and one.marker.encode() not in kept]


def test_the_batch_job(endpoint, store, tmp_path):
    """The example job sorts its tickets, keeps what it was told to, and gives a session to each customer."""
    endpoint.requests.clear()
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "batch_job.py")],
        env=environment(tmp_path, endpoint, store, KEEP="0.5"), capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip

    assert "20 of 20 tickets sorted, 20 LM calls" in done.stdout, done.stderr[-3000:]
    traces = stored(store)
    assert f"traces stored: {len(traces)}, sampled away: {20 - len(traces)}" in done.stdout
    for trace in traces:
        customer = next(span for span in trace.data.spans if span.parent_id is None).inputs["customer"]
        assert f"tickets-{customer}" == trace.info.trace_metadata["mlflow.trace.session"]
        assert "triage" == trace.info.tags["job"]
