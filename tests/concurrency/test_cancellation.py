"""Cancelled, abandoned and late calls: every span ends, says how, and its trace is stored."""

import asyncio
import gc
import threading

import anyio
import dspy
import mlflow
import pytest

from clean import assert_context_is_clean
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Chain, EchoLM, chain_tree, marker, predict_tree


def cancelled_predict(outcome="cancelled"):
    """A predictor that was cancelled inside its LM."""
    return (
        "Predict.forward",
        outcome,
        [("ChatAdapter.format", "ok", []), ("EchoLM.__call__", outcome, [])],
    )


class Held:
    """Holds async LM calls whose marker has ``@held`` until they are cancelled."""

    def __init__(self):
        self.reached = asyncio.Event()

    async def __call__(self, marker):
        if "@held" in marker:
            self.reached.set()
            await asyncio.Event().wait()


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


async def test_wait_for_that_times_out_inside_the_lm(recorded):
    """``asyncio.wait_for``: all spans end as cancelled, in one stored trace."""
    dspy.configure(lm=EchoLM(aduring=Held()))

    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(Chain().acall(question="@held"), 0.05)
    await Chain().acall(question="@next")

    held, following = recorded()
    assert ("Chain.forward", "cancelled", [cancelled_predict()]) == tree(held, "outcome")
    assert chain_tree("@next") == tree(following, marker)
    lm = next(span for span in held.data.spans if span.name == "EchoLM.__call__")
    assert "ERROR" == lm.status.status_code.value
    assert "CancelledError" in lm.status.description
    assert ["exception"] == [event.name for event in lm.events]
    assert "ERROR" == held.info.state.value


