"""Any value becomes plain JSON: shown as far as it can be, bounded, without secrets, and never changed."""

import copy
import dataclasses
import datetime as dt
import decimal
import enum
import json
import math
import pathlib
import uuid
from collections import OrderedDict, defaultdict, deque
from typing import NamedTuple

import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.tracing.utils import TraceJSONEncoder

from dspy_mlflow_async.spans.secret_names import MASK
from dspy_mlflow_async.spans.serialize import CIRCULAR, MAX_DEPTH, Plain

MiB = 1024 * 1024


def plain(value, max_bytes=MiB, **options):
    """The plain form."""
    return Plain(max_bytes, **options)(value)


def stored(value, max_bytes=MiB, **options):
    """What is read back from the store."""
    return json.loads(Plain(max_bytes, **options).dumps(value))


class Colour(enum.Enum):
    """An enum."""

    RED = "red"


class Number(enum.IntEnum):
    """An enum that is a number."""

    ONE = 1


class Name(str):
    """A str subclass."""

    __slots__ = ()

    def __str__(self):
        return "not what it is"


class Count(int):
    """An int subclass."""


@dataclasses.dataclass
class Point:
    """A dataclass."""

    x: int
    y: object = None


class Model(pydantic.BaseModel):
    """A pydantic model."""

    name: str
    more: dict = {}


class Unprintable:
    """Its text cannot be had."""

    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class Pair(NamedTuple):
    """A named tuple."""

    a: int
    b: int


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -1,
        1.5,
        "",
        "text",
        "ä 你好 🙂",
        [],
        {},
        [1, [2, [3]]],
        {"a": {"b": None}},
        2**63 - 1,
        -(2**63),
        2**64,
        10**40,
        "\x00\u2028\x7f",
        {"": ""},
        "a" * 100_000,
        list(range(5000)),
    ],
)
def test_json_values_are_themselves(value):
    """What JSON knows is stored as it is, huge integers included."""
    assert value == stored(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, 2), [1, 2]),
        (Pair(1, 2), [1, 2]),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(int, a=1), {"a": 1}),
        (Name("text"), "text"),
        (Count(3), 3),
        (Number.ONE, 1),
        (Point(1, Point(2)), {"x": 1, "y": {"x": 2, "y": None}}),
        (Model(name="n", more={"a": Model(name="m")}), {"name": "n", "more": {"a": {"name": "m", "more": {}}}}),
        (
            {1: "a", None: "b", False: "c", 2.5: "d", (1, 2): "e"},
            {"1": "a", "null": "b", "false": "c", "2.5": "d", "(1, 2)": "e"},
        ),
        (Colour.RED, "Colour.RED"),
        (b"bytes", "b'bytes'"),
        ({"set"}, "{'set'}"),
        (deque([1]), "deque([1])"),
        (pathlib.PurePosixPath("/a/b"), "/a/b"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (decimal.Decimal("1.10"), "1.10"),
        (dt.date(2026, 1, 2), "2026-01-02"),
        (1 + 2j, "(1+2j)"),
        (..., "Ellipsis"),
        (int, "<class 'int'>"),
    ],
)
def test_everything_else_is_shown(value, expected):
    """Subclasses as what they are, models and dataclasses as mappings, the rest as text."""
    assert expected == stored(value)


@pytest.mark.parametrize(
    "value",
    [
        (1, 2),
        Name("text"),
        Count(3),
        Number.ONE,
        Point(1, Point(2)),
        Model(name="n"),
        Colour.RED,
        b"bytes",
        {"set"},
        uuid.UUID(int=5),
        decimal.Decimal("1.10"),
        dt.datetime(2026, 1, 2, tzinfo=dt.timezone.utc),
        float("nan"),
        [float("inf"), -float("inf")],
        10**40,
        {1: "a", None: "b", 2.5: "d"},
        Pair(1, 2),
        1 + 2j,
        Model,
        np.float64(1.5),
    ],
)
def test_as_mlflow_stores_it(value):
    """What MLflow's own encoder makes of a value is what we make of it."""
    theirs = json.loads(json.dumps(value, cls=TraceJSONEncoder))
    ours = stored(value)

    assert repr(theirs) == repr(ours)


