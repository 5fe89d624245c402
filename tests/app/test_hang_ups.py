"""Clients that hang up, seen from between the server and the app: outcome cancelled, and nothing taken from the app."""

import asyncio
import threading

import anyio
import dspy
import pytest
from apps import Wire, asking_app, attribute, fastapi, program
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.middleware.base import BaseHTTPMiddleware

from dspy_mlflow_async.asgi import TracingMiddleware
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, EchoLM


async def test_hanging_up_before_the_answer(traces):
    """A handler that nobody tells that its client has gone: its trace is cancelled all the same."""
    wire = Wire()

    async def during(marker):
        wire.inbox.put_nowait({"type": "http.disconnect"})

    with dspy.context(lm=EchoLM(aduring=during)):
        await asking_app()(wire.scope, wire.inbox.get, wire.send)

    assert ("POST /ask/{topic}", "cancelled") == tree(traces[0], "outcome")[:2]


async def test_hanging_up_amid_a_stream(traces):
    """Starlette cancels a stream whose client has gone: all of its spans are cancelled."""
    app, wire = fastapi(), Wire("/stream", "GET")

    @app.get("/stream")
    async def stream():
        async def words():
            yield "begin"
            yield (await program.acall(question="@word")).answer

        return StreamingResponse(words())

    async def hang(marker):
        wire.inbox.put_nowait({"type": "http.disconnect"})
        await asyncio.Event().wait()

    with dspy.context(lm=EchoLM(aduring=hang)), anyio.fail_after(TIMEOUT):
        await app(wire.scope, wire.inbox.get, wire.send)

    assert {"cancelled"} == {
        span.get_attribute("outcome") for span in traces[0].data.spans if "format" not in span.name
    }


async def test_a_server_that_refuses_to_send(traces):
    """Where the server raises because the client has gone, so does ``send``, unchanged."""
    wire, error = Wire(), OSError("gone")

    async def send(message):
        raise error

    with pytest.raises(OSError, match="gone") as raised:
        await asking_app()(wire.scope, wire.inbox.get, send)

    assert error is raised.value
    assert "cancelled" == attribute(traces[0], "outcome")


async def test_what_the_app_receives_is_what_came(traces):
    """Looking for a hang-up takes nothing from an app that reads its body late."""
    wire, read = Wire(), []
    wire.inbox.get_nowait()
    for part in (b"one", b"two"):
        wire.inbox.put_nowait({"type": "http.request", "body": part, "more_body": part == b"one"})

    async def app(scope, receive, send):
        await program.acall(question="@a")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})
        read.extend([await receive(), await receive()])

    await TracingMiddleware(app)(wire.scope, wire.inbox.get, wire.send)

    assert [b"one", b"two"] == [message["body"] for message in read]
    assert "ok" == attribute(traces[0], "outcome")


@pytest.mark.parametrize("layers", [1, 2])
async def test_hanging_up_behind_other_middleware(traces, layers):
    """Middleware of Starlette's around ours takes several turns of the loop to pass a hang-up on; it is heard."""
    app, wire = asking_app(), Wire()

    async def pass_on(request, call_next):
        return await call_next(request)

    for _ in range(layers):
        app.middleware("http")(pass_on)

    async def during(marker):
        wire.inbox.put_nowait({"type": "http.disconnect"})
        for _ in range(20 * layers):
            await asyncio.sleep(0)

    with dspy.context(lm=EchoLM(aduring=during)), anyio.fail_after(TIMEOUT):
        await app(wire.scope, wire.inbox.get, wire.send)

    assert "cancelled" == attribute(traces[0], "outcome")


async def test_a_stream_that_never_waits(traces):
    """A server that finds out while it writes says so in the loop's next turns: they come before the last byte."""
    app, wire = fastapi(), Wire("/stream", "GET")
    loop = asyncio.get_running_loop()

    @app.get("/stream")
    async def stream():
        await program.acall(question="@a")

        async def words():
            for _ in range(9):
                yield "word"

        return StreamingResponse(words())

    async def send(message):
        wire.sent.append(message)
        if len(wire.sent) == 5:
            loop.call_soon(wire.inbox.put_nowait, {"type": "http.disconnect"})

    with anyio.fail_after(TIMEOUT):
        await app(wire.scope, wire.inbox.get, send)

    assert "cancelled" == attribute(traces[0], "outcome")