async def test_a_cancelled_task(recorded):
    """``task.cancel()``: the same, and its neighbours go on."""
    held = Held()
    dspy.configure(lm=EchoLM(aduring=held))
    task = asyncio.create_task(Chain().acall(question="@held"))
    neighbour = asyncio.create_task(Chain().acall(question="@neighbour"))
    await asyncio.wait_for(held.reached.wait(), TIMEOUT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await neighbour

    assert {("Chain.forward", "cancelled"), ("Chain.forward", "ok")} == {
        tree(trace, "outcome")[:2] for trace in recorded()
    }


async def test_a_cancelled_task_group_inside_a_module(recorded):
    """One call fails, the group cancels the others, the module fails: each span has its own outcome."""
    held = Held()

    async def during(marker):
        if marker == "@fails":
            await asyncio.wait_for(held.reached.wait(), TIMEOUT)
            raise ValueError(marker)
        await held(marker)

    class Program(dspy.Module):
        def __init__(self):
            super().__init__()
            self.step = dspy.Predict("question -> answer")

        async def aforward(self, question):
            async with anyio.create_task_group() as group:
                for each in ("@held", "@fails"):
                    group.start_soon(lambda question: self.step.acall(question=question), each)

    dspy.configure(lm=EchoLM(aduring=during), adapter=dspy.ChatAdapter(use_json_adapter_fallback=False))
    with pytest.raises(Exception) as failure:  # noqa: PT011 - an ExceptionGroup, which Python 3.10 lacks
        await Program().acall(question="@q")

    assert "ExceptionGroup" == type(failure.value).__name__
    (trace,) = recorded()
    failed = ("Predict.forward", "error", [("ChatAdapter.format", "ok", []), ("EchoLM.__call__", "error", [])])
    assert ("Program.forward", "error", [cancelled_predict(), failed]) == tree(trace, "outcome")


async def test_an_asyncify_thread_that_outlives_its_cancelled_caller(recorded):
    """The thread goes on: its spans are in the trace of the caller, and those that end after the root are late."""
    reached, go_on, ended = threading.Event(), threading.Event(), Ended("Chain")

    def hold(each):
        if not reached.is_set():
            reached.set()
            assert go_on.wait(TIMEOUT)

    dspy.configure(lm=EchoLM(during=hold), callbacks=[*dspy.settings.callbacks, ended])

    @mlflow.trace(name="request")
    async def request(question):
        return await dspy.asyncify(Chain())(question=question)

    task = asyncio.create_task(request("@a"))
    assert await asyncio.to_thread(reached.wait, TIMEOUT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await asyncio.to_thread(ended.event.wait, TIMEOUT)

    (trace,) = recorded()
    assert ("request", "@a", [chain_tree("@a")]) == tree(trace, marker)
    late = {span.name: span.get_attribute("outcome") for span in trace.data.spans}
    assert "late" == late["Chain.forward"]
    assert "late" == late["EchoLM.__call__"]
    first_format = min(
        (span for span in trace.data.spans if span.name == "ChatAdapter.format"), key=lambda span: span.start_time_ns
    )
    assert "ok" == first_format.get_attribute("outcome")


async def test_a_thread_of_a_cancelled_module_begins_its_next_call_below_what_is_open(recorded):
    """A root that ended is nobody's parent: what the thread calls later is below its own innermost open call."""
    reached, go_on, ended = threading.Event(), threading.Event(), Ended("Chain")

    def hold(each):
        if not reached.is_set():
            reached.set()
            assert go_on.wait(TIMEOUT)

    class Program(dspy.Module):
        async def aforward(self, question):
            return await asyncio.to_thread(Chain(), question=question)

    dspy.configure(lm=EchoLM(during=hold), callbacks=[*dspy.settings.callbacks, ended])
    task = asyncio.create_task(Program().acall(question="@a"))
    assert await asyncio.to_thread(reached.wait, TIMEOUT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await asyncio.to_thread(ended.event.wait, TIMEOUT)

    assert [("Program.forward", "@a", [chain_tree("@a")])] == [tree(trace, marker) for trace in recorded()]


async def test_a_call_in_a_task_that_outlives_its_module(recorded):
    """A background task that begins a call after its module has ended starts a trace of its own."""
    background = []

    class Program(dspy.Module):
        async def aforward(self, question):
            async def later():
                await asyncio.wait_for(ended.wait(), TIMEOUT)
                await dspy.Predict("question -> answer").acall(question="@later")

            background.append(asyncio.create_task(later()))
            return dspy.Prediction(answer=question)

    ended = asyncio.Event()
    await Program().acall(question="@q")
    ended.set()
    await background[0]

    assert [("Program.forward", "@q", []), predict_tree("@later")] == [tree(trace, marker) for trace in recorded()]


async def test_a_background_call_that_began_in_time_is_late(recorded):
    """A call that began inside its module and ends after it is in its trace, as late."""
    background, begun, ended = [], asyncio.Event(), asyncio.Event()

    async def hold(each):
        if each == "@slow":
            begun.set()
            await asyncio.wait_for(ended.wait(), TIMEOUT)

    class Program(dspy.Module):
        async def aforward(self, question):
            task = asyncio.create_task(dspy.Predict("question -> answer").acall(question="@slow"))
            background.append(task)
            await asyncio.wait_for(begun.wait(), TIMEOUT)
            await dspy.Predict("question -> answer").acall(question="@fast")
            return dspy.Prediction(answer=question)

    dspy.configure(lm=EchoLM(aduring=hold))
    await Program().acall(question="@q")
    ended.set()
    await background[0]

    (trace,) = recorded()
    assert ("Program.forward", "@q", [predict_tree("@fast"), predict_tree("@slow")]) == tree(trace, marker, sort=True)
    slow = [span for span in trace.data.spans if marker(span) == "@slow" and span.name == "Predict.forward"]
    assert ["late"] == [span.get_attribute("outcome") for span in slow]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_exceptions_that_are_no_exception_pass(recorded, error):
    """KeyboardInterrupt and its kind pass unchanged, and every span ends."""
    raised = error()

    def interrupt(each):
        if each == "@q":
            raise raised

    dspy.configure(lm=EchoLM(during=interrupt))
    with pytest.raises(error) as caught:
        Chain()(question="@q")
    Chain()(question="@next")

    assert raised is caught.value
    outcome = {SystemExit: "error", GeneratorExit: "abandoned"}.get(error, "cancelled")
    interrupted, following = recorded()
    assert ("Chain.forward", outcome, [cancelled_predict(outcome)]) == tree(interrupted, "outcome")
    assert chain_tree("@next") == tree(following, marker)


def test_keyboard_interrupt_in_a_worker(recorded):
    """A KeyboardInterrupt inside a pool of one thread passes; the spans of all levels end as cancelled."""

    def interrupt(each):
        raise KeyboardInterrupt

    class Program(dspy.Module):
        def forward(self, question):
            example = dspy.Example(question=question).with_inputs("question")
            return dspy.Parallel(num_threads=1, disable_progress_bar=True)([(Chain(), example)])

    dspy.configure(lm=EchoLM(during=interrupt))
    with pytest.raises(KeyboardInterrupt):
        Program()(question="@q")

    chain = ("Chain.forward", "cancelled", [cancelled_predict()])
    assert [("Program.forward", "cancelled", [chain])] == [tree(trace, "outcome") for trace in recorded()]


def drive(coroutine):
    """Run a coroutine to its first suspension."""
    coroutine.send(None)


class Forever:
    """Suspends whoever awaits it."""

    def __await__(self):
        yield


class Pausing(dspy.Module):
    """Suspends in the middle."""

    async def aforward(self, question):
        with mlflow.start_span("mine"):
            pass
        await Forever()


def test_a_coroutine_that_is_closed(recorded):
    """A coroutine closed before its end has abandoned spans, and leaves its context clean."""
    coroutine = Pausing().acall(question="@q")
    drive(coroutine)
    coroutine.close()

    assert [("Pausing.forward", "abandoned", [("mine", None, [])])] == [tree(trace, "outcome") for trace in recorded()]
    assert_context_is_clean()


# DSPy resets its own tokens while the collector closes the coroutine in another context, with or without a tracer.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_task_that_is_dropped(recorded):
    """A task that was never finished and got collected: its spans end as abandoned, whoever calls next ends them."""

    async def begin():
        pending = asyncio.get_running_loop().create_future()

        async def wait_forever(each):
            reached.set()
            await pending

        dspy.settings.lm.aduring = wait_forever
        return asyncio.create_task(Chain().acall(question="@q"))

    reached = asyncio.Event()
    dspy.configure(lm=EchoLM())
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # "Task was destroyed"
    task = await begin()
    await asyncio.wait_for(reached.wait(), TIMEOUT)
    dspy.settings.lm.aduring = None
    del task
    for _ in range(2):  # the first closes the coroutine, whose own exceptions in doing so are the second's
        await asyncio.to_thread(gc.collect)  # in the thread that prepared the call's request, and holds its context

    await Chain().acall(question="@next")

    shown = {tree(trace, "outcome")[1] for trace in recorded()}
    assert {"abandoned", "ok"} == shown


def test_a_generator_that_is_dropped(recorded):
    """A program that is a generator over calls, and is never read to its end, ends its user span and nothing else."""

    def stream():
        with mlflow.start_span("mine"):
            yield Chain()(question="@q").answer

    generator = stream()
    assert "@q" == next(generator)
    del generator
    gc.collect()
    Chain()(question="@next")

    assert ("mine", "", [chain_tree("@q")]) in [tree(trace, marker) for trace in recorded()]
