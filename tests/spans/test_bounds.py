"""What is stored of a value keeps to its number of bytes, is the beginning of the value, and says what is missing."""

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dspy_mlflow_async.spans.bounds import MARK_BYTES, json_text
from dspy_mlflow_async.spans.serialize import Plain


def stored(value, max_bytes):
    """What is read back from the store."""
    return json.loads(Plain(max_bytes).dumps(value))


def test_long_text_is_cut_with_a_mark():
    """The beginning is kept, and the mark says how much is missing."""
    assert "x" * 98 + "… [cut: 902 of 1000 characters]" == stored("x" * 1000, 100)  # and two quotes


def test_what_fits_is_not_cut():
    """Up to the bound, nothing is lost."""
    assert "x" * 998 == stored("x" * 998, 1000)


@pytest.mark.parametrize(
    ("character", "size"), [("x", 1), ("ä", 2), ("你", 3), ("🙂", 4), ('"', 2), ("\n", 2), ("\0", 6), ("\ud800", 6)]
)
def test_the_bound_is_in_bytes_of_what_is_stored(character, size):
    """Characters count as they are written in UTF-8 JSON, escapes included, and none is cut in half."""
    text = Plain(1502).dumps(character * 2000)

    kept = 1500 // size
    mark = f"… [cut: {2000 - kept} of 2000 characters]"
    written = json_text(character)[1:-1]
    assert f'"{written * kept}{mark}"' == text


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
    """The bound is for a value as a whole, whatever it is made of, and its room is used."""
    text = Plain(10_000).dumps(value)

    assert 10_000 - 200 <= len(text.encode()) <= 10_000 + MARK_BYTES
    assert "cut" in text


@pytest.mark.parametrize("key", ["data", "result", "b64_json", "content"])
def test_no_key_escapes_the_bound(key):
    """Media goes to MLflow's attachments; other long text under the same keys is cut."""
    maker = Plain(1000)
    shown = maker({key: "not base64! " * 10_000, "type": "text"})

    assert maker.has_attachments or len(maker.encode(shown)) <= 1000 + MARK_BYTES


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (["x" * 60, "y" * 60, "z"], ["x" * 60, "y" * 11 + "… [cut: 49 of 60 characters]", "[cut: 1 of 3 items]"]),
        ({"a": "x" * 80, "b": 1, "c": 1, "d": 1}, {"a": "x" * 80, "b": 1, "c": 1, "…": "[cut: 1 of 4 keys]"}),
        ({"a": {"b": ["x" * 200]}}, {"a": {"b": ["x" * 84 + "… [cut: 116 of 200 characters]"]}}),
        (["x" * 94, {"a": ["x" * 90]}, 1], ["x" * 94, "[cut: 2 of 3 items]"]),
        ({"k" * 200: 1, "b": 1}, {"…": "[cut: 2 of 2 keys]"}),
        (10**200, "1" + "0" * 97 + "… [cut: 103 of 201 characters]"),
        ([1] * 1000, [1] * 49 + ["[cut: 951 of 1000 items]"]),
    ],
)
def test_a_cut_value_says_how_many_are_missing(value, shown):
    """Characters, items and keys are counted, in each list and mapping that is cut."""
    text = Plain(100).dumps(value)

    assert shown == json.loads(text)
    assert len(text.encode()) <= 100 + MARK_BYTES


def test_what_is_cut_twice_is_counted_once():
    """The pass stops at what can never fit, and the text is cut to what does: the numbers are the value's own."""
    value = {"a": ["\0" * 100, "b" * 1000], "c": 1}

    kept = "\0" * 23 + "… [cut: 77 of 100 characters]"
    assert {"a": [kept, "[cut: 1 of 2 items]"], "…": "[cut: 1 of 2 keys]"} == stored(value, 200)


def test_unusual_floats_are_cut_too():
    """NaN has no orjson text; the bound holds."""
    text = Plain(100).dumps([math.nan] * 1000)

    assert len(text.encode()) <= 100 + MARK_BYTES
    assert '"[cut: 976 of 1000 items]"' in text


