"""What goes wrong in the tracer or beside it changes nothing for the program, and nothing that we hold grows."""

import asyncio
import contextlib
import gc
import sys
import threading
import types
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import dspy
import mlflow
import pytest
import tqdm
from dspy.utils.callback import BaseCallback
from mlflow.tracing.trace_manager import InMemoryTraceManager

import dspy_mlflow_async
from clean import assert_context_is_clean
from dspy_mlflow_async import TracingCallback, guard
from dspy_mlflow_async.spans import describe, tracer
from dspy_mlflow_async.testing import capture_traces, tree
from echo import TIMEOUT, Chain, EchoLM, chain_tree, marker, predict_tree

HANDLERS = [name for name in dir(BaseCallback) if name.startswith("on_")]


@pytest.fixture
def forgiving(monkeypatch):
    """Internal errors are counted and logged, as in production, and this test may have some."""
    monkeypatch.delenv("DSPY_MLFLOW_ASYNC_STRICT")
    guard.start_afresh()
    yield
    guard.start_afresh()


class Raising(BaseCallback):
    """Another tracer, all of whose handlers raise."""


def _raise(self, **kwargs):
    raise RuntimeError("a fault of this callback")


for _name in HANDLERS:
    setattr(Raising, _name, _raise)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_exceptions_in_another_callback(traces, order):
    """Before us or after us in the list, another callback that raises costs us no span."""
    both = [*dspy.settings.callbacks, Raising()]
    dspy.configure(callbacks=[both[n] for n in order])

    answer = Chain()(question="@a").answer
    dspy.Parallel(num_threads=2, disable_progress_bar=True)([(Chain(), {"question": "@b"})])

    assert "@a" == answer
    assert [chain_tree("@a"), chain_tree("@b")] == [tree(trace, marker) for trace in traces]


class Interrupting(BaseCallback):
    """A callback in whose handler the user presses Ctrl-C."""

    def __init__(self, handler):
        setattr(self, handler, self._interrupt)
        self.done = False

    def _interrupt(self, **kwargs):
        if not self.done:
            self.done = True
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("order", "handler"),
    [
        ([0, 1], "on_lm_start"),
        ([0, 1], "on_lm_end"),
        ([0, 1], "on_module_start"),
        ([0, 1], "on_module_end"),
        ([1, 0], "on_lm_start"),
        ([1, 0], "on_lm_end"),
        ([1, 0], "on_module_start"),
        ([1, 0], "on_module_end"),
    ],
)
def test_keyboard_interrupt_in_a_handler(traces, handler, order):
    """It passes; and whichever handlers DSPy then leaves out, every span ends and the next call starts clean.

    An interrupted start handler gets no end: DSPy calls them before its ``try``.
    """
    both = [*dspy.settings.callbacks, Interrupting(handler)]
    dspy.configure(callbacks=[both[n] for n in order])

    def interrupted_then_another():
        with pytest.raises(KeyboardInterrupt):
            Chain()(question="@a")
        dspy.configure(callbacks=[c for c in both if isinstance(c, TracingCallback)])
        Chain()(question="@next")

    copy_context().run(interrupted_then_another)
    gc.collect()
    tracer.end_abandoned()

    assert chain_tree("@next") in [tree(trace, marker) for trace in traces]
    outcomes = {tree(trace, "outcome")[1] for trace in traces}
    assert outcomes <= {"ok", "cancelled", "abandoned"}
    assert {} == dict(InMemoryTraceManager.get_instance()._traces)


