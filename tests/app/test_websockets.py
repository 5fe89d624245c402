"""WebSockets: a trace for each connection, or for each message."""

import asyncio
import contextlib

import anyio
import dspy
import pytest
from apps import attribute, fastapi, meta, program
from fastapi import WebSocket, WebSocketDisconnect

from clean import assert_context_is_clean
from dspy_mlflow_async.asgi import TracingMiddleware
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, EchoLM, chain_tree


def chatting_app(**options):
    app = fastapi(**options)

    @app.websocket("/chat/{room}")
    async def chat(socket: WebSocket, room: str):
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_text((await program.acall(question=text)).answer)

    return app


class Socket:
    """A server's side of one connection, by hand."""

    def __init__(self, *texts, code=1000, headers=()):
        self.scope = {
            "type": "websocket", "asgi": {"version": "3.0"}, "path": "/chat/lobby", "root_path": "",
            "query_string": b"", "headers": [(b"x-session-id", b"s-1"), *headers], "subprotocols": [],
        }  # fmt: skip
        self.inbox, self.sent, self.is_gone = asyncio.Queue(), [], False
        self.inbox.put_nowait({"type": "websocket.connect"})
        for text in texts:
            self.say(text)
        if code is not None:
            self.leave(code)

    def say(self, text):
        self.inbox.put_nowait({"type": "websocket.receive", "text": text})

    def leave(self, code):
        self.inbox.put_nowait({"type": "websocket.disconnect", "code": code})

    async def send(self, message):
        if self.is_gone:
            raise OSError("gone")  # as uvicorn
        self.sent.append(message)

    async def run(self, app):
        with anyio.fail_after(TIMEOUT):
            await app(self.scope, self.inbox.get, self.send)
        assert_context_is_clean()
        return self.sent


async def converse(app, *texts, code=1000):
    return await Socket(*texts, code=code).run(app)


async def test_a_connection_is_a_trace(traces):
    """By default all of a connection's calls are one trace, whose id the handshake tells."""
    sent = await converse(chatting_app(session_id="x-session-id"), "@a", "@b")

    (trace,) = traces
    assert ("WEBSOCKET /chat/{room}", [chain_tree(), chain_tree()]) == tree(trace)
    assert ["@a", "@b"] == [message["text"] for message in sent[1:]]
    assert ("s-1", "ok") == (meta(trace, "session"), attribute(trace, "outcome"))
    assert (b"x-trace-id", trace.info.trace_id.encode()) in sent[0]["headers"]


async def test_a_message_is_a_trace(traces):
    """With ``websocket="message"`` each message and what is done for it is a trace, with the connection's session."""
    await converse(chatting_app(session_id="x-session-id", websocket="message"), "@a", "@b")

    assert [("WEBSOCKET /chat/{room}", [chain_tree()])] * 2 == [tree(trace) for trace in traces]
    assert ["s-1", "s-1"] == [meta(trace, "session") for trace in traces]


async def test_a_connection_that_breaks(traces):
    """An abnormal closure cancels, and a connection without DSPy is no trace."""
    await converse(chatting_app(), "@a", code=1006)
    await converse(chatting_app())

    assert ["cancelled"] == [attribute(trace, "outcome") for trace in traces]


# --- clients that hang up while the handler works -----------------------------------------------------------------


async def answer_each(socket):
    while True:
        await socket.send_text((await program.acall(question=await socket.receive_text())).answer)


async def answer_each_and_catch(socket):
    with contextlib.suppress(WebSocketDisconnect):
        await answer_each(socket)


async def answer_iterated(socket):
    async for text in socket.iter_text():
        await socket.send_text((await program.acall(question=text)).answer)


async def answer_and_go_on(socket):
    for _ in range(2):
        text = await socket.receive_text()
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await socket.send_text((await program.acall(question=text)).answer)


