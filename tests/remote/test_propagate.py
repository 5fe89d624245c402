"""One tree over processes: `propagate`, `carry` and `attached`, with a real store and spawned processes."""

import functools
import inspect
import json
import logging
import pickle
import tempfile
import threading

import cloudpickle
import dspy
import elsewhere
import mlflow
import pytest

import dspy_mlflow_async
from dspy_mlflow_async import autolog, carry, flush, propagate, request, stats
from dspy_mlflow_async.testing import tree
from echo import EchoLM, predict_tree

TOKENS_OF_ONE = 14  # ten in, and as many out as "@a-0" has characters


def stored(experiment_id):
    """The traces of an experiment, with their spans."""
    return mlflow.search_traces(locations=[experiment_id], return_type="list", include_spans=True)


def settled(pool):
    """What both processes have traced is in the store."""
    with tempfile.TemporaryDirectory() as folder:
        for future in [pool.submit(elsewhere.settle_both, folder) for _ in range(2)]:
            future.result(60)
    assert flush(30)


def test_calls_in_processes_are_one_tree_with_one_total(experiment, pool):
    """A module whose steps run in other processes: one trace, each step below the module, tokens as if called here."""
    autolog(silent=True)
    program = elsewhere.Fan(lambda step, **inputs: pool.submit(propagate(step), **inputs))
    with request(session_id="s-1", user="ada") as record:
        answers = program(questions=[f"@a-{n}" for n in range(4)], name="fan").answers
    settled(pool)
    (trace,) = stored(experiment)

    assert [f"@a-{n}" for n in range(4)] == answers
    assert ("Fan.forward", [predict_tree()] * 4) == tree(trace)
    assert 4 * TOKENS_OF_ONE == trace.info.token_usage["total_tokens"]
    assert 4 * TOKENS_OF_ONE == record.usage["total_tokens"]
    assert 4 == len(record.lm_calls)
    assert "s-1" == trace.info.trace_metadata["mlflow.trace.session"]
    assert trace.info.state == "OK"


def test_the_result_is_the_functions_own_where_users_code_calls(experiment, pool):
    """A task of the user's that calls a propagated function itself gets what the function returns."""
    autolog(silent=True)
    with mlflow.start_span("outer"):
        future = pool.submit(elsewhere.predict_in_task, propagate(dspy.Predict("question -> answer")), "@b")
        answer = future.result(60)
    settled(pool)
    (trace,) = stored(experiment)

    assert "@b" == answer
    assert ("outer", [predict_tree()]) == tree(trace)


def test_a_pool_of_the_users_over_there_gets_results(experiment, pool):
    """Thread pools in the other process call it for somebody there: what they get is the function's own result."""
    autolog(silent=True)
    kinds, answers = pool.submit(elsewhere.call_in_thread, propagate(dspy.Predict("question -> answer")), "@t").result(
        60
    )

    assert ["Prediction"] * 2 == kinds
    assert ["@t"] * 2 == answers


def test_carried_run_session_and_silence_hold_over_there(experiment, pool):
    """`attached` puts run, tags, metadata and silence in force; spans of the carried trace are counted there."""
    autolog(silent=True)
    with mlflow.start_run() as run, mlflow.tracing.context(tags={"team": "blue"}, metadata={"k": "v"}):
        traced = carry()
        with dspy_mlflow_async.suppress():
            silent = carry()
    answer, run_id, _ = pool.submit(elsewhere.call_attached, traced, "@c").result(60)
    quiet, _, _ = pool.submit(elsewhere.call_attached, silent, "@d").result(60)
    (trace,) = stored(experiment)

    assert ("@c", "@d") == (answer, quiet)
    assert run.info.run_id == run_id == trace.info.trace_metadata["mlflow.sourceRun"]
    assert "blue" == trace.info.tags["team"]
    assert "v" == trace.info.trace_metadata["k"]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_total_has_the_tokens_of_all_processes_whoever_stores_first(experiment, pool, is_first):
    """A process of the root with LM calls of its own: what `carry` took elsewhere counts too, before it or after it."""
    autolog(silent=True)
    with mlflow.start_span("outer"):
        dspy.Predict("question -> answer")(question="@own")
        carried = carry()
        if is_first:
            pool.submit(elsewhere.call_attached, carried, "@far").result(60)
    assert flush(30)
    if not is_first:
        pool.submit(elsewhere.call_attached, carried, "@far").result(60)
    (trace,) = stored(experiment)

    assert ("outer", [predict_tree()] * 2) == tree(trace)
    assert 2 * TOKENS_OF_ONE == trace.info.token_usage["total_tokens"]
    assert 9 == json.loads(trace.info.trace_metadata["mlflow.trace.sizeStats"])["num_spans"]


