"""The arguments that callbacks are told of: they must be those that ``inspect.getcallargs`` finds."""

import functools
import inspect

import dspy
import dspy.utils.callback as dspy_callback
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_mlflow_async.seams.dspy_arguments import patch_arguments
from echo import EchoLM

NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module", autouse=True)
def patched():
    undo = patch_arguments()
    yield
    undo()
    assert dspy_callback.inspect is inspect


def outcome(getcallargs, function, positional, named):
    try:
        found = getcallargs(function, *positional, **named)
    except (TypeError, AttributeError) as error:
        return str(error)
    return list(found.items())


@st.composite
def functions(draw):
    """A function of any parameters that Python allows."""
    names = list(NAMES[: draw(st.integers(0, 5))])
    ends = sorted(draw(st.tuples(*[st.integers(0, len(names))] * 2)))
    has_rest, has_others = draw(st.booleans()), draw(st.booleans())
    first_default = draw(st.integers(0, ends[1]))
    shown = [f"{name}={name!r}" if at >= first_default else name for at, name in enumerate(names[: ends[1]])]
    if ends[0]:
        shown.insert(ends[0], "/")
    keyword_only = [f"{name}={name!r}" if draw(st.booleans()) else name for name in names[ends[1] :]]
    if has_rest or keyword_only:
        shown += ["*rest" if has_rest else "*"]
    shown += keyword_only + ["**others"] * has_others
    scope = {}
    exec(f"def function({', '.join(shown)}): local = 1", scope)  # noqa: S102 - Python has no other way to make one
    return scope["function"]


@given(
    functions(), st.lists(st.integers(), max_size=6), st.dictionaries(st.sampled_from((*NAMES, "x", "rest")), st.text())
)
def test_any_call_of_any_function(function, positional, named):
    """The same arguments in the same order, and the same errors."""
    expected = outcome(inspect.getcallargs, function, positional, named)
    assert expected == outcome(dspy_callback.inspect.getcallargs, function, positional, named)


class Kept:
    def method(self, a, b=2, *, c=3):
        """Bound."""


def _signed(*args, **kwargs):
    """Shows other parameters than it has."""


_signed.__signature__ = inspect.signature(lambda x, y=1: None)


@pytest.mark.parametrize(
    ("function", "positional"),
    [
        (Kept().method, (1,)),
        (functools.partial(Kept.method, None), (1,)),
        (_signed, (1,)),
        (functools.partialmethod(Kept.method, 1).__get__(None, Kept), (None,)),
        (dspy.Module.__call__.__wrapped__, (None, 1)),
        (EchoLM.forward, (None, "prompt")),
    ],
)
def test_what_is_no_plain_function(function, positional):
    """Whatever else can be called, and DSPy's own functions."""
    expected = outcome(inspect.getcallargs, function, positional, {"question": "?"})
    assert expected == outcome(dspy_callback.inspect.getcallargs, function, positional, {"question": "?"})


def test_defaults_that_change():
    """Nothing is remembered of a function."""

    def function(a=1, *, b=2):
        """Has defaults."""

    assert {"a": 1, "b": 2} == dspy_callback.inspect.getcallargs(function)
    function.__defaults__, function.__kwdefaults__["b"] = (3,), 4
    assert {"a": 3, "b": 4} == dspy_callback.inspect.getcallargs(function)