@pytest.mark.parametrize(
    "broken", ["describe_module", "describe_lm", "describe_adapter", "describe_outputs", "describe_tool"]
)
def test_a_fault_of_our_own(traces, forgiving, monkeypatch, caplog, broken):
    """An error inside a handler of ours is logged once, counted, and changes no result; later calls are whole."""

    def fail(*args):
        raise ZeroDivisionError("our own")

    tool = dspy.Tool(lambda query: query, name="search")
    with monkeypatch.context() as patch:
        patch.setattr(describe, broken, fail)
        answers = [Chain()(question="@a").answer for _ in range(3)]
        found = tool(query="@t")

    assert (["@a"] * 3, "@t") == (answers, found)
    assert guard.internal_errors() >= 1
    logged = [record for record in caplog.records if record.name == "dspy_mlflow_async"]
    assert len(guard.errors_by_place()) == len(logged)
    assert "ZeroDivisionError" in caplog.text
    assert_context_is_clean()

    Chain()(question="@next")
    assert chain_tree("@next") == tree(traces[-1], marker)
    assert {} == dict(InMemoryTraceManager.get_instance()._traces)


def test_mlflow_forgets_a_trace_in_the_middle(traces, forgiving):
    """A trace that MLflow drops while it is open (its timeout, its bounded cache) loses spans; the program goes on."""

    def forget(each):
        if each == "@a":
            InMemoryTraceManager.get_instance()._traces.clear()

    dspy.configure(lm=EchoLM(during=forget))
    answer = Chain()(question="@a").answer
    Chain()(question="@next")

    assert "@a" == answer
    assert [chain_tree("@next")] == [tree(trace, marker) for trace in traces]


async def test_two_tracers_of_different_settings_in_two_tasks(traces):
    """``dspy.context(callbacks=[...])``: each task's tracer goes by its own settings and sees its own calls."""
    dspy_mlflow_async.autolog(disable=True)
    both_in = [asyncio.Event(), asyncio.Event()]
    short, loud = TracingCallback(max_value_bytes=30), TracingCallback(redact=_shout)

    async def run(callback, question, mine, other):
        with dspy.context(callbacks=[callback]):
            mine.set()
            await asyncio.wait_for(other.wait(), TIMEOUT)
            await Chain().acall(question=question)

    await asyncio.gather(
        run(short, "@one-" + "x" * 100, both_in[0], both_in[1]), run(loud, "@two", both_in[1], both_in[0])
    )
    await Chain().acall(question="@nobody")

    shown = sorted(tree(trace, "inputs")[1]["question"] for trace in traces)
    assert 2 == len(shown)
    assert "@TWO" == shown[0]
    assert shown[1].startswith("@one-xxx")
    assert "… [cut: 90 of 105 characters]" in shown[1]


def _shout(value):
    return value.upper() if isinstance(value, str) else value


def test_a_callback_for_one_module_or_lm(traces):
    """``callbacks=[...]`` of one object: only its calls are recorded; beside ``autolog()``, no span is doubled."""
    program = Chain()
    program.callbacks = [TracingCallback()]
    program(question="@both")
    assert [chain_tree("@both")] == [tree(trace, marker) for trace in traces]

    dspy_mlflow_async.autolog(disable=True)
    program(question="@alone")
    dspy.Predict("question -> answer")(question="@nobody")

    assert ("Chain.forward", "@alone", []) == tree(traces[-1], marker)
    assert 2 == len(traces)


def test_settings_switched_in_the_middle_of_a_call(traces):
    """``log_traces=False`` while calls are open: what began ends, nothing new begins below it, no orphan either."""

    class Switching(dspy.Module):
        def __init__(self):
            super().__init__()
            self.step = dspy.Predict("question -> answer")

        def forward(self, question):
            self.step(question=f"{question}-1")
            dspy_mlflow_async.autolog(log_traces=False)
            self.step(question=f"{question}-2")
            dspy_mlflow_async.autolog(log_traces=True)
            return self.step(question=f"{question}-3")

    Switching()(question="@q")

    assert [("Switching.forward", "@q", [predict_tree("@q-1"), predict_tree("@q-3")])] == [
        tree(trace, marker) for trace in traces
    ]


