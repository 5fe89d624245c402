"""Scopes inside scopes, and one scope object in many places: each trace is the affair of the scope that it is of."""

import asyncio
import gc
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest
from apps import asking_app, attribute, client, fastapi, meta, program
from fastapi.responses import StreamingResponse

from clean import assert_context_is_clean
from dspy_mlflow_async import request, wrap
from dspy_mlflow_async.asgi import TracingMiddleware
from dspy_mlflow_async.seams import mlflow_spans as seam
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


# --- the outer scope decides --------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(store_uri):
    """An experiment that only the inner scope knows."""
    return mlflow.create_experiment(f"elsewhere-{uuid.uuid4()}")


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
def test_the_first_call_does_not_decide_for_the_request(traces, is_first, elsewhere):
    """An inner scope says nothing about the trace that the outer one begins, whichever of them calls first."""
    inner = wrap(program, session_id="in", user="in", tags={"in": "1"}, metadata={"in": "1"}, experiment_id=elsewhere)

    with request("outer", session_id="out", tags={"out": "1"}) as outer:
        if not is_first:
            program(question="@a")
        inner(question="@b")

    (trace,) = traces
    assert outer.trace_id == trace.info.trace_id
    assert ("outer", "out", None) == (tree(trace)[0], meta(trace, "session"), meta(trace, "user"))
    assert ("1", None, None) == (
        trace.info.tags.get("out"), trace.info.tags.get("in"), trace.info.trace_metadata.get("in")
    )  # fmt: skip
    assert elsewhere != trace.info.experiment_id


@pytest.mark.parametrize("sample", [0.0, {"ok": 0.0, "error": 0.0}], ids=["ratio", "outcome"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
def test_an_inner_sample_decides_nothing(stored, sampled, is_first, sample):
    """``sample`` inside a request that is one trace leaves out nothing of it."""
    inner = wrap(program, sample=sample)

    with request("outer"):
        if not is_first:
            program(question="@a")
        inner(question="@b")
        program(question="@c")

    assert [("outer", [chain_tree()] * (2 if is_first else 3))] == [tree(trace) for trace in stored()]
    assert 0 == sampled()


def test_a_ratio_of_the_request_holds_for_an_inner_scope(traces, sampled):
    """A request that its own ratio leaves out is left out, whatever an inner scope would keep."""
    with request("outer", sample=0.0), request(sample=0.999):
        program(question="@a")

    assert ([], 1) == (traces, sampled())


async def test_bad_requests_are_kept_over_an_inner_ratio(stored, sampled):
    """``TracingMiddleware(sample={...})`` keeps what failed, also where a wrapped program has a ratio of its own."""
    app = fastapi(session_id="x-session-id", sample={"ok": 0.0, "error": 1.0})
    inner = wrap(program, sample=0.0)

    @app.get("/{how}")
    async def ask(how: str):
        await inner.acall(question="@a")
        if how == "raise":
            raise RuntimeError(how)

    async with client(app, raise_app_exceptions=False) as http:
        for how in ("fine", "raise", "good"):
            await http.get(f"/{how}", headers={"x-session-id": how})

    assert [("raise", "error")] == [(meta(trace, "session"), attribute(trace, "outcome")) for trace in stored()]
    assert 2 == sampled()


async def test_the_id_that_a_stream_tells_is_asked_of_the_outer_scope(traces):
    """A streamed response tells the id of the trace that the middleware will begin, not of what an inner scope says."""
    app = fastapi()

    @app.get("/stream")
    async def stream():
        async def words():
            yield (await program.acall(question="@a")).answer

        with request(sample=0.0):
            return StreamingResponse(words())

    @app.get("/within")
    async def within():
        async def words():
            with request(sample=0.0):
                yield (await program.acall(question="@a")).answer

        return StreamingResponse(words())

    async with client(app) as http:
        told = [(await http.get(path)).headers["x-trace-id"] for path in ("/stream", "/within")]

    assert told == [trace.info.trace_id for trace in traces]


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
    app = TracingMiddleware(asking_app(traceparent=True), traceparent=True)
    parent = f"00-{'5' * 32}-b7ad6b7169203331-01"

    async with client(app) as http:
        await asyncio.gather(*(http.post("/ask/a", headers={"traceparent": parent}) for _ in range(3)))

    (trace,) = stored()
    names = [span.name for span in trace.data.spans]
    assert 6 == names.count("POST /ask/{topic}")
    assert 3 == names.count("Chain.forward")
