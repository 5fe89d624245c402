"""``autolog()``: put in once, changed at will, taken out without a trace, and never two tracers at once."""

import asyncio
import copy
import logging
import threading

import cloudpickle
import dspy
import mlflow
import pytest
from dspy.utils.callback import BaseCallback
from mlflow.dspy.callback import MlflowCallback
from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS

import dspy_mlflow_async
from clean import dspy_settings
from dspy_mlflow_async import TracingCallback, autolog
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Chain, chain_tree, marker, predict_tree


def ours():
    """Our callbacks among DSPy's global ones."""
    return [c for c in dspy_settings.main_thread_config["callbacks"] if isinstance(c, TracingCallback)]


def forests(traces):
    """The trees of some traces."""
    return [tree(trace, marker) for trace in traces]


def call(question="@a"):
    """One traced call."""
    return dspy.Predict("question -> answer")(question=question).answer


def test_idempotent(captured):
    """Called three times, there is one callback and one span per call."""
    for _ in range(3):
        autolog()
    call()

    assert 1 == len(ours())
    assert [predict_tree("@a")] == forests(captured)


def test_the_last_settings_count(captured):
    """Settings of a later call replace all of the earlier one's."""
    autolog(log_traces=False)
    call("@silent")
    autolog()
    call("@loud")

    assert [predict_tree("@loud")] == forests(captured)


def test_disable_undoes_every_patch(captured):
    """After ``autolog(disable=True)`` nothing is recorded, and every function of DSPy's and MLflow's is its own again.

    That each is the very object it was before is checked after every test.
    """
    autolog(propagate_threads=True)
    autolog(disable=True)
    call()

    assert [] == ours()
    assert [] == captured


def test_disable_twice_and_without_enable(captured):
    """Disabling what is not on does nothing."""
    autolog(disable=True)
    autolog(disable=True)
    call()

    assert [] == captured


def test_on_off_on(captured):
    """Off and on again, it works as before."""
    for question in ("@a", "@b"):
        autolog()
        call(question)
        autolog(disable=True)
        call("@silent")

    assert [predict_tree("@a"), predict_tree("@b")] == forests(captured)


def test_foreign_callbacks_are_left_alone(captured):
    """Other callbacks keep their place, on and off, and see every call."""

    class Counting(BaseCallback):
        calls = 0

        def on_lm_start(self, call_id, instance, inputs):
            self.calls += 1

    first, second = Counting(), Counting()
    dspy.configure(callbacks=[first])
    autolog()
    dspy.configure(callbacks=[*dspy.settings.callbacks, second])
    call()
    autolog()
    autolog(disable=True)
    call()

    assert [first, second] == dspy.settings.callbacks
    assert (2, 2) == (first.calls, second.calls)


def test_from_another_thread(captured):
    """When another thread has configured DSPy first, ``autolog()`` works, and owns nothing afterwards."""
    dspy_settings.config_owner_thread_id = None
    failures = []

    def configure_first():
        dspy.configure(num_threads=2)
        failures.append(None)

    thread = threading.Thread(target=configure_first)
    thread.start()
    thread.join(TIMEOUT)
    with pytest.raises(RuntimeError):
        dspy.configure(num_threads=3)
    autolog()
    call()
    owner = dspy_settings.config_owner_thread_id

    assert [predict_tree("@a")] == forests(captured)
    assert thread.ident == owner


def test_it_does_not_become_the_owner_of_the_settings(captured):
    """The thread that calls ``autolog()`` first leaves ``dspy.configure`` to whoever wants it."""
    dspy_settings.config_owner_thread_id = None
    thread = threading.Thread(target=autolog)
    thread.start()
    thread.join(TIMEOUT)
    dspy.configure(num_threads=2)
    call()

    assert [predict_tree("@a")] == forests(captured)


async def test_inside_a_running_loop(captured):
    """In a task, where another task has configured DSPy, and from two tasks at once."""

    async def configure():
        dspy.configure(num_threads=2)

    await asyncio.create_task(configure())
    await asyncio.gather(asyncio.to_thread(autolog), asyncio.create_task(asyncio.sleep(0)))
    autolog()
    await dspy.Predict("question -> answer").acall(question="@a")

    assert 1 == len(ours())
    assert [predict_tree("@a")] == forests(captured)


