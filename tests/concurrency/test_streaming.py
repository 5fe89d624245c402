"""``streamify``: one whole trace per stream, whether it is read to its end, broken off, or fails."""

import asyncio
import threading

import dspy
import mlflow
import pytest

from clean import assert_context_is_clean
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Chain, EchoLM, chain_tree, marker, predict_tree


async def read(stream):
    """All of a stream."""
    return [value async for value in stream]


@pytest.mark.parametrize("is_async", [False, True])
async def test_streams_read_to_their_end(recorded, is_async):
    """Three streams read at once give a whole trace each, with sync programs in threads and with async ones."""
    stream = dspy.streamify(Chain(), is_async_program=is_async)

    values = await asyncio.gather(*(read(stream(question=each)) for each in ("@a", "@b", "@c")))

    assert ["@a", "@b", "@c"] == [each[-1].answer for each in values]
    assert [chain_tree(each) for each in ("@a", "@b", "@c")] == sorted(tree(trace, marker) for trace in recorded())


async def test_a_stream_inside_a_user_span(recorded):
    """A stream that is read inside a user's span is below that span."""
    stream = dspy.streamify(Chain())

    @mlflow.trace(name="request")
    async def request(question):
        return (await read(stream(question=question)))[-1]

    await asyncio.gather(request("@a"), request("@b"))

    assert [("request", each, [chain_tree(each)]) for each in ("@a", "@b")] == sorted(
        tree(trace, marker) for trace in recorded()
    )


def test_a_sync_stream(recorded):
    """A stream as a sync generator runs in a thread of DSPy's, with the caller's context."""
    stream = dspy.streamify(Chain(), async_streaming=False)

    @mlflow.trace(name="request")
    def request(question):
        return list(stream(question=question))

    request("@a")
    list(stream(question="@b"))

    first, second = (tree(trace, marker) for trace in recorded())
    assert ("request", "@a", [chain_tree("@a")]) == first
    assert chain_tree("@b") == second


def _leaf(error):
    while hasattr(error, "exceptions"):
        (error,) = error.exceptions
    return error


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_failing_stream(recorded, is_async):
    """The program's own exception arrives, and the trace shows the error on the way up."""

    def fail(marker):
        raise LookupError("no answer")

    dspy.configure(lm=EchoLM(during=fail))

    with pytest.raises(Exception) as failure:  # noqa: PT011 - dspy 3.3 raises an exception group
        await read(dspy.streamify(Chain(), is_async_program=is_async)(question="@a"))
    assert "no answer" == str(_leaf(failure.value))

    (trace,) = recorded()
    root, predictor, *below = sorted(trace.data.spans, key=lambda span: span.start_time_ns)
    assert ["Chain.forward", "Predict.forward"] == [root.name, predictor.name]
    assert ["error", "error"] == [span.get_attribute("outcome") for span in (root, predictor)]
    assert "ERROR" == trace.info.state.value
    assert {"ok", "error"} == {span.get_attribute("outcome") for span in below}


async def test_a_sync_program_whose_stream_is_broken_off(recorded):
    """Who stops reading abandons the thread; its spans still end, in its trace, and what follows is clean."""
    reading, broken_off = threading.Event(), threading.Event()
    ended = Ended("Chain")

    def hold(marker):
        if marker == "@a" and not reading.is_set():
            reading.set()
            assert broken_off.wait(TIMEOUT)

    dspy.configure(lm=EchoLM(during=hold), callbacks=[*dspy.settings.callbacks, ended])
    task = asyncio.create_task(read(dspy.streamify(Chain())(question="@a")))
    assert await asyncio.to_thread(reading.wait, TIMEOUT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    broken_off.set()
    assert await asyncio.to_thread(ended.event.wait, TIMEOUT)
    await Chain().acall(question="@next")

    assert [chain_tree("@a"), chain_tree("@next")] == sorted(tree(trace, marker) for trace in recorded())


async def test_an_async_program_whose_stream_is_broken_off(recorded):
    """Its task is cancelled, and so are its open spans; the trace is stored."""
    reading = asyncio.Event()

    async def hold(marker):
        reading.set()
        await asyncio.Event().wait()

    dspy.configure(lm=EchoLM(aduring=hold))
    task = asyncio.create_task(read(dspy.streamify(Chain(), is_async_program=True)(question="@a")))
    await asyncio.wait_for(reading.wait(), TIMEOUT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    lm = ("EchoLM.__call__", "cancelled", [])
    predictor = ("Predict.forward", "cancelled", [("ChatAdapter.format", "ok", []), lm])
    assert [("Chain.forward", "cancelled", [predictor])] == [tree(trace, "outcome") for trace in recorded()]


async def test_breaking_out_of_a_stream(recorded):
    """``break`` and ``aclose()`` after the first value leave a whole trace, and the next call starts clean."""
    first_read, ended = threading.Event(), Ended("Talker")

    class Talker(dspy.Module):
        def __init__(self):
            super().__init__()
            self.step = dspy.Predict("question -> answer")

        async def aforward(self, question):
            await dspy.settings.send_stream.send("one")
            await self.step.acall(question=question)
            await dspy.settings.send_stream.send("two")
            return await self.step.acall(question=question)

    dspy.configure(callbacks=[*dspy.settings.callbacks, ended])

    async def read_one():
        stream = dspy.streamify(Talker(), is_async_program=True)(question="@a")
        try:
            async for value in stream:
                assert "one" == value
                break
            first_read.set()
        finally:
            await stream.aclose()

    # DSPy: the next await in that task gets a CancelledError, so the task is one of its own.
    await asyncio.gather(asyncio.create_task(read_one()), return_exceptions=True)
    assert first_read.is_set()
    assert await asyncio.to_thread(ended.event.wait, TIMEOUT)
    await Chain().acall(question="@next")

    names = sorted(tree(trace)[0] for trace in recorded())
    assert ["Chain.forward", "Talker.forward"] == names
    assert_context_is_clean()


class Ended(dspy.utils.BaseCallback):
    """Sets its event when a module of this class has ended, after the tracer's handler."""

    def __init__(self, name):
        self.event = threading.Event()
        self._name = name
        self._ids = set()

    def on_module_start(self, call_id, instance, inputs):
        if type(instance).__name__ == self._name:
            self._ids.add(call_id)

    def on_module_end(self, call_id, outputs, exception=None):
        if call_id in self._ids:
            self.event.set()


def test_a_streaming_program_made_before_autolog_is_left_out(recorded):
    """``streamify`` keeps the callbacks of the moment it was called: DSPy's edge, shown here, not mended."""
    import dspy_mlflow_async

    dspy_mlflow_async.autolog(disable=True)
    stream = dspy.streamify(dspy.Predict("question -> answer"))
    dspy_mlflow_async.autolog()

    asyncio.run(read(stream(question="@a")))
    asyncio.run(read(dspy.streamify(dspy.Predict("question -> answer"))(question="@b")))

    assert [predict_tree("@b")] == [tree(trace, marker) for trace in recorded()]