def test_switched_on_in_the_middle_of_a_call(traces):
    """A call that began while tracing was off gets no span, and what it calls starts no trace of its own."""
    dspy_mlflow_async.autolog(log_traces=False)

    class Switching(dspy.Module):
        def __init__(self):
            super().__init__()
            self.step = dspy.Predict("question -> answer")

        def forward(self, question):
            dspy_mlflow_async.autolog(log_traces=True)
            return self.step(question=question)

    Switching()(question="@q")
    assert [] == traces

    Chain()(question="@next")
    assert [chain_tree("@next")] == [tree(trace, marker) for trace in traces]


@pytest.mark.parametrize("again", [False, True])
def test_disabled_in_the_middle_of_a_call(traces, again):
    """``autolog(disable=True)`` while a call is open ends what began, in workers too, and leaks nothing."""

    def disable(each):
        if each == "@q":
            dspy_mlflow_async.autolog(disable=True)
            if again:
                dspy_mlflow_async.autolog()

    dspy.configure(lm=EchoLM(during=disable))

    class Program(dspy.Module):
        def __init__(self):
            super().__init__()
            self.step = dspy.Predict("question -> answer")

        def forward(self, question):
            parallel = dspy.Parallel(num_threads=2, disable_progress_bar=True)
            return parallel([(self.step, {"question": question})])

    Program()(question="@q")

    (trace,) = traces
    name, each, below = tree(trace, marker)
    assert ("Program.forward", "@q", ["Predict.forward"]) == (name, each, [child[0] for child in below])
    assert {} == dict(InMemoryTraceManager.get_instance()._traces)
    assert_context_is_clean()


def test_two_threads_switch_while_others_call(traces):
    """On, off and changed all the time, while four threads call: every answer is right, nothing is left open."""
    stop = threading.Event()

    def switch(number):
        while not stop.is_set():
            dspy_mlflow_async.autolog(silent=True, log_traces_from_eval=bool(number))
            dspy_mlflow_async.autolog(disable=True)

    def call(number):
        return [Chain()(question=f"@{number}-{n}").answer for n in range(25)]

    switchers = [threading.Thread(target=switch, args=(number,)) for number in range(2)]
    for thread in switchers:
        thread.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(call, range(4)))
    finally:
        stop.set()
        for thread in switchers:
            thread.join(TIMEOUT)

    assert [[f"@{number}-{n}" for n in range(25)] for number in range(4)] == answers
    gc.collect()
    tracer.end_abandoned()
    assert {} == dict(InMemoryTraceManager.get_instance()._traces)
    for trace in traces:
        tree(trace)  # one root


class Wrong(dspy.Module):
    """Fails, waits to be cancelled, or is dropped, as the question says."""

    def forward(self, question):
        if question == "@fails":
            raise ValueError(question)
        return dspy.Prediction(answer=question)

    async def aforward(self, question):
        if question == "@held":
            await asyncio.Event().wait()
        if question == "@dropped":
            await _for_ever()
        return self.forward(question)


@types.coroutine
def _for_ever():
    while True:
        yield


@pytest.mark.timeout(600)  # seconds; the other tests share the machine
@pytest.mark.long
def test_nothing_grows():
    """After 10,000 calls of several kinds, nothing that the tracer holds has grown."""
    standing = set(threading.enumerate())
    dspy.configure(lm=EchoLM(), disable_history=True)
    predict, small = dspy.Predict("question -> answer"), Wrong()
    example = dspy.Example(question="@a").with_inputs("question")

    async def in_tasks():
        held = asyncio.create_task(small.acall(question="@held"))
        await asyncio.gather(*(small.acall(question="@a") for _ in range(20)), predict.acall(question="@a"))
        await asyncio.gather(*(dspy.asyncify(small)(question="@a") for _ in range(10)))
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)

    def call_all_kinds():
        predict(question="@a")
        for _ in range(30):
            small(question="@a")
        with pytest.raises(ValueError, match="@fails"):
            small(question="@fails")
        dspy.Parallel(num_threads=4, disable_progress_bar=True)([(small, example)] * 20)
        with dspy_mlflow_async.ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda each: small(question=each), ["@a"] * 10))
        dspy.Evaluate(devset=[example] * 7, metric=lambda *_: 1.0, num_threads=2, display_progress=False)(small)
        with dspy_mlflow_async.suppress():
            small(question="@silent")
        asyncio.run(in_tasks())

    with capture_traces() as traces:
        dspy_mlflow_async.autolog(silent=True)
        for _ in range(3):
            call_all_kinds()
        traces.clear()
        before = _held(standing)
        for _ in range(100):
            call_all_kinds()
        assert 10_000 < len(traces)
        traces.clear()
        after = _held(standing)

    assert before == after


