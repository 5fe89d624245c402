"""``dspy.Evaluate``: a trace per example, wherever it runs and however many run at once."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import dspy
import mlflow
import pytest

import dspy_mlflow_async
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Chain, EchoLM, chain_tree, marker, predict_tree

THREADS = pytest.mark.parametrize("num_threads", [1, 4])


def devset(prefix, size=3):
    """Examples whose right answer is their question."""
    return [dspy.Example(question=f"{prefix}-{n}", answer=f"{prefix}-{n}").with_inputs("question") for n in range(size)]


def is_right(example, prediction, trace=None):
    """Exact match."""
    return example.answer == prediction.answer


def evaluate(prefix, num_threads=1, metric=is_right, program=None, size=3):
    """One evaluation."""
    evaluator = dspy.Evaluate(
        devset=devset(prefix, size), metric=metric, num_threads=num_threads, display_progress=False
    )
    return evaluator(program or Chain())


def expected(prefix, size=3):
    """A whole trace per example."""
    return [chain_tree(f"{prefix}-{n}") for n in range(size)]


@THREADS
def test_a_trace_per_example(recorded, num_threads):
    """One thread or many: each example is a trace of its own."""
    result = evaluate("@e", num_threads)

    assert 100.0 == result.score
    assert expected("@e") == sorted(tree(trace, marker) for trace in recorded())


@THREADS
def test_a_trace_per_example_inside_a_user_span(recorded, num_threads):
    """An evaluation inside a user's span does not go under it; the span goes on as it was."""
    with mlflow.start_span("mine") as span:
        span.set_inputs({"name": "@mine"})
        evaluate("@e", num_threads)
        Chain()(question="@after")

    assert sorted([("mine", "@mine", [chain_tree("@after")]), *expected("@e")]) == sorted(
        tree(trace, marker) for trace in recorded()
    )


@THREADS
def test_a_trace_per_example_inside_a_traced_module(recorded, num_threads):
    """The same inside a module: what it calls after the evaluation is below it again."""

    class Tuner(dspy.Module):
        def __init__(self):
            super().__init__()
            self.step = dspy.Predict("question -> answer")

        def forward(self, question):
            evaluate("@e", num_threads)
            return self.step(question=question)

    Tuner()(question="@t")

    assert sorted([("Tuner.forward", "@t", [predict_tree("@t")]), *expected("@e")]) == sorted(
        tree(trace, marker) for trace in recorded()
    )


@THREADS
def test_several_evaluations_at_once_in_threads(recorded, num_threads):
    """Three evaluations begun together in three threads: no example in another's trace, none missing."""
    gate = threading.Barrier(3, timeout=TIMEOUT)

    def run(prefix):
        gate.wait()
        return evaluate(prefix, num_threads).score

    with ThreadPoolExecutor(3) as pool:
        scores = list(pool.map(run, ("@a", "@b", "@c")))

    assert [100.0] * 3 == scores
    assert [*expected("@a"), *expected("@b"), *expected("@c")] == sorted(tree(trace, marker) for trace in recorded())


@THREADS
async def test_several_evaluations_at_once_in_tasks(recorded, num_threads):
    """The same from tasks, through ``asyncio.to_thread`` and below users' spans."""

    async def run(prefix):
        with mlflow.start_span(f"span of {prefix}"):
            return await asyncio.to_thread(evaluate, prefix, num_threads)

    await asyncio.gather(*(run(each) for each in ("@a", "@b", "@c")))

    found = [tree(trace, marker) for trace in recorded()]
    assert [*expected("@a"), *expected("@b"), *expected("@c")] == sorted(each for each in found if each[1])
    assert ["span of @a", "span of @b", "span of @c"] == sorted(name for name, each, _ in found if not each)


@THREADS
def test_a_metric_that_calls_an_lm(recorded, num_threads):
    """A judge's own calls are a trace of their own, beside the prediction it judges."""
    judge = dspy.Predict("answer -> verdict")

    def judged(example, prediction, trace=None):
        return bool(judge(answer=prediction.answer).verdict)

    evaluate("@e", num_threads, metric=judged)

    judgements = [predict_tree(f"@e-{n}") for n in range(3)]
    assert sorted([*expected("@e"), *judgements]) == sorted(tree(trace, marker) for trace in recorded())


@THREADS
@pytest.mark.parametrize("where", ["program", "metric"])
def test_failing_examples(recorded, num_threads, where):
    """A failing program or metric costs its own example only; the failing call is an error in its trace."""

    def fail(each):
        if each == "@e-1":
            raise ValueError(each)

    def failing_metric(example, prediction, trace=None):
        fail(example.question)
        return 1.0

    if where == "program":
        dspy.configure(lm=EchoLM(during=fail))
    result = evaluate("@e", num_threads, metric=failing_metric if where == "metric" else is_right)

    assert pytest.approx(66.67) == result.score
    outcomes = [tree(trace, "outcome", marker)[1:3] for trace in recorded()]
    failed = "error" if where == "program" else "ok"
    assert sorted([("ok", "@e-0"), (failed, "@e-1"), ("ok", "@e-2")]) == sorted(outcomes)


@THREADS
def test_evaluations_can_be_silent(recorded, num_threads):
    """``log_traces_from_eval=False`` silences evaluations alone, and restores what was before."""
    dspy_mlflow_async.autolog(log_traces_from_eval=False)

    Chain()(question="@before")
    evaluate("@e", num_threads)
    Chain()(question="@after")

    assert [chain_tree("@before"), chain_tree("@after")] == [tree(trace, marker) for trace in recorded()]


def test_a_silent_evaluation_silences_user_spans_inside_it(recorded):
    """And those of other MLflow integrations: everything that the evaluation starts, in any of its threads."""

    class Spanning(dspy.Module):
        def forward(self, question):
            with mlflow.start_span("mine"):
                return dspy.Prediction(answer=question)

    dspy_mlflow_async.autolog(log_traces_from_eval=False)
    evaluate("@e", 4, program=Spanning())
    Spanning()(question="@after")

    assert [("Spanning.forward", [("mine", [])])] == [tree(trace) for trace in recorded()]


def test_calls_elsewhere_are_whole_while_silent_evaluations_run(recorded):
    """Five silent evaluations are open; a call in another thread meanwhile loses nothing."""
    dspy_mlflow_async.autolog(log_traces_from_eval=False)
    all_open, called = threading.Barrier(6, timeout=TIMEOUT), threading.Event()

    def hold(each):
        if each.startswith("@silent") and each.endswith("-0") and not called.is_set():
            all_open.wait()
            assert called.wait(TIMEOUT)

    dspy.configure(lm=EchoLM(during=hold))
    with ThreadPoolExecutor(5) as pool:
        silent = [pool.submit(evaluate, f"@silent{n}", 2) for n in range(5)]
        all_open.wait()
        for n in range(3):
            Chain()(question=f"@loud{n}")
        called.set()
        for future in silent:
            future.result(TIMEOUT)

    assert [chain_tree(f"@loud{n}") for n in range(3)] == [tree(trace, marker) for trace in recorded()]
