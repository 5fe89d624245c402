"""Inputs, outputs and previews of a request's root: what the first DSPy call was asked and the last one answered."""

import asyncio
import threading

import dspy
import mlflow
import pytest
from apps import client, fastapi
from fastapi import WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from dspy_mlflow_async import autolog, request, wrap
from dspy_mlflow_async.asgi import TracingMiddleware
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Chain, EchoLM

KEY = "sk-proj-" + "a1B2" * 12
SHOWN = ("inputs", "outputs")


def shown(trace):
    return tree(trace, *SHOWN)[1:3]


async def test_a_request_shows_the_first_question_and_the_last_answer(traces):
    """The root of a service's request has the inputs of its first DSPy call and the outputs of its last."""
    app, program = fastapi(), Chain()

    @app.post("/ask")
    async def ask():
        await program.acall(question="@first")
        return (await program.acall(question="@last")).answer

    async with client(app) as http:
        await http.post("/ask")

    (trace,) = traces
    assert ({"question": "@first"}, {"answer": "@last"}) == shown(trace)


def test_the_list_of_traces_is_not_blank(stored):
    """The store's previews, which MLflow's page lists as request and response, come from the same."""
    with request("answer"):
        Chain()(question="@a")

    (trace,) = stored()
    assert ('{"question":"@a"}', '{"answer":"@a"}') == (trace.info.request_preview, trace.info.response_preview)


@pytest.mark.parametrize("inside", [request, lambda name: wrap(Chain(), name=name)])
def test_calls_below_other_spans_count(traces, inside):
    """A call below the user's own span, or in a request inside, is the outer request's, too."""
    with request("outer"), mlflow.start_span("own"):
        if inside is request:
            with request("inner"):
                Chain()(question="@a")
        else:
            inside("inner")(question="@a")

    (trace,) = traces
    assert ({"question": "@a"}, {"answer": "@a"}) == shown(trace)


def test_what_a_call_calls_is_not_shown(traces):
    """The last call is the last of the outermost: a request inside a program has the program's own calls."""

    class Outer(dspy.Module):
        def forward(self, question):
            with request("inner"):
                dspy.Predict("question -> step")(question="@step")
            return dspy.Prediction(answer="whole")

    with request("outer"):
        Outer()(question="@a")

    (trace,) = traces
    inner = next(span for span in trace.data.spans if span.name == "inner")
    assert ({"question": "@a"}, {"answer": "whole"}) == shown(trace)
    assert ({"question": "@step"}, {"step": "@step"}) == (inner.inputs, inner.outputs)


async def test_a_stream_shows_its_prediction(traces):
    """A streamed response shows what the stream's program was asked, and its prediction."""
    app, program = fastapi(), Chain()

    @app.get("/stream")
    async def stream():
        async def parts():
            async for part in wrap(program).stream(question="@a"):
                yield getattr(part, "answer", "")

        return StreamingResponse(parts())

    async with client(app) as http:
        response = await http.get("/stream")

    (trace,) = traces
    assert "@a" == response.text
    assert ({"question": "@a"}, {"answer": "@a"}) == shown(trace)


@pytest.mark.parametrize("final", [True, False])
async def test_a_named_stream_shows_the_fields_of_its_prediction(traces, final):
    """Whether or not the prediction is part of the stream, the root has it as the program's span has it."""
    answer = wrap(Chain(), name="answer")
    async for _ in answer.stream(question="@a", include_final_prediction_in_output_stream=final):
        pass

    (trace,) = traces
    assert ("answer", {"question": "@a"}, {"answer": "@a"}) == tree(trace, *SHOWN)[:3]


def test_requests_at_once_show_their_own(traces):
    """Threads of DSPy's, in requests that are open at the same time: each root has its own calls."""
    barrier = threading.Barrier(8, timeout=TIMEOUT)

    def answer(question):
        with request("answer"):
            barrier.wait()
            return Chain()(question=question)

    dspy.Parallel(num_threads=8, disable_progress_bar=True)([(answer, {"question": f"@{n}"}) for n in range(8)])

    assert [({"question": f"@{n}"}, {"answer": f"@{n}"}) for n in range(8)] == sorted(
        map(shown, traces), key=lambda each: each[0]["question"]
    )


def test_a_request_that_fails_shows_no_answer_of_another_call(traces):
    """Where the last call raised and the request with it, the answer of the call before is not its answer."""

    def fail(marker):
        if marker == "@bad":
            raise ValueError("no")

    def run(*, caught):
        with request("answer"), dspy.context(lm=EchoLM(during=fail)):
            Chain()(question="@good")
            try:
                Chain()(question="@bad")
            except ValueError:
                if not caught:
                    raise

    run(caught=True)
    with pytest.raises(ValueError, match="no"):
        run(caught=False)

    assert [({"question": "@good"}, {"answer": "@good"}), ({"question": "@good"}, None)] == list(map(shown, traces))


