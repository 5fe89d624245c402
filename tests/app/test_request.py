"""A request: what holds inside it, what does not outside, and what it tells afterwards."""

import asyncio
import contextvars
import functools
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType

import dspy
import mlflow
import pytest
from apps import unseen

from dspy_mlflow_async import request
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
from dspy_mlflow_async.requests import record
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Chain, EchoLM, chain_tree, predict_tree

ANSWER = "[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"


def session(trace):
    return trace.info.trace_metadata.get("mlflow.trace.session")


def user(trace):
    return trace.info.trace_metadata.get("mlflow.trace.user")


def test_values_hold_inside_and_nowhere_else(traces):
    """Session, user, tags and metadata are those of the traces of the block, and of no other."""
    program = Chain()

    program(question="@before")
    with request(session_id="s-1", user="ada", tags={"tier": "gold"}, metadata={"build": 7}) as r:
        program(question="@inside")
    program(question="@after")

    before, inside, after = traces
    assert (None, None) == (session(before), session(after))
    assert ("s-1", "ada") == (session(inside), user(inside))
    assert ("gold", "7") == (inside.info.tags["tier"], inside.info.trace_metadata["build"])
    assert chain_tree() == tree(inside)
    assert inside.info.trace_id == r.trace_id


async def test_requests_at_once_keep_apart(traces):
    """A hundred requests in one event loop: each trace has its own session, each record its own calls."""
    open_calls, everybody_in = [], asyncio.Event()

    async def meet(marker):
        open_calls.append(marker)
        if len(open_calls) == 100:
            everybody_in.set()
        await asyncio.wait_for(everybody_in.wait(), TIMEOUT)

    async def one(number):
        async with request(session_id=f"s-{number}", user=f"u-{number}") as r:
            with dspy.context(lm=EchoLM(aduring=meet)):
                await dspy.Predict("question -> answer").acall(question=f"@{number}")
        return r

    records = await asyncio.gather(*(one(number) for number in range(100)))

    assert {f"s-{n}": (f"u-{n}", records[n].trace_id) for n in range(100)} == {
        session(trace): (user(trace), trace.info.trace_id) for trace in traces
    }
    assert [predict_tree()] * 100 == [tree(trace) for trace in traces]
    assert [10 + len(f"@{n}") for n in range(100)] == [r.usage["total_tokens"] for r in records]
    assert [1] * 100 == [len(r.lm_calls) for r in records]


def test_threads_of_dspy_are_inside(traces):
    """Calls in the worker threads of ``dspy.Parallel`` have the request's session and count in it."""
    program = Chain()

    with request(session_id="pool") as r:
        dspy.Parallel(num_threads=4, disable_progress_bar=True)([(program, {"question": f"@{n}"}) for n in range(8)])

    assert ["pool"] * 8 == [session(trace) for trace in traces]
    assert 16 == len(r.lm_calls)
    assert sorted(r.trace_ids) == sorted(trace.info.trace_id for trace in traces)


async def test_a_named_request_is_one_trace(traces):
    """With a name, all calls of the block are below one span: those of tasks begun before it, and the user's spans."""
    program = Chain()

    async with request("answer", session_id="s") as r:
        await asyncio.gather(program.acall(question="@a"), asyncio.to_thread(program, question="@b"))
        with mlflow.start_span("own"):
            await program.acall(question="@c")

    (trace,) = traces
    assert ("answer", ["Chain.forward", "Chain.forward", "own"]) == (
        tree(trace)[0],
        sorted(child[0] for child in tree(trace)[1]),
    )
    assert ("s", r.trace_id) == (session(trace), trace.info.trace_id)


def test_a_named_request_without_calls_is_no_trace(traces):
    """A block that calls nothing makes no trace, and has none to tell of."""
    with request("idle") as r:
        assert mlflow.get_current_active_span() is None

    assert [] == traces
    assert (None, [], {}, 0.0) == (r.trace_id, r.lm_calls, r.usage, r.cost)


def test_the_current_trace_can_be_updated(traces):
    """Once it has begun, the span around the block is MLflow's current one."""
    with request("answer"):
        Chain()(question="@a")
        mlflow.update_current_trace(tags={"seen": "yes"})

    assert "yes" == traces[0].info.tags["seen"]


def test_requests_nest(traces):
    """An inner request adds to what holds, and both tell of its calls."""
    program = Chain()

    with request("outer", session_id="s", tags={"a": "1"}) as outer:
        program(question="@a")
        with request("inner", user="ada") as inner:
            program(question="@b")

    (trace,) = traces
    assert ("outer", [chain_tree(), ("inner", [chain_tree()])]) == tree(trace)
    assert (4, 2) == (len(outer.lm_calls), len(inner.lm_calls))
    assert outer.trace_id == inner.trace_id


