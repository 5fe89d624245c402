"""What becomes of a value is what MLflow makes of it, for every type that MLflow has words for."""

import dataclasses
import datetime as dt
import enum
import json
import math
import uuid

import dspy
import numpy as np
import pydantic
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.tracing.utils import dump_span_attribute_value

from dspy_mlflow_async.spans.serialize import Plain


class Color(enum.Enum):
    RED = 1


class Word(str, enum.Enum):
    YES = "yes"


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Pair:
    left: object
    right: object


class Model(pydantic.BaseModel):
    number: int = 1
    numbers: list[int] = [1, 2]


OBJECTS = [
    *(Color.RED, Word.YES, Level.HIGH, b"bytes", {1}, Model(), object, uuid.UUID(int=1)),
    *(dt.datetime(2026, 1, 2, tzinfo=dt.timezone.utc), dspy.Example(question="q")),
    *(np.float64(1.5), np.float32(2), np.int64(4), np.array([1.0, 2.0])),
]
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=80), st.sampled_from(OBJECTS))
KEYS = st.one_of(st.text(max_size=5), st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(KEYS, inner, max_size=4),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=12,
)


def is_same(one, other):
    """Equality that knows NaN, and tells 1 from True and 1.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    return one == other


@settings(max_examples=400, deadline=None)
@given(VALUES)
def test_any_value_is_stored_as_mlflow_stores_it(value):
    """Read back, our text and MLflow's text of a value are the same."""
    ours, theirs = json.loads(Plain(2**20).dumps(value)), json.loads(dump_span_attribute_value(value))

    assert is_same(theirs, ours), (theirs, ours)
