"""The parts of a call's cost, one by one: ``python -m pytest benchmarks/micro``."""

import inspect
import json
import subprocess
import sys

import dspy
import pytest

import dspy_mlflow_async
from benchmarks.programs import ScriptedLM, make_question
from dspy_mlflow_async.context import frame
from dspy_mlflow_async.spans import describe
from dspy_mlflow_async.spans.secret_texts import mask, masked
from dspy_mlflow_async.spans.serialize import Plain
from dspy_mlflow_async.spans.usage import LmUsage

_BATCH = 32  # as many traces as the queue writes at once
_LIMIT = 1024 * 1024


@pytest.mark.parametrize("depth", [0, 50])
def test_frame_enter_and_leave(benchmark, depth):
    """A frame begins and ends; what is around it must not matter."""
    for level in range(depth):
        frame.enter(f"outer {level}")

    def once():
        frame.enter("call")
        frame.leave("call")

    try:
        benchmark(once)
    finally:
        for level in reversed(range(depth)):
            frame.leave(f"outer {level}")


def test_describe_module(benchmark, program):
    """Name, type, inputs and attributes of a predictor's call, its program hash included."""
    benchmark(describe.describe_module, program, {"kwargs": {"question": "Is it?"}})


def test_describe_module_with_demos(benchmark, program):
    """The same with 16 demos, which the program hash reads."""
    program.demos = [dspy.Example(question=make_question(200), answer="yes") for _ in range(16)]

    benchmark(describe.describe_module, program, {"kwargs": {"question": "Is it?"}})


def test_describe_lm(benchmark):
    """Name, type, inputs and attributes of an LM call."""
    messages = [{"role": "user", "content": make_question(1024)}]

    benchmark(describe.describe_lm, ScriptedLM(), {"prompt": None, "messages": messages, "kwargs": {}})


@pytest.mark.parametrize("size", [1024, 32 * 1024, 1024 * 1024], ids=["1KiB", "32KiB", "1MiB"])
def test_serialize_text(benchmark, size):
    """Messages with one text of this size."""
    value = {"messages": [{"role": "user", "content": make_question(size)}]}

    benchmark(lambda: Plain(_LIMIT).dumps(value))


def test_serialize_many_values(benchmark):
    """A hundred small dicts: what structure costs, without text."""
    value = {"rows": [{"id": number, "score": 0.5, "tags": ["a", "b"]} for number in range(100)]}

    benchmark(lambda: Plain(_LIMIT).dumps(value))


def test_usage_of_one_call(benchmark):
    """An LM call's tracker is put in place, gets a provider's usage, and is read."""
    lm = ScriptedLM()

    def once():
        usage = LmUsage(lm, [])
        dspy.settings.usage_tracker.add_usage(lm.model, {"prompt_tokens": 10, "completion_tokens": 2})
        usage.close()
        return usage.attributes("output")

    assert benchmark(once)


@pytest.mark.usefixtures("traced")
def test_export_of_a_batch(benchmark, program):
    """A batch of traces of 4 spans, from the last call's end until sqlite has them."""

    def make_traces():
        for _ in range(_BATCH):
            program(question="Is it?")

    make_traces()
    dspy_mlflow_async.flush()

    benchmark.pedantic(dspy_mlflow_async.flush, setup=make_traces, rounds=10)
    benchmark.extra_info["traces"] = _BATCH

    assert dspy_mlflow_async.stats().waiting == 0


_PROSE = "The city was founded in 1204 by merchants from the north, who built a harbour; it has two churches. " * 100
_TEXTS = {
    "prose": _PROSE,
    "code": inspect.getsource(dspy.Predict),
    "json": json.dumps(
        [{"name": f"item {n}", "description": "of it", "price": n * 1.5, "tags": ["a"]} for n in range(200)]
    ),
}


@pytest.mark.parametrize("kind", _TEXTS)
@pytest.mark.parametrize("size", [100, 1000, 8000])
def test_mask(benchmark, kind, size):
    """The search of a text for secrets that has not been seen before; the results of the last ones are kept."""
    text = _TEXTS[kind][:size]
    assert len(text) == size
    benchmark(masked, text)

    assert mask(text) == text


@pytest.mark.usefixtures("traced")
def test_traced_call(benchmark, program):
    """One call of 4 spans with everything recorded. The store is written to meanwhile, by another thread."""
    benchmark.pedantic(program, kwargs={"question": "Is it?"}, rounds=100, warmup_rounds=10)


def test_import(benchmark):
    """What ``import dspy_mlflow_async`` adds, in a new interpreter that has dspy and mlflow; see ``extra_info``."""
    code = (
        "import dspy, mlflow, time; began = time.perf_counter(); import dspy_mlflow_async; "
        "print(time.perf_counter() - began)"
    )
    seconds = []

    def once():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
        seconds.append(float(done.stdout))

    benchmark.pedantic(once, rounds=3)
    benchmark.extra_info["added_ms"] = [round(each * 1000, 1) for each in seconds]
    print(f"\nimport dspy_mlflow_async: {min(seconds) * 1000:.0f} ms on top of dspy and mlflow")
