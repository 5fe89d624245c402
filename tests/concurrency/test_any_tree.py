"""Any tree of calls, over any mix of primitives, several at once: the stored traces are the plan."""

import asyncio
import concurrent.futures
import os
from dataclasses import dataclass

import dspy
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import dspy_mlflow_async
from clean import assert_context_is_clean
from dspy_mlflow_async import propagate
from dspy_mlflow_async.testing import capture_traces, tree
from echo import TIMEOUT, EchoLM, marker

WAYS = (
    "sequential",
    "gather",
    "asyncify",
    "parallel",
    "one_thread",
    "to_thread",
    "propagate",
    "our_pool",
    "task_group",
)
ENDS = ("ok", "error", "cancelled")


@dataclass(frozen=True)
class Plan:
    """A module that calls others in some way and then ends in some way; a leaf calls the LM.

    Attributes:
        way: How the children are called.
        children: The plans of what it calls.
        end: For a leaf: ``ok``, ``error`` or ``cancelled``.
    """

    way: str = "sequential"
    children: tuple["Plan", ...] = ()
    end: str = "ok"


LEAVES = st.builds(Plan, end=st.sampled_from(ENDS))
PLANS = st.recursive(
    LEAVES,
    lambda inner: st.builds(
        Plan, way=st.sampled_from(WAYS), children=st.lists(inner, min_size=1, max_size=3).map(tuple)
    ),
    max_leaves=8,
)


class Leaf(dspy.Module):
    """Calls a predictor, whose LM answers, fails or is cancelled as its marker says."""

    def __init__(self):
        super().__init__()
        self.step = dspy.Predict("question -> answer")

    def forward(self, name):
        return self.step(question=name)

    async def aforward(self, name):
        return await self.step.acall(question=name)


class Node(dspy.Module):
    """Calls its children in its way, and swallows what they raise."""

    def __init__(self, plan, name):
        super().__init__()
        self.calls = [program_of(child, f"{name}.{n}") for n, child in enumerate(plan.children)]
        self.way = plan.way

    def forward(self, name):
        if self.way in {"gather", "asyncify", "to_thread", "task_group"}:
            asyncio.run(self._async(self.way))
        else:
            getattr(self, f"_{self.way}")()
        return dspy.Prediction(answer=name)

    async def aforward(self, name):
        if self.way in {"gather", "asyncify", "to_thread", "task_group"}:
            await self._async(self.way)
        elif self.way == "sequential":
            for program, child in self.calls:
                await _aswallow(program.acall(name=child))
        else:
            await asyncio.to_thread(getattr(self, f"_{self.way}"))
        return dspy.Prediction(answer=name)

    async def _async(self, way):
        if way == "gather":
            calls = [program.acall(name=child) for program, child in self.calls]
        elif way == "asyncify":
            calls = [dspy.asyncify(program)(name=child) for program, child in self.calls]
        elif way == "to_thread":
            calls = [asyncio.to_thread(program, name=child) for program, child in self.calls]
        else:
            tasks = [asyncio.create_task(program.acall(name=child)) for program, child in self.calls]
            await asyncio.wait(tasks)
            calls = tasks
        await asyncio.gather(*(_aswallow(call) for call in calls))

    def _sequential(self):
        for program, child in self.calls:
            _swallow(program, child)

    def _parallel(self, num_threads=3):
        dspy.Parallel(num_threads=num_threads, disable_progress_bar=True, max_errors=1000)(
            [(lambda name, program=program: _swallow(program, name), {"name": child}) for program, child in self.calls]
        )

    def _one_thread(self):
        self._parallel(1)

    def _propagate(self):
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            bound = propagate(_swallow)
            _wait(pool.submit(bound, program, child) for program, child in self.calls)

    def _our_pool(self):
        with dspy_mlflow_async.ThreadPoolExecutor(3) as pool:
            _wait(pool.submit(_swallow, program, child) for program, child in self.calls)


def _wait(futures):
    for future in list(futures):
        future.result(TIMEOUT)


class FailedError(Exception):
    """What a failing leaf raises."""