EXAMPLES = [dspy.Example(question=each).with_inputs("question") for each in ("@a", "@fails", "@b")]


def cancelled_tasks():
    async def main():
        tasks = [asyncio.create_task(Wrong().acall(question="@held")) for _ in range(5)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(Wrong().acall(question="@held"), 0.001)

    asyncio.run(main())


def abandoned_coroutines():
    def begin():
        coroutine = Wrong().acall(question="@dropped")
        coroutine.send(None)
        return coroutine

    contexts = [copy_context() for _ in range(5)]
    held = [context.run(begin) for context in contexts]
    contexts[0].run(held[0].close)
    del held, contexts


def abandoned_generators():
    def generate():
        with mlflow.start_span("mine"):
            yield Wrong()(question="@a")
            yield Wrong()(question="@b")

    def begin():
        generators = [generate() for _ in range(5)]
        for each in generators:
            next(each)
        generators[0].close()

    copy_context().run(begin)


def broken_off_streams():
    async def read_one(stream):
        async for _ in stream:
            break
        await stream.aclose()

    async def main():
        streams = [dspy.streamify(Wrong(), is_async_program=is_async) for is_async in (True, False)]
        await asyncio.gather(
            *(asyncio.create_task(read_one(stream(question="@a"))) for stream in streams),
            *(asyncio.create_task(read_one(stream(question="@fails"))) for stream in streams),
            return_exceptions=True,
        )
        held = asyncio.create_task(read_one(streams[0](question="@held")))
        await asyncio.sleep(0.001)
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)

    asyncio.run(main())
    sync_stream = dspy.streamify(Wrong(), async_streaming=False)(question="@a")
    next(sync_stream)
    sync_stream.close()


def failing_pools():
    dspy.Parallel(num_threads=2, disable_progress_bar=True, max_errors=10)([(Wrong(), each) for each in EXAMPLES])
    with pytest.raises(Exception, match="error"):
        dspy.Parallel(num_threads=2, disable_progress_bar=True, max_errors=1)([(Wrong(), each) for each in EXAMPLES])


def failing_evaluations():
    for num_threads in (1, 2):
        dspy.Evaluate(
            devset=EXAMPLES, metric=lambda *_: 1 / 0, num_threads=num_threads, display_progress=False, max_errors=10
        )(Wrong())


def failing_compiles():
    with pytest.raises(ZeroDivisionError):
        dspy.BootstrapFewShot(metric=lambda *_: 1 / 0, max_errors=1).compile(Wrong(), trainset=EXAMPLES)


def threads_that_end():
    def call(question):
        with contextlib.suppress(ValueError):
            Wrong()(question=question)

    with mlflow.start_span("mine"):
        threads = [threading.Thread(target=call, args=(each,)) for each in ("@a", "@fails", "@b")]
        threads += [threading.Thread(target=dspy_mlflow_async.propagate(call), args=("@c",))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(call, ["@a", "@fails", "@b"]))


def requests_and_runs():
    with pytest.raises(ValueError, match="@fails"), dspy_mlflow_async.request(session_id="s"):
        Wrong()(question="@fails")
    with pytest.raises(ValueError, match="@fails"), mlflow.tracing.context(tags={"a": "b"}):
        Wrong()(question="@fails")


