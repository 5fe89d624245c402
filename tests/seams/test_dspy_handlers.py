"""DSPy's choice of a handler, remembered: it must be DSPy's."""

import inspect

import dspy
import dspy.utils.callback as dspy_callback
import pytest
from dspy.evaluate.evaluate import Evaluate
from dspy.primitives import PythonInterpreter
from dspy.teleprompt import LabeledFewShot
from mlflow.dspy.callback import MlflowCallback

from dspy_mlflow_async.seams.dspy_dispatch import patch_handlers
from echo import EchoLM


class Decides(dspy.Module):
    """What DSPy takes for an LM where an instance says so."""

    def __init__(self, decides):
        super().__init__()
        self.decides = decides

    @property
    def supports_decision_requests(self):
        return self.decides


def cases():
    tool = dspy.Tool(lambda x: x, name="same")
    return [
        (dspy.Predict("question -> answer"), "__call__"),
        (dspy.ChainOfThought("question -> answer"), "acall"),
        (EchoLM(), "forward"),
        (dspy.ChatAdapter(), "format"),
        (dspy.ChatAdapter(), "parse"),
        (dspy.JSONAdapter(), "format"),
        (tool, "__call__"),
        (Evaluate(devset=[]), "__call__"),
        (LabeledFewShot(), "compile"),
        (PythonInterpreter(), "execute"),
        (Decides(decides=True), "__call__"),
        (Decides(decides=False), "__call__"),
    ]


@pytest.fixture
def patched():
    originals = dspy_callback._get_on_start_handler, dspy_callback._get_on_end_handler
    undo = patch_handlers()
    yield originals
    undo()
    assert originals == (dspy_callback._get_on_start_handler, dspy_callback._get_on_end_handler)


@pytest.mark.parametrize("kind", ["start", "end"])
def test_it_is_dspys_choice(patched, kind):
    """For every kind of object, the first time and the second."""
    callback = MlflowCallback()
    original = patched[kind == "end"]
    for _ in range(2):
        for instance, name in cases():
            fn = inspect.getattr_static(instance, name)
            choose = getattr(dspy_callback, f"_get_on_{kind}_handler")
            assert original(callback, instance, fn) == choose(callback, instance, fn)


def test_other_callbacks_get_theirs(patched):
    """A callback that is no tracer is chosen for as before."""
    calls = []

    class Theirs(dspy.utils.callback.BaseCallback):
        def on_module_start(self, call_id, instance, inputs):
            calls.append("start")

        def on_module_end(self, call_id, outputs, exception=None):
            calls.append("end")

    with dspy.context(lm=EchoLM(), callbacks=[Theirs()]):
        dspy.Predict("question -> answer")(question="q")

    assert ["start", "end"] == calls


def test_what_dspy_refuses_is_refused(patched):
    """An adapter's method that DSPy has no handler for."""
    for _ in range(2):
        with pytest.raises(ValueError, match="Unsupported adapter method"):
            dspy_callback._get_on_start_handler(MlflowCallback(), dspy.ChatAdapter(), dspy.ChatAdapter.__init__)
