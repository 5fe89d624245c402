"""Scopes inside scopes, and one scope object in many places: each trace is the affair of the scope that it is of."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

from apps import meta, program

from clean import assert_context_is_clean
from dspy_mlflow_async import request
from dspy_mlflow_async.spans import tracer
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, chain_tree


async def test_one_request_object_in_many_tasks(traces):
    """Tasks that are in blocks of one object at the same time, and leave in the order they came, keep apart."""
    shared = request("job", session_id="s")
    entered, leaves = [asyncio.Event() for _ in range(3)], [asyncio.Event() for _ in range(3)]

    async def one(number):
        async with shared as r:
            await program.acall(question=f"@in{number}")
            entered[number].set()
            await asyncio.wait_for(leaves[number].wait(), TIMEOUT)
        assert_context_is_clean()
        await program.acall(question=f"@after{number}")
        return r

    tasks = []
    for number in range(3):
        tasks.append(asyncio.create_task(one(number)))
        await asyncio.wait_for(entered[number].wait(), TIMEOUT)
    for number in range(3):  # first in, first out
        leaves[number].set()
        await asyncio.wait_for(tasks[number], TIMEOUT)
    records = [task.result() for task in tasks]

    jobs = [trace for trace in traces if meta(trace, "session") == "s"]
    assert [("job", [chain_tree()])] * 3 == [tree(trace) for trace in jobs]
    assert [trace.info.trace_id for trace in jobs] == [r.trace_id for r in records]
    assert [2, 2, 2] == [len(r.lm_calls) for r in records]
    assert [chain_tree()] * 3 == [tree(trace) for trace in traces if meta(trace, "session") is None]


def test_one_request_object_in_many_threads(traces):
    """So do threads."""
    shared = request("job", session_id="s")
    inside = threading.Barrier(4, timeout=TIMEOUT)

    def one(number):
        with shared as r:
            program(question=f"@in{number}")
            inside.wait()
        assert_context_is_clean()
        return r.trace_id

    with ThreadPoolExecutor(4) as pool:
        told = [future.result(TIMEOUT) for future in [pool.submit(one, number) for number in range(4)]]

    assert [("job", [chain_tree()])] * 4 == [tree(trace) for trace in traces]
    assert sorted(told) == sorted(trace.info.trace_id for trace in traces)


def test_a_block_of_many_that_ends_elsewhere(traces):
    """Where one of several open blocks ends in a foreign context, it touches none of the others, and is abandoned."""
    shared = request("job")

    def hold(marker):
        with shared:
            program(question=marker)
            yield

    here, there = hold("@here"), hold("@there")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(next, there).result(TIMEOUT)
        next(here)
        with ThreadPoolExecutor(1) as another:
            another.submit(there.close).result(TIMEOUT)
        with shared:
            program(question="@inner")
        here.close()
    assert_context_is_clean()
    gc.collect()  # the thread's context is gone, and the block's scope with it
    tracer.end_abandoned()

    first, second = traces
    assert ("job", "abandoned", [chain_tree(), ("job", "ok", [chain_tree()])]) == shape(first)
    assert ("job", "abandoned", [chain_tree()]) == shape(second)


def shape(trace):
    """The tree, with the outcome of each job."""
    name, children = tree(trace)
    outcomes = iter([span.get_attribute("outcome") for span in trace.data.spans if span.name == name])

    def with_outcome(node):
        return (node[0], next(outcomes), [with_outcome(child) for child in node[1]]) if node[0] == name else node

    return with_outcome((name, children))
