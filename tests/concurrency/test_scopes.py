"""Session, user, tags, metadata, ``enabled=False`` and ``suppress()`` hold in every primitive, and only there."""

import asyncio
import concurrent.futures
import importlib
import inspect
import threading

import anyio
import dspy
import mlflow
import pytest
from mlflow.tracing.context import _USER_TRACE_CONTEXT

import dspy_mlflow_async
from dspy_mlflow_async import propagate, suppress
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Chain, EchoLM, chain_tree, marker

QUESTIONS = ["@a", "@b"]
EXAMPLES = [dspy.Example(question=each, answer=each).with_inputs("question") for each in QUESTIONS]


def with_parallel(program):
    dspy.Parallel(num_threads=2, disable_progress_bar=True)([(program, example) for example in EXAMPLES])


def with_one_thread(program):
    dspy.Parallel(num_threads=1, disable_progress_bar=True)([(program, example) for example in EXAMPLES])


def with_batch(program):
    program.batch(EXAMPLES, num_threads=2, disable_progress_bar=True)


def with_evaluate(program):
    dspy.Evaluate(devset=EXAMPLES, metric=lambda example, prediction: 1.0, num_threads=2, display_progress=False)(
        program
    )


def with_evaluate_in_one_thread(program):
    dspy.Evaluate(devset=EXAMPLES, metric=lambda example, prediction: 1.0, num_threads=1, display_progress=False)(
        program
    )


def with_optimizer(program):
    dspy_mlflow_async.autolog(silent=True, log_traces_from_compile=True)
    optimizer = dspy.BootstrapFewShot(metric=lambda *_: False, max_labeled_demos=0)
    optimizer.compile(program, trainset=EXAMPLES)


def with_gather(program):
    async def main():
        await asyncio.gather(*(program.acall(question=each) for each in QUESTIONS))

    asyncio.run(main())


def with_task_group(program):
    async def main():
        async with anyio.create_task_group() as group:
            for each in QUESTIONS:
                group.start_soon(lambda question: program.acall(question=question), each)

    asyncio.run(main())


def with_asyncify(program):
    async def main():
        await asyncio.gather(*(dspy.asyncify(program)(question=each) for each in QUESTIONS))

    asyncio.run(main())


def with_to_thread(program):
    async def main():
        await asyncio.gather(*(asyncio.to_thread(program, question=each) for each in QUESTIONS))

    asyncio.run(main())


def with_syncify(program):
    run = dspy.syncify(program.deepcopy())  # it changes the program
    for each in QUESTIONS:
        run(question=each)


ONE_TRIO = threading.Lock()


def with_trio(program):
    async def call(question):
        await dspy.asyncify(program)(question=question)

    async def main():
        async with anyio.create_task_group() as group:
            for each in QUESTIONS:
                group.start_soon(call, each)

    asyncify = importlib.import_module("dspy.utils.asyncify")
    with ONE_TRIO:  # DSPy's limiter belongs to the first event loop that uses it
        before, asyncify._limiter = asyncify._limiter, None
        try:
            anyio.run(main, backend="trio")
        finally:
            asyncify._limiter = before


def with_streamify(program):
    async def read(question):
        async for _ in dspy.streamify(program)(question=question):
            pass

    async def main():
        await asyncio.gather(*(read(each) for each in QUESTIONS))

    asyncio.run(main())


def with_sync_stream(program):
    stream = dspy.streamify(program, async_streaming=False)
    for each in QUESTIONS:
        list(stream(question=each))


def with_propagate(program):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(propagate(lambda each: program(question=each)), QUESTIONS))


def with_our_pool(program):
    with dspy_mlflow_async.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda each: program(question=each), QUESTIONS))


def with_any_pool(program):
    dspy_mlflow_async.autolog(silent=True, propagate_threads=True)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda each: program(question=each), QUESTIONS))


def with_any_threads(program):
    dspy_mlflow_async.autolog(silent=True, propagate_threads=True)
    threads = [threading.Thread(target=program, kwargs={"question": each}) for each in QUESTIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)


def in_sequence(program):
    for each in QUESTIONS:
        program(question=each)


