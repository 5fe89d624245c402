"""Each test starts with nothing installed and must leave nothing behind; each module may have a store of its own."""

import functools
import gc
import importlib
import inspect
import os
import shutil
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

os.environ["DSPY_MLFLOW_ASYNC_STRICT"] = "1"  # internal errors are raised, and counted whoever catches them
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download

import dspy
import mlflow
import pytest
from dspy.utils.parallelizer import ParallelExecutor
from mlflow.tracing.context import _USER_TRACE_CONTEXT
from mlflow.tracing.provider import _MLFLOW_TRACE_USER_DESTINATION, mlflow_runtime_context
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracking import fluent
from opentelemetry.context import Context
from tqdm import tqdm

import dspy_mlflow_async
from clean import assert_context_is_clean
from dspy_mlflow_async import guard, testing
from dspy_mlflow_async.composition import AutologCallback
from dspy_mlflow_async.context import frame
from dspy_mlflow_async.seams.mlflow_autolog import own_autolog_module, turn_own_autolog_off
from dspy_mlflow_async.spans import tracer
from echo import EchoLM

_ONE_IN = 4  # long tests

dspy_settings = importlib.import_module("dspy.dsp.utils.settings")  # an object of this name hides the module


def pytest_addoption(parser):
    """``--all`` runs what is long, too, of which else a sample runs."""
    parser.addoption("--all", action="store_true", help="run all long tests, not only one in four")


def pytest_collection_modifyitems(config, items):
    """Leave out most long tests, and check the context of async tests inside their own task: fixtures see another."""
    if not config.getoption("--all"):
        _keep_a_sample(config, items)
    for item in items:
        if inspect.iscoroutinefunction(getattr(item, "obj", None)):
            item.obj = _leaving_clean_context(item.obj)


def _keep_a_sample(config, items):
    """Of the tests that are marked as long every fourth stays. Of files from which one is asked for, all do."""
    asked = {os.path.normpath(argument.split("::")[0]) for argument in config.args if "::" in argument}
    long = [
        item
        for item in items
        if item.get_closest_marker("long") and os.path.relpath(item.path, config.invocation_params.dir) not in asked
    ]
    left_out = set(long) - set(long[::_ONE_IN])
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def _leaving_clean_context(test):
    @functools.wraps(test)
    async def checked(*args, **kwargs):
        await test(*args, **kwargs)
        assert_context_is_clean()

    return checked


@pytest.fixture(scope="session", autouse=True)
def _dspy_cache(tmp_path_factory):
    """DSPy's disk cache is this worker's, and off: a cached answer hides what a call does."""
    dspy.configure_cache(
        enable_disk_cache=False, enable_memory_cache=True, disk_cache_dir=str(tmp_path_factory.mktemp("cache"))
    )


class _Bars(weakref.WeakSet):
    """tqdm's set of progress bars, whose ``remove`` does not mind that the bar is gone."""

    remove = weakref.WeakSet.discard


@pytest.fixture(scope="session", autouse=True)
def _concurrent_progress_bars():
    """DSPy clears tqdm's set at the start of each evaluation; a bar of another one's then raises KeyError."""
    before, tqdm._instances = tqdm._instances, _Bars()
    yield
    tqdm._instances = before


@pytest.fixture(scope="session")
def _empty_store(tmp_path_factory):
    """A sqlite file with MLflow's schema, made once per worker: creating it takes a second."""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    mlflow.search_experiments()
    mlflow.set_tracking_uri(before)
    return path


@pytest.fixture(scope="module", autouse=True)
def store_uri(request, tmp_path_factory):
    """A fresh sqlite store for this module, MLflow's tracking URI while it runs. Nothing opens it until it is used."""
    folder = tmp_path_factory.mktemp("mlflow")
    path = folder / "mlflow.db"
    shutil.copyfile(request.getfixturevalue("_empty_store"), path)
    before = mlflow.get_tracking_uri()
    uri = f"sqlite:///{path}"
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(before)


@pytest.fixture(autouse=True)
def _experiment_of_its_own():
    """`mlflow.set_experiment` sets a global and an environment variable, which would reach the next test's store."""
    yield
    fluent._active_experiment_id = None
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)


