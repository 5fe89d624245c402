"""Why this package: MLflow's own tracer on the same programs. Each test shows what it loses, and that ours does not.

When one of these fails for MLflow, MLflow has become better: take it out.
"""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import dspy
import mlflow
import pytest

import dspy_mlflow_async
from dspy_mlflow_async.testing import capture_traces, tree
from echo import TIMEOUT, Barrier, Chain, EchoLM, Switching, chain_tree, marker, predict_tree


def theirs(**settings):
    """MLflow's tracer, less ``track_usage``."""
    mlflow.dspy.autolog(**settings)
    dspy.configure(track_usage=False)


def ours(**settings):
    """Our tracer."""
    dspy_mlflow_async.autolog(silent=True, **settings)


def forest_of(turn_on, program, **settings):
    """The sorted trees that a program leaves; a trace that is no tree counts as a fragment."""
    with capture_traces() as traces:
        turn_on(**settings)
        try:
            program()
        finally:
            mlflow.dspy.autolog(disable=True)
            dspy_mlflow_async.autolog(disable=True)
    return sorted(_tree_or_fragment(trace) for trace in traces)


def _tree_or_fragment(trace):
    try:
        return tree(trace, marker, sort=True)
    except ValueError:
        return ("fragment", "", [])


class InParallel(dspy.Module):
    """Calls its step through ``dspy.Parallel``."""

    def __init__(self):
        super().__init__()
        self.step = dspy.Predict("question -> answer")

    def forward(self, questions, name):
        parallel = dspy.Parallel(num_threads=2, disable_progress_bar=True)
        return parallel([(self.step, {"question": each}) for each in questions])


def test_parallel_inside_a_module():
    """Worker threads start without the caller's span: MLflow makes a trace of each span that has no parent there."""

    def program():
        dspy.configure(lm=EchoLM(during=Barrier(2)))
        InParallel()(questions=["@a", "@b"], name="@module")

    whole = [("InParallel.forward", "@module", [predict_tree("@a"), predict_tree("@b")])]
    assert whole == forest_of(ours, program)
    assert whole != forest_of(theirs, program)


def test_a_silent_evaluation_elsewhere():
    """MLflow swaps the process's tracer provider while an evaluation is silent: calls elsewhere are lost."""
    inside, called = threading.Event(), threading.Event()

    def hold(each):
        if each == "@silent":
            inside.set()
            assert called.wait(TIMEOUT)

    def program():
        inside.clear()
        called.clear()
        dspy.configure(lm=EchoLM(during=hold))
        evaluator = dspy.Evaluate(
            devset=[dspy.Example(question="@silent").with_inputs("question")],
            metric=lambda *_: 1.0,
            num_threads=1,
            display_progress=False,
        )
        with ThreadPoolExecutor(1) as pool:
            silent = pool.submit(evaluator, dspy.Predict("question -> answer"))
            assert inside.wait(TIMEOUT)
            Chain()(question="@loud")
            called.set()
            silent.result(TIMEOUT)

    assert [chain_tree("@loud")] == forest_of(ours, program, log_traces_from_eval=False)
    assert [chain_tree("@loud")] != forest_of(theirs, program, log_traces_from_eval=False)


def test_evaluations_inside_a_user_span():
    """With one thread, MLflow puts the examples under the span around the evaluation; with many, beside it."""

    def evaluate(num_threads):
        examples = [dspy.Example(question=each).with_inputs("question") for each in ("@a", "@b")]
        evaluator = dspy.Evaluate(
            devset=examples, metric=lambda *_: 1.0, num_threads=num_threads, display_progress=False
        )
        with mlflow.start_span("mine"):
            evaluator(Chain())

    beside = [chain_tree("@a"), chain_tree("@b"), ("mine", "", [])]
    for num_threads in (1, 2):
        assert beside == forest_of(ours, lambda num_threads=num_threads: evaluate(num_threads))
    assert beside != forest_of(theirs, lambda: evaluate(1))


