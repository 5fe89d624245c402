"""A wrapped program: the same call forms, each call a request of its own."""

import asyncio
import copy
import functools
import logging
import re
import threading

import anyio
import cloudpickle
import dspy
import mlflow
import pytest

import dspy_mlflow_async
from dspy_mlflow_async import request, wrap
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Chain, EchoLM, chain_tree, predict_tree


class SyncOnly(dspy.Module):
    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict("question -> answer")

    def forward(self, question, chat=None):
        return self.predict(question=question)


def session(trace):
    return trace.info.trace_metadata.get("mlflow.trace.session")


def test_a_call_is_a_request(traces):
    """A call has its values, from its own arguments, and the result and the tree of the bare program."""
    program = SyncOnly()
    wrapped = wrap(
        program, session_id=lambda question, chat: chat, user="ada", tags={"q": lambda question, chat: question}
    )

    prediction = wrapped(question="@a", chat="c-1")

    assert "@a" == prediction.answer
    assert ("SyncOnly.forward", [predict_tree()]) == tree(traces[0])
    assert ("c-1", "@a") == (session(traces[0]), traces[0].info.tags["q"])


async def test_sync_programs_run_in_threads(traces):
    """A hundred calls of a sync program wait at once without blocking the loop, each in its own scope."""
    everybody_in = threading.Barrier(101, timeout=TIMEOUT)
    wrapped = wrap(SyncOnly(), session_id=lambda question: question)

    async with anyio.create_task_group() as tasks:
        for number in range(100):
            with dspy.context(lm=EchoLM(during=lambda marker: everybody_in.wait())):
                tasks.start_soon(lambda n=number: wrapped.acall(question=f"@{n}"))
        await asyncio.to_thread(everybody_in.wait)

    assert {f"@{n}" for n in range(100)} == {session(trace) for trace in traces}
    assert all(session(trace) == trace.data.spans[0].inputs["question"] for trace in traces)


async def test_async_programs_run_in_the_loop(traces):
    """A program with an async form is awaited in the task itself."""
    seen = []

    async def note(marker):
        seen.append(threading.current_thread() is threading.main_thread())

    with dspy.context(lm=EchoLM(aduring=note)):
        await wrap(Chain(), session_id="s").acall(question="@a")

    assert [True, True] == seen
    assert (chain_tree(), "s") == (tree(traces[0]), session(traces[0]))


def test_batch_gives_each_example_a_request(traces):
    """Each example of a batch has the values of its own arguments."""
    wrapped = wrap(SyncOnly(), session_id=lambda question: f"s-{question}")
    examples = [dspy.Example(question=f"@{n}").with_inputs("question") for n in range(8)]

    results = wrapped.batch(examples, num_threads=4, disable_progress_bar=True)

    assert [f"@{n}" for n in range(8)] == [result.answer for result in results]
    assert {f"s-@{n}" for n in range(8)} == {session(trace) for trace in traces}


def test_batch_of_the_program_itself(traces):
    """A program with a ``batch`` of its own keeps it; the batch is one request."""

    class Own(SyncOnly):
        def batch(self, examples, suffix):
            return [self(question=example + suffix) for example in examples]

    results = wrap(Own(), session_id="s").batch(["@a", "@b"], suffix="!")

    assert ["@a", "@b"] == [result.answer for result in results]
    assert ["s", "s"] == [session(trace) for trace in traces]


def test_a_name_is_a_span(traces):
    """With a name, a call is below a span of it that shows arguments and result."""
    wrap(SyncOnly(), name="answer")(question="@a")

    root = traces[0].data.spans[0]
    assert ("answer", [("SyncOnly.forward", [predict_tree()])]) == tree(traces[0])
    assert ({"question": "@a"}, {"answer": "@a"}) == (root.inputs, root.outputs)


def test_the_bound_holds_for_a_request(captured):
    """Inputs and outputs of its span; media, which no request stores beside the trace, are named in a few words."""
    dspy_mlflow_async.autolog(silent=True, max_value_bytes=1000)
    picture = "data:image/png;base64," + "A" * 5000

    def ask(question, picture):
        dspy.Predict("question -> answer")(question="@a")
        return picture

    assert picture == wrap(ask, name="ask")(question="\0" * 5000, picture=picture)

    root = next(span for span in captured[0].data.spans if span.parent_id is None)
    attributes = root.to_dict()["attributes"]
    assert 900 <= len(attributes["mlflow.spanInputs"].encode()) <= 1064
    assert re.fullmatch(r'"\[image/png, 3750 bytes, sha256 [0-9a-f]{16}\]"', attributes["mlflow.spanOutputs"])


def test_copies_of_programs_with_copying_of_their_own():
    """A wrapped program is copied and pickled as what it is, whatever its program says of itself."""

    class Own:
        def __call__(self, question):
            return question

        def __deepcopy__(self, memo):
            return Own()

        def __copy__(self):
            return Own()

        def __getstate__(self):
            return {"own": 1}

        def __setstate__(self, state):
            self.__dict__.update(state)

    wrapped = wrap(Own())
    for copied in (copy.copy(wrapped), copy.deepcopy(wrapped), cloudpickle.loads(cloudpickle.dumps(wrapped))):
        assert repr(copied).startswith("wrap(")
        assert "@a" == copied(question="@a")


