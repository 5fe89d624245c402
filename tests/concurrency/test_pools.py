"""DSPy's worker threads: what a module starts in them is below it, with one thread and with many."""

import threading
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest

from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Barrier, Chain, EchoLM, chain_tree, marker, predict_tree

THREADS = pytest.mark.parametrize("num_threads", [1, 4])


def examples(*markers):
    """An example per marker."""
    return [dspy.Example(question=each).with_inputs("question") for each in markers]


class InParallel(dspy.Module):
    """Calls its step through ``dspy.Parallel`` for each question."""

    def __init__(self, num_threads, step=None):
        super().__init__()
        self.step = step or dspy.Predict("question -> answer")
        self.num_threads = num_threads

    def forward(self, questions, name):
        parallel = dspy.Parallel(num_threads=self.num_threads, disable_progress_bar=True)
        return parallel([(self.step, example) for example in examples(*questions)])


class InBatch(InParallel):
    """The same through ``Module.batch``."""

    def forward(self, questions, name):
        return self.step.batch(examples(*questions), num_threads=self.num_threads, disable_progress_bar=True)


class Nested(dspy.Module):
    """``dspy.Parallel`` over modules that call ``Module.batch`` themselves."""

    def __init__(self, num_threads):
        super().__init__()
        self.inner = InBatch(num_threads)
        self.num_threads = num_threads

    def forward(self, groups, name):
        parallel = dspy.Parallel(num_threads=self.num_threads, disable_progress_bar=True)
        return parallel([(self.inner, {"questions": questions, "name": questions[0]}) for questions in groups])


def call_at_once(*calls):
    """Each call in a thread of its own, all begun together."""
    gate = threading.Barrier(len(calls), timeout=TIMEOUT)

    def run(call):
        gate.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(TIMEOUT) for future in [pool.submit(run, call) for call in calls]]


@THREADS
@pytest.mark.parametrize("kind", [InParallel, InBatch])
def test_items_are_below_the_module_that_started_them(recorded, kind, num_threads):
    """A module that fans out gives one trace, with a predictor below it for each item."""
    predictions = kind(num_threads)(questions=["@a", "@b", "@c"], name="@module")

    assert ["@a", "@b", "@c"] == [prediction.answer for prediction in predictions]
    expected = (f"{kind.__name__}.forward", "@module", [predict_tree(each) for each in ("@a", "@b", "@c")])
    assert [expected] == [tree(trace, marker, sort=True) for trace in recorded()]


@pytest.mark.parametrize("kind", [InParallel, InBatch])
def test_calls_that_fan_out_at_the_same_time_stay_apart(recorded, kind):
    """Four calls that are all open at once in twelve workers give four whole traces."""
    dspy.configure(lm=EchoLM(during=Barrier(12)))
    program = kind(3)
    names = [f"@n{n}" for n in range(4)]
    questions = {name: [f"{name}-{item}" for item in range(3)] for name in names}

    call_at_once(*(lambda name=name: program(questions=questions[name], name=name) for name in names))

    expected = [(f"{kind.__name__}.forward", name, [predict_tree(each) for each in questions[name]]) for name in names]
    assert expected == sorted(tree(trace, marker, sort=True) for trace in recorded())


@THREADS
def test_pools_nest(recorded, num_threads):
    """Workers that start workers: each item below the inner module, each inner module below the outer."""
    program = Nested(num_threads)

    program(groups=[["@a1", "@a2"], ["@b1", "@b2"]], name="@outer")

    inner = [
        ("InBatch.forward", "@a1", [predict_tree("@a1"), predict_tree("@a2")]),
        ("InBatch.forward", "@b1", [predict_tree("@b1"), predict_tree("@b2")]),
    ]
    assert [("Nested.forward", "@outer", inner)] == [tree(trace, marker, sort=True) for trace in recorded()]


