"""The search for secrets in an audit finds by parts what reading each text as a whole finds."""

import json

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
KEYS = st.sampled_from(["question", "api_key", "x-api-key", "max_tokens", "token", "path", "é"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS | TEXTS.map(json.dumps),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["mlflow.spanInputs", "mlflow.spanOutputs", "api_key", "model", "url", "access_token"])
SPANS = st.tuples(
    st.sampled_from(["CHAIN", "LLM", "TOOL"]),
    st.dictionaries(NAMES, VALUES, max_size=3),
    st.just("") | TEXTS,
    st.just([]) | st.lists(TEXTS, max_size=1),
)


def trace_of(spans, *, is_ascii):
    """A trace as a store has it, whose texts are written with or without what is not ASCII."""
    rows = []
    for number, (kind, attributes, message, events) in enumerate(spans):
        content = {
            "span_id": str(number),
            "events": [{"name": "exception", "attributes": {"exception.message": each}} for each in events],
            "status": {"code": "STATUS_CODE_OK", "message": message},
            "attributes": {key: json.dumps(value, ensure_ascii=is_ascii) for key, value in attributes.items()},
            "links": [],
        }
        rows.append(SpanRow(str(number), None, f"s{number}", kind, number, number, json.dumps(content)))
    return Trace(TraceRow("tr-1", "0", 0, 1, "OK", None, {}, {}, {}, (), rows))


@pytest.mark.parametrize("is_ascii", [True, False])
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=st.lists(SPANS, max_size=2), spans=st.lists(SPANS, min_size=1, max_size=3))
def test_parts_lose_nothing(before, spans, is_ascii):
    """Whatever is written, and whatever was seen before, each span says what reading it as a whole says."""
    contents = Contents()
    list(contents.check(trace_of(before, is_ascii=is_ascii)))
    trace = trace_of(spans, is_ascii=is_ascii)

    assert [finding for span in trace.spans for finding in check_span(trace, span)] == list(contents.check(trace))


def test_what_is_the_same_is_read_once(monkeypatch):
    """Of a trace only the span is read as a whole that has a secret."""
    read = []

    def noted(trace, span):
        read.append(span.name)
        return check_span(trace, span)

    monkeypatch.setattr(content_checks, "check_span", noted)
    harmless = ("LLM", {"mlflow.spanInputs": {"question": 'Say "yes" to max_tokens'}, "model": "m"}, "", [])
    secret = ("LLM", {"mlflow.spanInputs": {"api_key": "hush-hush"}}, "", [])
    contents = Contents()

    found = contents.check(trace_of([harmless, secret], is_ascii=True))
    assert ["s1, spanInputs.api_key"] == [finding.detail for finding in found]
    assert ["s1"] == read
