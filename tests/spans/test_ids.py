"""Ids of spans and traces: they are no business of the program's random numbers."""

import random

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


def test_a_seed_repeats_no_trace(program, traces):
    """A program that seeds ``random`` and is run again makes traces of its own, which overwrite none."""
    drawn(program)
    drawn(program)

    ids = [trace.info.trace_id for trace in traces]
    spans = [span.span_id for trace in traces for span in trace.data.spans]
    assert 4 == len(set(ids)) == len(ids)
    assert len(set(spans)) == len(spans)