@THREADS
def test_a_pool_outside_of_any_call_gives_a_trace_per_item(recorded, num_threads):
    """``dspy.Parallel`` at top level: each item is an outermost call."""
    dspy.Parallel(num_threads=num_threads, disable_progress_bar=True)(
        [(Chain(), example) for example in examples("@a", "@b", "@c")]
    )

    assert [chain_tree(each) for each in ("@a", "@b", "@c")] == sorted(tree(trace, marker) for trace in recorded())


@THREADS
def test_a_failing_item_fails_alone(recorded, num_threads):
    """A failing item is an error in its place; its neighbours and the module are as they are."""

    def fail(marker):
        if marker == "@b":
            raise ValueError("no @b")

    dspy.configure(lm=EchoLM(during=fail))

    InParallel(num_threads)(questions=["@a", "@b", "@c"], name="@module")

    failed = (
        "Predict.forward",
        "@b",
        "error",
        [("ChatAdapter.format", "@b", "ok", []), ("EchoLM.__call__", "@b", "error", [])],
    )
    shown = [tree(trace, marker, "outcome", sort=True) for trace in recorded()]
    assert 1 == len(shown)
    name, root_marker, outcome, items = shown[0]
    assert ("InParallel.forward", "@module", "ok") == (name, root_marker, outcome)
    assert ["@a", "@b", "@c"] == [item[1] for item in items]
    # ChatAdapter falls back to JSONAdapter when a call fails, and tries again below the same predictor.
    assert failed[:3] == items[1][:3]
    assert ["ok", "error", "ok"] == [item[2] for item in items]


@THREADS
def test_usage_of_a_trace_is_the_sum_of_its_calls(recorded, num_threads):
    """Tokens are counted per LM call, and their sum over the trace equals the calls made, also in workers."""
    markers = ["@a", "@bb", "@ccc", "@dddd"]

    InParallel(num_threads)(questions=markers, name="@module")

    (trace,) = recorded()
    total = {"input_tokens": 40, "output_tokens": 14, "total_tokens": 54}
    per_call = {
        marker(span): span.get_attribute("mlflow.chat.tokenUsage")["output_tokens"]
        for span in trace.data.spans
        if span.name == "EchoLM.__call__"
    }
    assert {each: len(each) for each in markers} == per_call
    root = next(span for span in trace.data.spans if span.parent_id is None)
    assert total == root.get_attribute("mlflow.chat.tokenUsage")
    assert total == trace.info.token_usage


def test_a_straggler_that_is_submitted_again_stays_in_its_trace(recorded):
    """DSPy submits a slow item twice; both runs are below the module that started them."""
    second_run = threading.Event()
    runs = []

    def slow_at_first(marker):
        runs.append(marker)
        if len(runs) == 1:
            assert second_run.wait(TIMEOUT)
        else:
            second_run.set()

    dspy.configure(lm=EchoLM(during=slow_at_first))

    class Program(dspy.Module):
        def __init__(self):
            super().__init__()
            self.step = dspy.Predict("question -> answer")

        def forward(self, question):
            parallel = dspy.Parallel(num_threads=2, disable_progress_bar=True, timeout=0.1)
            return parallel([(self.step, example) for example in examples(question)])

    ended = AllEnded(2)
    dspy.configure(callbacks=[*dspy.settings.callbacks, ended])
    Program()(question="@a")
    ended.wait()

    shown = [tree(trace, marker) for trace in recorded()]
    assert [("Program.forward", "@a", [predict_tree("@a"), predict_tree("@a")])] == shown


class AllEnded(dspy.utils.BaseCallback):
    """Waits until the tracer, whose handlers run first, has seen the end of so many predictors."""

    def __init__(self, number):
        self._semaphore = threading.Semaphore(0)
        self._number = number
        self._ids = set()

    def on_module_start(self, call_id, instance, inputs):
        if isinstance(instance, dspy.Predict):
            self._ids.add(call_id)

    def on_module_end(self, call_id, outputs, exception=None):
        if call_id in self._ids:
            self._semaphore.release()

    def wait(self):
        for _ in range(self._number):
            assert self._semaphore.acquire(timeout=TIMEOUT)