def test_spans_of_other_processes_traces_are_counted(experiment, pool):
    """`stats().remote_spans` of the process that made them says where they are; the trace is counted where it began."""
    autolog(silent=True)
    before = stats()
    with mlflow.start_span("outer"):
        _, _, there = pool.submit(elsewhere.call_attached, carry(), "@e").result(60)
    assert flush(30)

    assert there.remote_spans.ended == there.remote_spans.stored >= 4
    assert (1, 1) == (stats().started - before.started, stats().stored - before.stored)
    assert before.remote_spans == stats().remote_spans


def test_spans_after_attached_are_not_lost(experiment, pool):
    """A thread that goes on after `attached` ends its open span and begins new ones: all of them arrive."""
    autolog(silent=True)
    with mlflow.start_span("outer"):
        there = pool.submit(elsewhere.leave_behind, carry(), "@f").result(60)
    settled(pool)
    (trace,) = stored(experiment)

    assert ("outer", [("left-behind", []), predict_tree()]) == tree(trace)
    assert there.remote_spans.ended == there.remote_spans.stored


def test_tracers_arguments_and_redaction_hold_over_there(experiment, pool):
    """`redact` of the tracer and of the request around, and `max_value_bytes`, apply to the spans over there."""
    autolog(silent=True, redact=lambda value: "R" if value == "@secret-1" else value)
    with request(redact=lambda value: "Q" if value == "@secret-2" else value):
        carried = carry()
    for question in ("@secret-1", "@secret-2"):
        pool.submit(elsewhere.call_attached, carried, question).result(60)
    inputs = [trace.data.spans[0].inputs["question"] for trace in stored(experiment)]

    assert ["Q", "R"] == sorted(inputs)


def test_sample_by_outcome_keeps_a_trace_that_has_parts_elsewhere(experiment, pool):
    """What another process adds to a trace would be a fragment if the trace were left out: it is kept."""
    autolog(silent=True)
    program = elsewhere.Fan(lambda step, **inputs: pool.submit(propagate(step), **inputs))
    with request(sample={"ok": 0.0}):
        program(questions=["@g"], name="fan")
    settled(pool)

    assert ["Fan.forward"] == [trace.data.spans[0].name for trace in stored(experiment)]


class KeyedLM(EchoLM):
    """An LM as people make it: with a key in three places."""

    def __init__(self):
        super().__init__(
            api_key="sk-KEY-IN-KWARGS", extra_headers={"Authorization": "Bearer KEY-IN-HEADER", "x-tenant": "blue"}
        )
        self.client_secret = "KEY-IN-ATTRIBUTE"  # noqa: S105


def test_keys_travel_only_where_they_are_asked_to():
    """LMs travel with their keys, or without by `secrets="environment"`; with no history, wherever they stand."""
    lm = KeyedLM()
    program = dspy.Predict("question -> answer")
    program.lm = lm
    with dspy.context(lm=lm):
        program(question="@PROMPT-OF-ANOTHER")
        lm.calls.clear()  # the test's own record
        with_keys, without = carry(), carry(secrets="environment")
        bound = pickle.dumps(propagate(program))

    for key in (b"KEY-IN-KWARGS", b"KEY-IN-HEADER", b"KEY-IN-ATTRIBUTE"):
        assert key in with_keys.settings
        assert key not in without.settings
        assert key.decode() not in repr(with_keys)
    assert b"x-tenant" in without.settings
    assert b"PROMPT-OF-ANOTHER" not in with_keys.settings + bound
    assert lm.history
    assert "KEY-IN-KWARGS" in str(lm.kwargs)


