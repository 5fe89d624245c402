"""Rule 4: no result, setting, input or exception differs, whether the tracer works, fails or is off."""

import asyncio
import copy
import inspect

import dspy
import pytest

import dspy_mlflow_async
from clean import dspy_settings
from dspy_mlflow_async import guard
from dspy_mlflow_async.spans import tracer
from dspy_mlflow_async.testing import capture_traces
from echo import Chain, EchoLM, usage_of

EXAMPLES = [dspy.Example(question=f"@q{n}", answer=f"@q{n}").with_inputs("question") for n in range(3)]


def off():
    """No tracer."""


def on():
    """Our tracer."""
    dspy_mlflow_async.autolog()


def failing(monkeypatch):
    """Our tracer, each of whose spans fails to begin or to end."""
    dspy_mlflow_async.autolog()
    calls = []

    def fail(*args):
        calls.append(args)
        raise ZeroDivisionError("a fault of our own")

    monkeypatch.delenv("DSPY_MLFLOW_ASYNC_STRICT")
    monkeypatch.setattr(tracer, "start", fail)


@pytest.fixture(params=["off", "on", "failing"])
def state(request, monkeypatch):
    """The tracer off, on and failing."""
    with capture_traces():
        if request.param == "failing":
            failing(monkeypatch)
        elif request.param == "on":
            on()
        yield request.param
    guard.start_afresh()


def items(value):
    """A prediction or result in comparable form."""
    return value.toDict() if isinstance(value, dspy.Example | dspy.Prediction) else value


def test_sequential_results(state):
    """Predictions are the same, keys and order included."""
    prediction = Chain()(question="@a")

    assert [("answer", "@a")] == list(prediction.items())
    assert "Prediction(\n    answer='@a'\n)" == repr(prediction)


def test_parallel_results(state):
    """Results of ``dspy.Parallel``, failed items and exceptions included."""

    def fail(marker):
        if marker == "@q1":
            raise LookupError(marker)

    dspy.configure(lm=EchoLM(during=fail))
    parallel = dspy.Parallel(num_threads=2, disable_progress_bar=True, return_failed_examples=True)
    results, failed, errors = parallel([(Chain(), example) for example in EXAMPLES])

    assert ["@q0", None, "@q2"] == [result and result.answer for result in results]
    assert [EXAMPLES[1]] == failed
    assert ["@q1"] == [str(error) for error in errors]


def test_evaluation_results(state):
    """Score and result rows in devset order."""
    result = dspy.Evaluate(
        devset=EXAMPLES,
        metric=lambda example, prediction: example.answer == prediction.answer,
        num_threads=2,
        display_progress=False,
    )(Chain())

    assert 100.0 == result.score
    assert [(example, "@q" + str(n), True) for n, example in enumerate(EXAMPLES)] == [
        (example, prediction.answer, score) for example, prediction, score in result.results
    ]


def test_exceptions_pass_unchanged(state):
    """The very exception object arrives, with its cause and context as raised."""
    cause = KeyError("cause")
    raised = LookupError("no answer")
    raised.__cause__ = cause

    def fail(marker):
        raise raised

    dspy.configure(lm=EchoLM(during=fail), adapter=dspy.ChatAdapter(use_json_adapter_fallback=False))
    with pytest.raises(LookupError) as caught:
        Chain()(question="@a")

    assert raised is caught.value
    assert cause is caught.value.__cause__


def test_inputs_are_not_mutated(state):
    """DSPy hands one ``inputs`` dict to every callback: nobody sees ours in it."""
    seen = []

    class Watching(dspy.utils.BaseCallback):
        def on_module_start(self, call_id, instance, inputs):
            seen.append(dict(inputs))

    arguments = {"question": {"nested": [1, {"@a": (2, 3)}]}}
    before = copy.deepcopy(arguments)

    class Program(dspy.Module):
        def forward(self, question):
            return dspy.Prediction(answer=question)

    dspy.configure(callbacks=[*dspy.settings.callbacks, Watching()])
    prediction = Program()(**arguments)

    assert before == arguments
    assert arguments["question"] is prediction.answer
    # MLflow's callback takes the empty "args" out of the dict that others are given too.
    assert [{"args": (), "kwargs": arguments}] == seen


