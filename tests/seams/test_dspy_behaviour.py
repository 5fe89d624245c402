"""What DSPy does and we build on. When one of these fails, DSPy has changed, and it says what of ours breaks."""

import asyncio
import contextvars
import inspect
import threading

import dspy
import pytest
from dspy.utils.callback import BaseCallback
from dspy.utils.callback_context import ACTIVE_CALL_ID
from dspy.utils.parallelizer import ParallelExecutor

from clean import dspy_settings
from dspy_mlflow_async.seams import dspy as seam
from echo import TIMEOUT, Chain, EchoLM


class Recording(BaseCallback):
    """Notes every event of modules and LMs."""

    def __init__(self):
        self.events = []

    def on_module_start(self, call_id, instance, inputs):
        self.events.append(("start", call_id, ACTIVE_CALL_ID.get(), inputs))

    def on_module_end(self, call_id, outputs, exception=None):
        self.events.append(("end", call_id, ACTIVE_CALL_ID.get(), exception))

    on_lm_start, on_lm_end = on_module_start, on_module_end


def recorded(call, *callbacks):
    """The events of a call."""
    recording = Recording()
    dspy.configure(callbacks=[*callbacks, recording])
    call()
    return recording.events


def test_start_and_end_run_in_the_callers_context():
    """Handlers set our context variable for the call itself; elsewhere they would set it for nobody."""
    variable = contextvars.ContextVar("variable", default=None)
    seen = []

    class Setting(BaseCallback):
        def on_module_start(self, call_id, instance, inputs):
            variable.set(call_id)

    class Program(dspy.Module):
        def forward(self):
            seen.append(variable.get())

        async def aforward(self):
            seen.append(variable.get())

    dspy.configure(callbacks=[Setting()])
    Program()()
    asyncio.run(Program().acall())

    assert [None] * 2 != seen
    assert None not in seen


def test_the_active_call_is_still_the_parent_in_a_start_handler():
    """We tell by it whether DSPy has forgotten the call that we think is around."""
    events = recorded(lambda: Chain()(question="@a"))
    starts = [(call_id, active) for kind, call_id, active, _ in events if kind == "start"]

    assert starts[0][1] is None
    assert starts[0][0] == starts[1][1]


def test_an_end_handler_gets_the_exact_base_exception():
    """Outcomes (cancelled, interrupted) are told by it; dspy >= 3.3.1."""
    raised = KeyboardInterrupt()

    def interrupt(marker):
        raise raised

    dspy.configure(lm=EchoLM(during=interrupt))
    recording = Recording()
    dspy.configure(callbacks=[recording])
    with pytest.raises(KeyboardInterrupt):
        Chain()(question="@a")

    assert [raised] * 3 == [exception for kind, _, _, exception in recording.events if kind == "end"]


def test_all_callbacks_get_one_inputs_dict():
    """Which is why we never change it."""
    first, second = Recording(), Recording()
    dspy.configure(callbacks=[first, second])
    Chain()(question="@a")

    assert first.events[0][3] is second.events[0][3]


def test_every_worker_thread_begins_in_parallel_executor():
    """The one place that we wrap; another pool of DSPy's would lose its spans, unless an optimizer starts it."""
    users = {
        "dspy.evaluate.evaluate": "ParallelExecutor",
        "dspy.predict.parallel": "ParallelExecutor",
    }
    for module, name in users.items():
        assert name in inspect.getsource(__import__(module, fromlist=["_"]))
    assert ["self", "function", "data"] == list(inspect.signature(ParallelExecutor.execute).parameters)


def test_pools_of_dspys_own_that_we_know():
    """DSPy's files that make threads themselves: when this list grows, a new hole has opened."""
    import pathlib

    root = pathlib.Path(dspy.__file__).parent
    made = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if "_vendor" not in path.parts and ("ThreadPoolExecutor(" in path.read_text() or "Thread(" in path.read_text())
    }
    known = {
        "utils/parallelizer.py",  # wrapped
        "predict/rlm.py",  # copies the context
        "streaming/streamify.py",  # copies the context
        "teleprompt/gepa/gepa_utils.py",  # copies the context
        "streaming/messages.py",  # sends a message, calls nothing
        "utils/unbatchify.py",  # a hole
        "teleprompt/avatar_optimizer.py",  # inside its compile
    }

    assert "utils/parallelizer.py" in made
    assert set() == {path for path in made - known if not path.startswith(("clients/", "primitives/"))}


def test_execute_takes_the_function_per_item():
    """The wrapped function is called with each item, in the workers."""
    seen = []
    ParallelExecutor(num_threads=2, disable_progress_bar=True).execute(seen.append, [1, 2, 3])

    assert [1, 2, 3] == sorted(seen)


def test_a_usage_tracker_in_the_overrides_sees_each_response():
    """Usage of one call is counted by a tracker in DSPy's own context override."""
    seen = []

    class Watching(seam.UsageTracker):
        def add_usage(self, lm, usage_entry):
            seen.append((lm, usage_entry["total_tokens"]))

    before = seam.overrides()
    seam.override_usage_tracker(Watching())
    dspy.settings.lm("@a")
    seam.restore_overrides(before)
    dspy.settings.lm("@a")

    assert [("echo/one", 12)] == seen


def test_overriding_the_tracker_freezes_no_other_setting():
    """``dspy.context`` would copy all settings, so that a later ``dspy.configure`` is not seen."""
    before = seam.overrides()
    seam.override_usage_tracker(None)
    try:
        dspy.configure(num_threads=7)
        assert 7 == dspy.settings.num_threads
    finally:
        seam.restore_overrides(before)


def test_global_callbacks_are_read_at_each_call():
    """Callbacks set by us take effect at the next call, in every thread, without ``dspy.configure``."""
    recording = Recording()
    thread = threading.Thread(target=seam.change_callbacks, args=(lambda present: [*present, recording],))
    thread.start()
    thread.join(TIMEOUT)
    Chain()(question="@a")

    assert recording.events
    assert [recording] == seam.global_callbacks()


def test_setting_callbacks_owns_nothing():
    """``dspy.configure`` stays with whoever calls it first."""
    dspy_settings.config_owner_thread_id = None
    seam.change_callbacks(lambda _: [])

    assert dspy_settings.config_owner_thread_id is None


def test_changing_callbacks_inside_a_context():
    """Where a ``dspy.context`` has a list of its own, both are changed, each from what it was."""
    ours, theirs = Recording(), Recording()
    with dspy.context(callbacks=[theirs]):
        seam.change_callbacks(lambda present: [*present, ours])
        assert [theirs, ours] == dspy.settings.callbacks
        assert [ours] == seam.global_callbacks()
        seam.change_callbacks(lambda present: [callback for callback in present if callback is not ours])
        assert [theirs] == dspy.settings.callbacks

    assert [] == dspy.settings.callbacks


@pytest.mark.parametrize(
    "name", ["on_compile_start", "on_compile_end", "on_evaluate_start", "on_interpreter_execute_start"]
)
def test_handlers_that_we_implement(name):
    """Events that DSPy reports since 3.3.1."""
    assert callable(getattr(BaseCallback, name))