def test_what_cannot_be_pickled_is_named_without_its_secrets(caplog):
    """An error says which part it is; a callback that cannot be pickled stays here, with a warning."""

    class Locked(EchoLM):
        def __reduce_ex__(self, protocol):
            raise ValueError("cannot pickle <client api_key='sk-abcdefghijklmnopqrstuvwxyz123456'>")

    class Watcher(dspy.utils.callback.BaseCallback):
        def __init__(self):
            self.lock = threading.Lock()

    with dspy.context(lm=Locked()), pytest.raises(TypeError, match="DSPy's setting 'lm' cannot be sent") as raised:
        carry()
    autolog(silent=True, redact=functools.partial(lambda lock, value: value, threading.Lock()))
    with pytest.raises(TypeError, match="autolog's redact cannot be sent to another process"):
        carry()
    autolog(silent=True)
    with dspy.context(callbacks=[Watcher()]), caplog.at_level(logging.WARNING):
        carry()

    assert "abcdefghijklmnop" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert "The callback Watcher is not called in other processes" in caplog.text


def test_a_propagated_function_is_a_function():
    """For inspect, decorators, copies, cloudpickle and threads it is what it was: a plain function of the same name."""

    def greet(name: str, *, loud: bool = False) -> str:
        """Say hello."""
        return name.upper() if loud else name

    async def agreet(name):
        return name

    bound, abound = propagate(greet), propagate(agreet)
    again = cloudpickle.loads(cloudpickle.dumps(bound))

    assert inspect.isfunction(bound)
    assert inspect.signature(greet) == inspect.signature(bound)
    assert ("greet", "Say hello.", __name__) == (bound.__name__, bound.__doc__, bound.__module__)
    assert inspect.iscoroutinefunction(abound)
    assert not inspect.iscoroutinefunction(bound)
    assert "ADA" == bound("ada", loud=True) == again("ada", loud=True)
    assert pickle.loads(pickle.dumps(bound))("ada") == "ada"  # noqa: S301


def test_a_process_serves_one_store(experiment, store_uri, tmp_path):
    """What was carried from another store is refused, by both names and without a password."""
    autolog(silent=True)
    mlflow.set_tracking_uri("http://ada:hidden@127.0.0.1:1")
    other = carry(settings=False)
    mlflow.set_tracking_uri(store_uri)
    with pytest.raises(RuntimeError, match="a process serves one store") as raised, dspy_mlflow_async.attached(other):
        pass

    assert "hidden" not in str(raised.value)
    assert "http://127.0.0.1:1" in str(raised.value)


def test_a_file_of_another_machine_is_refused(experiment, monkeypatch):
    """A worker on another machine does not write into a file of its own of the same name; the error says what to do."""
    autolog(silent=True)
    carried = carry(settings=False)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    with pytest.raises(RuntimeError, match="Start `mlflow server` there"), dspy_mlflow_async.attached(carried):
        pass


def test_usage_comes_home_into_the_example_it_was_used_for(experiment, pool):
    """An evaluation of a program that fans out: its run has the tokens of all processes."""
    autolog(silent=True, log_evals=True)
    program = elsewhere.Fan(lambda step, **inputs: pool.submit(propagate(step), **inputs))
    devset = [dspy.Example(questions=["@h-0", "@h-1"], name="n").with_inputs("questions", "name")]
    dspy.Evaluate(devset=devset, metric=lambda e, p: 1.0, num_threads=1)(program)
    assert flush(30)
    (run,) = mlflow.search_runs([experiment], output_format="list")

    assert 20 == run.data.metrics["input_tokens"]
    assert 8 == run.data.metrics["output_tokens"]


def test_remote_spans_survive_the_spool(experiment):
    """A spooled record says that it is a span of another process's trace, so that counters stay balanced."""
    from dspy_mlflow_async.export.counters import Counted, TraceCounters

    counters = TraceCounters()
    counters.take_remote_span()
    counters.take_remote_span()
    counters.move("waiting", "spooled", Counted.REMOTE_SPAN)
    counters.move("spooled", "stored", Counted.REMOTE_SPAN)
    counts = counters.stats().remote_spans

    assert (2, 1, 1, 0) == (counts.ended, counts.waiting, counts.stored, counts.spooled)
    assert json.dumps(int(Counted.REMOTE_SPAN)) == "2"
