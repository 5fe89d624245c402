"""What a resume goes by: the same text for the same thing in every process, another for another."""

import functools
import os
import subprocess
import sys

import dspy
import numpy as np
import pytest

from dspy_mlflow_async.evaluate import fingerprint as fingerprints
from dspy_mlflow_async.evaluate.fingerprint import fingerprint, text_of_function, text_of_lm
from echo import Chain, EchoLM

SCRIPT = """
import dspy
from dspy_mlflow_async.evaluate.fingerprint import fingerprint, text_of_function
class Thing: pass
def metric(example, prediction): return example.answer in {"alpha", "beta", "gamma"}
inner = dspy.Example(letters={"a", "b"})
example = dspy.Example(words={"alpha", "beta", "gamma"}, frozen=[frozenset("xyz")], thing=Thing(), inner=inner)
print(fingerprint(example), text_of_function(metric))
"""


def test_same_in_every_process():
    """The order of a set differs between processes, and so does where an object lies; neither counts."""
    said = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    }

    assert 1 == len(said)


def at_least(limit):
    return lambda example, prediction: prediction.n >= limit


def one_of(*fields):
    def metric(example, prediction, fields=fields):
        return prediction.answer in fields

    return metric


class Exact:
    def __call__(self, example, prediction):
        return example.answer == prediction.answer

    def loose(self, example, prediction):
        return example.answer in prediction.answer


PAIRS = [
    (dspy.Example(a={1, 2}), dspy.Example(a={1, 3})),
    (dspy.Example(a=np.arange(5000)), dspy.Example(a=np.arange(5000)[::-1])),
    (dspy.Example(a=b"x"), dspy.Example(a=b"y")),
    (dspy.Example(a=np.array(["x"], dtype=object)), dspy.Example(a=np.array(["y"], dtype=object))),
    (dspy.Example(a=float("nan")), dspy.Example(a=None)),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_other_examples(one, other):
    """Examples that differ anywhere differ here; those that are alike are alike, whatever the order of their fields."""
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(dspy.Example(**one)) == fingerprint(one)


def test_order_of_fields():
    """Examples with the same fields are equal."""
    assert fingerprint(dspy.Example(a=1, b=2)) == fingerprint(dspy.Example(b=2, a=1))


def test_functions():
    """Functions are told apart by what they do, what is bound to them, and their name; not by where they are."""
    functions = [
        lambda example, prediction: True,
        lambda example, prediction: False,
        at_least(1),
        at_least(2),
        one_of("x"),
        one_of("y"),
        functools.partial(at_least, 1),
        functools.partial(at_least, 2),
        Exact(),
        Exact().loose,
        len,
        sum,
    ]
    texts = [text_of_function(function) for function in functions]

    assert len(functions) == len(set(texts))
    assert text_of_function(at_least(1)) == text_of_function(at_least(1))
    assert text_of_function(Exact().loose) == text_of_function(Exact().loose)


def test_counting_metric():
    """A metric that counts its own calls is the same after some of them."""
    calls = 0

    def metric(example, prediction):
        nonlocal calls
        calls += 1
        return True

    before = text_of_function(metric)
    metric(None, None)

    assert before == text_of_function(metric)


def test_lms():
    """An LM counts with class, model and arguments, that of a predictor too; a secret does not, nor is it told."""
    program, other = Chain(), Chain()
    other.set_lm(EchoLM(model="echo/two"))
    lm = EchoLM()
    texts = {
        text_of_lm(lm, program),
        text_of_lm(EchoLM(model="echo/two"), program),
        text_of_lm(EchoLM(top_p=0.5), program),
        text_of_lm(lm, other),
        text_of_lm(None, program),
    }

    assert 5 == len(texts)
    assert text_of_lm(EchoLM(api_key="sesame"), program) == text_of_lm(EchoLM(api_key="other"), program)
    assert "sesame" not in text_of_lm(EchoLM(api_key="sesame"), program)


def test_what_cannot_be_looked_at():
    """An object that refuses still has a text, and none of this raises."""

    class Odd:
        __slots__ = ()

        def __repr__(self):
            raise RuntimeError("no")

    circle = []
    circle.append(circle)

    assert fingerprint(dspy.Example(a=Odd(), b=circle)) == fingerprint(dspy.Example(a=Odd(), b=circle))
    assert fingerprints.digest(Odd()) == fingerprints.digest(Odd())
