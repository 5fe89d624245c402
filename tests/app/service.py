"""A service with what the example has not: large streams, a WebSocket, and a signal handler of its own."""

import asyncio
import contextlib
import os
import signal

import dspy
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse

from dspy_mlflow_async import autolog
from dspy_mlflow_async.asgi import TracingMiddleware

# More than the sockets of two processes on one machine hold: a server that has written all of it has had a reader.
PARTS, PART = 640, "x" * 100_000

autolog()
dspy.configure(lm=dspy.LM("openai/scripted", api_base=os.environ["LM_API_BASE"], cache=False))
answer = dspy.Predict("question -> answer")


@contextlib.asynccontextmanager
async def lifespan(app):
    before = signal.getsignal(signal.SIGTERM)

    def told_to_stop(number, frame):
        print("the service was told to stop", flush=True)  # noqa: T201
        before(number, frame)

    signal.signal(signal.SIGTERM, told_to_stop)
    yield
    print("the service has stopped", flush=True)  # noqa: T201


app = FastAPI(lifespan=lifespan)
app.add_middleware(
    TracingMiddleware,
    session_id="x-session-id",
    websocket=os.environ.get("WEBSOCKET", "connection"),
    traceparent=["127.0.0.0/8"],
)


@app.get("/health")
async def health():
    return "ok"


@app.post("/ask/{topic}")
async def ask(topic: str):
    return (await answer.acall(question=f"@{topic}")).answer


@app.get("/big")
async def big():
    await answer.acall(question="@big")

    async def parts():
        for _ in range(PARTS):
            yield PART

    return StreamingResponse(parts())


@app.websocket("/chat")
async def chat(socket: WebSocket):
    await socket.accept()
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            question = await asyncio.wait_for(socket.receive_text(), 60)
            await socket.send_text((await answer.acall(question=question)).answer)