def _swallow(program, name):
    try:
        return program(name=name)
    except (FailedError, asyncio.CancelledError):
        return None


async def _aswallow(call):
    try:
        return await call
    except (FailedError, asyncio.CancelledError):
        return None


def program_of(plan, name):
    """The program of a plan, and the name to call it with: it says how a leaf ends."""
    return (Node(plan, name), name) if plan.children else (Leaf(), f"{name}-{plan.end}")


def end_as_named(each):
    """What the LM does with a leaf's marker."""
    if each.endswith("-error"):
        raise FailedError(each)
    if each.endswith("-cancelled"):
        raise asyncio.CancelledError


def expected(plan, name):
    """The tree that a plan must leave: names, markers and outcomes."""
    if plan.children:
        below = [expected(child, f"{name}.{n}") for n, child in enumerate(plan.children)]
        return ("Node.forward", name, "ok", below)
    name = f"{name}-{plan.end}"
    calls = [("ChatAdapter.format", name, "ok", []), ("EchoLM.__call__", name, plan.end, [])]
    if plan.end == "ok":
        calls.append(("ChatAdapter.parse", name, "ok", []))
    return ("Leaf.forward", name, plan.end, [("Predict.forward", name, plan.end, calls)])


def root_marker(span):
    """The name that a call was given."""
    return span.inputs["name"] if "name" in span.inputs else marker(span)


def by_name(node):
    """A tree with its modules in order of their names; a predictor's own steps stay in theirs."""
    name, each, outcome, below = node
    below = [by_name(child) for child in below]
    return (name, each, outcome, sorted(below, key=lambda child: child[1]) if name == "Node.forward" else below)


def run(plans, way):
    """Call the programs of some plans, all at once."""
    programs = [program_of(plan, f"@p{n}") for n, plan in enumerate(plans)]
    if way == "threads":
        with concurrent.futures.ThreadPoolExecutor(len(plans)) as pool:
            _wait([pool.submit(_swallow, program, name) for program, name in programs])
    else:

        async def main():
            await asyncio.gather(*(_aswallow(program.acall(name=name)) for program, name in programs))

        asyncio.run(main())


def check(plans, way, traces):
    """The traces of some plans are theirs."""
    run(plans, way)
    assert_context_is_clean()

    assert sorted(by_name(expected(plan, f"@p{n}")) for n, plan in enumerate(plans)) == sorted(
        by_name(tree(trace, root_marker, "outcome")) for trace in traces()
    )


@pytest.fixture(autouse=True)
def _lm(_leaves_nothing_behind):
    dspy.configure(
        lm=EchoLM(during=end_as_named),
        adapter=dspy.ChatAdapter(use_json_adapter_fallback=False),
        max_errors=1000,
        # asyncify shares one limiter between event loops, and anyio raises when one wakes a waiter of another.
        async_max_workers=10_000,
    )


@settings(
    max_examples=int(os.environ.get("TREES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(plans=st.lists(PLANS, min_size=1, max_size=4), way=st.sampled_from(["threads", "tasks"]))
@example(
    plans=[Plan("parallel", (Plan("gather", (Plan(end="cancelled"), Plan(end="error"))), Plan()))] * 3, way="tasks"
)
def test_any_trees_at_once(plans, way):
    """Generated trees, run at the same time, each give the trace that was planned."""
    with capture_traces() as traces:
        dspy_mlflow_async.autolog(silent=True)
        check(plans, way, lambda: traces)


FIXED = Plan(
    "gather",
    (
        Plan("parallel", (Plan(), Plan("to_thread", (Plan(), Plan(end="error"))), Plan(end="cancelled"))),
        Plan("asyncify", (Plan("propagate", (Plan(), Plan())), Plan("sequential", (Plan(), Plan())))),
        Plan("our_pool", (Plan("task_group", (Plan(), Plan())), Plan("one_thread", (Plan(), Plan())))),
    ),
)


@pytest.mark.parametrize("way", ["threads", "tasks"])
def test_one_big_tree_in_the_store(recorded, way):
    """A tree of every primitive, four times at once, read back from the store."""
    check([FIXED] * 4, way, recorded)
