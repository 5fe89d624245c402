"""A service over DSPy programs. Each request is one MLflow trace, with its session, user, route and status.

Run it with ``uvicorn fastapi_app:app --app-dir examples``, or under gunicorn with any number of workers. The LM is
``LM_MODEL`` at ``LM_API_BASE``, by default OpenAI's; traces go to ``MLFLOW_TRACKING_URI``.
"""

import os
from collections.abc import AsyncIterator

import dspy
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

import dspy_mlflow_async as dma
from dspy_mlflow_async.asgi import TracingMiddleware

dma.autolog()
dspy.configure(lm=dspy.LM(os.environ.get("LM_MODEL", "openai/gpt-4o-mini"), api_base=os.environ.get("LM_API_BASE")))

PRICES = {"apple": 30, "pear": 45}


def price(item: str) -> int:
    """The price of an item in cents."""
    return PRICES[item]  # an unknown item fails, and the agent is told


answer = dma.wrap(dspy.ChainOfThought("question -> answer"))
agent = dspy.ReAct("question -> answer", tools=[price], max_iters=3)

app = FastAPI()
app.add_middleware(TracingMiddleware, session_id="x-session-id", user="x-user", tags={"service": "shop"})


class Question(BaseModel):
    """What clients send."""

    question: str


@app.post("/ask")
async def ask(body: Question) -> dict[str, object]:
    """Answer, and say what it took."""
    with dma.request() as did:
        prediction = await answer.acall(question=body.question)
    return {"answer": prediction.answer, "tokens": did.usage.get("total_tokens", 0), "lm_calls": len(did.lm_calls)}


@app.post("/agent")
async def ask_agent(body: Question) -> dict[str, object]:
    """Let the agent look up prices."""
    prediction = await agent.acall(question=body.question)
    return {"answer": prediction.answer}


@app.post("/stream")
async def stream(body: Question) -> StreamingResponse:
    """Answer word by word; a client may hang up at any time."""

    async def words() -> AsyncIterator[str]:
        listener = dspy.streaming.StreamListener(signature_field_name="answer")
        async for part in answer.stream(question=body.question, stream_listeners=[listener]):
            if isinstance(part, dspy.streaming.StreamResponse):
                yield f"data: {part.chunk}\n\n"

    return StreamingResponse(words(), media_type="text/event-stream")


@app.get("/health")
def health() -> str:
    """Calls no DSPy, and makes no trace."""
    return "ok"
