"""``TracingCallback`` for a context or an object: as good as ``autolog``, and beside it, each by its own settings."""

import asyncio
import gc
import threading

import cloudpickle
import dspy
import pytest
from dspy.utils.callback import BaseCallback

import dspy_mlflow_async
from dspy_mlflow_async import TracingCallback
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Chain, EchoLM, chain_tree, marker, predict_tree

EXAMPLES = [dspy.Example(question=f"@{n}", answer=f"@{n}").with_inputs("question") for n in range(3)]


class Both(dspy.Module):
    """Two calls in DSPy's worker threads."""

    def __init__(self):
        super().__init__()
        self.step = dspy.Predict("question -> answer")

    def forward(self, question):
        parallel = dspy.Parallel(num_threads=2, disable_progress_bar=True)
        return parallel([(self.step, {"question": question}) for _ in range(2)])[0]


def trees(traces, detail=marker):
    """All traces as nested literals."""
    return [tree(trace, detail) for trace in traces]


def evaluate():
    dspy.Evaluate(devset=EXAMPLES, metric=lambda *_: 1.0, num_threads=2, display_progress=False)(Chain())


def compile_one():
    dspy.BootstrapFewShotWithRandomSearch(
        metric=lambda *_: True, num_candidate_programs=1, max_bootstrapped_demos=1, num_threads=2
    ).compile(Chain(), trainset=EXAMPLES)


@pytest.fixture(params=["as it is", "unpickled"])
def make(request):
    """Makes a tracer, as a program does or as MLflow's serving gets it: where nobody has called ``autolog``."""

    def make(**settings):
        callback = TracingCallback(**settings)
        return callback if request.param == "as it is" else cloudpickle.loads(cloudpickle.dumps(callback))

    return make


def test_worker_threads_without_autolog(captured, make):
    """What DSPy's worker threads do is under the call that gave them their work."""
    with dspy.context(callbacks=[make()]):
        Both()(question="@a")

    assert [("Both.forward", "@a", [predict_tree("@a")] * 2)] == trees(captured)


@pytest.mark.parametrize(
    ("settings", "call", "count"),
    [
        ({"log_traces_from_eval": False}, evaluate, 0),
        ({}, evaluate, 3),
        ({}, compile_one, 0),
        ({"log_traces": False}, evaluate, 0),
    ],
)
def test_silence_without_autolog(captured, make, settings, call, count):
    """An evaluation's and a compile's own settings hold in the threads that they use."""
    with dspy.context(callbacks=[make(**settings)]):
        call()

    assert count == len(captured)


def test_patches_go_with_the_last_tracer(captured):
    """``autolog(disable=True)`` leaves in what a tracer of somebody's own needs, and takes it out without one."""
    before = dspy.utils.parallelizer.ParallelExecutor.execute
    own = TracingCallback()
    dspy_mlflow_async.autolog(silent=True)
    dspy_mlflow_async.autolog(disable=True)
    with dspy.context(callbacks=[own]):
        Both()(question="@a")
    assert 1 == len(captured)
    del own
    gc.collect()  # DSPy 3.3 inspects the stack in each call, and so leaves its frames to the collector
    dspy_mlflow_async.autolog(disable=True)

    assert before is dspy.utils.parallelizer.ParallelExecutor.execute


@pytest.mark.parametrize("where", ["object", "inner object", "lm", "context"])
def test_beside_an_autolog_that_is_silent(captured, where):
    """``autolog(log_traces=False)`` silences itself, and no tracer that somebody has put in by hand."""
    dspy_mlflow_async.autolog(log_traces=False, silent=True)
    program, lm = Chain(), EchoLM()
    if where == "object":
        program.callbacks = [TracingCallback()]
    elif where == "inner object":
        program.first.callbacks = [TracingCallback()]
    elif where == "lm":
        lm = EchoLM(callbacks=[TracingCallback()])
    callbacks = [*dspy.settings.callbacks, *([TracingCallback()] if where == "context" else [])]
    with dspy.context(lm=lm, callbacks=callbacks):
        program(question="@a")

    expected = {
        "object": [("Chain.forward", "@a", [])],
        "inner object": [("Predict.forward", "@a", [])],
        "lm": [("EchoLM.__call__", "@a", [])] * 2,
        "context": [chain_tree("@a")],
    }
    assert expected[where] == trees(captured)


def test_two_tracers_at_once_in_worker_threads(captured):
    """Different settings in two contexts side by side, each with a pool of its own."""
    meet = threading.Barrier(2, timeout=TIMEOUT)
    hidden = TracingCallback(redact=lambda value: "hidden" if isinstance(value, str) else value)

    def work(callback, question):
        with dspy.context(callbacks=[callback]):
            meet.wait()
            Both()(question=question)

    threads = [
        threading.Thread(target=work, args=each) for each in [(hidden, "@a"), (TracingCallback(log_traces=False), "@b")]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)

    assert [("Both.forward", [predict_tree()] * 2)] == [tree(trace) for trace in captured]
    assert "@" not in repr([trace.to_dict() for trace in captured])


async def test_work_that_outlives_an_untraced_call(captured):
    """A task begun inside a call while tracing was off begins traces of its own once that call is over."""
    dspy_mlflow_async.autolog(log_traces=False, silent=True)
    go, tasks = asyncio.Event(), []

    async def later():
        await go.wait()
        await Chain().acall(question="@later")

    class Outer(dspy.Module):
        async def aforward(self, question):
            tasks.append(asyncio.create_task(later()))

    await Outer().acall(question="@a")
    dspy_mlflow_async.autolog(silent=True)
    go.set()
    await tasks[0]

    assert [chain_tree("@later")] == trees(captured)


def test_autolog_inside_a_context_with_callbacks_of_its_own(captured):
    """Ours comes to the callbacks that are there, and goes from among them."""
    seen = []

    class Foreign(BaseCallback):
        def on_lm_start(self, call_id, instance, inputs):
            seen.append(call_id)

    foreign = Foreign()
    with dspy.context(callbacks=[foreign]):
        dspy_mlflow_async.autolog(silent=True)
        dspy.Predict("question -> answer")(question="@a")
        dspy_mlflow_async.autolog(disable=True)
        dspy.Predict("question -> answer")(question="@b")
        assert [foreign] == dspy.settings.callbacks

    assert 2 == len(seen)
    assert [predict_tree("@a")] == trees(captured)