async def test_the_end_of_a_response_is_no_hang_up(traces):
    """Servers say that the client has gone once a response is complete, some before the last ``send`` returns."""
    wire = Wire()

    async def send(message):
        wire.sent.append(message)
        if message["type"] == "http.response.body":
            wire.inbox.put_nowait({"type": "http.disconnect"})
            for _ in range(9):
                await asyncio.sleep(0)

    await asking_app()(wire.scope, wire.inbox.get, send)

    assert "ok" == attribute(traces[0], "outcome")


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["direct", "behind-middleware"])
async def test_a_body_that_comes_while_dspy_works(traces, is_wrapped):
    """Listening for a hang-up reads ahead, and the app still receives each part, in order, and the hang-up last."""
    wire, received = Wire(), []
    wire.inbox.get_nowait()
    parts = iter((b"one", b"two", b"three"))  # they come during the first call

    async def during(marker):
        for part in parts:
            wire.inbox.put_nowait({"type": "http.request", "body": part, "more_body": part != b"three"})
            for _ in range(9):
                await asyncio.sleep(0)

    async def inner(scope, receive, send):
        await program.acall(question="@a")
        for _ in range(3):
            received.append((await receive())["body"])
            await program.acall(question="@b")
        wire.inbox.put_nowait({"type": "http.disconnect"})
        received.append((await receive())["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def pass_on(request, call_next):
        return await call_next(request)

    app = TracingMiddleware(inner)
    if is_wrapped:
        app = BaseHTTPMiddleware(app, dispatch=pass_on)
    with dspy.context(lm=EchoLM(aduring=during)), anyio.fail_after(TIMEOUT):
        await app(wire.scope, wire.inbox.get, wire.send)

    assert [b"one", b"two", b"three"] == received[:3]
    assert "http.disconnect" == received[3]
    assert "cancelled" == attribute(traces[0], "outcome")


async def test_an_app_that_asks_is_told(traces):
    """``request.is_disconnected()``, which does not wait, sees a hang-up that was heard in its place."""
    app, wire, seen = fastapi(), Wire(), []

    @app.post("/ask/a")
    async def ask(request: Request):
        seen.append(await request.is_disconnected())
        await program.acall(question="@a")
        seen.append(await request.is_disconnected())

    async def during(marker):
        wire.inbox.put_nowait({"type": "http.disconnect"})
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    with dspy.context(lm=EchoLM(aduring=during)):
        await app(wire.scope, wire.inbox.get, wire.send)

    assert [False, True] == seen


async def test_a_server_whose_receive_raises(traces):
    """An app that does not receive is not disturbed by it, and one that does gets what it would have got."""
    wire, error, caught = Wire(), RuntimeError("not now"), []

    async def receive():
        raise error

    async def app(scope, receive, send):
        await program.acall(question="@a")
        with pytest.raises(RuntimeError) as raised:
            await receive()
        caught.append(raised.value)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    await TracingMiddleware(app)(wire.scope, receive, wire.send)

    assert [error] == caught
    assert ("ok", 2) == (attribute(traces[0], "outcome"), len(wire.sent))


async def test_what_listens_ends_with_the_request(traces):
    """No task is left behind that receives for a request that is over."""
    before = asyncio.all_tasks()
    wire = Wire()

    async def during(marker):
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    with dspy.context(lm=EchoLM(aduring=during)):
        await asking_app()(wire.scope, wire.inbox.get, wire.send)
    left = asyncio.all_tasks() - before
    if left:
        await asyncio.wait(left, timeout=TIMEOUT)

    assert before == asyncio.all_tasks()
    assert "ok" == attribute(traces[0], "outcome")


async def test_a_sync_handler_in_a_thread(traces):
    """Where the trace begins in a worker thread, the loop listens all the same."""
    app, wire = fastapi(), Wire()
    loop = asyncio.get_running_loop()
    told = threading.Event()

    @app.post("/ask/a")
    def ask():
        program(question="@a")

    def during(marker):
        if not told.is_set():
            loop.call_soon_threadsafe(wire.inbox.put_nowait, {"type": "http.disconnect"})
            loop.call_soon_threadsafe(loop.call_soon, told.set)
            told.wait(TIMEOUT)

    with dspy.context(lm=EchoLM(during=during)):
        await app(wire.scope, wire.inbox.get, wire.send)

    assert "cancelled" == attribute(traces[0], "outcome")
