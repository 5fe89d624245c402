"""What MLflow's own test-suite expects of its callback holds for ours: serving, models, usage, state."""

import dspy
import mlflow
import pytest
from mlflow.pyfunc.context import Context, get_prediction_context, set_prediction_context

from clean import dspy_settings
from dspy_mlflow_async import TracingCallback, autolog
from dspy_mlflow_async.testing import tree
from echo import Chain, EchoLM, chain_tree, marker


class Program(dspy.Module):
    """A small program at module level, so that a model of it can be loaded."""

    def __init__(self):
        super().__init__()
        self.step = dspy.Predict("question -> answer")

    def forward(self, question):
        return self.step(question=question)


def callback():
    """The tracer."""
    return next(c for c in dspy_settings.main_thread_config["callbacks"] if isinstance(c, TracingCallback))


def test_state_is_empty_around_a_compile(traces):
    """``optimizer_stack_level`` is 0 and the dicts are empty before and after; ``reset()`` exists."""
    assert (0, {}) == (callback().optimizer_stack_level, dict(callback()._call_id_to_metric_key))
    examples = [dspy.Example(question="@a", answer="@a").with_inputs("question")]
    dspy.BootstrapFewShot(metric=lambda *_: True).compile(Chain(), trainset=examples)
    callback().reset()

    assert 0 == callback().optimizer_stack_level
    for name in ("_call_id_to_metric_key", "_call_id_to_span", "_call_id_to_module", "_evaluation_counter"):
        assert {} == dict(getattr(callback(), name))


def test_log_load_and_serve_a_model(traces, store_uri):
    """``log_model`` pickles our callback with DSPy's settings; the loaded model predicts and is traced once."""
    program = Program()
    with mlflow.start_run():
        info = mlflow.dspy.log_model(program, name="model", pip_requirements=["dspy"])
    traces.clear()

    loaded = mlflow.dspy.load_model(info.model_uri)
    assert "@loaded" == loaded(question="@loaded").answer
    served = mlflow.pyfunc.load_model(info.model_uri)
    assert {"answer": "@served"} == served.predict("@served")

    assert [("Program.forward", "@loaded"), ("Program.forward", "@served")] == [
        tree(trace, marker)[:2] for trace in traces
    ]


def test_dependencies_schema(traces):
    """A served model's schema goes into the prediction context, once set; a second set raises, as MLflow's does."""
    schema = {"dependencies_schemas": {"retrievers": [{"name": "r"}]}}
    tracing = TracingCallback()
    tracing.set_dependencies_schema(schema)
    with pytest.raises((mlflow.exceptions.MlflowException, AttributeError)):  # AttributeError: MLflow's own slip
        tracing.set_dependencies_schema(schema)

    with dspy.context(callbacks=[tracing]), set_prediction_context(Context(request_id="r-1")):
        Program()(question="@a")
        context = get_prediction_context()

    assert schema["dependencies_schemas"] == context.dependencies_schemas


def test_the_prediction_context_reaches_workers(traces):
    """Spans that a served model makes in DSPy's worker threads know its prediction context."""
    seen = []

    def look(marker):
        seen.append(get_prediction_context())

    dspy.configure(lm=EchoLM(during=look))
    with set_prediction_context(Context(request_id="r-1")):
        context = get_prediction_context()
        dspy.Parallel(num_threads=2, disable_progress_bar=True)([(Chain(), {"question": "@a"})])

    assert [context, context] == seen


def test_usage_that_an_lm_reports_around_its_call(traces):
    """An LM that adds usage to the tracker in an undecorated ``__call__``, before DSPy's: MLflow's own test does."""

    class Reporting(EchoLM):
        def __call__(self, *args, **kwargs):
            if dspy.settings.usage_tracker:
                dspy.settings.usage_tracker.add_usage(
                    "mine", {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
                )
            return super().__call__(*args, **kwargs)

    dspy.configure(lm=Reporting(usage=lambda marker: {}), track_usage=True)
    Program()(question="@a")

    expected = {"input_tokens": 5, "output_tokens": 6, "total_tokens": 11}
    assert expected == traces[0].info.token_usage


def test_usage_of_an_lm_that_reports_nothing(traces):
    """No usage is no attribute, rather than zeros."""
    dspy.configure(lm=EchoLM(usage=lambda marker: {}))
    Program()(question="@a")

    assert traces[0].info.token_usage is None
    assert [None] * 5 == [span.get_attribute("mlflow.chat.tokenUsage") for span in traces[0].data.spans]


@pytest.mark.parametrize("error", [ValueError("x"), KeyError()])
def test_a_trace_with_an_error_can_be_searched_for(stored, error):
    """Errors arrive in the store with status and events."""

    def fail(marker):
        raise error

    dspy.configure(lm=EchoLM(during=fail))
    with pytest.raises(type(error)):
        Program()(question="@a")

    (trace,) = stored()
    assert "ERROR" == trace.info.state.value
    root = next(span for span in trace.data.spans if span.parent_id is None)
    (event,) = root.events
    assert ("exception", type(error).__name__) == (event.name, event.attributes["exception.type"])
    assert event.attributes["exception.message"]
    assert "Traceback" in event.attributes["exception.stacktrace"]


def test_get_trace_and_last_active_trace_id(stored):
    """``mlflow.get_last_active_trace_id()`` after a call is that call's trace."""
    autolog()
    Chain()(question="@a")
    trace_id = mlflow.get_last_active_trace_id()

    (trace,) = stored()
    assert trace_id == trace.info.trace_id
    assert chain_tree("@a") == tree(mlflow.get_trace(trace_id), marker)


def test_update_current_trace_inside_a_module(traces):
    """``mlflow.update_current_trace`` and ``get_current_active_span`` work inside a module, in workers too."""

    class Tagging(dspy.Module):
        def forward(self, question):
            mlflow.update_current_trace(tags={"mine": question})
            mlflow.get_current_active_span().set_attribute("mine", question)
            return dspy.Prediction(answer=question)

    class Outer(dspy.Module):
        def forward(self, question):
            return dspy.Parallel(num_threads=2, disable_progress_bar=True)([(Tagging(), {"question": question})])

    Outer()(question="@a")

    (trace,) = traces
    assert "@a" == trace.info.tags["mine"]
    assert ("Outer.forward", None, [("Tagging.forward", "@a", [])]) == tree(trace, "mine")
