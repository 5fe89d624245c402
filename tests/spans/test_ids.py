"""Ids of spans and traces: they are no business of the program's random numbers."""

import multiprocessing
import random
import subprocess
import sys

import dspy
import pytest

import dspy_mlflow_async
from echo import EchoLM


@pytest.fixture
def program():
    with dspy.context(lm=EchoLM()):
        yield dspy.Predict("question -> answer")


def drawn(program):
    """The random numbers of a seeded program that draws some before, between and after two calls."""
    random.seed(7)
    numbers = [random.random()]  # noqa: S311 - no secret
    for _ in range(2):
        program(question="@a")
        numbers.append(random.random())  # noqa: S311
    return numbers


def test_a_seeded_program_draws_the_same_numbers(program, traces):
    """Who seeds ``random`` gets the same numbers with tracing on as with it off."""
    traced = drawn(program)
    with dspy_mlflow_async.suppress():
        untraced = drawn(program)

    assert untraced == traced
    assert 2 == len(traces)


def test_a_seeded_process_draws_the_same_numbers(tmp_path):
    """Neither the import, nor the first call of all, nor what is written takes a number away."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)

    def draws(*arguments):
        done = subprocess.run(
            [sys.executable, str(script), *arguments], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        return done.stdout

    assert draws("traced") == draws("untraced") != ""


PROGRAM = """
import random, sys
import dspy, mlflow, numpy
from dspy.utils import DummyLM

mlflow.set_tracking_uri("sqlite:///ids.db")
mlflow.set_experiment("ids")

random.seed(7)
numpy.random.seed(7)
if sys.argv[1] == "traced":
    import dspy_mlflow_async
    dspy_mlflow_async.autolog()
dspy.configure(lm=DummyLM([{"answer": "a"}] * 3))
dspy.Predict("question -> answer")(question="q")
if sys.argv[1] == "traced":
    assert dspy_mlflow_async.flush()
print(random.random(), numpy.random.random())
"""


def test_a_seed_repeats_no_trace(program, traces):
    """A program that seeds ``random`` and is run again makes traces of its own, which overwrite none."""
    drawn(program)
    drawn(program)

    ids = [trace.info.trace_id for trace in traces]
    spans = [span.span_id for trace in traces for span in trace.data.spans]
    assert 4 == len(set(ids)) == len(ids)
    assert len(set(spans)) == len(spans)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_forked_processes_make_ids_of_their_own(program, traces):
    """Children of one process, and the process itself, make no id twice, whatever state they have in common."""

    def send_ids(writer):
        program(question="@child")
        writer.send([span.span_id for span in traces[-1].data.spans])

    program(question="@parent")
    context = multiprocessing.get_context("fork")
    found = []
    for _ in range(2):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=send_ids, args=(writer,))
        process.start()
        found.append(reader.recv() if reader.poll(30) else [])
        process.join(30)
    program(question="@parent")
    found.append([span.span_id for span in traces[-1].data.spans])

    assert [4, 4, 4] == list(map(len, found))
    assert 12 == len({span_id for ids in found for span_id in ids})
