"""Tasks, and the bridges between tasks and threads, keep every call under the one that caused it."""

import asyncio
import importlib
import threading

import anyio
import dspy
import mlflow
import pytest

from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Barrier, Chain, EchoLM, chain_tree, marker, predict_tree

MARKERS = [f"@q{n}" for n in range(6)]


class AllOpen:
    """An async barrier: the first ``parties`` LM calls wait until all of them are open."""

    def __init__(self, parties):
        self._missing = parties
        self._all = asyncio.Event()

    async def __call__(self, marker):
        self._missing -= 1
        if self._missing <= 0:
            self._all.set()
        await asyncio.wait_for(self._all.wait(), TIMEOUT)


class Gather(dspy.Module):
    """Calls its step for all questions at once."""

    def __init__(self, step=None):
        super().__init__()
        self.step = step or dspy.Predict("question -> answer")

    async def aforward(self, questions, name):
        return await asyncio.gather(*(self.step.acall(question=question) for question in questions))


class TaskGroup(Gather):
    """The same with an anyio task group."""

    async def aforward(self, questions, name):
        async def call(question):
            await self.step.acall(question=question)

        async with anyio.create_task_group() as group:
            for question in questions:
                group.start_soon(call, question)


class ToThread(Gather):
    """The same in threads, with ``asyncio.to_thread``."""

    async def aforward(self, questions, name):
        await asyncio.gather(*(asyncio.to_thread(self.step, question=question) for question in questions))


class Asyncified(Gather):
    """The same in threads, with ``dspy.asyncify``."""

    async def aforward(self, questions, name):
        await asyncio.gather(*(dspy.asyncify(self.step)(question=question) for question in questions))


async def test_gathered_calls_are_a_trace_each(recorded):
    """``asyncio.gather`` over ``acall``, all open at once: a whole trace per call."""
    dspy.configure(lm=EchoLM(aduring=AllOpen(6)))

    predictions = await asyncio.gather(*(Chain().acall(question=each) for each in MARKERS))

    assert MARKERS == [prediction.answer for prediction in predictions]
    assert [chain_tree(each) for each in MARKERS] == sorted(tree(trace, marker) for trace in recorded())


async def test_calls_of_a_task_group_are_a_trace_each(recorded):
    """An anyio task group over ``acall``: the same."""
    dspy.configure(lm=EchoLM(aduring=AllOpen(6)))
    program = Chain()

    async def call(question):
        await program.acall(question=question)

    async with anyio.create_task_group() as group:
        for each in MARKERS:
            group.start_soon(call, each)

    assert [chain_tree(each) for each in MARKERS] == sorted(tree(trace, marker) for trace in recorded())


@pytest.mark.parametrize("kind", [Gather, TaskGroup, ToThread, Asyncified])
async def test_calls_made_at_once_inside_a_module_are_below_it(recorded, kind):
    """A module that calls its step for all items at once has each of them below it; three such modules stay apart."""
    in_threads = kind in {ToThread, Asyncified}
    lm = EchoLM(during=Barrier(6)) if in_threads else EchoLM(aduring=AllOpen(6))
    dspy.configure(lm=lm)
    questions = {f"@n{n}": [f"@n{n}-a", f"@n{n}-b"] for n in range(3)}

    await asyncio.gather(*(kind().acall(questions=each, name=name) for name, each in questions.items()))

    expected = [
        (f"{kind.__name__}.forward", name, [predict_tree(each) for each in below]) for name, below in questions.items()
    ]
    assert expected == sorted(tree(trace, marker, sort=True) for trace in recorded())


async def test_fan_out_nests_over_all_primitives(recorded):
    """Gather over task groups over threads: every level below the one that started it."""
    program = Gather(Wrapped(TaskGroup(Wrapped(ToThread()))))

    await program.acall(questions=["@a", "@b"], name="@top")

    def expected(question):
        threads = ("ToThread.forward", question, [predict_tree(question)])
        groups = ("TaskGroup.forward", question, [("Wrapped.forward", question, [threads])])
        return ("Wrapped.forward", question, [groups])

    assert [("Gather.forward", "@top", [expected("@a"), expected("@b")])] == [
        tree(trace, marker, sort=True) for trace in recorded()
    ]


