"""The search for secrets takes time in proportion to the text, whatever strangers have written into it."""

import ast
import importlib
import pkgutil
import re
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dspy_mlflow_async
from dspy_mlflow_async.spans import secret_texts
from dspy_mlflow_async.spans.outcome import failure_of
from dspy_mlflow_async.spans.secret_names import mask_in_text
from dspy_mlflow_async.spans.secret_patterns import TOKENS
from dspy_mlflow_async.spans.secret_texts import masked, may_hold_secrets
from dspy_mlflow_async.spans.serialize import Plain

SOURCE = Path(dspy_mlflow_async.__file__).parent
SMALL, TIMES = 4_096, 8  # characters, and how often as many
MOST = 20  # times the time: 8 where it is linear, 64 where it is quadratic
NOISE = 0.004  # seconds of CPU

SEARCHES = {
    "contents": masked,
    "parts of contents": may_hold_secrets,
    "names": mask_in_text,
    "an object's text": lambda text: Plain(2**20, secrets=True)(Shown(text)),
    "a text": Plain(2**30),
}


class Shown:
    """An object with a text."""

    def __init__(self, text):
        self.text = text

    def __str__(self):
        return self.text


def seconds(function, text):
    """The CPU seconds of this thread: others' load does not count."""
    secret_texts.masked_short.cache_clear()
    secret_texts.masked_long.cache_clear()
    began = time.thread_time()
    function(text)
    return time.thread_time() - began


def assert_linear(function, make):
    """``make(n)`` gives a text of about n characters. What was disturbed is measured again."""
    small, large = make(SMALL), make(SMALL * TIMES)
    tried = []
    for _ in range(12):
        tried.append((seconds(function, small), seconds(function, large)))
        before, after = (min(times) for times in zip(*tried, strict=True))
        if after <= before * MOST + NOISE:
            return
    pytest.fail(f"{before:.4f} s for {len(small)} characters, {after:.4f} s for {len(large)}: {small[:80]!r}")


def repeated(piece, begin="", end=""):
    """A text of a piece, again and again."""
    return lambda size: begin + piece * (size // len(piece)) + end


PREFIXES = sorted({prefix for each in TOKENS for prefix in each.prefixes})
PIECES = [
    *(" ", "\t", "\n", "\\", "'", '"', "\\'", '\\"', "(", ")", "[", "{", "}", ",", ";", "&", "=", ":", "@", "/", "-"),
    *(".", "a", "Z", "7", "aB3", "é", "\ud800", "://", "://a:", "a@", "--", "-----BEGIN ", "-----END ", " --token "),
    *("-----BEGIN RSA PRIVATE KEY-----", "token", "token=", "token=(", "token='", '("token", "x"', "('token', ", "key"),
    *("password: ", '"password": "', "authorization: ", "Bearer ", "basic ", "cookie: a=", "eyJ", "eyJ-"),
    *("SG.a", "sk-", "sk-ant-", "AKIA", "xoxb-", "data:x;base64,"),
    *("_", " -u a:", "%20", "+", "bearer+", "b'", "\\n", "MIIE", " at 0x", "None", "token=token", "[masked]", "=key"),
    *("https://hooks.slack.com/services/", "&sig=", "=="),
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize(
    "begin", ["", '("token", "x"', "token='", "token=(", "-----BEGIN RSA PRIVATE KEY-----\n", "sk-"]
)
def test_pieces_of_what_is_searched_for(search, begin):
    """Each piece of each pattern, again and again: twice the text is twice the time."""
    for piece in (*PIECES, *PREFIXES):
        assert_linear(search, repeated(piece, begin))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from([*PIECES, *PREFIXES]), min_size=1, max_size=5).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=2).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=2).map("".join),
    st.sampled_from(sorted(SEARCHES)),
)
def test_generated_texts(piece, begin, end, search):
    """Whatever pieces are put together."""
    assert_linear(SEARCHES[search], repeated(piece, begin, end))


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_one_credential_that_holds_many_words_for_one(search):
    """What is masked is not searched again: the rest of a token may say ``bearer`` as often as it likes."""
    for piece in ("sk-or-v1-bearer+", "bearer+aB3dE5fG7hJ9", "basic YWxhZGRpbjpvcGVu"):
        assert_linear(search, repeated(piece, "bearer+", "bearer+"))


def test_what_took_seconds():
    """20,000 characters of an argument's text, which took six seconds."""
    for text in ('("token", "x"' + " " * 20_000, "token=(" * 3_000, "token='" + "\\'" * 10_000):
        assert seconds(mask_in_text, text) < 0.2
        assert seconds(masked, text) < 0.2


# --- no more than the bound needs ---------------------------------------------------------------------------------

LARGE = 50_000_000


BOUND = 64 * 1024


