"""``wrap`` and ``AsyncEvaluate`` run the same form of a program, the one that its author wrote."""

import functools

import dspy
import pytest

from dspy_mlflow_async import AsyncEvaluate, wrap
from dspy_mlflow_async.async_programs import async_form


def said(form, question):
    return dspy.Prediction(answer=f"{form} {question}")


class Inherits(dspy.Predict):
    """Neither form of its own."""


class ForwardAlone(dspy.Predict):
    def forward(self, question):
        return said("forward", question)


class AsyncForwardAlone(dspy.Predict):
    async def aforward(self, question):
        return said("aforward", question)


class Both(dspy.Module):
    def forward(self, question):
        return said("forward", question)

    async def aforward(self, question):
        return said("aforward", question)


class ForwardBelowBoth(Both):
    def forward(self, question):
        return said("lower", question)


class CallAlone(dspy.Predict):
    def __call__(self, question):
        return said("call", question)


class AcallAlone(dspy.Module):
    def forward(self, question):
        return said("forward", question)

    async def acall(self, question):
        return said("acall", question)


class ForwardBelowAcall(AcallAlone):
    def forward(self, question):
        return said("lower", question)


class SyncObject:
    def __call__(self, question):
        return said("call", question)


class AsyncObject:
    async def __call__(self, question):
        return said("acall", question)


class ObjectWithAcall(SyncObject):
    __slots__ = ()

    async def acall(self, question):
        return said("acall", question)


class CallBelowAcall(ObjectWithAcall):
    def __call__(self, question):
        return said("lower", question)


class Proxy:
    """Answers for another object, whose ``acall`` would not pass through its own call."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, question):
        return said("proxy", question)


def function(question):
    return said("function", question)


async def async_function(question):
    return said("async", question)


def with_own_forward():
    program = Both()
    program.forward = lambda question: said("own", question)
    return program


SIGNATURE = "question -> answer"
KINDS = {
    "forward-alone": (lambda: ForwardAlone(SIGNATURE), "forward", False),
    "aforward-alone": (lambda: AsyncForwardAlone(SIGNATURE), "aforward", True),
    "both": (Both, "aforward", True),
    "forward-below-both": (ForwardBelowBoth, "lower", False),
    "forward-of-the-instance": (with_own_forward, "own", False),
    "call-alone": (lambda: CallAlone(SIGNATURE), "call", False),
    "acall-alone": (AcallAlone, "acall", True),
    "forward-below-acall": (ForwardBelowAcall, "lower", False),
    "sync-object": (SyncObject, "call", False),
    "async-object": (AsyncObject, "acall", True),
    "object-with-acall": (ObjectWithAcall, "acall", True),
    "call-below-acall": (CallBelowAcall, "lower", False),
    "proxy": (lambda: Proxy(Both()), "proxy", False),
    "function": (lambda: function, "function", False),
    "async-function": (lambda: async_function, "async", True),
    "partial": (lambda: functools.partial(function), "function", False),
    "async-partial": (lambda: functools.partial(async_function), "async", True),
    "partial-of-module": (lambda: functools.partial(Both()), "aforward", True),
    "bound-method": (lambda: Both().forward, "forward", False),
    "async-bound-method": (lambda: Both().aforward, "aforward", True),
    "asyncified": (lambda: dspy.asyncify(Both()), "forward", True),
    "wrapped-sync": (lambda: wrap(ForwardAlone(SIGNATURE)), "forward", False),
    "wrapped-async": (lambda: wrap(Both()), "aforward", True),
    "wrapped-twice": (lambda: wrap(wrap(ForwardBelowBoth())), "lower", False),
    "wrapped-function": (lambda: wrap(function), "function", False),
    "partial-of-wrapped": (lambda: functools.partial(wrap(Both())), "aforward", True),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_both_run_what_the_user_wrote(traces, kind):
    """The form that is awaited, or called in a thread, is one and the same for both."""
    make, form, is_async = KINDS[kind]

    wrapped = await wrap(make()).acall(question="q")
    devset = [dspy.Example(question="q").with_inputs("question")]
    evaluated = await AsyncEvaluate(devset=devset, metric=lambda example, prediction, trace=None: True).acall(make())

    assert f"{form} q" == wrapped.answer
    assert [f"{form} q"] == [prediction.answer for _, prediction, _ in evaluated.results]
    assert is_async == (async_form(make()) is not None)


@pytest.mark.parametrize("make", [Inherits, dspy.Predict, dspy.ChainOfThought], ids=lambda make: make.__name__)
async def test_dspys_own_programs_are_awaited(make):
    """What DSPy writes in both forms is awaited, also through a class that adds neither."""
    assert "acall" == async_form(make(SIGNATURE)).__name__
