"""The text of what is shown as it is: the same as by a pass of ``Plain``, or none."""

import enum
import sys
import threading
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_mlflow_async.spans.serialize import Plain
from dspy_mlflow_async.spans.unchanged import unchanged_text

SECRET = "sk-ant-api03-" + "Ab3" * 31 + "AA"
MOST = 4096


class Color(enum.Enum):
    """Neither orjson nor json shows it as the tracer does."""

    RED = "red"


class Text(str):
    """A subclass of a type that JSON knows."""

    __slots__ = ()


LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=40)),
    st.sampled_from([
        *(SECRET, f"the key is {SECRET}.", "https://me:hunter22@example.org", "api_key=abc12345xyz"),
        *("x" * 300, "y" * 40_000),
        *("data:image/png;base64," + "A" * 2000, "\ud800", Color.RED, Text("text"), uuid.UUID(int=1), b"bytes", 2**70),
    ]),
)  # fmt: skip
KEYS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(
        ["password", "api_key", "value", "name", "key", "headers", "config", "lm", "data", "result", SECRET]
    ),
    st.sampled_from([1, None, True, Text("k"), b"password"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda children: st.one_of(
        st.lists(children, max_size=4), st.dictionaries(KEYS, children, max_size=4), st.tuples(children, children)
    ),
)


@given(VALUES, st.booleans())
@settings(max_examples=1000)
def test_the_same_as_by_a_whole_pass(value, secrets):
    """Whatever the value: where it gives a text, that is the one."""
    text = unchanged_text(value, MOST, secrets=secrets)
    plain = Plain(MOST, secrets=secrets)
    if text is not None:
        assert text == plain.dumps(value)
        assert not plain.has_attachments


@pytest.mark.parametrize("secrets", [False, True])
def test_what_programs_pass_around_needs_no_pass(secrets):
    """Prompts, answers, numbers, and what is nested."""
    value = {
        "messages": [{"role": "system", "content": "Your input fields are: " * 100}, {"role": "user", "content": "Hi"}],
        "max_tokens": 1000,
        "temperature": 0.7,
        "stop": None,
        "pairs": [("a", 1), ("b", [True, {}])],
    }
    assert unchanged_text(value, 10**6, secrets=secrets) == Plain(10**6, secrets=secrets).dumps(value)


def _nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def _circle():
    value = {}
    value["itself"] = value
    return value


def _doubled(times):
    value = []
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: "x" * (MOST + 1), id="long"),
        pytest.param(lambda: ["ä" * MOST], id="long-in-bytes"),
        pytest.param(lambda: _nested(250), id="deep"),
        pytest.param(_circle, id="circle"),
        pytest.param(lambda: _doubled(40), id="shared-again-and-again"),
        pytest.param(lambda: [[0]] * 20_000, id="many"),
        pytest.param(lambda: {"x" * 2000: 1}, id="long-key"),
        pytest.param(lambda: [float("nan")], id="nan"),
        pytest.param(lambda: {"headers": {"x-key": "1234567890"}}, id="headers"),
        pytest.param(lambda: {"data": "A" * 2000}, id="medium"),
        pytest.param(lambda: [SECRET], id="secret"),
        pytest.param(lambda: {SECRET: 1}, id="secret-key"),
    ],
)
def test_what_a_pass_changes_is_left_to_it(make):
    """At once, however large it would be."""
    assert unchanged_text(make(), MOST, secrets=False) is None


def test_named_secrets_are_left_to_a_pass():
    """Only where names count."""
    for value in ({"password": "abc"}, [("api_key", "abc")], {"name": "api_key", "value": "abc"}):
        assert unchanged_text(value, MOST, secrets=True) is None
        assert unchanged_text(value, MOST, secrets=False) is not None


def test_a_secret_that_comes_in_between_is_not_shown():
    """Another thread puts one in and takes it out, all the time."""
    value = {"text": "", "more": [{"text": ""}]}
    is_over = threading.Event()

    def change():
        while not is_over.is_set():
            for shown in (SECRET, "nothing of the kind"):
                value["text"] = value["more"][0]["text"] = shown
            value[SECRET] = 1
            value.pop(SECRET)

    before = sys.getswitchinterval()
    changer = threading.Thread(target=change)
    sys.setswitchinterval(1e-6)
    changer.start()
    try:
        texts = [unchanged_text(value, MOST, secrets=False) for _ in range(20_000)]
    finally:
        sys.setswitchinterval(before)
        is_over.set()
        changer.join()
    assert not [text for text in texts if text is not None and SECRET in text]
