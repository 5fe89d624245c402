"""Ctrl-C while DSPy tells its callbacks that a call begins: no end comes, and the next call must not notice."""

import dspy
import mlflow
import pytest
from dspy.utils.callback import BaseCallback

import dspy_mlflow_async
from clean import assert_context_is_clean
from dspy_mlflow_async.runs import evaluation as evaluations
from dspy_mlflow_async.runs.compile import Compile
from dspy_mlflow_async.testing import tree
from echo import Chain, chain_tree, marker


class Interrupted(BaseCallback):
    """A callback in one of whose handlers the user presses Ctrl-C, once."""

    def __init__(self, handler):
        self.is_over = False
        setattr(self, handler, self._interrupt)

    def _interrupt(self, **event):
        if not self.is_over:
            self.is_over = True
            raise KeyboardInterrupt


def run_module():
    Chain()(question="@a")


def run_tool():
    dspy.Tool(lambda question: question, name="echo")(question="@a")


def run_evaluation():
    devset = [dspy.Example(question="@a").with_inputs("question")]
    dspy.Evaluate(devset=devset, metric=lambda *_: 1.0, display_progress=False)(Chain())


def run_compile():
    trainset = [dspy.Example(question="@a", answer="@a").with_inputs("question")]
    dspy.BootstrapFewShot(metric=lambda *_: True).compile(Chain(), trainset=trainset)


CALLS = {
    "on_module_start": run_module,
    "on_lm_start": run_module,
    "on_adapter_format_start": run_module,
    "on_adapter_parse_start": run_module,
    "on_tool_start": run_tool,
    "on_evaluate_start": run_evaluation,
    "on_compile_start": run_compile,
}


def assert_nothing_is_left(traces):
    """In this very context: the user's own spans and the next calls are recorded whole, and usage is counted."""
    assert_context_is_clean()
    traces.clear()
    with mlflow.start_span("user", attributes={"question": "@next"}) as span:
        span.set_inputs("@next")
        Chain()(question="@next")
    dspy.configure(track_usage=True)
    assert Chain()(question="@b").get_lm_usage()
    dspy.configure(track_usage=False)

    assert [("user", "@next", [chain_tree("@next")]), chain_tree("@b")] == [tree(trace, marker) for trace in traces]


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("handler", CALLS)
def test_in_a_start_handler_of_another_callback(traces, handler, first):
    """Whatever ours has begun for that call ends as cancelled, and nothing of it stays in the context."""
    interrupted, (ours,) = Interrupted(handler), dspy.settings.callbacks
    dspy_mlflow_async.autolog(silent=True, log_evals=False, log_compiles=False)
    dspy.configure(callbacks=[interrupted, ours] if first else [ours, interrupted])
    with pytest.raises(KeyboardInterrupt):
        CALLS[handler]()

    assert interrupted.is_over
    outcomes = {span.get_attribute("outcome") for trace in traces for span in trace.data.spans}
    assert outcomes <= {"ok", "cancelled"}
    assert_nothing_is_left(traces)


@pytest.mark.parametrize(("room", "call"), [(evaluations.Evaluation, run_evaluation), (Compile, run_compile)])
def test_in_our_own_start_handler(traces, monkeypatch, room, call):
    """While a slow store creates the run of an evaluation or a compile, whose traces are not wanted."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "open", interrupt)
    dspy_mlflow_async.autolog(silent=True, log_evals=True, log_compiles=True, log_traces_from_eval=False)
    with pytest.raises(KeyboardInterrupt):
        call()

    assert_nothing_is_left(traces)
