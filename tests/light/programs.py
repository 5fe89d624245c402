"""Programs that the tests run, each in a process of its own, by name: it prints what it has found as JSON."""

import asyncio
import json
import os
import sys
from types import SimpleNamespace

import dspy
import mlflow

import dspy_mlflow_async as ours
from dspy_mlflow_async import testing


class Echo(dspy.BaseLM):
    forward_contract = "legacy"

    def forward(self, prompt=None, messages=None, **kwargs):
        message = SimpleNamespace(content="[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]", tool_calls=None)
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        choice = SimpleNamespace(message=message, finish_reason="stop")
        return SimpleNamespace(choices=[choice], usage=usage, model="m")

    async def aforward(self, *args, **kwargs):
        return self.forward()


class Asks(dspy.Module):
    def __init__(self):
        super().__init__()
        self.ask = dspy.Predict("question -> answer")

    async def aforward(self, question):
        return (await self.ask.acall(question=question)).answer

    def forward(self, question):
        pairs = [(self.ask, {"question": question})] * 3
        return [each.answer for each in dspy.Parallel(num_threads=3, disable_progress_bar=True)(pairs)]


def stored():
    """The traces that this process has stored: those of the server that bear its name."""
    everything = mlflow.search_traces(locations=[_experiment()], return_type="list")
    return [trace for trace in everything if trace.info.tags.get("process") == str(os.getpid())]


def _experiment():
    from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME
    from mlflow.tracking import fluent

    from dspy_mlflow_async.seams.mlflow_client import MlflowClient

    name = MLFLOW_EXPERIMENT_NAME.get()
    if fluent._active_experiment_id:
        return fluent._active_experiment_id
    return MlflowClient().get_experiment_by_name(name).experiment_id if name else "0"


def names(trace):
    root = next(span for span in trace.data.spans if span.parent_id is None)
    return [root.name, [span.name for span in trace.data.spans if span.parent_id == root.span_id]]


def traces():
    program = ours.wrap(Asks(), session_id="light")
    ours.autolog()

    async def gather():
        return await asyncio.gather(*(program.acall(question=str(n)) for n in range(3)))

    answers = asyncio.run(gather())
    answers += Asks()(question="in threads")
    with ours.request("outer", session_id="light"):
        answers.append(dspy.Predict("question -> answer")(question="5").answer)
    is_stored = ours.flush(60)
    stats = ours.stats()
    found = [names(trace) for trace in stored()]
    expected = [["Asks.forward", ["Predict.forward"]]] * 3
    expected += [["Asks.forward", ["Predict.forward"] * 3], ["outer", ["Predict.forward"]]]
    return {
        "ours": {
            "answers": answers,
            "is_stored": is_stored,
            "stored": stats.stored,
            "errors": stats.internal_errors,
            "lost": stats.dropped + stats.dead,
        },
        "names": sorted(found),
        "expected": sorted(expected),
    }


def capture():
    ours.autolog()
    with testing.capture_traces() as captured:
        dspy.Predict("question -> answer")(question="6")
    return [names(trace) for trace in captured]


def evaluate():
    ours.autolog()
    devset = [dspy.Example(question=str(n), answer="yes").with_inputs("question") for n in range(3)]
    score = dspy.Evaluate(devset=devset, metric=lambda example, prediction: float(example.answer == prediction.answer))(
        dspy.Predict("question -> answer")
    )
    ours.flush(60)
    return {"score": score.score, "feedback": [trace.info.assessments[0].value for trace in stored()]}


def asgi():
    from dspy_mlflow_async.asgi import TracingMiddleware

    async def app(scope, receive, send):
        await dspy.Predict("question -> answer").acall(question="?")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive():
        return messages.pop() if messages else await asyncio.Future()

    async def send(message):
        pass

    ours.autolog()
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"", "scheme": "http"}
    asyncio.run(TracingMiddleware(app)(scope, receive, send))
    ours.flush(60)
    return [names(trace)[0] for trace in stored()]


def leave():
    ours.autolog(exit_timeout=0.1)
    for n in range(3):
        dspy.Predict("question -> answer")(question=str(n))
    ours.flush(5)
    stats = ours.stats()
    return [stats.started, stats.spooled + stats.waiting, stats.internal_errors + stats.dropped + stats.dead]


def settings(call, setting):
    if call == "autolog":
        ours.autolog(**{setting: True})
    else:
        mlflow.set_experiment("of MLflow's own exporter")  # which cannot do without one here
        dspy.configure(callbacks=[ours.TracingCallback(**{setting: True})])
    dspy.Evaluate(devset=[dspy.Example(question="?").with_inputs("question")], metric=lambda example, prediction: 1.0)(
        dspy.Predict("question -> answer")
    )
    ours.flush(60)
    mlflow.flush_trace_async_logging()
    return [len(stored()), ours.stats().internal_errors]


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    dspy.configure(lm=Echo("echo/one", "chat", 0.0, 100, cache=False))
    if name != "capture":
        mlflow.set_tracking_uri(rest.pop(0))
    with mlflow.tracing.context(tags={"process": str(os.getpid())}):
        found = globals()[name](*rest)
    print(json.dumps(found))  # noqa: T201
