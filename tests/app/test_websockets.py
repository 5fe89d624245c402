"""WebSockets: a trace for each connection, or for each message."""

import asyncio

from apps import attribute, fastapi, meta, program
from fastapi import WebSocket

from clean import assert_context_is_clean
from dspy_mlflow_async.testing import tree
from echo import chain_tree


def chatting_app(**options):
    app = fastapi(**options)

    @app.websocket("/chat/{room}")
    async def chat(socket: WebSocket, room: str):
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_text((await program.acall(question=text)).answer)

    return app


async def converse(app, *texts, code=1000):
    inbox, sent = asyncio.Queue(), []
    inbox.put_nowait({"type": "websocket.connect"})
    for text in texts:
        inbox.put_nowait({"type": "websocket.receive", "text": text})
    inbox.put_nowait({"type": "websocket.disconnect", "code": code})
    scope = {
        "type": "websocket", "asgi": {"version": "3.0"}, "path": "/chat/lobby", "root_path": "", "query_string": b"",
        "headers": [(b"x-session-id", b"s-1")], "subprotocols": [],
    }  # fmt: skip

    async def send(message):
        sent.append(message)

    await app(scope, inbox.get, send)
    assert_context_is_clean()
    return sent


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