def test_settings_are_as_they_were(state):
    """Inside and after a call, DSPy's settings are those of a program without a tracer."""
    names = set(dspy_settings.DEFAULT_CONFIG) - {"callbacks", "usage_tracker", "caller_predict", "caller_modules"}
    expected = {name: dspy_settings.DEFAULT_CONFIG[name] for name in names - {"lm", "trace"}}
    seen = []

    def look(marker):
        seen.append({name: dspy.settings.get(name) for name in expected})

    dspy.configure(lm=EchoLM(during=look))
    Chain()(question="@a")

    assert [expected, expected] == [{**each, "send_stream": None} for each in seen]
    assert dspy_settings.thread_local_overrides.get().get("usage_tracker") is None


def test_a_setting_changed_inside_a_call(state):
    """``dspy.configure`` inside a program holds after it; inside, DSPy's own ``dspy.context`` hides it."""

    class Program(dspy.Module):
        def forward(self, question):
            dspy.configure(num_threads=3)
            return dspy.Prediction(answer=dspy.settings.num_threads)

    assert dspy_settings.DEFAULT_CONFIG["num_threads"] == Program()(question="@a").answer
    assert 3 == dspy.settings.num_threads


def test_history_and_trace(state):
    """The LM's history and ``dspy.settings.trace`` are what they are without a tracer."""
    lm = EchoLM()
    with dspy.context(lm=lm, trace=[]):
        program = Chain()
        program(question="@a")
        trace = dspy.settings.trace

    assert [program.first, program.second] == [step for step, _, _ in trace]
    assert ["@a", "@a"] == [entry["outputs"][0].split("\n")[1] for entry in lm.history]


def test_functions_stay_themselves(state):
    """Neither metrics nor tools nor programs are wrapped or replaced."""

    def metric(example, prediction):
        return 1.0

    program, evaluator = Chain(), dspy.Evaluate(devset=EXAMPLES, metric=metric, display_progress=False)
    forward = program.forward
    evaluator(program)

    assert metric is evaluator.metric
    assert forward == program.forward
    assert "forward" not in vars(program)
    assert ["self", "question"] == list(inspect.signature(Chain.forward).parameters)


# --- usage ------------------------------------------------------------------------------------------------------


def total(*markers):
    """What the tracker of DSPy makes of one call per marker."""
    usages = [usage_of(each) for each in markers]
    return {"echo/one": {key: sum(usage[key] for usage in usages) for key in usages[0]}}


def test_without_track_usage_predictions_have_none(state):
    """``get_lm_usage()`` stays None: the tracer counts beside DSPy's own tracking."""
    assert Chain()(question="@a").get_lm_usage() is None


def test_with_track_usage(state):
    """``track_usage=True``: each prediction has its own, as without a tracer."""
    dspy.configure(track_usage=True)

    assert total("@a", "@a") == Chain()(question="@a").get_lm_usage()


def test_with_track_usage_and_workers(state):
    """``track_usage=True`` in worker threads: each item has its own."""
    dspy.configure(track_usage=True)
    results = dspy.Parallel(num_threads=3, disable_progress_bar=True)([(Chain(), example) for example in EXAMPLES])

    assert [total(f"@q{n}", f"@q{n}") for n in range(3)] == [result.get_lm_usage() for result in results]


async def test_with_track_usage_and_tasks(state):
    """``track_usage=True`` in tasks: each call has its own."""
    with dspy.context(track_usage=True):
        results = await asyncio.gather(*(Chain().acall(question=f"@q{n}") for n in range(3)))

    assert [total(f"@q{n}", f"@q{n}") for n in range(3)] == [result.get_lm_usage() for result in results]


def test_with_a_tracker_of_the_users(state):
    """``dspy.track_usage()`` sees every call, and ours is never seen."""
    with dspy.track_usage() as outer:
        Chain()(question="@a")
        assert outer is dspy.settings.usage_tracker

    assert total("@a", "@a") == outer.get_total_tokens()


def test_a_tracker_that_is_configured(state):
    """``dspy.configure(usage_tracker=...)`` sees every call: in modules, directly, in worker threads."""
    tracker = dspy.utils.usage_tracker.UsageTracker()
    dspy.configure(usage_tracker=tracker)
    Chain()(question="@a")
    dspy.settings.lm("@bb")
    dspy.Parallel(num_threads=2, disable_progress_bar=True)([(Chain(), example) for example in EXAMPLES])
    with dspy.context(usage_tracker=None):
        dspy.settings.lm("@nobody")

    assert tracker is dspy.settings.usage_tracker
    assert total("@a", "@a", "@bb", *(f"@q{n}" for n in range(3) for _ in range(2))) == tracker.get_total_tokens()


