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

from dspy_mlflow_async.spans.serialize import CIRCULAR, MASK, MAX_DEPTH, Plain, _names_secret, dump, is_secret

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


# --- bounds -----------------------------------------------------------------------------------------------------


def test_long_text_is_cut_with_a_mark():
    """The beginning is kept, and the mark says how much is missing."""
    assert "x" * 100 + "… [cut: 900 of 1000 characters]" == plain("x" * 1000, 100)


def test_what_fits_is_not_cut():
    """Up to the bound, nothing is lost."""
    assert "x" * 1000 == plain("x" * 1000, 1000)


@pytest.mark.parametrize("text", ["ä" * 1000, "你" * 1000, "🙂" * 1000])
def test_the_bound_is_in_bytes(text):
    """Text beyond ASCII is measured as it is stored, and never cut into half a character."""
    cut = plain(text, 1500)

    assert len(cut.encode()) < len(text.encode()) + 64
    assert "cut" in cut
    assert set(cut.split("…")[0]) <= {text[0]}


@pytest.mark.parametrize(
    "value",
    [
        ["x" * 100] * 100_000,
        {str(n): "x" * 100 for n in range(100_000)},
        [[["x" * 1000] * 100] * 100] * 10,
        list(range(1_000_000)),
        [None] * 1_000_000,
        ["\u1234" * 1000] * 1000,
        [{}] * 1_000_000,
        [[]] * 1_000_000,
        {"a": "x" * 10_000_000},
        [1.5] * 1_000_000,
        [b"x" * 100] * 100_000,
    ],
    ids=["texts", "mapping", "nested", "ints", "nones", "unicode", "dicts", "lists", "one", "floats", "bytes"],
)
def test_a_whole_value_is_bounded(value):
    """The bound is for a value as a whole, whatever it is made of; the JSON text exceeds it by a factor at most."""
    text = Plain(10_000).dumps(value)

    assert len(text.encode()) < 60_000
    assert "cut" in text


@pytest.mark.parametrize("key", ["data", "result", "b64_json", "content"])
def test_no_key_escapes_the_bound(key):
    """Media goes to MLflow's attachments; other long text under the same keys is cut."""
    maker = Plain(1000)
    shown = maker({key: "not base64! " * 10_000, "type": "text"})

    assert maker.has_attachments or len(dump(shown)) < 2000


def test_a_cut_value_says_how_many_are_missing():
    """Items and keys are counted."""
    assert "[cut: 1 of 3 items]" == plain(["x" * 60, "y" * 60, "z"], 100)[-1]
    assert "[cut: 1 of 3 keys]" == plain({"a": "x" * 60, "b": "y" * 60, "c": 1}, 100)["…"]


# --- secrets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "API_KEY",
        "Api-Key",
        "apikey",
        "X-Api-Key",
        "Authorization",
        "authorization",
        "Proxy-Authorization",
        "password",
        "passwd",
        "Cookie",
        "Set-Cookie",
        "token",
        "access_token",
        "refresh_token",
        "id_token",
        "auth_token",
        "client_secret",
        "secret",
        "secret_key",
        "aws_secret_access_key",
        "private_key",
        "azure_ad_token",
        "openai_api_key",
        "db_password",
        "credentials",
        "session_token",
    ],
)
def test_names_of_secrets(key):
    """Whole key names, whatever their case and hyphens."""
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    [
        "max_tokens",
        "tokens",
        "token_count",
        "max_completion_tokens",
        "total_tokens",
        "tokenizer",
        "secretary",
        "password_hint",
        "author",
        "authority",
        "keys",
        "key",
        "api_base",
        "prompt",
        "cookies_eaten",
        "n",
    ],
)
def test_names_of_no_secrets(key):
    """``max_tokens`` stays."""
    assert not is_secret(key)


def test_secrets_are_masked_in_depth():
    """In LM kwargs and tool arguments, wherever they are nested."""
    value = {"api_key": "sk-1", "nested": [{"headers": {"Authorization": "Bearer x"}, "max_tokens": 5}], "n": 1}

    assert {"api_key": MASK, "nested": [{"headers": {"Authorization": MASK}, "max_tokens": 5}], "n": 1} == plain(
        value, secrets=True
    )


def test_headers_are_masked_everywhere():
    """Also where keys are not masked otherwise: a module's inputs."""
    value = {"password": "kept: a question about passwords", "extra_headers": {"Authorization": "x", "Accept": "y"}}

    assert {
        "password": "kept: a question about passwords",
        "extra_headers": {"Authorization": MASK, "Accept": "y"},
    } == plain(value)


def test_a_secret_that_is_none_stays_none():
    """No secret is not a secret."""
    assert {"api_key": None} == plain({"api_key": None}, secrets=True)


def test_secrets_in_dataclasses_and_models():
    """Attributes are keys."""

    @dataclasses.dataclass
    class Client:
        api_key: str
        retries: int

    assert {"api_key": MASK, "retries": 3} == plain(Client("sk-1", 3), secrets=True)


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


def test_long_keys_are_not_kept():
    """A dict key of a program may be large, and is nobody's secret."""
    before = _names_secret.cache_info().currsize
    assert not is_secret("x" * 100_000 + "_password")

    assert before == _names_secret.cache_info().currsize


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
    text.encode()


@given(st.text(alphabet=st.characters(codec=None)))
def test_any_text_can_be_stored(value):
    """Surrogates, control characters, everything."""
    Plain(MiB).dumps([value]).encode()
