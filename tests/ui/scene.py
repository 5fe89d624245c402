"""Fills a store with what the pages are looked at for: a service, evaluations with labels, a compile.

Usage: ``python scene.py ours|mlflow``, with ``MLFLOW_TRACKING_URI``; prints the ids of experiment and runs as JSON.
"""

import asyncio
import json
import re
import sys

import dspy
import httpx
import mlflow
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

import dspy_mlflow_async
from dspy_mlflow_async.asgi import TracingMiddleware
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint, text_of

CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo", "Cuba": "Havana",
    "Egypt": "Cairo", "Chile": "Santiago", "Spain": "Madrid", "Ghana": "Accra", "Italy": "Rome", "Nepal": "Kathmandu",
}  # fmt: skip
# What a small model gets wrong unless it thinks first.
WRONG = {"Kenya": "Mombasa", "Peru": "Cusco", "Chile": "Valparaíso"}
BETTER = "Name the capital city, the seat of government.\nAnswer with one word."
_FIELD = re.compile(r"\[\[ ## (\w+) ## \]\]")


def script(body):
    """The language model: knows capitals, and proposes better instructions when it is asked for some."""
    text = text_of(body)
    question = text.rpartition("[[ ## question ## ]]")[2]
    country = next((name for name in CAPITALS if name in question), "France")
    if "broken" in question:
        return {"content": "The model is overloaded.", "status": 400}
    fields = dict.fromkeys(_FIELD.findall(text.rpartition("Respond with")[2]))
    thinks = "reasoning" in fields or "seat of government" in text
    values = {
        "answer": CAPITALS[country] if thinks else WRONG.get(country, CAPITALS[country]),
        "reasoning": f"The seat of government of {country} is {CAPITALS[country]}.",
        "proposed_instruction": BETTER,
        "proposed_prefix_for_output_field": "Answer:",
        "draft": f"The question is about {country}.",
    }
    return "\n\n".join([f"[[ ## {name} ## ]]\n{values.get(name, '')}" for name in fields])


class Desk(dspy.Module):
    """Makes two drafts at once in DSPy's threads, and answers: MLflow's own tracer makes three traces of it."""

    def __init__(self):
        super().__init__()
        self.draft = dspy.Predict("question -> draft")
        self.answer = dspy.ChainOfThought("question, draft -> answer")

    async def aforward(self, question):
        both = dspy.Parallel(num_threads=2, disable_progress_bar=True)
        drafts = await asyncio.to_thread(both, [(self.draft, {"question": question})] * 2)
        return await self.answer.acall(question=question, draft=drafts[0].draft)


class Question(BaseModel):
    """What clients send."""

    question: str


def service(*, with_middleware):
    app, desk = FastAPI(), Desk()
    if with_middleware:
        app.add_middleware(TracingMiddleware, session_id="x-session-id", user="x-user")

    @app.post("/ask")
    async def ask(body: Question):
        try:
            return {"answer": (await desk.acall(question=body.question)).answer}
        except Exception as error:
            raise HTTPException(502, "no answer") from error

    return app


async def serve(*, with_middleware):
    """Three sessions of three questions each, all sessions at once, and a question that the model fails at."""
    transport = httpx.ASGITransport(app=service(with_middleware=with_middleware))

    async def session(number, countries):
        headers = {"x-session-id": f"chat-{number}", "x-user": ("ada", "grace", "alan")[number]}
        for country in countries:
            question = f"What is the capital of {country}?"
            await client.post("/ask", json={"question": question}, headers=headers)

    async with httpx.AsyncClient(transport=transport, base_url="http://desk", timeout=60) as client:
        names = list(CAPITALS)
        await asyncio.gather(*(session(number, names[3 * number : 3 * number + 3]) for number in range(3)))
        await client.post("/ask", json={"question": "Is it broken?"}, headers={"x-session-id": "chat-2"})


def judged(example, prediction, trace=None):
    """Whether it is the capital, and why not."""
    is_right = example.answer == prediction.answer
    said = "It is." if is_right else f"{prediction.answer} is a city of the country, but not its capital."
    return dspy.Prediction(score=float(is_right), feedback=said)


def right(example, prediction, trace=None):
    return example.answer == prediction.answer


def devset():
    return [
        dspy.Example(question=f"What is the capital of {country}?", answer=city).with_inputs("question")
        for country, city in CAPITALS.items()
    ]


def ours():
    dspy_mlflow_async.autolog(log_evals=True, log_compiles=True, silent=True)
    found = {"experiment": mlflow.set_experiment("Capitals").experiment_id}
    signature = dspy.Signature("question -> answer", "Answer the question.")
    comparison = dspy_mlflow_async.evaluate_all(
        {"direct": dspy.Predict(signature), "reasoned": dspy.ChainOfThought(signature)},
        devset=devset(), metric=judged, display_progress=False,
    )  # fmt: skip
    found |= {"comparison": comparison.run_id, "cases": {name: comparison[name].run_id for name in comparison}}
    optimizer = dspy.COPRO(metric=right, breadth=3, depth=2)
    optimizer.compile(dspy.Predict(signature), trainset=devset(), eval_kwargs={"num_threads": 2})
    asyncio.run(serve(with_middleware=True))  # last, so that its requests stand first in the list of traces
    assert dspy_mlflow_async.flush(60)
    found["compile"] = next(
        run.info.run_id
        for run in mlflow.search_runs([found["experiment"]], output_format="list")
        if "dspy.optimizer" in run.data.tags
    )
    return found


def theirs():
    mlflow.dspy.autolog(log_evals=True, silent=True)
    found = {"experiment": mlflow.set_experiment("Capitals, by mlflow.dspy.autolog").experiment_id}
    evaluate = dspy.Evaluate(devset=devset(), metric=right, num_threads=4, display_progress=False)
    evaluate(dspy.Predict("question -> answer"), callback_metadata={"metric_key": "direct"})
    asyncio.run(serve(with_middleware=False))
    mlflow.flush_trace_async_logging()
    return found


if __name__ == "__main__":
    with LocalEndpoint(script, latency=0.05) as endpoint:
        dspy.configure(lm=dspy.LM("openai/gpt-4o-mini", api_base=endpoint.api_base, api_key="none", cache=False))
        sys.stdout.write(json.dumps(ours() if sys.argv[1] == "ours" else theirs()))