def test_a_tracker_that_is_configured_beside_track_usage(state):
    """DSPy counts for the results only where nobody has a tracker: with a tracer, too."""
    tracker = dspy.utils.usage_tracker.UsageTracker()
    dspy.configure(usage_tracker=tracker, track_usage=True)
    result = Chain()(question="@a")

    assert result.get_lm_usage() is None
    assert total("@a", "@a") == tracker.get_total_tokens()


def test_with_nested_trackers_of_the_users(state):
    """Nested ``dspy.track_usage()`` blocks see what they see without a tracer."""
    with dspy.track_usage() as outer:
        dspy.settings.lm("@a")
        with dspy.track_usage() as inner:
            dspy.settings.lm("@bb")

    rolls_up = "roll-up" in (dspy.track_usage.__doc__ or "")  # dspy 3.3 does not
    assert total("@bb") == inner.get_total_tokens()
    assert (total("@a", "@bb") if rolls_up else total("@a")) == outer.get_total_tokens()


def test_a_tracker_inside_a_module(state):
    """A tracker that the user opens inside a module sees the calls inside it only."""
    trackers = []

    class Program(dspy.Module):
        def __init__(self):
            super().__init__()
            self.step = dspy.Predict("question -> answer")

        def forward(self, question):
            self.step(question="@before")
            with dspy.track_usage() as tracker:
                self.step(question=question)
            self.step(question="@after")
            trackers.append(tracker)
            return dspy.Prediction(answer=question)

    Program()(question="@aaa")

    assert [total("@aaa")] == [tracker.get_total_tokens() for tracker in trackers]


def test_a_tracker_around_workers(state):
    """DSPy deep-copies the user's tracker for each worker: with a tracer, the same is seen as without."""
    with dspy.track_usage() as tracker:
        dspy.Parallel(num_threads=2, disable_progress_bar=True)([(Chain(), example) for example in EXAMPLES])
    with dspy.track_usage() as sequential:
        dspy.Parallel(num_threads=1, disable_progress_bar=True)([(Chain(), example) for example in EXAMPLES])

    assert {} == tracker.get_total_tokens()
    assert total(*(f"@q{n}" for n in range(3) for _ in range(2))) == sequential.get_total_tokens()


def test_a_tracker_that_raises(state):
    """A user's tracker that raises fails the call, as without a tracer."""

    class Strict(dspy.utils.usage_tracker.UsageTracker):
        def add_usage(self, lm, usage_entry):
            raise PermissionError("over budget")

    with dspy.context(usage_tracker=Strict()), pytest.raises(PermissionError, match="over budget"):
        dspy.settings.lm("@a")


@pytest.mark.parametrize("has_tracker", [False, True])
@pytest.mark.parametrize("place", ["module", "lm"])
def test_settings_that_are_saved_inside_a_call(state, tmp_path, place, has_tracker):
    """``dspy.settings.save`` stores the user's tracker or none, and nothing of ours but the callback."""
    path = tmp_path / "settings.pkl"

    def save():
        dspy.settings.save(str(path), exclude_keys=["lm", "callbacks", "caller_modules", "caller_predict"])

    class Program(dspy.Module):
        def forward(self, question):
            if place == "module":
                save()
            return dspy.Prediction(answer=dspy.settings.lm(question))

    tracker = dspy.utils.usage_tracker.UsageTracker() if has_tracker else None
    lm = EchoLM(during=lambda marker: save() if place == "lm" else None)
    dspy.configure(lm=lm, usage_tracker=tracker, trace=[])  # which has what other tests have called
    Program()(question="@a")

    saved = dspy.load_settings(str(path), allow_pickle=True)
    assert type(tracker) is type(saved["usage_tracker"])
    assert b"dspy_mlflow_async" not in path.read_bytes()


def test_the_settings_an_lm_sees(state):
    """An LM that asks for ``dspy.settings.usage_tracker`` and has none finds what it would find: falsy or usable."""
    seen = []

    class Reporting(EchoLM):
        def forward(self, prompt=None, messages=None, **kwargs):
            if dspy.settings.usage_tracker:
                dspy.settings.usage_tracker.add_usage("mine", {"prompt_tokens": 1})
            seen.append(bool(dspy.settings.track_usage))
            return super().forward(prompt, messages, **kwargs)

    dspy.configure(lm=Reporting())

    assert ["@a"] == dspy.settings.lm("@a")
    assert [False] == seen