class Wrapped(dspy.Module):
    """Makes a step of one question from a module of many."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    async def aforward(self, question):
        return await self.inner.acall(questions=[question], name=question)


async def test_asyncify_at_top_level(recorded):
    """``dspy.asyncify`` from several tasks at once: a trace per call."""
    dspy.configure(lm=EchoLM(during=Barrier(4)))

    await asyncio.gather(*(dspy.asyncify(dspy.Predict("question -> answer"))(question=each) for each in MARKERS[:4]))

    assert [predict_tree(each) for each in MARKERS[:4]] == sorted(tree(trace, marker) for trace in recorded())


async def test_asyncify_inside_a_traced_coroutine(recorded):
    """Below a user's ``@mlflow.trace`` coroutine, asyncified calls are below its span, and their workers' too."""

    @mlflow.trace(name="request")
    async def request(question):
        return await dspy.asyncify(Chain())(question=question)

    await asyncio.gather(*(request(each) for each in MARKERS))

    assert [("request", each, [chain_tree(each)]) for each in MARKERS] == sorted(
        tree(trace, marker) for trace in recorded()
    )


async def test_user_spans_and_calls_interleave(recorded):
    """A user's span inside a module is below it, and a call inside that span below the span."""

    class Program(dspy.Module):
        def __init__(self):
            super().__init__()
            self.step = dspy.Predict("question -> answer")

        async def aforward(self, question):
            with mlflow.start_span("mine") as span:
                span.set_inputs({"question": question})
                await self.step.acall(question=question)
            return await self.step.acall(question=question)

    dspy.configure(lm=EchoLM(aduring=AllOpen(6)))
    await asyncio.gather(*(Program().acall(question=each) for each in MARKERS))

    expected = [
        ("Program.forward", each, [("mine", each, [predict_tree(each)]), predict_tree(each)]) for each in MARKERS
    ]
    assert expected == sorted(tree(trace, marker) for trace in recorded())


def test_syncify_inside_a_module(recorded):
    """``dspy.syncify`` runs an async program from sync code, below the caller."""

    class Outer(dspy.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, question):
            return self.inner(questions=[question], name=question)

    Outer(dspy.syncify(Gather(), in_place=False))(question="@a")
    Outer(dspy.syncify(Gather()))(question="@b")

    first, second = (tree(trace, marker) for trace in recorded())
    gather = ("Gather.forward", "@b", [predict_tree("@b")])
    assert ("Outer.forward", "@b", [gather]) == second
    # The wrapper calls aforward itself, which is no DSPy call: its predictors are below the wrapper.
    assert ("Outer.forward", "@a", [("SyncWrapper.forward", "@a", [predict_tree("@a")])]) == first


def test_event_loops_in_several_threads(recorded):
    """An event loop per thread, all running at once: a trace per call."""
    gate = threading.Barrier(3, timeout=TIMEOUT)

    def loop(each):
        gate.wait()
        asyncio.run(Gather(Chain()).acall(questions=[f"{each}-1", f"{each}-2"], name=each))

    threads = [threading.Thread(target=loop, args=(each,)) for each in MARKERS[:3]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)

    expected = [("Gather.forward", each, [chain_tree(f"{each}-1"), chain_tree(f"{each}-2")]) for each in MARKERS[:3]]
    assert expected == sorted(tree(trace, marker, sort=True) for trace in recorded())


def test_trio(recorded, monkeypatch):
    """Modules on trio, through anyio, give a trace each.

    DSPy's LMs call ``asyncio.to_thread`` in ``acall``, so predictors run there through ``asyncify``, whose limiter
    belongs to the first backend that a process uses.
    """
    monkeypatch.setattr(importlib.import_module("dspy.utils.asyncify"), "_limiter", None)
    dspy.configure(lm=EchoLM(during=Barrier(3)))
    step = dspy.Predict("question -> answer")

    class Program(dspy.Module):
        async def aforward(self, question):
            async with anyio.create_task_group() as group:
                group.start_soon(self.call, question)

        async def call(self, question):
            await dspy.asyncify(step)(question=question)

    async def main():
        async with anyio.create_task_group() as group:
            for each in MARKERS[:3]:
                group.start_soon(lambda question: Program().acall(question=question), each)

    anyio.run(main, backend="trio")

    assert [("Program.forward", each, [predict_tree(each)]) for each in MARKERS[:3]] == sorted(
        tree(trace, marker) for trace in recorded()
    )


def react_answers(field, marker):
    """An agent that searches once and then finishes."""
    if field == "next_tool_name":
        return "finish" if marker.endswith("found") else "search"
    if field == "next_tool_args":
        return "{}" if marker.endswith("found") else f'{{"query": "{marker}"}}'
    return marker


async def test_react_with_async_tools(recorded):
    """ReAct's predictors and async tools are below the agent; ``finish`` is no tool; agents at once stay apart."""
    both_open = AllOpen(3)

    async def search(query: str) -> str:
        """Looks a query up."""
        await both_open(query)
        return f"{query}.found"

    async def call(question):
        agent = dspy.ReAct("question -> answer", tools=[search])
        return await agent.acall(question=question)

    dspy.configure(lm=EchoLM(answer=react_answers))
    await asyncio.gather(*(call(each) for each in MARKERS[:3]))

    shown = [tree(trace) for trace in recorded()]
    expected = (
        "ReAct.forward",
        [
            predict_tree(),
            ("Tool.search", []),
            predict_tree(),
            ("ChainOfThought.forward", [predict_tree()]),
        ],
    )
    assert [expected] * 3 == shown
    for trace in recorded():
        root, tool = (next(s for s in trace.data.spans if s.name == name) for name in ("ReAct.forward", "Tool.search"))
        assert {"query": root.inputs["question"]} == tool.inputs
        assert f"{root.inputs['question']}.found" == tool.outputs