@pytest.mark.timeout(300)  # seconds; the other tests share the machine
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "call_all",
    [
        cancelled_tasks,
        abandoned_coroutines,
        abandoned_generators,
        broken_off_streams,
        failing_pools,
        failing_evaluations,
        failing_compiles,
        threads_that_end,
        requests_and_runs,
    ],
)
@pytest.mark.long
def test_nothing_grows_where_calls_go_wrong(call_all, monkeypatch):
    """Each way in which a call can end, again and again, with everything switched on that follows it."""
    # pytest keeps what DSPy raises in a coroutine that is collected in another context, with all that it holds.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    standing = set(threading.enumerate())
    dspy.configure(lm=EchoLM(), disable_history=True)
    with capture_traces() as traces:
        dspy_mlflow_async.autolog(silent=True, propagate_threads=True, log_traces_from_compile=True)
        for _ in range(3):
            call_all()
        traces.clear()
        before = _held(standing)
        for _ in range(20):
            call_all()
        gc.collect()  # DSPy 3.3 inspects the stack in each call, and so leaves its frames to the collector
        tracer.end_abandoned()
        assert len(traces) >= 20
        traces.clear()
        after = _held(standing)

    assert before == after


def _held(standing):
    """How many objects of ours are alive, by type; how large our variables are; how many traces MLflow has open."""
    _wait_for_workers(standing)
    gc.collect()  # what is collected now is ended next, and held no longer
    tracer.end_abandoned()
    gc.collect()
    alive = Counter(
        type(each).__qualname__
        for each in gc.get_objects()
        if str(type(each).__module__).startswith("dspy_mlflow_async.")
    )
    manager = InMemoryTraceManager.get_instance()
    sizes = {
        f"{name}.{variable}": len(value)
        for name, module in list(sys.modules.items())
        if name.startswith("dspy_mlflow_async")
        for variable, value in vars(module).items()
        if isinstance(value, (dict, list, set, deque, WeakSet, WeakKeyDictionary, WeakValueDictionary))
        and variable != "__builtins__"
    }
    return alive, sizes, len(manager._traces), len(manager._otel_id_to_mlflow_trace_id)


def _wait_for_workers(standing):
    """DSPy does not wait for the workers of a pool or of a stream that was broken off; what they hold is no leak."""
    for thread in set(threading.enumerate()) - standing:
        if not thread.name.startswith("dspy-mlflow-async-") and not isinstance(thread, tqdm.TMonitor):
            thread.join(TIMEOUT)
            assert not thread.is_alive()


def test_recursion(traces, forgiving):
    """Deep recursion of modules gives a deep tree, and a RecursionError passes like any other, ours among them."""

    class Down(dspy.Module):
        def forward(self, depth):
            return self(depth=depth - 1) if depth else dspy.Prediction(answer="@bottom")

    Down()(depth=20)
    shown, depth = tree(traces[0]), 0
    while shown[1]:
        shown, depth = shown[1][0], depth + 1
    assert 20 == depth

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(400)
    try:
        with pytest.raises(
            (RecursionError, TypeError)
        ):  # "unsupported callable": DSPy inspects it without any stack left
            Down()(depth=10_000)
    finally:
        sys.setrecursionlimit(limit)
    gc.collect()
    tracer.end_abandoned()
    Chain()(question="@next")
    assert chain_tree("@next") == tree(traces[-1], marker)


def test_the_next_call_in_the_same_worker_starts_clean(traces):
    """One worker thread for many kinds of calls, failing ones too: each starts a trace of its own."""

    def fail(each):
        if "fails" in each:
            raise ValueError(each)

    dspy.configure(lm=EchoLM(during=fail))
    questions = ["@a", "@fails-1", "@b", "@fails-2", "@c"]

    def call(question):
        try:
            return Chain()(question=question).answer
        except ValueError:
            return None
        finally:
            assert_context_is_clean()

    with ThreadPoolExecutor(1) as pool:
        answers = list(pool.map(call, questions))

    assert ["@a", None, "@b", None, "@c"] == answers
    assert questions == [tree(trace, marker)[1] for trace in traces]
    with mlflow.start_span("mine"):
        pass
    assert ("mine", []) == tree(traces[-1])