@pytest.mark.parametrize("code", [1000, 1005, 1006], ids=["closes", "no-code", "aborts"])
@pytest.mark.parametrize("mode", ["connection", "message"])
@pytest.mark.parametrize("handler", [answer_each, answer_each_and_catch, answer_iterated, answer_and_go_on])
async def test_hanging_up_while_the_handler_works(traces, handler, mode, code):
    """Where an answer finds nobody, the trace is cancelled: whatever code the client gave, whoever catches what."""
    app, socket = fastapi(websocket=mode), Socket("@a", "@gone", code=None)

    @app.websocket("/chat/{room}")
    async def chat(websocket: WebSocket, room: str):
        await websocket.accept()
        await handler(websocket)

    async def during(marker):
        if marker == "@gone":
            socket.is_gone = True
            socket.leave(code)

    with dspy.context(lm=EchoLM(aduring=during)), contextlib.suppress(WebSocketDisconnect):
        await socket.run(app)

    expected = ["cancelled"] if mode == "connection" else ["ok", "cancelled"]
    assert expected == [attribute(trace, "outcome") for trace in traces]


async def test_a_handler_that_closes(traces):
    """The code that the app itself gives is no client's, and what it sends to one that has left is its own affair."""
    app, socket = fastapi(), Socket("@a", code=None)

    @app.websocket("/chat/{room}")
    async def chat(websocket: WebSocket, room: str):
        await websocket.accept()
        await program.acall(question=await websocket.receive_text())
        await websocket.close(1011)
        socket.leave(1011)
        assert "websocket.disconnect" == (await websocket.receive())["type"]

    await socket.run(app)

    assert "ok" == attribute(traces[0], "outcome")


@pytest.mark.parametrize("mode", ["connection", "message"])
async def test_a_handler_that_raises(traces, mode):
    """The exception passes unchanged, and is on the trace of what the handler was at."""
    app, error = fastapi(websocket=mode), RuntimeError("broken")

    @app.websocket("/chat/{room}")
    async def chat(websocket: WebSocket, room: str):
        await websocket.accept()
        for _ in range(2):
            await program.acall(question=await websocket.receive_text())
        raise error

    with pytest.raises(RuntimeError) as raised:
        await converse(app, "@a", "@b")
    assert_context_is_clean()

    assert error is raised.value
    expected = ["error"] if mode == "connection" else ["ok", "error"]
    assert expected == [attribute(trace, "outcome") for trace in traces]
    assert "RuntimeError: broken" in traces[-1].data.spans[0].status.description


# --- a message, whoever receives it -------------------------------------------------------------------------------


async def receive_elsewhere(websocket):
    """As ``asyncio.wait_for`` does before Python 3.12."""
    return await asyncio.create_task(websocket.receive_text())


async def receive_here(websocket):
    return await websocket.receive_text()


ONE = ("WEBSOCKET /chat/{room}", [chain_tree()])
TWO = ("WEBSOCKET /chat/{room}", [chain_tree(), chain_tree()])


@pytest.mark.parametrize(
    "receivers",
    [
        [receive_elsewhere] * 3,
        [receive_here, receive_elsewhere, receive_elsewhere],
        [receive_elsewhere, receive_here] * 2,
    ],
    ids=["elsewhere", "first-here", "in-turns"],
)
@pytest.mark.parametrize("how", ["task", "tasks", "thread"])
async def test_a_message_that_another_task_receives(traces, receivers, how):
    """What the handler, its tasks and its threads do for a message is one trace, whichever task received it."""
    app = fastapi(websocket="message", session_id="x-session-id")

    @app.websocket("/chat/{room}")
    async def chat(websocket: WebSocket, room: str):
        await websocket.accept()
        for receive in receivers[:3]:
            text = await receive(websocket)
            if how == "task":
                await program.acall(question=text)
                await program.acall(question=text)
            elif how == "tasks":
                await asyncio.gather(*(program.acall(question=text) for _ in range(2)))
            else:
                await asyncio.to_thread(program, question=text)
                await asyncio.to_thread(program, question=text)
            await websocket.send_text(text)

    await converse(app, "@a", "@b", "@c")

    assert [TWO] * 3 == [tree(trace) for trace in traces]
    assert ["s-1"] * 3 == [meta(trace, "session") for trace in traces]


