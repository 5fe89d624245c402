"""Values that lie, never end, or are not there yet: looking at them changes nothing, and loses no span."""

import signal

import dspy
import numpy as np
import pytest
from werkzeug.local import LocalProxy

import dspy_mlflow_async
from dspy_mlflow_async.runs.artifacts import fields_of
from dspy_mlflow_async.spans.serialize import Plain
from dspy_mlflow_async.testing import tree


class Return(dspy.Module):
    """Gives back what it is given, without looking at it."""

    def forward(self, **kwargs):
        return dspy.Prediction(**kwargs)


class AskedError(Exception):
    pass


@pytest.fixture
def evaluations():
    return []


def proxy(evaluations, error=None):
    def load():
        evaluations.append("asked")
        if error is not None:
            raise error
        return "value"

    return LocalProxy(load)


@pytest.mark.parametrize("error", [None, RuntimeError("no request"), SystemExit(1)], ids=["value", "raises", "exits"])
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: [value], lambda value: {"a": (value,)}])
def test_a_proxy_is_not_evaluated(traces, evaluations, error, wrap):
    """Not as an argument, not as a result, not inside of others; the other arguments are shown."""
    Return()(lazy=wrap(proxy(evaluations, error)), plain="kept")

    (span,) = traces[0].data.spans
    assert [] == evaluations
    assert "kept" == span.inputs["plain"] == span.outputs["plain"]
    for shown in (span.inputs, span.outputs):
        assert "<werkzeug.local.LocalProxy, not evaluated>" in str(shown["lazy"])


def test_a_proxy_in_what_dspy_looks_at_itself(traces, evaluations):
    """What DSPy evaluates for a tool or a predictor it evaluates as often without a tracer; demos not at all."""

    def call_all():
        lazy = proxy(evaluations)
        evaluations.clear()
        dspy.Tool(lambda value: "done", name="look", args={"value": {}})(value=lazy)
        dspy.Predict("question -> answer")(question=lazy)
        Return()(demo=dspy.Example(value=lazy), deep=dspy.Prediction(inner=dspy.Prediction(value=lazy)))
        return len(evaluations)

    traced = call_all()
    dspy_mlflow_async.autolog(disable=True)
    untraced = call_all()

    assert untraced == traced
    assert "not evaluated" in str(traces[-1].data.spans[0].inputs["demo"])
    assert "not evaluated" in str(traces[-1].data.spans[0].outputs["deep"])


def test_djangos_lazy_objects(traces, evaluations):
    """One that is not evaluated is left so; one that is shows what it holds."""
    functional = pytest.importorskip("django.utils.functional")
    new, known = (functional.SimpleLazyObject(lambda: evaluations.append("asked") or {"name": "ada"}) for _ in range(2))
    assert "ada" == known["name"]
    evaluations.clear()
    text = functional.lazystr("hello")
    Return()(new=new, known=known, text=text)

    (span,) = traces[0].data.spans
    assert [] == evaluations
    assert "<django.utils.functional.SimpleLazyObject, not evaluated>" == span.inputs["new"]
    assert {"name": "ada"} == span.inputs["known"]


class Endless(list):
    def __iter__(self):
        while True:
            yield "again"

    def __len__(self):
        return 10**9


class EndlessTuple(tuple):
    __slots__ = ()

    def __iter__(self):
        while True:
            yield "again"


class EndlessDict(dict):
    def items(self):
        n = 0
        while True:
            n += 1
            yield f"key-{n}", n

    def __len__(self):
        return 3


class BadLength(list):
    def __len__(self):
        raise SystemExit(1)


ENDLESS = {
    "list": (lambda: Endless(["a"]), '["a"]'),
    "tuple": (lambda: EndlessTuple(["a"]), '["a"]'),
    "dict": (lambda: EndlessDict(a=1), '{"key-1":'),
    "length": (lambda: BadLength("ab"), '["a"'),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ENDLESS)
def test_what_never_ends(kind):
    """It is read as what it is, or as far as the bound goes."""
    make, begins = ENDLESS[kind]
    text = Plain(10_000).dumps(make())

    assert text.startswith(begins)
    assert len(text) <= 10_064


def raising(error, name):
    def method(self, *args):
        raise error

    return type("Raises", (), {name: method, **({"__repr__": method} if name == "__str__" else {})})()


@pytest.mark.parametrize(
    "error", [ValueError(), SystemExit(3), GeneratorExit()], ids=lambda error: type(error).__name__
)
@pytest.mark.parametrize("name", ["__str__", "__getattr__", "__eq__", "__hash__", "__bool__", "__len__"])
def test_what_a_value_raises_stays_with_it(traces, name, error):
    """The call, its span and its other values are there; the value says what it raised."""
    Return()(value=raising(error, name), plain="kept")

    (span,) = traces[0].data.spans
    assert "kept" == span.inputs["plain"]
    assert ("Return.forward", []) == tree(traces[0])
    if name == "__str__":
        assert f"without text: {type(error).__name__}" in span.inputs["value"]


def test_ctrl_c_is_none_of_ours():
    """Ctrl-C, and what the program's handler of a signal raises, pass through where they strike."""

    class Interrupted:
        def __init__(self, number):
            self.number = number

        def __str__(self):
            signal.raise_signal(self.number)
            return "text"

    def leave(number, frame):
        raise SystemExit(number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(KeyboardInterrupt):
            Plain(1000)(Interrupted(signal.SIGINT))
        with pytest.raises(SystemExit):
            Plain(1000)([Interrupted(signal.SIGTERM)])
    finally:
        signal.signal(signal.SIGTERM, before)


class LiesAboutItsClass:
    @property
    def __class__(self):
        raise AskedError


class Meta(type):
    def __instancecheck__(cls, instance):
        raise AskedError

    def __subclasscheck__(cls, kind):
        raise AskedError

    def __eq__(cls, other):
        raise AskedError

    def __hash__(cls):
        return 1


class OfMeta(metaclass=Meta):
    pass


ODD = {
    "class": LiesAboutItsClass,
    "metaclass": OfMeta,
    "the-class": lambda: OfMeta,
    "array": lambda: np.array([1, 2]),
    "array-of-bool": lambda: np.array([[True]]),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_classes_and_arrays(traces, kind):
    """Nothing is asked of them, and the span is there."""
    Return()(value=ODD[kind](), plain="kept")

    assert "kept" == traces[0].data.spans[0].inputs["plain"]


def test_an_error_that_cannot_be_told(traces):
    """An exception whose text exits ends its span as it is, and passes to the caller unchanged."""

    class OddError(Exception):
        def __str__(self):
            raise SystemExit(3)

    error = OddError()

    class Fails(dspy.Module):
        def forward(self):
            raise error

    with pytest.raises(OddError) as raised:
        Fails()()

    (span,) = traces[0].data.spans
    assert error is raised.value
    assert "error" == span.get_attribute("outcome")


def test_lazy_values_in_a_result_table(evaluations):
    """A prediction that is a lazy object is one field, and stays as it is."""
    fields = fields_of(proxy(evaluations), prefix="pred_")

    assert ["pred"] == list(fields)
    assert [] == evaluations