def test_inside_a_dspy_context(captured):
    """Where a ``dspy.context`` hides the global callbacks, the tracer works at once, and after the block."""
    with dspy.context(num_threads=2):
        autolog()
        call("@inside")
    call("@after")

    assert [predict_tree("@inside"), predict_tree("@after")] == forests(captured)


def test_from_many_threads_at_once(captured):
    """Ten threads that call ``autolog()`` together leave one callback."""
    gate = threading.Barrier(10, timeout=TIMEOUT)

    def turn_on():
        gate.wait()
        autolog()

    threads = [threading.Thread(target=turn_on) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    call()

    assert 1 == len(ours())
    assert [predict_tree("@a")] == forests(captured)


# --- MLflow's own tracer ----------------------------------------------------------------------------------------


def test_mlflows_own_callback_is_replaced_with_one_log_line(captured, caplog):
    """If MLflow's tracer is on, ours replaces it and says so once."""
    mlflow.dspy.autolog()
    dspy.configure(track_usage=False)
    with caplog.at_level(logging.INFO, logger="dspy_mlflow_async"):
        autolog()
    call()

    assert [TracingCallback] == [
        TracingCallback if isinstance(c, TracingCallback) else type(c) for c in dspy.settings.callbacks
    ]
    assert 1 == len([record for record in caplog.records if record.name == "dspy_mlflow_async"])
    assert [predict_tree("@a")] == forests(captured)


def test_silent(captured, caplog):
    """``silent=True`` replaces it without a word."""
    mlflow.dspy.autolog()
    dspy.configure(track_usage=False)
    with caplog.at_level(logging.INFO, logger="dspy_mlflow_async"):
        autolog(silent=True)

    assert [] == [record for record in caplog.records if record.name == "dspy_mlflow_async"]


@pytest.mark.parametrize("is_off", [False, True])
def test_its_patches_are_taken_out_too(captured, is_off):
    """MLflow's patches of ``Evaluate.__call__`` and ``compile`` are gone: they swap the process's provider.

    Also where it was switched off: it leaves them in place, and they work again once ours is noted as on.
    """
    before = dspy.Evaluate.__call__, dspy.BootstrapFewShot.compile
    mlflow.dspy.autolog()
    if is_off:
        mlflow.dspy.autolog(disable=True)
    assert before != (dspy.Evaluate.__call__, dspy.BootstrapFewShot.compile)
    autolog()

    assert before == (dspy.Evaluate.__call__, dspy.BootstrapFewShot.compile)


def test_a_later_mlflow_autolog_does_not_double_the_spans(captured):
    """``mlflow.dspy.autolog()`` after ours comes to ours, with its settings."""
    autolog()
    mlflow.dspy.autolog(log_traces_from_eval=False)
    call()
    dspy.Evaluate(
        devset=[dspy.Example(question="@e").with_inputs("question")], metric=lambda *_: 1.0, display_progress=False
    )(Chain())

    assert [predict_tree("@a")] == forests(captured)
    assert 1 == len(dspy.settings.callbacks)
    assert dspy.settings.track_usage is False


def test_a_later_mlflow_autolog_that_somebody_holds(captured):
    """Also through a reference taken before ours was on: its patches stay out."""
    held = mlflow.dspy.autolog
    before = dspy.Evaluate.__call__, dspy.BootstrapFewShot.compile
    autolog()
    held()
    dspy.configure(track_usage=False)
    call()

    assert before == (dspy.Evaluate.__call__, dspy.BootstrapFewShot.compile)
    assert [predict_tree("@a")] == forests(captured)


def test_mlflow_autolog_works_after_ours_is_off(captured):
    """After ``autolog(disable=True)``, MLflow's own tracer is as it was."""
    autolog()
    autolog(disable=True)
    mlflow.dspy.autolog()
    dspy.configure(track_usage=False)
    call()
    mlflow.dspy.autolog(disable=True)

    assert 1 == len(captured)
    assert "outcome" not in captured[0].data.spans[0].attributes


@pytest.fixture
def generic_autolog():
    """``mlflow.autolog``, undone afterwards: MLflow remembers that everything was switched off."""
    yield mlflow.autolog
    mlflow.autolog(disable=True, silent=True)
    AUTOLOGGING_INTEGRATIONS.pop("mlflow")


def test_mlflows_generic_autolog(captured, generic_autolog):
    """``mlflow.autolog()`` finds the integration's name on our function, and does not double the spans."""
    assert "dspy" == autolog.integration_name
    autolog()
    generic_autolog(silent=True)
    call()

    assert [predict_tree("@a")] == forests(captured)


def mask(value):
    """A hook that hides all text."""
    return "hidden" if isinstance(value, str) else value


EXTRAS = {"redact": mask, "max_value_bytes": 1000, "propagate_threads": True, "context_runs": False}


def test_a_later_mlflow_autolog_keeps_what_it_cannot_name(captured):
    """MLflow's seven arguments are its own; ``redact`` and the like stay as they were, or values would be stored."""
    autolog(log_traces_from_eval=False, **EXTRAS)
    mlflow.dspy.autolog(log_compiles=True)
    call("@secret")

    settings = ours()[0].settings
    assert (mask, 1000, True, True) == (
        settings.redact, settings.max_value_bytes, settings.log_compiles, settings.log_traces_from_eval
    )  # fmt: skip
    assert "@secret" not in repr([trace.to_dict() for trace in captured])


def test_mlflows_generic_autolog_leaves_our_settings_alone(captured, generic_autolog):
    """As MLflow does for an integration that was set by itself, also when all are switched off."""
    autolog(log_evals=True, **EXTRAS)
    before = ours()[0].settings
    generic_autolog(silent=True)
    assert before == ours()[0].settings
    generic_autolog(disable=True, silent=True)

    assert before == ours()[0].settings


@pytest.mark.parametrize("enable_tracing", [True, False])
@pytest.mark.parametrize("log_traces", [True, False])
def test_mlflows_evaluation_puts_our_settings_back(captured, enable_tracing, log_traces):
    """MLflow sets integrations for its evaluations and restores them after; hidden values stay hidden meanwhile."""
    from mlflow.models.evaluation.utils.trace import configure_autologging_for_evaluation

    autolog(log_traces=log_traces, log_evals=True, **EXTRAS)
    before = ours()[0].settings
    with configure_autologging_for_evaluation(enable_tracing=enable_tracing):
        call("@inside")
    call("@after")

    assert [before] == [callback.settings for callback in ours()]
    assert [c for c in dspy.settings.callbacks if isinstance(c, MlflowCallback)] == ours()
    assert log_traces * (1 + enable_tracing) == len(captured)
    assert "@" not in repr([trace.to_dict() for trace in captured])


def test_mlflows_evaluation_after_ours_is_off(captured):
    """``autolog(disable=True)`` is somebody's explicit wish, which MLflow's evaluations respect."""
    from mlflow.models.evaluation.utils.trace import configure_autologging_for_evaluation

    autolog()
    autolog(disable=True)
    with configure_autologging_for_evaluation():
        call()

    assert [] == captured


def test_it_is_an_mlflow_callback():
    """MLflow's serving and autolog find their tracer by ``isinstance``."""
    autolog()

    assert isinstance(ours()[0], MlflowCallback)


# --- copies -----------------------------------------------------------------------------------------------------


def test_cloudpickle(captured):
    """The callback survives cloudpickle, alone and inside DSPy's settings, and the copy works."""
    autolog(max_value_bytes=1234)
    copy = cloudpickle.loads(cloudpickle.dumps(ours()[0]))
    assert 1234 == copy.settings.max_value_bytes

    with dspy.context(callbacks=[copy]):
        call()
    assert [predict_tree("@a")] == forests(captured)


class Locked:
    """A hook that holds what cannot be pickled."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, value):
        return mask(value)


def test_a_hook_that_cannot_be_pickled(captured, caplog):
    """It keeps nothing from being pickled or copied; the pickled tracer stores a mask in place of every value."""
    hidden = TracingCallback(redact=Locked(), max_value_bytes=1000)
    assert hidden.settings is copy.deepcopy(hidden).settings
    pickled = cloudpickle.loads(cloudpickle.dumps(hidden))
    with dspy.context(callbacks=[pickled]):
        call("@secret")

    assert 1 == len([record for record in caplog.records if "cannot be pickled" in record.message])
    assert 1000 == pickled.settings.max_value_bytes
    assert [predict_tree()] == [tree(trace) for trace in captured]
    assert "@secret" not in repr([trace.to_dict() for trace in captured])


def test_an_unpickled_copy_works_without_autolog(captured):
    """In a process that never called ``autolog()``, a copy goes by the settings it was pickled with."""
    callback = TracingCallback(max_value_bytes=4321, dependencies_schema={"schema": 1})
    copy = cloudpickle.loads(cloudpickle.dumps(callback))

    with dspy.context(callbacks=[copy]):
        call()
    assert [predict_tree("@a")] == forests(captured)
    assert 4321 == copy.settings.max_value_bytes


def test_two_of_ours_on_one_call_give_one_span(captured):
    """A second instance beside the first does not double the spans, in any order."""
    autolog()
    dspy.configure(callbacks=[TracingCallback(), *dspy.settings.callbacks, TracingCallback()])
    call()
    Chain()(question="@b")

    assert [predict_tree("@a"), chain_tree("@b")] == forests(captured)


def test_disable_removes_copies_of_autologs_callback(captured):
    """A copy that came back by ``dspy.configure`` of loaded settings is off after ``disable``."""
    autolog()
    copy = cloudpickle.loads(cloudpickle.dumps(ours()[0]))
    autolog(disable=True)
    with dspy.context(callbacks=[copy]):
        call()

    assert [] == captured


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"log_traces": "yes"}, TypeError, "log_traces"),
        ({"log_traces_from_compile": 1}, TypeError, "log_traces_from_compile"),
        ({"log_traces_from_eval": None}, TypeError, "log_traces_from_eval"),
        ({"log_compiles": []}, TypeError, "log_compiles"),
        ({"log_evals": "no"}, TypeError, "log_evals"),
        ({"disable": "no"}, TypeError, "disable"),
        ({"silent": 0}, TypeError, "silent"),
        ({"propagate_threads": "no"}, TypeError, "propagate_threads"),
        ({"max_value_bytes": 0}, ValueError, "max_value_bytes"),
        ({"max_value_bytes": 1.5}, TypeError, "max_value_bytes"),
        ({"max_value_bytes": True}, TypeError, "max_value_bytes"),
        ({"redact": "mask"}, TypeError, "redact"),
        ({"unknown": 1}, TypeError, "unknown"),
    ],
)
def test_invalid_arguments(captured, arguments, error, named):
    """An invalid argument raises an error that names it, and changes nothing."""
    with pytest.raises(error, match=named):
        autolog(**arguments)

    assert [] == ours()


@pytest.mark.parametrize(
    ("arguments", "error"), [({"log_traces": "yes"}, TypeError), ({"max_value_bytes": -1}, ValueError)]
)
def test_invalid_arguments_of_the_callback(arguments, error):
    """The public callback checks the same."""
    with pytest.raises(error):
        TracingCallback(**arguments)


def test_the_parameters_are_mlflows():
    """Names, order and defaults of MLflow's parameters, so that it is a drop-in."""
    import inspect

    theirs = list(inspect.signature(mlflow.dspy.autolog).parameters.values())
    mine = list(inspect.signature(autolog).parameters.values())

    assert [(p.name, p.default) for p in theirs] == [(p.name, p.default) for p in mine[: len(theirs)]]
    assert {inspect.Parameter.KEYWORD_ONLY} == {p.kind for p in mine[len(theirs) :]}


def test_public_names():
    """``__all__`` names what can be imported."""
    for name in dspy_mlflow_async.__all__:
        assert getattr(dspy_mlflow_async, name) is not None
    with pytest.raises(AttributeError):
        _ = dspy_mlflow_async.nothing_of_the_kind
