"""What MLflow's store would refuse is said in another way, so that what stands beside it is stored."""

import sys
import types

import dspy
import mlflow
import pytest
from runtools import Program, evaluate

import dspy_mlflow_async
from dspy_mlflow_async.runs.feedback import feedback_of
from dspy_mlflow_async.runs.handle import RunHandle, storable_key
from dspy_mlflow_async.seams import litellm_prices
from dspy_mlflow_async.spans.door import Door


class Hops(Program):
    """A program whose predictors are in a list."""

    def __init__(self):
        super().__init__()
        self.hops = [dspy.Predict("question -> answer")]


@pytest.mark.parametrize(
    ("key", "stored"),
    [
        ("Hops.hops[0].signature", "Hops.hops.0.signature"),
        ("acc@5", "acc_5"),
        ("/a/../b//c", "a/b/c"),
        ("..", "_"),
        ("..hidden", "__hidden"),
        ("by['a b'].signature", "by.a b.signature"),
        ("a\n", "a_"),
        ("x" * 249 + "/y", "x" * 249),
        ("x" * 300, "x" * 250),
        ("precision at: 5", "precision at: 5"),
    ],
)
def test_keys(key, stored):
    """Readable, relative, bounded."""
    assert stored == storable_key(key)


def test_no_two_keys_become_one(store):
    """What MLflow takes keeps its name; of others that would be called the same, each has its own, always the same."""
    dspy_mlflow_async.autolog(silent=True)
    with mlflow.start_run(run_name="mine") as mine:
        handle = RunHandle(mine, is_own=False)
        for step in range(2):
            handle.metrics({"acc@5": 1 + step, "acc_5": 3 + step, "acc#5": 5 + step}, step)
        handle.params({"x" * 251: 1, "x" * 250 + "y": 2})
        handle.tags({"best.acc@5": "z" * 9000})

    run = store.run("mine")
    assert {"acc_5": [(0, 3.0), (1, 4.0)], "acc_5_2": [(0, 1.0), (1, 2.0)], "acc_5_3": [(0, 5.0), (1, 6.0)]} == {
        key: store.series(run, key) for key in run.data.metrics
    }
    assert {"x" * 250: "1", "x" * 244 + "_2": "2"} == run.data.params
    assert "z" * 8000 == run.data.tags["best.acc_5"]


def test_params_of_predictors_in_a_list(store):
    """They are there, and so are the params beside them."""
    dspy_mlflow_async.autolog(log_evals=True, silent=True)
    evaluate("a", 1, 1, program=Hops())
    params = store.run("eval").data.params

    assert "lm_params" in params
    assert [key for key in params if key.startswith("Hops.hops.0.signature")]


@pytest.mark.parametrize(
    ("score", "value"),
    [(float("nan"), "nan"), (float("inf"), "inf"), ([1.0, float("-inf")], [1.0, "-inf"]), (0.5, 0.5)],
)
def test_scores_that_json_has_no_numbers_for(score, value):
    """Feedback that could not be sent would keep its trace from being stored."""
    feedback = feedback_of(lambda *_: score, Door(), score=score)

    assert value == feedback.value
    assert feedback.to_dictionary()


def test_a_module_that_another_thread_imports_is_not_waited_for(monkeypatch):
    """Its import takes seconds, and an evaluation would stand still for them."""
    module = types.ModuleType("litellm")
    module.__spec__ = types.SimpleNamespace(_initializing=True)
    monkeypatch.setitem(sys.modules, "litellm", module)

    assert not litellm_prices.is_imported()
    module.__spec__._initializing = False
    assert litellm_prices.is_imported()
