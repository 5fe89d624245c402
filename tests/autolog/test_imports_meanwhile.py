"""Tracing goes on and off while other threads import: the look through the modules sees those of one moment."""

import gc
import itertools
import sys
import types

import pytest

import dspy_mlflow_async


@pytest.fixture
def importing():
    """Whatever is made, a module comes: the garbage collector runs, and whatever it runs may import."""
    names = (f"late_{number}" for number in itertools.count())
    added = []

    def come(phase, _):
        if phase == "start":
            name = next(names)
            added.append(name)
            sys.modules[name] = types.ModuleType(name)

    threshold = gc.get_threshold()
    gc.callbacks.append(come)
    gc.set_threshold(1)
    yield added
    gc.set_threshold(*threshold)
    gc.callbacks.remove(come)
    for name in added:
        del sys.modules[name]


def test_modules_that_come_meanwhile(importing):
    """Neither on nor off fails."""
    for _ in range(2):
        dspy_mlflow_async.autolog(silent=True)
        dspy_mlflow_async.autolog(disable=True, silent=True)

    assert importing