def trace_context(*, session_id, user, tags, metadata):
    """``mlflow.tracing.context``, whose session and user the lowest supported version has as metadata only."""
    if "session_id" in inspect.signature(mlflow.tracing.context).parameters:
        return mlflow.tracing.context(session_id=session_id, user=user, tags=tags, metadata=metadata)
    named = {"mlflow.trace.session": session_id, "mlflow.trace.user": user}
    return mlflow.tracing.context(tags=tags, metadata={**metadata, **named})


PRIMITIVES = pytest.mark.parametrize(
    "call_all",
    [
        in_sequence,
        with_parallel,
        with_one_thread,
        with_batch,
        with_evaluate,
        with_evaluate_in_one_thread,
        with_optimizer,
        with_gather,
        with_task_group,
        with_asyncify,
        with_to_thread,
        with_syncify,
        with_trio,
        with_streamify,
        with_sync_stream,
        with_propagate,
        with_our_pool,
        with_any_pool,
        with_any_threads,
    ],
)


@PRIMITIVES
def test_trace_context_holds(traces, call_all):
    """Each trace has the session, user, tags and metadata of the block that its call was made in."""

    def in_context(name):
        with trace_context(
            session_id=f"session {name}", user=f"user {name}", tags={"tag": name}, metadata={"meta": name}
        ):
            call_all(Chain())

    threads = [threading.Thread(target=in_context, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)

    found = sorted(
        (
            trace.info.trace_metadata["mlflow.trace.session"],
            trace.info.trace_metadata["mlflow.trace.user"],
            trace.info.tags["tag"],
            trace.info.trace_metadata["meta"],
            tree(trace, marker),
        )
        for trace in traces
    )
    assert [
        (f"session {name}", f"user {name}", name, name, chain_tree(each))
        for name in ("one", "two")
        for each in QUESTIONS
    ] == found


@PRIMITIVES
@pytest.mark.parametrize("silence", [suppress, lambda: mlflow.tracing.context(enabled=False)])
def test_silence_holds(traces, call_all, silence):
    """Nothing is recorded of what a silenced block starts; everything before and after it is."""
    program = Chain()
    program(question="@before")
    with silence():
        call_all(program)
    program(question="@after")

    assert [chain_tree("@before"), chain_tree("@after")] == [tree(trace, marker) for trace in traces]


@PRIMITIVES
def test_a_silenced_block_inside_a_module(traces, call_all):
    """A module that silences part of its work is recorded without it."""

    class Program(dspy.Module):
        def __init__(self):
            super().__init__()
            self.chain = Chain()

        def forward(self, question):
            with suppress():
                call_all(self.chain)
            return self.chain(question=question)

    Program()(question="@q")

    assert [("Program.forward", "@q", [chain_tree("@q")])] == [tree(trace, marker) for trace in traces]


def test_suppress_is_the_threads_own(traces):
    """A thread that suppresses silences no other."""
    inside, done = threading.Event(), threading.Event()

    def silent():
        with suppress():
            inside.set()
            Chain()(question="@silent")
            assert done.wait(TIMEOUT)

    thread = threading.Thread(target=silent)
    thread.start()
    assert inside.wait(TIMEOUT)
    Chain()(question="@loud")
    done.set()
    thread.join(TIMEOUT)

    assert [chain_tree("@loud")] == [tree(trace, marker) for trace in traces]


async def test_suppress_is_the_tasks_own(traces):
    """A task that suppresses silences no other, whatever the order in which they go on."""
    inside, loud_done = asyncio.Event(), asyncio.Event()

    async def silent():
        with suppress():
            inside.set()
            await asyncio.wait_for(loud_done.wait(), TIMEOUT)
            await Chain().acall(question="@silent")

    async def loud():
        await asyncio.wait_for(inside.wait(), TIMEOUT)
        await Chain().acall(question="@loud")
        loud_done.set()

    await asyncio.gather(silent(), loud())

    assert [chain_tree("@loud")] == [tree(trace, marker) for trace in traces]


def test_suppress_silences_user_spans_and_keeps_tags(traces):
    """User spans too; tags and metadata set around it hold again after it."""
    with mlflow.tracing.context(tags={"k": "v"}):
        with suppress(), mlflow.start_span("mine"):
            pass
        with mlflow.start_span("loud"):
            pass

    assert [("loud", [])] == [tree(trace) for trace in traces]
    assert "v" == traces[0].info.tags["k"]


def test_suppress_ends_with_an_exception(traces):
    """An exception passes, and the silence ends."""
    with pytest.raises(KeyError), suppress():
        raise KeyError("mine")
    Chain()(question="@after")

    assert [chain_tree("@after")] == [tree(trace, marker) for trace in traces]


async def test_suppress_may_end_in_another_task(traces):
    """A block that begins in one task and ends in another (an async fixture, a generator) does not raise."""
    scope = suppress()
    scope.__enter__()

    async def end():
        scope.__exit__(None, None, None)
        await Chain().acall(question="@after")

    await asyncio.create_task(end())
    await Chain().acall(question="@silent")  # this task is a context of its own, and still silent
    _USER_TRACE_CONTEXT.set(None)

    assert [chain_tree("@after")] == [tree(trace, marker) for trace in traces]


def test_sampling_holds(captured, monkeypatch):
    """A trace that is sampled out has no part that is kept."""
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0.0")
    dspy_mlflow_async.autolog()

    with_parallel(Chain())
    with_gather(Chain())

    assert [] == captured


def test_tracing_disabled_for_the_process(traces):
    """``mlflow.tracing.disable()`` silences us, ``enable()`` brings us back, and results are the same."""
    mlflow.tracing.disable()
    try:
        silent = Chain()(question="@silent").answer
        with_parallel(Chain())
    finally:
        mlflow.tracing.enable()
    loud = Chain()(question="@loud").answer

    assert ("@silent", "@loud") == (silent, loud)
    assert [chain_tree("@loud")] == [tree(trace, marker) for trace in traces]


def test_calls_inside_a_dspy_context_of_their_own(traces):
    """``dspy.context`` in threads and tasks: each call uses its LM and stays in its trace."""
    lms = {each: EchoLM(answer=lambda field, marker, each=each: f"{each}!") for each in QUESTIONS}

    def call(each):
        with dspy.context(lm=lms[each]):
            return Chain()(question=each).answer

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(call, QUESTIONS))

    assert ["@a!", "@b!"] == answers
    assert ["Chain.forward"] * 2 == [tree(trace)[0] for trace in traces]