@pytest.fixture(autouse=True)
def _leaves_nothing_behind():
    """After each test: no tracer, no patch, no frame, no current span, no internal error, DSPy's settings as before."""
    config = dict(dspy_settings.main_thread_config)
    overrides = dspy_settings.thread_local_overrides.get()
    owner = dspy_settings.config_owner_thread_id, dspy_settings.config_owner_async_task
    _drop_patches()  # that a fixture of a wider scope has left
    errors = guard.internal_errors()
    dspy.configure(lm=EchoLM(), callbacks=[], track_usage=False)

    yield

    dspy_mlflow_async.autolog(disable=True)
    left = [type(c) for c in dspy_settings.main_thread_config["callbacks"] if isinstance(c, AutologCallback)]
    dspy_settings.main_thread_config.clear()
    dspy_settings.main_thread_config.update(config)
    dspy_settings.config_owner_thread_id, dspy_settings.config_owner_async_task = owner
    try:
        assert [] == left
        _drop_patches()
        assert _patched_functions() == UNPATCHED
        assert errors == guard.internal_errors()
        assert_context_is_clean()
        tracer.end_abandoned()
        _assert_nothing_sends_traces_elsewhere()
    finally:
        frame.VARIABLE.set(None)
        _USER_TRACE_CONTEXT.set(None)
        mlflow_runtime_context.attach(Context())
        dspy_settings.thread_local_overrides.set(overrides)
        turn_own_autolog_off()
        InMemoryTraceManager.reset()
        mlflow.clear_active_model()  # loading a model makes it active, and its store is another than the next test's


def _assert_nothing_sends_traces_elsewhere():
    """A run that some thread has left open, or a destination, sends the next test's traces to another store."""
    left = [run.info for run in fluent._active_run_stack.get_all_thread_values().values() for run in run]
    assert ([], None) == (left, _MLFLOW_TRACE_USER_DESTINATION.get())


def _patched_functions():
    return (
        ParallelExecutor.execute,
        dspy.utils.callback._get_on_start_handler,
        dspy.utils.callback._get_on_end_handler,
        threading.Thread.start,
        ThreadPoolExecutor.submit,
        mlflow.dspy.autolog,
        own_autolog_module().safe_patch,
        mlflow.dspy.log_model.__code__,
        mlflow.pyfunc.load_model.__code__,
        mlflow.tracing.provider.trace_disabled.__code__,
        type(mlflow.tracing.provider.provider).get_or_init_tracer,
        sys.modules["mlflow.models.evaluation.utils.trace"].configure_autologging_for_evaluation,
    )


UNPATCHED = _patched_functions()


def _drop_patches():
    """Patches stay in while a tracer lives that somebody has made by hand; let those go that nobody holds."""
    if _patched_functions() != UNPATCHED:
        (dspy_settings.main_thread_config["trace"] or []).clear()  # DSPy keeps the last predictors that were called
        gc.collect()
        dspy_mlflow_async.autolog(disable=True)


@pytest.fixture
def captured():
    """The traces of the test, in memory, without any tracer."""
    with testing.capture_traces() as traces:
        yield traces


@pytest.fixture
def traces(captured):
    """The traces of the test, in memory, with ``autolog()`` on."""
    dspy_mlflow_async.autolog(silent=True)
    return captured


class Stored:
    """What has arrived in the store since the test began."""

    def __init__(self, experiment_id):
        self.experiment_id = experiment_id

    def __call__(self):
        """All traces, read back from the store, oldest first."""
        tracer.end_abandoned()
        found = mlflow.search_traces(
            locations=[self.experiment_id], return_type="list", max_results=5000, include_spans=True
        )
        return sorted(found, key=lambda trace: trace.data.spans[0].start_time_ns if trace.data.spans else 0)


@pytest.fixture
def stored(request, store_uri, monkeypatch):
    """A function that reads the test's traces back from its sqlite store, with ``autolog()`` on.

    MLflow's exporter writes at once here: its queue takes seconds to flush.
    """
    from mlflow.entities.trace_location import MlflowExperimentLocation

    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    experiment_id = mlflow.create_experiment(f"{request.node.nodeid}-{id(request)}")
    mlflow.tracing.set_destination(MlflowExperimentLocation(experiment_id))
    dspy_mlflow_async.autolog(silent=True)
    yield Stored(experiment_id)
    mlflow.tracing.reset()
