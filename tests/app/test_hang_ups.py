"""Clients that hang up, seen from between the server and the app: outcome cancelled, and nothing taken from the app."""

import asyncio

import anyio
import dspy
import pytest
from apps import Wire, asking_app, attribute, fastapi, program
from fastapi.responses import StreamingResponse

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
