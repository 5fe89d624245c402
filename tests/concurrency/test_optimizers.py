"""Optimizers with ``log_traces_from_compile=True`` give whole traces; without it they are silent, and they alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import dspy
import mlflow
import pytest

import dspy_mlflow_async
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Chain, EchoLM, chain_tree, marker, predict_tree

TRAINSET = [dspy.Example(question=f"@t-{n}", answer=f"@t-{n}").with_inputs("question") for n in range(4)]


def is_right(example, prediction, trace=None):
    """Exact match."""
    return example.answer == prediction.answer


def scored(gold, prediction, trace=None, pred_name=None, pred_trace=None):
    """The same in the form that GEPA asks for."""
    return dspy.Prediction(score=float(gold.answer == prediction.answer), feedback="as it should be")


class Program(dspy.Module):
    """One predictor inside a module."""

    def __init__(self):
        super().__init__()
        self.step = dspy.Predict("question -> answer")

    def forward(self, question):
        return self.step(question=question)


def bootstrap(program):
    """BootstrapFewShot."""
    return dspy.BootstrapFewShot(metric=is_right, max_bootstrapped_demos=2).compile(program, trainset=TRAINSET)


def random_search(program):
    """BootstrapFewShotWithRandomSearch, whose candidates are bootstrapped and then evaluated."""
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=is_right, max_bootstrapped_demos=1, max_labeled_demos=1, num_candidate_programs=1, num_threads=4
    )
    return optimizer.compile(program, trainset=TRAINSET)


def mipro(program):
    """MIPROv2 with two trials."""
    pytest.importorskip("optuna")
    optimizer = dspy.MIPROv2(
        metric=is_right,
        auto=None,
        num_candidates=2,
        max_bootstrapped_demos=1,
        max_labeled_demos=1,
        num_threads=4,
        verbose=False,
    )
    return optimizer.compile(program, trainset=TRAINSET, valset=TRAINSET, num_trials=2, minibatch=False)


def gepa(program):
    """GEPA with a reflection LM that always proposes the same."""
    optimizer = dspy.GEPA(
        metric=scored,
        max_metric_calls=12,
        reflection_lm=EchoLM(answer=lambda field, marker: "```\nAnswer with the marker.\n```"),
        num_threads=4,
        track_stats=False,
    )
    return optimizer.compile(program, trainset=TRAINSET, valset=TRAINSET)


OPTIMIZERS = pytest.mark.parametrize("compile_program", [bootstrap, random_search, mipro, gepa])


def answers(field, marker):
    """Every field gets the marker; what MIPROv2 proposes has none."""
    return marker or "Answer with the marker."


@pytest.fixture(autouse=True)
def _lm(_leaves_nothing_behind):
    dspy.configure(lm=EchoLM(answer=answers))


@OPTIMIZERS
def test_every_call_of_a_compile_is_in_one_whole_trace(recorded, compile_program):
    """Each program call of a compile is one trace of the program's shape, as many as the LM was called."""
    dspy_mlflow_async.autolog(log_traces_from_compile=True)

    compile_program(Program())

    shown = [tree(trace, marker) for trace in recorded()]
    calls = [each for each in shown if each[0] == "Program.forward"]
    assert calls
    for name, each, below in calls:
        assert (name, each, [predict_tree(each)]) == (name, each, below)
    lm_calls = sum(span.name == "EchoLM.__call__" for trace in recorded() for span in trace.data.spans)
    reflections = sum(each[0] == "EchoLM.__call__" for each in shown)
    assert len(dspy.settings.lm.calls) == lm_calls - reflections


@OPTIMIZERS
def test_a_compile_is_silent_by_default(recorded, compile_program):
    """By default nothing of a compile is recorded, and calls before and after it are."""
    program = Program()
    program(question="@before")
    compile_program(program)
    program(question="@after")

    whole = [("Program.forward", each, [predict_tree(each)]) for each in ("@before", "@after")]
    assert whole == [tree(trace, marker) for trace in recorded()]


def test_calls_elsewhere_are_whole_while_ten_compiles_run(recorded):
    """Ten silent compiles are open; calls in another thread, and user spans there, lose nothing."""
    all_open, called = threading.Barrier(11, timeout=TIMEOUT), threading.Event()
    held = threading.local()

    def hold(each):
        if each.startswith("@t") and not getattr(held, "once", False):
            held.once = True
            all_open.wait()
            assert called.wait(TIMEOUT)

    dspy.configure(lm=EchoLM(during=hold))
    with ThreadPoolExecutor(10) as pool:
        compiles = [pool.submit(bootstrap, Program()) for _ in range(10)]
        all_open.wait()
        for n in range(5):
            with mlflow.start_span("mine"):
                Chain()(question=f"@loud-{n}")
        called.set()
        for future in compiles:
            future.result(TIMEOUT)

    assert [("mine", "", [chain_tree(f"@loud-{n}")]) for n in range(5)] == [tree(trace, marker) for trace in recorded()]


def test_a_compile_inside_a_module_or_span_leaves_it_whole(recorded):
    """What a silent compile silences ends with it: the module and the span around it are whole."""

    class Learner(dspy.Module):
        def forward(self, question):
            return bootstrap(Program())(question=question)

    with mlflow.start_span("mine"):
        Learner()(question="@q")

    (shown,) = [tree(trace) for trace in recorded()]
    assert ("mine", [("Learner.forward", [("Program.forward", [predict_tree()])])]) == shown


def test_a_failing_compile_restores_tracing(recorded):
    """A compile that raises leaves no suppression behind."""

    def broken(example, prediction, trace=None):
        raise KeyError("metric")

    optimizer = dspy.BootstrapFewShot(metric=broken, max_errors=1)
    with pytest.raises(KeyError):
        optimizer.compile(Program(), trainset=TRAINSET)
    Chain()(question="@after")

    assert [chain_tree("@after")] == [tree(trace, marker) for trace in recorded()]


def test_the_stack_level_is_the_contexts_own(recorded):
    """MLflow's ``optimizer_stack_level``: 1 inside a compile and the threads it starts, 2 in a nested one, else 0."""
    (callback,) = [c for c in dspy.settings.callbacks if isinstance(c, dspy_mlflow_async.TracingCallback)]
    levels, below, elsewhere = set(), set(), set()
    asked, over = threading.Event(), threading.Event()

    def look_from_elsewhere():
        assert asked.wait(TIMEOUT)
        elsewhere.add(callback.optimizer_stack_level)
        over.set()

    other = threading.Thread(target=look_from_elsewhere)
    other.start()

    def watching(example, prediction, trace=None):
        levels.add(callback.optimizer_stack_level)
        thread = threading.Thread(target=lambda: below.add(callback.optimizer_stack_level))
        thread.start()
        thread.join(TIMEOUT)
        asked.set()
        return over.wait(TIMEOUT)

    dspy.BootstrapFewShot(metric=watching).compile(Program(), trainset=TRAINSET)
    assert ({1}, 0) == (levels, callback.optimizer_stack_level)

    dspy.BootstrapFewShotWithRandomSearch(metric=watching, num_candidate_programs=1, num_threads=1).compile(
        Program(), trainset=TRAINSET
    )
    assert ({1, 2}, 0) == (levels, callback.optimizer_stack_level)
    assert (levels, {0}) == (below, elsewhere)
    other.join(TIMEOUT)
    assert {} == callback._call_id_to_metric_key