@pytest.mark.parametrize(
    "make",
    [
        lambda size: b"x" * size,
        bytearray,
        lambda size: "x" * size,
        lambda size: "é" * size,
        lambda size: "token=" * (size // 6),
        lambda size: [1] * size,
        lambda size: (b"x" * size,) * 10,
        lambda size: {"a": ["x" * size] * 10},
        lambda size: {"x" * size: 1},
        lambda size: {b"x" * size: 1},
    ],
    ids=["bytes", "bytearray", "text", "no ascii", "names", "list", "tuple", "nested", "key", "key of bytes"],
)  # fmt: skip
@pytest.mark.parametrize("secrets", [True, False])
def test_what_cannot_be_stored_is_not_looked_at(make, secrets):
    """50 MB, of which 64 kB are stored: the time is that of the 64 kB, and of one search in memory."""

    def dumps(value):
        return Plain(BOUND, secrets=secrets).dumps(value)

    small, large = make(BOUND), make(LARGE)

    assert len(dumps(large)) <= BOUND + 64
    bounded = min(seconds(dumps, small) for _ in range(3))
    assert min(seconds(dumps, large) for _ in range(3)) < 2 * bounded + 0.1


@pytest.mark.parametrize("kind", [set, frozenset, lambda items: dict.fromkeys(items).keys()])
def test_large_sets(kind):
    """The same for what is stored as the text of a set."""
    value = kind(range(2_000_000))
    text = Plain(1000, secrets=True).dumps(value)

    assert text.endswith('… [cut: 2000000 items]"')
    assert seconds(lambda each: Plain(1000, secrets=True).dumps(each), value) < 0.05


def test_other_threads_go_on():
    """While a long text is searched, which adversaries have written, others run: no pass holds the interpreter long."""
    gaps, is_over = [], threading.Event()
    searchers_time = time.pthread_getcpuclockid(threading.get_ident())  # others' load does not count

    def watch():
        last = time.clock_gettime(searchers_time)
        while not is_over.is_set():
            time.sleep(0)
            now = time.clock_gettime(searchers_time)
            gaps.append(now - last)
            last = now

    before = sys.getswitchinterval()
    sys.setswitchinterval(0.001)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for piece in ("=", "y=", ":", " ", "'", '"', "key", "token=(", "(", "a", "\\'"):
            masked(piece * (2**20 // len(piece)))
            mask_in_text("token" + piece * (2**20 // len(piece)))
    finally:
        is_over.set()
        watcher.join()
        sys.setswitchinterval(before)

    assert sorted(gaps)[-3] < 0.25  # seconds of CPU; a pass over all of it would take longer


# --- exceptions ---------------------------------------------------------------------------------------------------


def fail(depth):
    """Raise from so many calls below."""
    if depth == 0:
        raise ValueError("x")
    fail(depth - 1)


def test_stack_traces_are_bounded():
    """The calls nearest to the failure are kept, and how many are not is said."""
    with pytest.raises(ValueError, match="x") as caught:
        fail(600)

    stacktrace = failure_of(caught.value).stacktrace
    assert len(stacktrace) < 16_000
    assert "calls are left out" in stacktrace
    assert stacktrace.endswith("ValueError: x")


def test_chains_are_bounded():
    """An exception that was raised while another one was handled, and so on: the last ones."""

    def chain(length):
        if length == 0:
            raise KeyError("first")
        try:
            chain(length - 1)
        except Exception as error:
            raise ValueError(length) from error

    with pytest.raises(ValueError, match="100") as caught:
        chain(100)

    stacktrace = failure_of(caught.value).stacktrace
    assert stacktrace.count("Traceback (most recent call last)") <= 10
    assert stacktrace.endswith("ValueError: 100")


# --- all patterns of the package ------------------------------------------------------------------------------------

# Every pattern in the package, and why its search is linear.
SETS = "no repetition can be followed by what it has itself taken, and none is begun again within itself"
BOUNDED = "all repetitions are bounded, so that each place costs a constant at most"
PLAIN = "has no repetition"
ANCHORED = "is matched at one place only, and its repetitions are of one set of characters each"
SHORT = "sees short texts only: names of at most 64 characters, paths, or three characters"
OWN = "reads what this package has written"
LINEAR = {
    "asgi.middleware._TOKEN": ANCHORED,
    "cli.audit.content_checks._CUT": "begins with words that its repetitions do not take",
    "cli.audit.content_checks._KEY_WITH_QUOTE": "begins with a quote, and its repetitions stop at the next one",
    "cli.audit.run_checks._STEP": ANCHORED,
    "cli.audit.trace_checks._ID": PLAIN,
    "cli.demo.script._FIELD": OWN,
    "cli.demo.script._MARKER": OWN,
    "cli.lineage.origins._HASH": BOUNDED,
    "cli.lineage.origins._IN_SPAN": BOUNDED,
    "cli.lineage.origins._MODEL": BOUNDED,
    "cli.options._AGO": ANCHORED,
    "cli.report.scores._CALL": ANCHORED,
    "cli.report.scores._FIELD": "begins where an earlier one would have ended, so that each place is read once",
    "evaluate.summary._NO_METRIC_CHARACTER": PLAIN,
    "export.spool.codec._HEAD": OWN,
    "export.spool.format._DONE": OWN,
    "export.spool.format._LINE": OWN,
    "export.spool.format._TEXT": PLAIN,
    "export.write.errors._CANNOT_WRITE_NOW": PLAIN,
    "export.write.errors._HAS_NO_ANSWER": BOUNDED,
    "export.write.errors._WAS_OVERTAKEN": PLAIN,
    "export.write.rows._SIMPLE_KEY": BOUNDED,
    "export.write.rows._TRACE_ID": PLAIN,
    "printable._CONTROLS": PLAIN,
    "printable._CONTROLS_AND_LINES": PLAIN,
    "printable._SECRET_PARAMETER": "is bounded up to the sign; then it takes what is masked",
    "printable._USER_INFO": "stops at the next slash, before which another one could not begin",
    "runs.description._TICKS": SETS,
    "runs.drawing._ODD": PLAIN,
    "runs.handle._INDEX": BOUNDED,
    "runs.handle._ODD_CHARACTER": PLAIN,
    "spans.secret_assignments.PLACEHOLDER": ANCHORED,
    "spans.secret_assignments._BARE": BOUNDED,
    "spans.secret_assignments._BARE_REST": "takes what is masked, so that it is not searched again",
    "spans.secret_assignments._BLANKS": BOUNDED,
    "spans.secret_assignments._LETTER": PLAIN,
    "spans.secret_assignments._LINE": BOUNDED,
    "spans.secret_assignments._END_OF_HEADER": "ends what is masked, so that it is not searched again",
    "spans.secret_assignments._NAMED": PLAIN,
    "spans.secret_assignments._NAME_BACKWARDS": BOUNDED,
    "spans.secret_assignments._PASSWORD": SHORT,
    "spans.secret_assignments._PATH": "sees 256 characters at most, once",
    "spans.secret_assignments._QUOTE": BOUNDED,
    "spans.secret_assignments._SURE": SHORT,
    "spans.secret_texts._BEGIN": BOUNDED,
    "spans.secret_texts._CREDENTIAL": BOUNDED,
    "spans.secret_texts._CREDENTIAL_REST": "takes what is masked, so that it is not searched again",
    "spans.secret_texts._HOOK": BOUNDED,
    "spans.secret_texts._KEY_LINE": BOUNDED,
    "spans.secret_texts._OPTION": "begins with a blank, which its repetitions do not take",
    "spans.secret_texts._OPTION_NAME": BOUNDED,
    "spans.secret_texts._PREFIX": PLAIN,
    "spans.secret_texts._TOKEN_REST": "takes what is masked, so that it is not searched again",
    "spans.secret_texts._USER_INFO": BOUNDED,
    "spans.secret_texts._USER_OPTION": BOUNDED,
    "spans.media._BASE64": ANCHORED,
    "spans.media._DATA_URI": "is bounded up to the comma; then it takes what is not searched again",
    "spans.secret_names._AFTER_PAIR": ANCHORED,
    "spans.secret_names._HUMP": PLAIN,
    "spans.secret_names._NAMED": BOUNDED,
    "spans.secret_names._NO_WORD": SHORT,
    "spans.secret_names._QUOTED_BY": SHORT,
    "spans.secret_names._SIGN": PLAIN,
    "spans.serialize._ADDRESS": "begins with letters of its own, which its repetition does not take",
}


def patterns():
    """Every compiled pattern of the package, and every text that is compiled where it is used."""
    found = {}
    for module in pkgutil.walk_packages([str(SOURCE)], "dspy_mlflow_async."):
        if module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, re.Pattern):
                found.setdefault(id(value), (f"{module.name.removeprefix('dspy_mlflow_async.')}.{name}", value))
    return dict(found.values())


def uses():
    """The calls of ``re`` in the package whose pattern is written in place."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id == "re" and node.func.attr != "escape":
                    yield path.relative_to(SOURCE), node.func.attr


def test_all_patterns_are_known():
    """Whoever adds one says why it is linear, and adds its pieces above where strangers' texts reach it."""
    assert sorted(LINEAR) == sorted(patterns())
    assert [] == [use for use in uses() if use[1] != "compile"]


@pytest.mark.parametrize("name", sorted(LINEAR))
def test_each_pattern_is_linear(name):
    """Searched for in texts of its own pieces."""
    pattern = patterns()[name]
    if LINEAR[name] in (SHORT, OWN) or "256" in LINEAR[name]:
        pytest.skip(LINEAR[name])
    is_bytes = isinstance(pattern.pattern, bytes)

    def search(text):
        text = text.encode("ascii", "replace") if is_bytes else text
        if LINEAR[name] is ANCHORED or name.endswith("_REST"):
            pattern.match(text)
        else:
            for _ in pattern.finditer(text):
                pass

    pieces = [
        "a",
        "[",
        "[a",
        ",\n    score=",
        "API request to ",
        " failed with ",
        " at 0x",
        "0",
        "(",
        "a.",
        " ",
        "=",
        ":",
    ]
    for piece in (*pieces, *PIECES):
        assert_linear(search, repeated(piece))
