"""Threads that a program starts itself inherit nothing; ``propagate``, our pool, or ``propagate_threads`` carry it."""

import asyncio
import concurrent.futures
import multiprocessing.pool
import threading
from contextvars import Context

import dspy
import mlflow
import pytest

import dspy_mlflow_async
from dspy_mlflow_async import propagate
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Barrier, EchoLM, marker, predict_tree

QUESTIONS = ["@a", "@b", "@c"]


class OwnPool(dspy.Module):
    """Runs its step in a pool of its own."""

    def __init__(self):
        super().__init__()
        self.step = dspy.Predict("question -> answer")

    def forward(self, questions, name):
        return self.run(lambda question: self.step(question=question), questions)


class Propagated(OwnPool):
    """``propagate`` with any pool."""

    def run(self, call, questions):
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            return list(pool.map(propagate(call), questions))


class OurPool(OwnPool):
    """Our pool."""

    def run(self, call, questions):
        with dspy_mlflow_async.ThreadPoolExecutor(3) as pool:
            return list(pool.map(call, questions))


class AnyPool(OwnPool):
    """Python's pool as it is."""

    def run(self, call, questions):
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            return list(pool.map(call, questions))


class PlainThreads(OwnPool):
    """Python's threads as they are."""

    def run(self, call, questions):
        threads = [threading.Thread(target=call, args=(question,)) for question in questions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)


def expected(kind, name, questions):
    """One whole trace."""
    return (f"{kind.__name__}.forward", name, [predict_tree(each) for each in questions])


@pytest.mark.parametrize("kind", [Propagated, OurPool])
def test_the_public_helpers(recorded, kind):
    """Three modules at once, each with three workers of its own: each call below its module."""
    dspy.configure(lm=EchoLM(during=Barrier(9)))
    program, gate = kind(), threading.Barrier(3, timeout=TIMEOUT)

    def call(name):
        gate.wait()
        program(questions=[f"{name}-{n}" for n in range(3)], name=name)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(call, QUESTIONS))

    assert [expected(kind, name, [f"{name}-{n}" for n in range(3)]) for name in QUESTIONS] == sorted(
        tree(trace, marker, sort=True) for trace in recorded()
    )


@pytest.mark.parametrize("kind", [AnyPool, PlainThreads])
def test_propagate_threads_carries_it_into_any_thread(recorded, kind):
    """With the opt-in, threads and pools of Python's own are below the call that started them."""
    dspy_mlflow_async.autolog(propagate_threads=True)

    kind()(questions=QUESTIONS, name="@module")

    assert [expected(kind, "@module", QUESTIONS)] == [tree(trace, marker, sort=True) for trace in recorded()]


@pytest.mark.parametrize("kind", [AnyPool, PlainThreads])
def test_without_it_they_are_traces_of_their_own(recorded, kind):
    """The known hole: a plain thread gives a whole trace per call, beside the module's."""
    kind()(questions=QUESTIONS, name="@module")

    assert sorted([(f"{kind.__name__}.forward", "@module", []), *(predict_tree(each) for each in QUESTIONS)]) == sorted(
        tree(trace, marker) for trace in recorded()
    )


@pytest.mark.parametrize("kind", [AnyPool, PlainThreads])
def test_propagate_threads_ends_with_the_next_autolog(recorded, kind):
    """The last call's settings count: without the opt-in, Python's threads are as they were."""
    dspy_mlflow_async.autolog(propagate_threads=True)
    dspy_mlflow_async.autolog()

    kind()(questions=QUESTIONS, name="@module")

    assert 4 == len(recorded())


def test_a_pool_that_was_first_used_inside_a_compile(recorded):
    """Its threads go on after the compile, and are not silent for ever."""
    step = dspy.Predict("question -> answer")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def metric(example, prediction, trace=None):
            return pool.submit(lambda: True).result(TIMEOUT)

        trainset = [dspy.Example(question="@t", answer="@t").with_inputs("question")]
        dspy.BootstrapFewShot(metric=metric, max_bootstrapped_demos=1).compile(step, trainset=trainset)
        pool.submit(step, question="@later").result(TIMEOUT)

    assert [predict_tree("@later")] == [tree(trace, marker) for trace in recorded()]