def test_everything_else_is_the_programs(traces):
    """Attributes are read from and written to the program; copies are wrapped copies."""
    program = SyncOnly()
    wrapped = wrap(program, session_id="s")
    lm = EchoLM()

    wrapped.set_lm(lm)
    wrapped.note = 5
    copied = copy.deepcopy(wrapped)
    copied(question="@a")

    assert (lm, 5) == (program.predict.lm, program.note)
    assert [name for name, _ in wrapped.named_predictors()] == ["predict"]
    assert copied.predict is not program.predict
    assert "s" == session(traces[0])


def test_errors_pass_unchanged(traces):
    """What the program raises comes out of each call form as it is."""
    error = ValueError("no")

    def fail(marker):
        raise error

    with dspy.context(lm=EchoLM(during=fail)), pytest.raises(ValueError, match="no") as raised:
        wrap(SyncOnly(), name="answer")(question="@a")

    assert error is raised.value
    assert ("answer", "error") == tree(traces[0], "outcome")[:2]


def test_functions_can_be_wrapped(traces):
    """A plain function is a program too, sync or async."""
    predict = dspy.Predict("question -> answer")

    async def answer(question):
        return (await predict.acall(question=question)).answer

    assert "@a" == wrap(lambda question: predict(question=question).answer, session_id="s")(question="@a")
    assert "@b" == asyncio.run(wrap(answer, session_id="t")(question="@b"))
    assert ["s", "t"] == [session(trace) for trace in traces]


class AsyncCall:
    async def __call__(self, question):
        return await Chain().acall(question=question)


async def ask(question):
    return await Chain().acall(question=question)


@pytest.mark.parametrize(
    "function",
    [AsyncCall(), functools.partial(AsyncCall()), functools.partial(ask), lambda question: ask(question)],  # noqa: PLW0108
    ids=["object", "partial-of-object", "partial", "sync-that-gives-a-coroutine"],
)
async def test_whatever_gives_a_coroutine_is_awaited(traces, function):
    """``acall`` gives the answer of async callables of every kind, within the request."""
    answer = await wrap(function, session_id="s").acall(question="@a")

    assert "@a" == answer.answer
    assert [("s", chain_tree())] == [(session(trace), tree(trace)) for trace in traces]


async def test_an_async_object_is_called_as_a_request(traces):
    """Its plain call form gives a coroutine that is the whole request, as an async function's."""
    answer = await wrap(AsyncCall(), name="ask")(question="@a")

    assert "@a" == answer.answer
    assert [("ask", [chain_tree()])] == [tree(trace) for trace in traces]


def test_a_wrapped_program_in_an_evaluation(traces):
    """``dspy.Evaluate`` takes a wrapped program like any other."""
    devset = [dspy.Example(question=f"@{n}", answer=f"@{n}").with_inputs("question") for n in range(3)]
    wrapped = wrap(SyncOnly(), session_id=lambda question: question)

    result = dspy.Evaluate(devset=devset, metric=lambda gold, pred, trace=None: gold.answer == pred.answer)(wrapped)

    assert 100.0 == result.score
    assert {"@0", "@1", "@2"} == {session(trace) for trace in traces}


# --- streams ------------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint():
    """An endpoint whose answers come word by word."""
    content = "[[ ## answer ## ]]\none two three four five\n\n[[ ## completed ## ]]"
    with LocalEndpoint(lambda body: {"content": content, "chunk_latency": 0.005}) as endpoint:
        yield endpoint


def streaming_lm(endpoint):
    return dspy.LM("openai/gpt-4o-mini", api_base=endpoint.api_base, api_key="none", cache=False)


@pytest.mark.parametrize("program", [dspy.Predict("question -> answer"), SyncOnly()], ids=["async", "sync"])
async def test_a_stream_is_a_request(traces, endpoint, program):
    """A stream gives chunks and the prediction; its trace has its values, and the consumer is not inside."""
    wrapped = wrap(program, session_id=lambda question: f"s-{question}")
    with dspy.context(lm=streaming_lm(endpoint)), request() as r:
        chunks = []
        listener = dspy.streaming.StreamListener(signature_field_name="answer")
        async for chunk in wrapped.stream(question="@a", stream_listeners=[listener]):
            if not chunks:
                with dspy.context(lm=EchoLM()):
                    await Chain().acall(question="@consumer")
            chunks.append(chunk)

    *words, prediction = chunks
    assert "one two three four five" == "".join(chunk.chunk for chunk in words) == prediction.answer
    streamed = [trace for trace in traces if session(trace) == "s-@a"]
    others = [trace for trace in traces if session(trace) is None]
    assert (1, 1) == (len(streamed), len(others))
    assert 3 == len(r.lm_calls)