def test_a_request_can_be_used_again(traces):
    """The same object gives a scope of its own to each block, also inside itself."""
    again = request("answer", session_id="s")

    with again as outer, again as inner:
        Chain()(question="@a")
    with again as later:
        Chain()(question="@b")
    Chain()(question="@after")

    assert [("answer", "s"), ("answer", "s"), ("Chain.forward", None)] == [
        (tree(trace)[0], session(trace)) for trace in traces
    ]
    assert (2, 2, 2) == (len(outer.lm_calls), len(inner.lm_calls), len(later.lm_calls))
    assert outer.trace_id == inner.trace_id != later.trace_id


def test_an_error_ends_the_span_and_passes(traces):
    """What the block raises is on the span around it, and comes out unchanged."""
    error = RuntimeError("broken")

    def run():
        with request("answer"):
            Chain()(question="@a")
            raise error

    with pytest.raises(RuntimeError) as raised:
        run()

    assert error is raised.value
    assert ("answer", "error", "ERROR") == tree(traces[0], "outcome", "status")[:3]


async def test_a_cancelled_request(traces):
    """A block that is cancelled ends its spans with that outcome."""
    started = asyncio.Event()

    async def hang(marker):
        started.set()
        await asyncio.Event().wait()

    async def run():
        async with request("answer"):
            with dspy.context(lm=EchoLM(aduring=hang)):
                await dspy.Predict("question -> answer").acall(question="@a")

    task = asyncio.create_task(run())
    await asyncio.wait_for(started.wait(), TIMEOUT)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert ("answer", "cancelled") == tree(traces[0], "outcome")[:2]


def test_a_block_that_ends_elsewhere(traces):
    """A request that is left in a foreign context touches nothing there."""
    block = request("answer", session_id="mine", experiment_id="0", sample=0.999)
    elsewhere = contextvars.copy_context()
    contextvars.copy_context().run(block.__enter__)

    def leave_amid_another():
        with request(session_id="other"):
            block.__exit__(None, None, None)
            Chain()(question="@a")

    elsewhere.run(leave_amid_another)

    assert ["other"] == [session(trace) for trace in traces]


def test_the_calls_in_order(traces):
    """``lm_calls`` tells model, latency, tokens, cache hit and outcome of each call, in order."""

    def fail(marker):
        if marker == "@bad":
            raise ValueError("no answer")

    fine, failing = EchoLM(model="echo/fine"), EchoLM(model="echo/bad", during=fail)
    predict = dspy.Predict("question -> answer")
    with request() as r:
        with dspy.context(lm=fine):
            predict(question="@good")
        with dspy.context(lm=failing), pytest.raises(ValueError, match="no answer"):
            predict(question="@bad")

    good, bad, *again = r.lm_calls  # DSPy 3.3 asks once more, with another adapter
    assert {("echo/bad", "error")} >= {(call.model, call.outcome) for call in again}
    assert ("echo/fine", "ok", False, 15) == (good.model, good.outcome, good.cache_hit, good.tokens["total_tokens"])
    assert ("echo/bad", "error", None, {}) == (bad.model, bad.outcome, bad.cache_hit, bad.tokens)
    assert 0 < good.latency < TIMEOUT
    assert good.began < bad.began


def test_cached_answers_cost_nothing(traces):
    """An answer from DSPy's cache is a call, with no tokens, and known as such."""
    reply = {"content": ANSWER, "usage": {"prompt_tokens": 1000, "completion_tokens": 100}}
    with LocalEndpoint(lambda body: reply) as endpoint:
        lm = dspy.LM("openai/gpt-4o-mini", api_base=endpoint.api_base, api_key="none", cache=True)
        with dspy.context(lm=lm), request() as r:
            for _ in range(2):
                dspy.Predict("question -> answer")(question=f"@{id(r)}")

    assert [(False, 1100), (True, 0)] == [(c.cache_hit, c.tokens.get("total_tokens", 0)) for c in r.lm_calls]
    assert 1100 == r.usage["total_tokens"]
    assert pytest.approx(0.00021) == r.cost


def test_calls_beyond_the_cap_are_counted(traces, monkeypatch):
    """Memory is bounded: the calls beyond the cap are added up by model, from many threads, and none is lost."""
    monkeypatch.setattr(record, "MAX_LM_CALLS", 10)
    monkeypatch.setattr(record, "FOLD_AT", 4)
    witness = record.Record()
    call = record.LmCall("m", 1.0, 0.1, {"total_tokens": 3}, False, "ok")
    start = threading.Barrier(8, timeout=TIMEOUT)

    def many():
        start.wait()
        for _ in range(1000):
            witness.lm_call_ended(call)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(many) for _ in range(8)]:
            future.result(TIMEOUT)

    assert 10 == len(witness.lm_calls)
    assert 7990 == witness.lm_calls_left_out
    assert {"total_tokens": 24000} == witness.usage
    assert sys.getrefcount(call) < 100 + 18  # what it keeps of them