# --- pools whose threads were there before --------------------------------------------------------------------------


def futures_pool():
    """Of ``concurrent.futures``."""
    return concurrent.futures.ThreadPoolExecutor(1)


def multiprocessing_pool():
    """Of ``multiprocessing.pool``."""
    return multiprocessing.pool.ThreadPool(1)


class Given(dspy.Module):
    """Gives its questions to a pool that it was given itself."""

    def __init__(self):
        super().__init__()
        self.step = dspy.Predict("question -> answer")

    def forward(self, questions, name, pool, bind=lambda function: function):
        list(pool.map(bind(lambda question: self.step(question=question)), questions))


UNDER_THE_MODULE = [("Given.forward", "@module", [predict_tree(each) for each in QUESTIONS])]


@pytest.mark.parametrize("before", ["autolog", "the call"])
def test_a_futures_pool_that_was_there_before(recorded, before):
    """Each item takes up the context of its ``submit``, whenever the threads were started."""
    with futures_pool() as pool:
        if before == "autolog":
            pool.submit(abs, 1).result(TIMEOUT)
        dspy_mlflow_async.autolog(propagate_threads=True)
        pool.submit(abs, 1).result(TIMEOUT)
        Given()(questions=QUESTIONS, name="@module", pool=pool)

    assert UNDER_THE_MODULE == [tree(trace, marker, sort=True) for trace in recorded()]


def test_a_multiprocessing_pool_that_was_there_before(recorded):
    """The known hole: its threads take up the context they were started in, once; ``propagate`` takes it along."""
    dspy_mlflow_async.autolog(propagate_threads=True)
    with multiprocessing_pool() as pool:
        Given()(questions=QUESTIONS, name="@module", pool=pool)
        alone = [tree(trace, marker) for trace in recorded()]
        Given()(questions=QUESTIONS, name="@module", pool=pool, bind=propagate)

    assert sorted([("Given.forward", "@module", []), *(predict_tree(each) for each in QUESTIONS)]) == sorted(alone)
    assert UNDER_THE_MODULE[0] in [tree(trace, marker, sort=True) for trace in recorded()]


def test_a_multiprocessing_pool_keeps_the_place_it_was_made_in(recorded):
    """The other half of the hole: silence, session and tags of that place hold in it for ever."""
    dspy_mlflow_async.autolog(propagate_threads=True)
    step = dspy.Predict("question -> answer")
    with dspy_mlflow_async.suppress():
        silent = multiprocessing_pool()
    with mlflow.tracing.context(tags={"made": "here"}):
        tagged = multiprocessing_pool()
    with silent, tagged:
        for pool, question in ((silent, "@silent"), (tagged, "@tagged")):
            pool.apply(step, kwds={"question": question})
        silent.apply(propagate(step), kwds={"question": "@propagated"})

    assert [("@tagged", "here"), ("@propagated", None)] == [
        (tree(trace, marker)[1], trace.info.tags.get("made")) for trace in recorded()
    ]


@pytest.mark.parametrize("make", [futures_pool, multiprocessing_pool])
def test_a_pool_that_is_made_inside_the_call(recorded, make):
    """Either kind is carried."""
    dspy_mlflow_async.autolog(propagate_threads=True)

    class Making(Given):
        def forward(self, questions, name):
            with make() as pool:
                super().forward(questions, name, pool)

    Making()(questions=QUESTIONS, name="@module")

    assert [("Making.forward", *UNDER_THE_MODULE[0][1:])] == [tree(trace, marker, sort=True) for trace in recorded()]


def test_propagate_keeps_user_spans_and_trace_context(recorded):
    """A propagated function is below the span that was current, with its session and tags."""
    step = dspy.Predict("question -> answer")

    with mlflow.tracing.context(metadata={"mlflow.trace.session": "s"}, tags={"k": "v"}), mlflow.start_span("mine"):
        bound = propagate(step)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda each: bound(question=each), QUESTIONS))
    bound(question="@later")

    first, second = recorded()
    assert ("mine", "", [predict_tree(each) for each in QUESTIONS]) == tree(first, marker, sort=True)
    # The span that was current has ended: an ended span is nobody's parent.
    assert predict_tree("@later") == tree(second, marker)
    for trace in (first, second):
        assert ("s", "v") == (trace.info.trace_metadata["mlflow.trace.session"], trace.info.tags["k"])


