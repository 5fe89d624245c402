"""The search for secrets in an audit finds by parts what reading each text as a whole finds."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspy_mlflow_async.cli.audit import content_checks
from dspy_mlflow_async.cli.audit.content_checks import Contents, check_span
from dspy_mlflow_async.cli.audit.traces import Trace
from dspy_mlflow_async.seams.mlflow_bulk_reads import SpanRow, TraceRow
from dspy_mlflow_async.spans.secret_patterns import TOKENS

PIECES = [
    *(" ", "\t", "\n", "\\", "'", '"', "\\'", '\\"', "(", "{", ",", ";", "&", "?", "=", ":", ": ", "@", "/", "-", "é"),
    *("\0", "\x7f", "\ud800", "://", "://a:b@c", "https://u:pw9x@host/", "Hello", "question", "42", "=="),
    *("-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n", "token", "token=", "my_token", "max_tokens", "api_key", "apiKey"),
    *(
        "password: ",
        "hunter2x",
        "a1B2c3D4e5F6g7H8",
        "Authorization: ",
        "Bearer ",
        "basic ",
        "dXNlcjpwYXNz",
        "cookie: a=b",
    ),
    *(" -u ", "--user=", "--password ", "--token ", "me:secret9", "[cut: 3 of 9 characters]", "[masked]", "ntoken"),
    "dXNlcjpwYXNz",
    *("?sig=", "conn_str", "https://hooks.slack.com/services/T0/B0/abcdefgh12345678", ";base64,"),
    *sorted({prefix for each in TOKENS for prefix in each.prefixes}),
    *("ghp_" + "a1B2" * 9, "AKIA" + "ABCD2345" * 2, "sk-ant-" + "a1B2" * 9),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=8)
PAIRS = [("api", "key"), ("client", "secret"), ("access", "token"), ("db", "pass"), ("max", "tokens"), ("", "cookie")]
SIGNS = [
    "_",
    "-",
    " ",
    ".",
    '"',
    "\\",
    "/",
    "'",
    "\n",
    "\t",
    "\b",
    "\0",
    "\u2013",
    "é",
    "😀",
    ":",
    '":',
    '\\"',
    "[",
    "}",
    "=",
]
ODD = st.lists(st.sampled_from(SIGNS), max_size=3).map("".join)
ODD_KEYS = st.builds(
    lambda odd, pair: f"{odd[0]}{pair[0]}{odd[1]}{pair[1]}{odd[2]}", st.tuples(ODD, ODD, ODD), st.sampled_from(PAIRS)
)
KEYS = st.sampled_from(["question", "api_key", "x-api-key", "max_tokens", "token", "path", "é"]) | ODD_KEYS
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS | TEXTS.map(json.dumps),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["mlflow.spanInputs", "mlflow.spanOutputs", "api_key", "model", "url", "access_token"])


@st.composite
def json_texts(draw):
    """A JSON text as some writer writes it: with blanks where they may stand, and with any character as an escape."""
    text = json.dumps(
        draw(VALUES | st.dictionaries(ODD_KEYS, TEXTS, max_size=2)),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, None, 1, "\t"])),
        separators=draw(st.sampled_from([None, (",", ":"), (" , ", " : "), (",", "\n:\t")])),
    )
    escaped = draw(st.sampled_from(["", '"', "_", "k", '\\"', "-e:"]))
    return "".join(written(piece, escaped) for piece in _PIECE.findall(text))


_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|[^"]+', re.DOTALL)


def written(piece, escaped):
    """A piece of a JSON text; where it is a string, with an escape for each of some characters."""
    if piece[:1] != '"':
        return piece
    text = json.loads(piece)
    shown = json.dumps(text, ensure_ascii=False)[1:-1]
    for character in escaped:
        shown = "".join(
            f"\\u{ord(character):04x}" if each in (character, json.dumps(character)[1:-1]) else each
            for each in re.findall(r"\\u[0-9a-f]{4}|\\.|.", shown, re.DOTALL)
        )
    assert json.loads(f'"{shown}"') == text
    return f'"{shown}"'


ATTRIBUTES = json_texts() | json_texts().map(lambda text: text[: len(text) // 2]) | TEXTS
SPANS = st.tuples(
    st.sampled_from(["CHAIN", "LLM", "TOOL"]),
    st.dictionaries(NAMES | ODD_KEYS, ATTRIBUTES, max_size=3),
    st.just("") | TEXTS,
    st.just([]) | st.lists(TEXTS, max_size=1),
)


def trace_of(spans):
    """A trace as a store has it."""
    rows = []
    for number, (kind, attributes, message, events) in enumerate(spans):
        content = {
            "span_id": str(number),
            "events": [{"name": "exception", "attributes": {"exception.message": each}} for each in events],
            "status": {"code": "STATUS_CODE_OK", "message": message},
            "attributes": attributes,
            "links": [],
        }
        rows.append(SpanRow(str(number), None, f"s{number}", kind, number, number, json.dumps(content)))
    return Trace(TraceRow("tr-1", "0", 0, 1, "OK", None, {}, {}, {}, (), rows))


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=st.lists(SPANS, max_size=2), spans=st.lists(SPANS, min_size=1, max_size=3))
def test_parts_lose_nothing(before, spans):
    """Whatever is written, and whatever was seen before, each span says what reading it as a whole says."""
    contents = Contents()
    list(contents.check(trace_of(before)))
    trace = trace_of(spans)

    assert [finding for span in trace.spans for finding in check_span(trace, span)] == list(contents.check(trace))


def test_what_is_the_same_is_read_once(monkeypatch):
    """Of a trace only the span is read as a whole that has a secret."""
    read = []

    def noted(trace, span):
        read.append(span.name)
        return check_span(trace, span)

    monkeypatch.setattr(content_checks, "check_span", noted)
    harmless = (
        "LLM",
        {"mlflow.spanInputs": json.dumps({"question": 'Say "yes" to max_tokens'}), "model": '"m"'},
        "",
        [],
    )
    secret = ("LLM", {"mlflow.spanInputs": '{"api_key": "hush-hush"}'}, "", [])
    contents = Contents()

    found = contents.check(trace_of([harmless, secret]))
    assert ["s1, spanInputs.api_key"] == [finding.detail for finding in found]
    assert ["s1"] == read


@pytest.mark.parametrize(
    "key",
    [
        'api"key',
        '"api_key"',
        'api_"_key',
        'api\\"key',
        'api"\\"key',
        "api\\key",
        "api\u2013key",
        "api\nkey",
        '":"api:"key',
    ],
)
def test_secrets_are_found_by_odd_keys(key):
    """A key is the name of a secret with whatever between its words, in an argument and as one."""
    argument = ("LLM", {"mlflow.spanInputs": json.dumps({"n": 'Say "yes"', key: "hush-hush"})}, "", [])
    attribute = ("LLM", {key: '"hush-hush"'}, "", [])

    assert [f"s0, spanInputs.{key}"] == [each.detail for each in Contents().check(trace_of([argument]))]
    assert [f"s0, {key}"] == [each.detail for each in Contents().check(trace_of([attribute]))]


@pytest.mark.parametrize("text", ["--password hunter2xyz", "-u me:secret99", "--user=me:secret99"])
def test_secrets_of_options_are_found_where_a_text_begins(text):
    """A command line may be the whole of a text."""
    argument = ("CHAIN", {"mlflow.spanInputs": json.dumps({"command": text})}, "", [])

    assert ["s0, spanInputs.command"] == [each.detail for each in Contents().check(trace_of([argument]))]