def test_what_happened_is_told_without_traces(traces):
    """With tracing suppressed the request still tells of its LM calls."""
    with mlflow.tracing.context(enabled=False), request() as r:
        Chain()(question="@a")

    assert [] == traces
    assert (None, 2) == (r.trace_id, len(r.lm_calls))


def test_redaction_of_one_request(traces):
    """``redact`` holds for the spans of the block, and for no other."""
    program = Chain()

    with request(redact=lambda value: "[gone]" if isinstance(value, str) and "@secret" in value else value):
        program(question="@secret")
    program(question="@secret")

    redacted, plain = traces
    assert "[gone]" == redacted.data.spans[0].inputs["question"]
    assert "@secret" not in redacted.to_json().replace("[gone]", "")
    assert "@secret" == plain.data.spans[0].inputs["question"]


def test_redaction_reaches_what_is_said_of_a_request(traces):
    """Session, user, tags and metadata, like what spans hold."""
    with request("answer", redact=lambda value: "[gone]", session_id="s", user="ada", tags={"tier": "gold"}):
        Chain()(question="@secret")

    (trace,) = traces
    assert ("[gone]", "[gone]", "[gone]") == (session(trace), user(trace), trace.info.tags["tier"])
    assert "@secret" not in trace.to_json()


def test_long_ids_are_cut_and_told_apart(traces):
    """A session of 10 KiB is cut, with a mark, and two that begin alike stay two."""
    for end in "ab":
        with request(session_id="x" * 10240 + end):
            Chain()(question="@a")

    first, second = (session(trace) for trace in traces)
    assert (250, 250) == (len(first), len(second))
    assert "… [cut: 10241 characters, sha256 " in first
    assert first != second


async def never(*args):
    return "nobody awaits it"


class AlsoNever:
    async def __call__(self, *args):
        return "nor this"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sample": 1.5}, ValueError, "from 0 to 1"),
        ({"sample": -0.1}, ValueError, "from 0 to 1"),
        ({"sample": float("nan")}, ValueError, "from 0 to 1"),
        ({"sample": "half"}, TypeError, "a number from 0 to 1"),
        ({"sample": True}, TypeError, "a number from 0 to 1"),
        ({"sample": {"okay": 1.0}}, ValueError, "not 'okay'"),
        ({"sample": {"ok": 2}}, ValueError, "sample\\['ok'\\] must be from 0 to 1"),
        ({"sample": {"slow": -1}}, ValueError, "0 or more seconds"),
        ({"session_id": 1.5}, TypeError, "session_id"),
        ({"tags": ["a"]}, TypeError, "tags"),
        ({"metadata": "a"}, TypeError, "metadata"),
        ({"redact": "a"}, TypeError, "redact"),
        ({"experiment_id": ""}, ValueError, "experiment_id"),
        ({"name": 5}, TypeError, "name"),
        ({"session_id": never}, TypeError, "session_id must not be async"),
        ({"user": functools.partial(never, 1)}, TypeError, "user must not be async"),
        ({"experiment_id": AlsoNever()}, TypeError, "experiment_id must not be async"),
        ({"tags": never}, TypeError, "tags must not be async"),
        ({"metadata": {"a": "1", "b": never}}, TypeError, "metadata\\['b'\\] must not be async"),
        ({"redact": never}, TypeError, "redact must not be async"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, error, message):
    """What cannot work is refused where it is said, not inside a program."""
    with pytest.raises(error, match=message):
        request(**arguments)


def test_each_function_that_raises_is_reported_once(traces, caplog):
    """Two lambdas of one place in the code are two; one that is made anew for each request is one."""
    first, second = unseen(lambda: 1 / 0), unseen(lambda: {}["user"])
    with caplog.at_level(logging.WARNING, "dspy_mlflow_async"):
        for _ in range(3):
            with request(session_id=FunctionType(first, {}), user=FunctionType(second, {})):
                pass

    assert ["ZeroDivisionError", "KeyError"] == [record.args[1] for record in caplog.records]


def test_values_that_are_not_texts(traces):
    """Numbers become texts, None and empty texts say nothing, and a function that raises says nothing either."""
    with request(session_id=17, user=lambda: 1 / 0, tags={"n": 3, "none": None}, metadata=lambda: {"k": 1.5}):
        Chain()(question="@a")

    (trace,) = traces
    assert ("17", None) == (session(trace), user(trace))
    assert ("3", "1.5") == (trace.info.tags["n"], trace.info.trace_metadata["k"])
    assert "none" not in trace.info.tags
