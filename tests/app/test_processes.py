"""A service in a process of its own and its callers: clients that leave, a caller that traces, a signal."""

import asyncio
import contextlib
import json
import threading
from pathlib import Path

import dspy
import httpx
import mlflow
import pytest
from mlflow.tracing.distributed import get_tracing_context_headers_for_http_request
from servers import environment, marker_of, running, script, settled

import dspy_mlflow_async
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, predict_tree

SERVICE = [
    "uvicorn", "service:app", "--app-dir", str(Path(__file__).parent), "--port", "{port}", "--log-level", "warning",
]  # fmt: skip
PREDICT = predict_tree(lm="LM")


class Waiting:
    """An LM that answers, but the question ``@slow`` only when it is told to."""

    def __init__(self):
        self.asked, self.go = threading.Event(), threading.Event()

    def __call__(self, body):
        if marker_of(body) == "@slow":
            self.asked.set()
            assert self.go.wait(TIMEOUT)
        return script(body)


@pytest.fixture
def waiting():
    return Waiting()


@pytest.fixture
def endpoint(waiting):
    with LocalEndpoint(waiting) as endpoint:
        yield endpoint


def root(trace):
    return next(span for span in trace.data.spans if span.name.startswith(("GET", "POST", "WEBSOCKET")))


def outcomes(traces):
    return sorted(root(trace).get_attribute("outcome") for trace in traces)


async def stop(service):
    service.terminate()
    assert -15 == await asyncio.to_thread(service.exit_code), service.log[-3000:]


@pytest.mark.long
async def test_broken_off_streams_are_cancelled(endpoint, store, tmp_path):
    """Each client that leaves a stream of 64 MB after its first bytes, and none that takes it all."""
    with running(tmp_path, SERVICE, environment(tmp_path, endpoint, store)) as service:

        async def break_off():
            async with httpx.AsyncClient(base_url=service.url) as http, http.stream("GET", "/big") as response:
                await anext(response.aiter_bytes())

        for _ in range(10):
            await break_off()
        await asyncio.gather(*(break_off() for _ in range(10)))
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as http:
            assert 64_000_000 == len((await http.get("/big")).content)
        await stop(service)

    assert ["cancelled"] * 20 + ["ok"] == outcomes(settled(store, tmp_path))


async def test_a_service_with_a_signal_handler_of_its_own(endpoint, waiting, store, tmp_path):
    """SIGTERM amid a request: the service's handler is called, the request is answered, and its trace stored."""
    with running(tmp_path, SERVICE, environment(tmp_path, endpoint, store)) as service:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as http:
            asking = asyncio.create_task(http.post("/ask/slow"))
            assert await asyncio.to_thread(waiting.asked.wait, TIMEOUT)
            service.terminate()
            waiting.go.set()
            answer = await asking
        assert -15 == await asyncio.to_thread(service.exit_code), service.log[-3000:]

    (trace,) = settled(store, tmp_path)
    assert (200, answer.headers["x-trace-id"]) == (answer.status_code, trace.info.trace_id)
    assert [1, 1] == [service.log.count(f"the service {said}") for said in ("was told to stop", "has stopped")]


@pytest.fixture
def calling(store):
    """This process traces into the service's store."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    dspy_mlflow_async.autolog(silent=True)
    yield
    mlflow.set_tracking_uri(before)


@pytest.mark.usefixtures("calling")
async def test_a_caller_in_another_process(endpoint, store, tmp_path):
    """With MLflow's own headers the service's spans are below the caller's in the one trace of both, in one store."""
    with running(tmp_path, SERVICE, environment(tmp_path, endpoint, store)) as service:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as http:
            with mlflow.start_span("caller") as caller:
                headers = get_tracing_context_headers_for_http_request() | {"x-session-id": "theirs"}
                answers = await asyncio.gather(*(http.post(f"/ask/{n}", headers=headers) for n in "ab"))
        await stop(service)
    dspy_mlflow_async.flush(TIMEOUT)

    (trace,) = settled(store, tmp_path)
    assert [caller.trace_id] * 3 == [trace.info.trace_id, *(answer.headers["x-trace-id"] for answer in answers)]
    assert ("caller", [("POST /ask/{topic}", [PREDICT])] * 2) == tree(trace)
    assert "OK" == trace.info.state.value
    assert "theirs" == root(trace).get_attribute("mlflow.trace.session")