def test_integers_that_python_refuses_to_write():
    """More than 4,300 digits: named, not lost, and the neighbours stay."""
    assert ["<builtins.int without text: ValueError>", 1] == stored([10**5000, 1])
    assert ["<builtins.int without text: ValueError>"] == stored([Count(10**5000)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_unusual_floats(value):
    """NaN and infinities stay what they are, as MLflow writes them."""
    back = stored({"a": [value]})["a"][0]

    assert math.isnan(back) if math.isnan(value) else back == value


@pytest.mark.parametrize("value", ["\ud800", "a\udfffb", {"\ud800": "\udc00"}, ["\ud83d"]])
def test_lone_surrogates(value):
    """Text that is no Unicode is stored escaped, not lost, and can be encoded."""
    text = Plain(MiB).dumps(value)

    text.encode()
    assert "\\ud" in text
    json.loads(text)


def test_circles():
    """A value inside itself is marked where the circle closes; the same value twice side by side is shown twice."""
    loop = {"name": "loop"}
    loop["self"] = loop
    loop["list"] = [loop]
    shared = [1]
    node = Point(1)
    node.y = node

    assert {"name": "loop", "self": CIRCULAR, "list": [CIRCULAR]} == stored(loop)
    assert {"a": [1], "b": [1]} == stored({"a": shared, "b": shared})
    assert {"x": 1, "y": CIRCULAR} == stored(node)


def test_deep_nesting():
    """Nesting deeper than the bound is marked; no RecursionError."""
    deep = []
    for _ in range(5000):
        deep = [deep]
    text = Plain(MiB).dumps(deep)

    assert f"nested deeper than {MAX_DEPTH}" in text
    json.loads(text)


def test_deep_nesting_of_models():
    """Also through dataclasses and dictionaries."""
    deep = Point(0)
    for _ in range(2000):
        deep = Point(1, {"p": deep})

    assert "nested deeper" in Plain(MiB).dumps(deep)


class HostileDict(dict):
    """A mapping that refuses to be read."""

    def items(self):
        raise RuntimeError("no items")


class HostileList(list):
    """A list that refuses to be read."""

    def __iter__(self):
        raise RuntimeError("no items")


class HostileModel(pydantic.BaseModel):
    """A model that refuses to be dumped."""

    name: str = "n"

    def model_dump(self, **kwargs):
        raise RuntimeError("no dump")


@dataclasses.dataclass
class HostileData:
    """A dataclass with an attribute that is gone."""

    name: str = "n"

    def __post_init__(self):
        del self.name

    def __getattr__(self, name):
        raise RuntimeError("no attribute")


class HostileClass:
    """Its very class lies."""

    @property
    def __class__(self):
        raise RuntimeError("no class")


@pytest.mark.parametrize(
    "make",
    [Unprintable, lambda: HostileDict(a=1), lambda: HostileList([1]), HostileModel, HostileData, HostileClass],
    ids=["text", "mapping", "list", "model", "dataclass", "class"],
)
def test_hostile_values_are_shown_as_far_as_they_go(make):
    """A value that raises when it is looked at costs itself only, not its neighbours."""
    shown = stored({"before": 1, "hostile": make(), "after": 2})

    assert (1, 2) == (shown["before"], shown["after"])
    assert isinstance(shown["hostile"], (str, dict, list))


def test_unprintable_objects_are_named():
    """What has no text is named by its class and the error."""
    assert "Unprintable without text: RuntimeError" in stored(Unprintable())
    assert "RuntimeError" in next(iter(stored({Unprintable(): 1})))


def test_a_mapping_that_changes_meanwhile():
    """Another thread may change a value while it is read: the pass works on a snapshot."""

    class Growing(dict):
        def __iter__(self):
            self[len(self)] = 1
            return super().__iter__()

    assert stored({"a": Growing(b=1)})


# --- the user's hook --------------------------------------------------------------------------------------------


def test_redact_sees_containers_before_what_they_contain():
    """The hook sees every value, containers first, and what it returns is gone through too."""
    seen = []

    def redact(value):
        seen.append(value)
        return value

    plain({"a": [1, "b"]}, redact=redact)

    assert [{"a": [1, "b"]}, [1, "b"], 1, "b"] == seen


def test_redact_replaces_leaves_and_containers():
    """Whatever it returns is stored in place."""

    def redact(value):
        if isinstance(value, dict) and "email" in value:
            return {**value, "email": "<email>"}
        return value.replace("secret", "***") if isinstance(value, str) else value

    assert [{"email": "<email>", "text": "a ***"}] == plain([{"email": "a@b.c", "text": "a secret"}], redact=redact)


def test_redact_that_raises_stores_a_mask():
    """Not the value, and only there."""

    def redact(value):
        if value == "bad":
            raise ValueError(value)
        return value

    assert {"a": MASK, "b": "good"} == plain({"a": "bad", "b": "good"}, redact=redact)


def test_redact_may_return_objects():
    """An object that it returns is made plain too."""
    assert {"x": 1, "y": None} == plain("anything", redact=lambda value: Point(1) if value == "anything" else value)


def test_redact_sees_the_text_of_objects():
    """An object that is stored as text is seen twice: itself, and that text."""

    class Customer:
        def __str__(self):
            return "secret name"

    assert ["*** name"] == plain(
        [Customer()], redact=lambda value: value.replace("secret", "***") if isinstance(value, str) else value
    )
    assert ["x"] == plain([Customer()], redact=lambda value: "x" if value == "secret name" else value)


def test_redact_that_always_returns_objects():
    """A hook that answers text with objects ends, and what is stored is their text."""

    class Mask:
        def __str__(self):
            return "masked"

    assert "masked" == plain("anything", redact=lambda value: Mask())


def test_redact_does_not_change_the_value_itself():
    """Its result is stored; the program's value stays."""
    value = {"a": ["b"]}
    plain(value, redact=lambda each: "x" if each == "b" else each)

    assert {"a": ["b"]} == value


# --- properties -------------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children) | st.tuples(children, children),
    max_leaves=30,
)


@given(JSON_VALUES)
def test_nothing_is_lost_below_the_bound(value):
    """JSON values come back from the store as they were."""
    assert json.loads(json.dumps(value)) == stored(value)


@given(JSON_VALUES)
def test_nothing_is_changed(value):
    """The value that is shown is as it was."""
    before = copy.deepcopy(value)
    plain(value, 100, secrets=True, redact=lambda each: each)

    assert before == value


@given(st.recursive(st.text() | st.integers() | st.binary(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)))
def test_any_value_can_be_stored(value):
    """Whatever comes, the text is valid JSON and valid UTF-8, within the bound."""
    text = Plain(200).dumps(value)

    json.loads(text)
    assert len(text.encode()) <= 200 + 64  # the mark of a cut


@given(st.text(alphabet=st.characters(codec=None)))
def test_any_text_can_be_stored(value):
    """Surrogates, control characters, everything: what can be written as UTF-8 comes back as it was."""
    (back,) = json.loads(Plain(MiB).dumps([value]).encode())

    assert value.encode("utf-16", "surrogatepass") == back.encode("utf-16", "surrogatepass")