def test_propagate_leaves_the_users_own_variables_alone(recorded):
    """Only tracing variables travel: a thread sees none of the user's context variables, as without us."""
    from contextvars import ContextVar

    mine = ContextVar("mine", default="default")
    mine.set("changed")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        seen = pool.submit(propagate(mine.get)).result(TIMEOUT)

    assert "default" == seen


async def test_propagate_of_a_coroutine_function(recorded):
    """A coroutine function stays one, and runs below the span that was current, in any loop."""
    step = dspy.Predict("question -> answer")

    class Program(dspy.Module):
        def forward(self, questions, name):
            async def call(question):
                await step.acall(question=question)

            bound = propagate(call)
            assert asyncio.iscoroutinefunction(bound)
            threads = [threading.Thread(target=asyncio.run, args=(bound(each),)) for each in questions]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(TIMEOUT)

    Program()(questions=QUESTIONS, name="@module")

    assert [("Program.forward", "@module", [predict_tree(each) for each in QUESTIONS])] == [
        tree(trace, marker, sort=True) for trace in recorded()
    ]


def test_a_worker_is_clean_after_each_item(recorded):
    """A pool's thread that ran a propagated item starts its next, plain item with nothing of it."""
    step = dspy.Predict("question -> answer")
    with concurrent.futures.ThreadPoolExecutor(1) as pool, mlflow.start_span("mine"):
        pool.submit(propagate(step), question="@a").result(TIMEOUT)
        pool.submit(step, question="@b").result(TIMEOUT)

    assert sorted([("mine", "", [predict_tree("@a")]), predict_tree("@b")]) == sorted(
        tree(trace, marker) for trace in recorded()
    )


def test_a_process_pool_works_with_patched_threads():
    """The opt-in patches threads that ``multiprocessing`` starts too; results arrive as without it."""
    dspy_mlflow_async.autolog(propagate_threads=True)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        result = pool.submit(abs, -1).result(TIMEOUT)

    assert 1 == result


# --- carried, and back to the thread it came from -------------------------------------------------------------------


class Delegating(dspy.Module):
    """Lets ``self.run`` call its step."""

    def __init__(self, run):
        super().__init__()
        self.step = dspy.Predict("question -> answer")
        self.run = run

    def forward(self, question):
        return self.run(self.step, question)

    async def aforward(self, question):
        return await self.run(self.step, question)


ONE_TREE = [("Delegating.forward", "@a", [predict_tree("@a")])]


def test_propagated_to_the_same_thread_in_another_context(traces):
    """The context is fresh and DSPy knows of no call in it; the step is still the module's."""
    Delegating(lambda step, question: Context().run(propagate(step), question=question))(question="@a")

    assert ONE_TREE == [tree(trace, marker) for trace in traces]


async def test_propagated_to_a_task_of_the_same_loop(traces):
    """A worker task that was there before takes the job from a queue."""
    jobs = asyncio.Queue()

    async def work():
        job, done = await jobs.get()
        done.set_result(await job())

    async def delegate(step, question):
        done = asyncio.get_running_loop().create_future()
        await jobs.put((propagate(lambda: step.acall(question=question)), done))
        return await done

    worker = asyncio.create_task(work())
    await Delegating(delegate).acall(question="@a")
    await worker

    assert ONE_TREE == [tree(trace, marker) for trace in traces]


async def test_a_thread_that_calls_back_into_the_loop(captured):
    """Under ``propagate_threads``, to an executor's thread and back."""
    dspy_mlflow_async.autolog(silent=True, propagate_threads=True)
    loop = asyncio.get_running_loop()

    async def delegate(step, question):
        def in_thread():
            return asyncio.run_coroutine_threadsafe(step.acall(question=question), loop).result(TIMEOUT)

        return await loop.run_in_executor(None, in_thread)

    await Delegating(delegate).acall(question="@a")

    assert ONE_TREE == [tree(trace, marker) for trace in captured]
