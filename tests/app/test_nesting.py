"""Scopes inside scopes, and one scope object in many places: each trace is the affair of the scope that it is of."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest
from apps import asking_app, client, fastapi, meta, program

from clean import assert_context_is_clean
from dspy_mlflow_async import request
from dspy_mlflow_async.asgi import TracingMiddleware
from dspy_mlflow_async.seams import mlflow as seam
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


# --- middleware in middleware -------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer_takes_up", [True, False])
async def test_a_mounted_app_with_middleware_of_its_own(traces, outer_takes_up):
    """Two of the middleware, one in the other, are two spans of one trace, with a caller's trace or without."""
    app = fastapi(session_id="x-session-id", traceparent=outer_takes_up)
    app.mount("/sub", asking_app())

    async with client(app) as http:
        with mlflow.start_span("caller") as caller:
            parent = f"00-{caller.trace_id[3:]}-{caller.span_id}-01"
            before = seam.detach()  # the server is another process
            answers = await asyncio.gather(
                *(http.post("/sub/ask/a", headers={"traceparent": parent, "x-session-id": "s"}) for _ in range(2))
            )
            seam.reattach(before)

    one = ("POST /sub/ask/{topic}", [("POST /ask/{topic}", [chain_tree()])])
    wholes = [("caller", [one, one])] if outer_takes_up else [one, one, ("caller", [])]
    assert wholes == [tree(trace) for trace in traces]
    told = {answer.headers["x-trace-id"] for answer in answers}
    assert told == {trace.info.trace_id for trace in traces if tree(trace)[1]}


async def test_a_caller_that_mlflow_does_not_know_and_two_middlewares(stored):
    """No span is lost when the inner of two ends first: MLflow keeps the caller's trace as long as the outer needs."""
    app = TracingMiddleware(asking_app())
    parent = f"00-{'5' * 32}-b7ad6b7169203331-01"

    async with client(app) as http:
        await asyncio.gather(*(http.post("/ask/a", headers={"traceparent": parent}) for _ in range(3)))

    (trace,) = stored()
    names = [span.name for span in trace.data.spans]
    assert 6 == names.count("POST /ask/{topic}")
    assert 3 == names.count("Chain.forward")