def test_messages_of_a_websocket_show_their_own(traces):
    """Where each message is a trace, each shows its own question and answer, whichever task receives."""
    app = fastapi(websocket="message")

    @app.websocket("/chat")
    async def chat(socket: WebSocket):
        await socket.accept()
        for _ in range(2):
            question = await asyncio.wait_for(socket.receive_text(), TIMEOUT)
            await socket.send_text((await Chain().acall(question=question)).answer)
        await socket.close()

    with TestClient(app) as http, http.websocket_connect("/chat") as socket:
        for question in ("@a", "@b"):
            socket.send_text(question)
            socket.receive_text()

    assert [({"question": each}, {"answer": each}) for each in ("@a", "@b")] == list(map(shown, traces))


@pytest.mark.parametrize("scope", ["request", "wrap", "middleware"])
async def test_functions_say_what_is_shown(traces, scope):
    """``inputs`` and ``outputs`` are given what would be shown, and return what is."""
    options = {"inputs": lambda inputs: inputs["question"], "outputs": lambda outputs: outputs["answer"]}

    await _call(scope, **options)

    assert ("@a", "@a") == shown(traces[0])


@pytest.mark.parametrize("scope", ["request", "wrap", "middleware"])
async def test_nothing_is_shown_where_nothing_is_wanted(traces, scope):
    """With False the root has neither; the calls below it have theirs."""
    await _call(scope, inputs=False, outputs=False)

    (trace,) = traces
    assert (None, None) == shown(trace)
    assert {"question": "@a"} == trace.data.spans[1].inputs


async def _call(scope, **options):
    program = Chain()
    if scope == "request":
        with request("answer", **options):
            program(question="@a")
    elif scope == "wrap":
        await wrap(program, name="answer", **options).acall(question="@a")
    else:
        app = fastapi(**options)

        @app.get("/ask")
        async def ask():
            return (await program.acall(question="@a")).answer

        async with client(app) as http:
            await http.get("/ask")


def test_functions_see_what_is_stored_and_no_more(traces):
    """They are given masked, bounded JSON, not the program's objects, and what they return is masked as well."""
    seen = []

    def inputs(value):
        seen.append(value)
        return f"{value['question']} {KEY}"

    with request("answer", inputs=inputs):
        Chain()(question=f"@a {KEY}")

    assert [{"question": "@a [masked]"}] == seen
    assert KEY not in traces[0].to_json()
    assert "@a [masked] [masked]" == shown(traces[0])[0]


def test_a_function_that_raises_leaves_it_blank(traces, caplog):
    """The program goes on, and it is said once."""
    with request("answer", inputs=lambda inputs: inputs["no such key"]):
        assert "@a" == Chain()(question="@a").answer

    assert (None, {"answer": "@a"}) == shown(traces[0])
    assert ["KeyError"] == [record.args[1] for record in caplog.records]


def test_what_is_shown_is_bounded(captured):
    """A root has no more of a long text than the call that it comes from."""
    autolog(silent=True, max_value_bytes=500)

    with request("answer"):
        dspy.Predict("question -> answer")(question="x" * 10_000 + "@a")

    root, predict = captured[0].data.spans[:2]
    assert root.inputs == predict.inputs
    assert 600 > len(root.get_attribute("mlflow.spanInputs")["question"])


def test_what_the_user_has_said_stays(stored):
    """A preview that the program itself gives the trace is kept."""
    with request("answer"):
        Chain()(question="@a")
        mlflow.update_current_trace(request_preview="my own")

    (trace,) = stored()
    assert ("my own", '{"answer":"@a"}') == (trace.info.request_preview, trace.info.response_preview)


def test_a_call_of_an_evaluation_is_not_the_requests(traces):
    """What an evaluation calls inside a request makes traces of its own, and is not shown on the request's."""
    devset = [dspy.Example(question="@e", answer="@e").with_inputs("question")]
    with request("answer"):
        Chain()(question="@a")
        dspy.Evaluate(devset=devset, metric=lambda *_: 1, display_progress=False)(Chain())

    root = next(trace for trace in traces if tree(trace)[0] == "answer")
    assert ({"question": "@a"}, {"answer": "@a"}) == shown(root)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda **o: request("answer", **o), TypeError, "inputs must be True, False or a function of what"),
        (lambda **o: wrap(Chain(), name="a", **o), TypeError, "inputs must be True, False or a function of what"),
        (
            lambda **o: TracingMiddleware(lambda *_: None, **o),
            TypeError,
            "inputs must be True, False or a function of what",
        ),
    ],
)
def test_what_is_neither_is_refused(make, error, sentence):
    """A text in place of a function is refused where it is written."""
    with pytest.raises(error, match=sentence):
        make(inputs="question")


@pytest.mark.parametrize("make", [request, lambda **o: wrap(Chain(), **o)])
def test_what_no_span_would_show_is_refused(make):
    """Without a name there is no span around the calls, so nothing could show what a function says."""
    with pytest.raises(ValueError, match="outputs= is shown on the span that name= makes: give a name, too"):
        make(outputs=lambda outputs: outputs)