@pytest.mark.parametrize("program", [dspy.Predict("question -> answer"), SyncOnly()], ids=["async", "sync"])
async def test_a_stream_that_is_broken_off(traces, endpoint, program):
    """Breaking off ends the spans, and the consumer's next await is its own."""
    wrapped = wrap(program, name="answer", session_id="s")
    with dspy.context(lm=streaming_lm(endpoint)):
        stream = wrapped.stream(question="@a")
        async for _ in stream:
            break
        await stream.aclose()
        await asyncio.sleep(0)

    with anyio.fail_after(TIMEOUT):
        while not traces:  # noqa: ASYNC110 - a sync program's thread goes on to its end
            await asyncio.sleep(0.01)
    assert ("answer", "cancelled") == tree(traces[0], "outcome")[:2]
    assert "s" == session(traces[0])


async def test_a_stream_that_is_closed_by_another_task(traces, endpoint):
    """Web frameworks leave the closing to the garbage collector, in a task of its own."""
    wrapped = wrap(dspy.Predict("question -> answer"), name="answer")
    with dspy.context(lm=streaming_lm(endpoint)):
        stream = wrapped.stream(question="@a")
        await anext(stream)
        await asyncio.create_task(stream.aclose())

    assert ("answer", "cancelled") == tree(traces[0], "outcome")[:2]


async def test_a_consumer_that_is_cancelled(traces):
    """A consumer that is cancelled while it waits cancels the program."""
    started = asyncio.Event()

    async def hang(marker):
        started.set()
        await asyncio.Event().wait()

    async def consume():
        async for _ in wrap(dspy.Predict("question -> answer"), name="answer").stream(question="@a"):
            pass

    with dspy.context(lm=EchoLM(aduring=hang)):
        task = asyncio.create_task(consume())
    await asyncio.wait_for(started.wait(), TIMEOUT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert ("answer", "cancelled") == tree(traces[0], "outcome")[:2]


async def test_a_stream_that_fails(traces):
    """The program's own error comes out of the stream."""
    error = ValueError("no")

    def fail(marker):
        raise error

    with dspy.context(lm=EchoLM(during=fail)), pytest.raises(Exception, match=r"no|unhandled errors") as raised:
        async for _ in wrap(SyncOnly()).stream(question="@a"):
            pass

    # DSPy before 3.4 leaves it in its task group's exception group.
    assert [error] == list(getattr(raised.value, "exceptions", [raised.value]))
    assert "error" == tree(traces[0], "outcome")[1]


def test_a_stream_under_trio(traces):
    """Without asyncio, where DSPy's LMs are sync only, a stream is as DSPy's, and its consumer not inside."""
    import trio

    seen = []

    async def main():
        async for chunk in wrap(SyncOnly(), session_id="s").stream(question="@a"):
            seen.append(chunk)
            Chain()(question="@consumer")

    trio.run(main)

    assert "@a" == seen[-1].answer
    assert {"s", None} == {session(trace) for trace in traces}


# --- where traces go ----------------------------------------------------------------------------------------------


def test_a_destination_of_its_own(store_uri):
    """The traces of a wrapped program go to its experiment, those beside it to theirs."""
    mine, theirs = mlflow.create_experiment("mine"), mlflow.create_experiment("theirs")
    dspy_mlflow_async.autolog(silent=True)
    with request(experiment_id=theirs):
        Chain()(question="@a")
        wrap(Chain(), experiment_id=mine)(question="@b")
        wrap(Chain(), experiment_id=lambda question: int(theirs))(question="@c")
    dspy_mlflow_async.flush(TIMEOUT)

    def markers(experiment_id):
        found = mlflow.search_traces(locations=[experiment_id], return_type="list")
        return sorted(trace.data.spans[0].inputs["question"] for trace in found)

    assert (["@b"], ["@a", "@c"]) == (markers(mine), markers(theirs))


def test_an_unknown_experiment_is_refused(store_uri):
    """A wrong or deleted experiment is an error when the program is wrapped."""
    deleted = mlflow.create_experiment("deleted")
    mlflow.delete_experiment(deleted)

    with pytest.raises(ValueError, match="'4711': MLflow's store has no such experiment"):
        wrap(Chain(), experiment_id="4711")
    with pytest.raises(ValueError, match="no such experiment"):
        wrap(Chain(), experiment_id="my experiment")
    with pytest.raises(ValueError, match="deleted"):
        wrap(Chain(), experiment_id=deleted)


def test_a_store_that_is_away_does_not_hold_up_the_start(monkeypatch, caplog):
    """Where the store does not answer, wrapping goes on with a warning."""
    from dspy_mlflow_async.requests import options

    monkeypatch.setattr(options, "CHECK_TIMEOUT", 0.2)
    monkeypatch.setattr(options.mlflow_trace_settings, "why_not", lambda experiment_id: threading.Event().wait(TIMEOUT))
    with caplog.at_level(logging.WARNING, "dspy_mlflow_async"):
        wrap(Chain(), experiment_id="1")

    assert "could not check experiment 1" in caplog.text


def test_what_cannot_be_called_is_refused():
    """A program is something that can be called."""
    with pytest.raises(TypeError, match="can be called"):
        wrap("program")