@pytest.mark.parametrize("call_all", [with_parallel, with_any_pool, with_any_threads, with_asyncify, with_optimizer])
def test_an_inner_scope_adds_to_the_outer_one(traces, call_all):
    """Tags of an inner block stand beside those of the outer one, in each thread, and end with it."""
    with mlflow.tracing.context(tags={"outer": "o"}):
        with mlflow.tracing.context(tags={"inner": "i"}):
            call_all(Chain())
        Chain()(question="@c")

    assert [("@a", "o", "i"), ("@b", "o", "i"), ("@c", "o", None)] == sorted(
        (tree(trace, marker)[1], trace.info.tags.get("outer"), trace.info.tags.get("inner")) for trace in traces
    )


def test_a_switch_of_one_thread_holds_in_what_it_starts(traces):
    """Under ``propagate_threads``: a silent thread's threads are silent, a loud thread's are not, at the same time."""
    dspy_mlflow_async.autolog(silent=True, propagate_threads=True)
    both, program = threading.Barrier(2, timeout=TIMEOUT), Chain()

    def start(question, scope):
        with scope:
            both.wait()
            thread = threading.Thread(target=program, kwargs={"question": question})
            thread.start()
            thread.join(TIMEOUT)

    threads = [
        threading.Thread(target=start, args=("@silent", mlflow.tracing.context(enabled=False))),
        threading.Thread(target=start, args=("@loud", mlflow.tracing.context(tags={"k": "v"}))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)

    assert [(chain_tree("@loud"), "v")] == [(tree(trace, marker), trace.info.tags["k"]) for trace in traces]