def test_a_setting_switched_in_the_middle_of_a_call():
    """MLflow skips end handlers when traces are switched off: the span stays current, later calls hang under it."""

    def program(turn_on):
        def switched_then_another():
            Switching(turn_on)(question="@a")
            turn_on(log_traces=True)
            Chain()(question="@next")

        copy_context().run(switched_then_another)  # what leaks, leaks there

    whole = [chain_tree("@next"), ("Switching.forward", "@a", [])]
    assert whole == forest_of(ours, lambda: program(ours))
    assert whole != forest_of(theirs, lambda: program(theirs))


def test_a_thread_that_outlives_its_cancelled_caller():
    """A user's span whose asyncified thread goes on: its trace has the thread's spans, and is stored when they end."""
    reached, go_on = threading.Event(), threading.Event()

    def hold(each):
        reached.set()
        assert go_on.wait(TIMEOUT)

    async def main():
        task = asyncio.create_task(request())
        assert await asyncio.to_thread(reached.wait, TIMEOUT)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        go_on.set()

    @mlflow.trace(name="request")
    async def request():
        await dspy.asyncify(dspy.Predict("question -> answer"))(question="@a")

    def program():
        reached.clear()
        go_on.clear()
        dspy.configure(lm=EchoLM(during=hold))
        ended = Ended()
        dspy.configure(callbacks=[*dspy.settings.callbacks, ended])
        asyncio.run(main())
        assert ended.event.wait(TIMEOUT)

    assert [("request", "", [predict_tree("@a")])] == forest_of(ours, program)


class Ended(dspy.utils.BaseCallback):
    """Sets its event when a predictor has ended, after the tracers' handlers."""

    def __init__(self):
        self.event = threading.Event()

    def on_module_end(self, call_id, outputs, exception=None):
        self.event.set()


def test_usage_without_changing_the_program():
    """MLflow switches on DSPy's ``track_usage``, which changes what programs return; ours counts beside it."""
    mlflow.dspy.autolog()
    assert dspy.settings.track_usage
    assert Chain()(question="@a").get_lm_usage()

    dspy.configure(track_usage=False)
    dspy_mlflow_async.autolog()
    assert not dspy.settings.track_usage
    assert Chain()(question="@a").get_lm_usage() is None


def test_inputs_of_other_callbacks():
    """MLflow's callback takes ``args`` out of the dict that it shares with every other callback."""

    class Watching(dspy.utils.BaseCallback):
        def __init__(self):
            self.seen = []

        def on_module_start(self, call_id, instance, inputs):
            self.seen.append(sorted(inputs))

    def seen_with(turn_on):
        watching = Watching()
        turn_on()
        dspy.configure(callbacks=[*dspy.settings.callbacks, watching])
        Chain()(question="@a")
        mlflow.dspy.autolog(disable=True)
        dspy_mlflow_async.autolog(disable=True)
        dspy.configure(callbacks=[])
        return watching.seen[0]

    with capture_traces():
        assert ["args", "kwargs"] == seen_with(ours)
        assert ["kwargs"] == seen_with(theirs)


def test_from_a_thread_that_does_not_own_the_settings():
    """``mlflow.dspy.autolog()`` raises where another thread has configured DSPy; ours does not."""
    raised = []

    def turn_on(autolog):
        try:
            autolog()
        except RuntimeError as error:
            raised.append((autolog, str(error)))

    for autolog in (dspy_mlflow_async.autolog, theirs):
        thread = threading.Thread(target=turn_on, args=(autolog,))
        thread.start()
        thread.join(TIMEOUT)
        dspy_mlflow_async.autolog(disable=True)

    ((failed, text),) = raised
    assert theirs is failed
    assert "thread" in text


@pytest.mark.parametrize("model", [None, 5])
def test_a_model_that_is_no_text(model):
    """MLflow's handler raises on it, so that the LM's span is missing."""
    lm = EchoLM()
    lm.model = model

    def program():
        dspy.configure(lm=lm)
        with dspy.context(adapter=dspy.ChatAdapter()):
            dspy.settings.lm("@a")

    assert [("EchoLM.__call__", "@a", [])] == forest_of(ours, program)
    assert [] == forest_of(theirs, program)
