"""The ids of DSPy's calls: UUIDs as ``uuid.uuid4`` makes them, without a look at the system."""

import os
import pickle
import random
import subprocess
import sys
import uuid

import dspy
import dspy.utils.callback as dspy_callback
import pytest
from dspy.utils.callback import BaseCallback

from dspy_mlflow_async.seams.dspy_call_ids import patch_call_ids
from echo import EchoLM


@pytest.fixture(autouse=True)
def patched():
    undo = patch_call_ids()
    yield
    undo()
    assert dspy_callback.uuid is uuid


class Ids(BaseCallback):
    """Keeps the ids that it is told."""

    def __init__(self):
        self.told = []

    def on_module_start(self, call_id, instance, inputs):
        self.told.append(call_id)


def test_an_id_is_a_random_uuid():
    """Version, variant, type and all that a UUID does, and no two alike."""
    made = [dspy_callback.uuid.uuid4() for _ in range(10_000)]

    assert len(made) == len(set(made))
    assert {(uuid.UUID, 4, uuid.RFC_4122, uuid.SafeUUID.unknown)} == {
        (type(each), each.version, each.variant, each.is_safe) for each in made
    }
    assert all(each == uuid.UUID(each.hex) == pickle.loads(pickle.dumps(each)) for each in made[:100])  # noqa: S301
    drawn = [sum(each.int >> bit & 1 for each in made) for bit in range(128)]
    fixed = {*range(62, 64), *range(76, 80)}
    assert all(4_500 < count < 5_500 for bit, count in enumerate(drawn) if bit not in fixed)


def test_the_system_is_asked_for_no_id(monkeypatch):
    """A call with callbacks asks the system for as many random bytes as one without."""
    asked = []
    monkeypatch.setattr(uuid.os, "urandom", lambda size, ask=os.urandom: asked.append(size) or ask(size))
    ids, program, counts = Ids(), dspy.Predict("question -> answer"), []
    for callbacks in ([], [ids], [ids]):
        asked.clear()
        with dspy.context(lm=EchoLM(), callbacks=callbacks):
            program(question="?")
        counts.append(len(asked))

    assert 2 == len(set(ids.told))
    assert all(32 == len(each) for each in ids.told)
    assert [counts[0]] * 3 == counts


def test_ids_of_somebody_else(monkeypatch):
    """Who puts another ``uuid4`` there gets its ids."""
    wanted = uuid.UUID(int=7)
    monkeypatch.setattr(uuid, "uuid4", lambda: wanted)

    assert wanted is dspy_callback.uuid.uuid4()


def test_a_program_that_seeds_draws_its_own_numbers():
    """``random`` is left alone, and does not decide the ids."""
    random.seed(1)
    expected = random.getstate()
    first = dspy_callback.uuid.uuid4()

    assert expected == random.getstate()
    random.seed(1)
    assert first != dspy_callback.uuid.uuid4()


def test_all_else_is_the_modules():
    """What stands in DSPy is the module to whoever else looks, and in a pickle."""
    assert uuid.UUID is dspy_callback.uuid.UUID
    assert uuid.NAMESPACE_DNS is dspy_callback.uuid.NAMESPACE_DNS
    assert uuid is pickle.loads(pickle.dumps(dspy_callback.uuid))  # noqa: S301


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_ids_of_its_own():
    """Parent and children draw different ones."""
    code = """
import os, sys
from dspy_mlflow_async.seams.dspy_call_ids import patch_call_ids
import dspy.utils.callback as callback
patch_call_ids()
for _ in range(3):
    if os.fork() == 0:
        break
else:
    [os.wait() for _ in range(3)]
os.write(1, (callback.uuid.uuid4().hex + "\\n").encode())
os._exit(0)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout

    assert 4 == len(set(said.split()))