@pytest.mark.parametrize("max_bytes", [1, 2, 3, 5, 30])
def test_the_smallest_bounds(max_bytes):
    """Little more than a mark is left."""
    for value in ("x" * 100, ["x" * 100], {"a": "x" * 100}, 10**100, [[[[1, 2, 3] * 100]]]):
        text = Plain(max_bytes).dumps(value)
        json.loads(text)
        assert len(text.encode()) <= max_bytes + MARK_BYTES


# --- properties -------------------------------------------------------------------------------------------------

ANY_TEXT = st.text(alphabet=st.characters(codec=None), max_size=200)  # control characters, lone surrogates
ESCAPED = st.text(alphabet=st.sampled_from('\0\x1f\n"\\\x7fä你🙂\ud800\udfffx'), max_size=200)
TEXTS = ANY_TEXT | ESCAPED
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(TEXTS, inner, max_size=8),
    max_leaves=30,
)
BOUNDS = st.integers(1, 500)


@given(TEXTS, BOUNDS)
def test_any_text_is_cut_exactly(text, max_bytes):
    """The whole text where it fits; otherwise the longest beginning of it that fits, and a mark."""
    whole = json_text(text)
    kept = Plain(max_bytes).dumps(text)

    if len(whole.encode()) <= max(max_bytes, 2):
        assert json.loads(whole) == json.loads(kept)
        return
    beginning, mark = kept.rsplit("… [cut: ", 1)
    missing = int(mark.split()[0])
    there = len(text) - missing
    assert f"{missing} of {len(text)} characters]" == mark.rstrip('"')
    assert json_text(text[:there])[:-1] == beginning
    assert len(beginning.encode()) + 1 <= max(max_bytes, 2) < len(json_text(text[: there + 1]).encode())
    assert len(kept.encode()) <= max_bytes + MARK_BYTES


def is_beginning(kept, value):
    """Whether all that is kept is the beginning of what it was kept of, with marks where something is missing."""
    if isinstance(value, str) and isinstance(kept, str):
        return kept == value or _units(value).startswith(_units(kept.rsplit("… [cut: ", 1)[0]))
    if isinstance(value, list) and isinstance(kept, list):
        if len(kept) == len(value) and all(map(is_beginning, kept, value)):
            return True
        return is_mark(kept[-1], "items") and all(map(is_beginning, kept[:-1], value))
    if isinstance(value, dict) and isinstance(kept, dict):
        if len(kept) == len(value) and all(key in kept and is_beginning(kept[key], value[key]) for key in value):
            return True
        *pairs, (last, mark) = kept.items()
        same = [key for key, _ in pairs] == list(value)[: len(pairs)]
        return last == "…" and is_mark(mark, "keys") and same and all(is_beginning(v, value[k]) for k, v in pairs)
    return repr(kept) == repr(value)


def _units(text):
    """Two lone surrogates side by side are read back as one character, which the cut may go through."""
    return text.encode("utf-16-le", "surrogatepass")


def is_mark(text, kind):
    """A mark in place of items or keys."""
    return isinstance(text, str) and text.startswith("[cut: ") and text.endswith(f" {kind}]")


@settings(max_examples=300, deadline=None)
@example(["\ud800\udc00" * 20], 20)
@given(VALUES, BOUNDS)
def test_any_value_is_cut_to_its_beginning(value, max_bytes):
    """Never more than the bound and a mark; nothing cut that fits; what is kept is the beginning, and is marked."""
    text = Plain(max_bytes).dumps(value)
    whole = json_text(value)

    assert len(text.encode()) <= max_bytes + MARK_BYTES
    if len(whole.encode()) <= max_bytes:
        assert repr(json.loads(whole)) == repr(json.loads(text))
    elif value and not isinstance(value, (int, float)):
        assert "[cut: " in text
        assert is_beginning(json.loads(text), json.loads(whole))