class Asks(dspy.Module):
    """Asks an LM, and then a service, which asks its own."""

    def __init__(self, post):
        super().__init__()
        self.post = post
        self.answer = dspy.Predict("question -> answer")

    async def aforward(self, question):
        await self.answer.acall(question=question)
        return await self.post(question, get_tracing_context_headers_for_http_request())


def tokens(trace):
    """The tokens of all LM calls of a trace, by its spans, and how many calls there are."""
    calls = [span for span in trace.data.spans if span.span_type == "CHAT_MODEL"]
    return sum(span.get_attribute("mlflow.chat.tokenUsage")["total_tokens"] for span in calls), len(calls)


@pytest.mark.long
@pytest.mark.usefixtures("calling")
@pytest.mark.parametrize("last", ["the caller", "the service"])
@pytest.mark.parametrize("is_module", [True, False])
async def test_the_totals_of_a_callers_trace_are_those_of_all_its_calls(
    endpoint, waiting, store, tmp_path, last, is_module
):
    """Whoever writes last, caller or service: tokens of both count, below a module or below a span of the user's."""
    lm = dspy.LM("openai/scripted", api_base=endpoint.api_base, api_key="none", cache=False)
    with running(tmp_path, SERVICE, environment(tmp_path, endpoint, store)) as service:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as http:
            begun = []

            async def post(question, headers):
                path = "/ask/slow" if last == "the service" else f"/ask/{question[1:]}"
                begun.append(asyncio.create_task(http.post(path, headers=headers)))
                if last == "the service":
                    assert await asyncio.to_thread(waiting.asked.wait, TIMEOUT)
                else:
                    assert 200 == (await begun[0]).status_code
                    await stop(service)

            program = Asks(post)
            with dspy.context(lm=lm), contextlib.nullcontext() if is_module else mlflow.start_span("caller"):
                await (program.acall if is_module else program.aforward)(question="@own")
            assert dspy_mlflow_async.flush(TIMEOUT)
            if last == "the service":
                waiting.go.set()
                assert 200 == (await begun[0]).status_code
                await stop(service)

    (trace,) = settled(store, tmp_path)
    total, calls = tokens(trace)
    assert 2 == calls
    assert total == trace.info.token_usage["total_tokens"]
    assert len(trace.data.spans) == json.loads(trace.info.trace_metadata["mlflow.trace.sizeStats"])["num_spans"]


@pytest.mark.long
@pytest.mark.parametrize("mode", ["connection", "message"])
@pytest.mark.parametrize("how", ["abort", "close"])
async def test_websocket_clients_that_leave(endpoint, waiting, store, tmp_path, mode, how):
    """One that leaves while the service works on its answer is cancelled, whether it says so or not."""
    websockets = pytest.importorskip("websockets")
    env = environment(tmp_path, endpoint, store, WEBSOCKET=mode)
    with running(tmp_path, SERVICE, env) as service:
        url = service.url.replace("http", "ws") + "/chat"
        for last in ("@fine", "@slow"):
            async with websockets.connect(url) as socket:
                for question in ("@a", last):
                    await socket.send(question)
                    if question != "@slow":
                        await asyncio.wait_for(socket.recv(), TIMEOUT)
                        continue
                    assert await asyncio.to_thread(waiting.asked.wait, TIMEOUT)
                    await socket.close() if how == "close" else socket.transport.abort()
                    await asyncio.wait_for(socket.wait_closed(), TIMEOUT)
                    waiting.go.set()
        await stop(service)

    traces = settled(store, tmp_path)
    expected = ["cancelled", "ok"] if mode == "connection" else ["cancelled", "ok", "ok", "ok"]
    assert expected == outcomes(traces)