async def test_what_comes_before_the_first_message(traces):
    """It is a trace too, and told by the handshake where it has begun by then."""
    app = fastapi(websocket="message", session_id="x-session-id")

    @app.websocket("/chat/{room}")
    async def chat(websocket: WebSocket, room: str):
        await program.acall(question="@before")
        await websocket.accept()
        await program.acall(question="@hello")
        async for text in websocket.iter_text():
            await program.acall(question=text)

    sent = await converse(app, "@a")

    assert [TWO, ONE] == [tree(trace) for trace in traces]
    assert (b"x-trace-id", traces[0].info.trace_id.encode()) in sent[0]["headers"]
    assert ["s-1", "s-1"] == [meta(trace, "session") for trace in traces]


@pytest.mark.parametrize("receive", [receive_here, receive_elsewhere])
async def test_what_comes_between_two_messages(traces, receive):
    """What runs while the next message is waited for belongs to none; it makes traces of its own, with the session."""
    app, socket = fastapi(websocket="message", session_id="x-session-id"), Socket("@a", code=None)
    asked = asyncio.Event()

    async def push():
        await asyncio.wait_for(asked.wait(), TIMEOUT)
        await program.acall(question="@pushed")
        socket.say("@b")

    async def server_receive():
        if socket.inbox.empty():
            asked.set()
        return await socket.inbox.get()

    @app.websocket("/chat/{room}")
    async def chat(websocket: WebSocket, room: str):
        await websocket.accept()
        await program.acall(question=await receive(websocket))
        pushing = asyncio.create_task(push())
        await program.acall(question=await receive(websocket))
        await pushing

    with anyio.fail_after(TIMEOUT):
        await app(socket.scope, server_receive, socket.send)

    assert [ONE, chain_tree(), ONE] == [tree(trace) for trace in traces]
    assert ["s-1"] * 3 == [meta(trace, "session") for trace in traces]


async def test_a_task_that_outlives_its_message(traces):
    """It is not taken for the next one's."""
    app, go = fastapi(websocket="message"), asyncio.Event()

    async def later():
        await asyncio.wait_for(go.wait(), TIMEOUT)
        await program.acall(question="@later")

    @app.websocket("/chat/{room}")
    async def chat(websocket: WebSocket, room: str):
        await websocket.accept()
        await program.acall(question=await websocket.receive_text())
        task = asyncio.create_task(later())
        text = await websocket.receive_text()
        go.set()
        await task
        await program.acall(question=text)

    await converse(app, "@a", "@b")

    assert [ONE, chain_tree(), ONE] == [tree(trace) for trace in traces]


async def test_messages_in_middleware_of_messages(traces):
    """Two of the middleware, one in the other, are two spans for each message."""
    app = TracingMiddleware(chatting_app(websocket="message"), websocket="message")

    await converse(app, "@a", "@b")

    assert [("WEBSOCKET /chat/{room}", [ONE])] * 2 == [tree(trace) for trace in traces]


async def test_messages_of_a_callers_trace(stored):
    """With ``traceparent`` each message is a span of the caller's trace, with the connection's session."""
    parent = (b"traceparent", f"00-{'6' * 32}-b7ad6b7169203331-01".encode())

    await Socket("@a", "@b", headers=[parent]).run(
        chatting_app(websocket="message", session_id="x-session-id", traceparent=True)
    )

    (trace,) = stored()
    roots = [span for span in trace.data.spans if span.name == "WEBSOCKET /chat/{room}"]
    assert ["s-1", "s-1"] == [span.get_attribute("mlflow.trace.session") for span in roots]
    assert 2 == sum(span.name == "Chain.forward" for span in trace.data.spans)


async def test_sampling_of_messages(traces, sampled):
    """A ratio decides on each message."""
    await converse(chatting_app(websocket="message", sample=0.3), *["@a"] * 40)

    assert 40 == len(traces) + sampled()
    assert 0 < len(traces) < 40
