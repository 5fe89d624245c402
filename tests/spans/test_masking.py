"""Secrets are known by what they look like: a corpus of texts that hold one, and of texts that only look so."""

import random
import string
from pathlib import Path

import dspy
import pytest
from corpus import false_examples, jwt, private_key, tokens, true_examples
from hypothesis import given
from hypothesis import strategies as st

from dspy_mlflow_async import autolog
from dspy_mlflow_async.spans.secret_names import MASK, is_secret
from dspy_mlflow_async.spans.secret_patterns import RULES, SHORTEST_TOKEN, TOKENS
from dspy_mlflow_async.spans.secret_texts import MARGIN, mask, mask_beginning
from dspy_mlflow_async.spans.serialize import Plain

DOCS = Path(__file__).parents[2] / "docs" / "masking.md"
TRUE, FALSE = list(true_examples()), list(false_examples())


def shows(text, secret):
    """Whether a text shows a secret, or the first half of one."""
    return secret in text or (len(secret) >= 16 and secret[: len(secret) // 2] in text)


MISSED = [(text, secret) for text, secret in TRUE if shows(mask(text), secret)]
CHANGED = [text for text in FALSE if mask(text) != text]


def test_secrets_are_masked():
    """None of them is stored, whatever stands around it."""
    assert len(TRUE) > 1000
    assert [] == MISSED


def test_what_is_none_stays():
    """Prompts, code, hashes, UUIDs, images, counts of tokens: people come to read them."""
    assert len(FALSE) > 400
    assert [] == CHANGED


def test_the_code_of_dspy_stays():
    """A real corpus: the lines of DSPy's own sources, full of tokens and keys that are none."""
    lines = [line for path in Path(dspy.__file__).parent.rglob("*.py") for line in path.read_text().splitlines()]
    changed = [line for line in lines if mask(line) != line]

    assert len(lines) > 10_000
    assert len(changed) <= len(lines) / 2_000


def rows():
    """The tables of the docs."""
    yield from (f"| {each.name} | `{'`, `'.join(each.prefixes)}` | {each.reason} | {each.source} |" for each in TOKENS)
    yield from (f"| {each.name} | {each.reason} | {each.source} |" for each in RULES)


def rates():
    """The sentence of the docs."""
    return (
        f"Of {len(TRUE):,} texts with a secret, {len(TRUE) - len(MISSED):,} are masked; of {len(FALSE):,} that only "
        f"look so, {len(CHANGED)} are changed."
    )


def test_the_docs_tell_what_is_masked():
    """Each pattern with its reason and its source, and the rates of this corpus as they are."""
    text = DOCS.read_text()

    assert [] == [row for row in rows() if row not in text]
    assert rates() in " ".join(text.split())


@pytest.mark.parametrize("pattern", [*TOKENS, *RULES], ids=lambda each: each.name)
def test_each_pattern_has_a_reason_and_a_source(pattern):
    """Nobody has to guess."""
    assert pattern.reason.endswith(".")
    assert pattern.source.startswith(("gitleaks", "detect-secrets", "https://", "RFC"))


def test_each_token_of_the_corpus_is_long_enough():
    """What is shorter is not looked for; each kind is in the corpus."""
    known = list(tokens())

    assert all(len(token) >= SHORTEST_TOKEN for token in known)
    prefixes = [prefix for each in TOKENS for prefix in each.prefixes]
    assert all(token.startswith(tuple(prefixes)) for token in known)
    assert [] == [each.name for each in TOKENS if not any(token.startswith(each.prefixes) for token in known)]


NAMES = "connection_string account_key github_pat passcode sessionid set-cookie JSESSIONID conn_str db_pass authKey"


@pytest.mark.parametrize("name", NAMES.split())
def test_names(name):
    """Names of secrets in keys of LM and tool arguments."""
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["session_id", "sessionId", "file_pat", "pattern", "bypass", "test_pass", "string", "path"]
)
def test_names_of_no_secrets(name):
    """A session of MLflow's is none."""
    assert not is_secret(name)


def test_it_is_masked_once():
    """What was masked stays as it is."""
    for text, _ in TRUE:
        assert mask(text) == mask(mask(text))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ('Cookie: a="x y"; sid=abc; b=c\nAccept: *', "Cookie: [masked]\nAccept: *"),
        ('curl -H "Cookie: a=b; c=d" https://x', 'curl -H "Cookie: [masked]" https://x'),
        ("{'Set-Cookie': 'a=b; Path=/', 'n': 5}", "{'Set-Cookie': '[masked]', 'n': 5}"),
        (
            r'{"raw": "GET /\r\nCookie: a=b\r\nHost: x", "n": 5}',
            r'{"raw": "GET /\r\nCookie: [masked]\r\nHost: x", "n": 5}',
        ),
        ('{"raw": "x Cookie: a=b; c=d", "n": 5}', '{"raw": "x Cookie: [masked]", "n": 5}'),
        (r"{\"Authorization\": \"Bearer abcd1234\", \"n\": 5}", r"{\"Authorization\": \"[masked]\", \"n\": 5}"),
        ("csrftoken=qwer5678; theme=dark", "csrftoken=[masked]; theme=dark"),
    ],
)
def test_where_a_header_ends(text, masked):
    """With its line, or with the text that it stands in; never in the middle of it."""
    assert masked == mask(text)


# --- where a bound cuts ---------------------------------------------------------------------------------------------

KEY = "".join(random.Random(2).choices(string.ascii_letters + string.digits, k=48))  # noqa: S311 - nobody's key
SPLIT = [
    (f"sk-{KEY}", KEY[:8]),
    (f"password={KEY}", KEY[:8]),
    (f'{{"api_key": "{KEY}"}}', KEY[:8]),
    (f"Authorization: Bearer {KEY}", KEY[:8]),
    (f"postgres://ada:{KEY}@db/x", KEY[:8]),
    (jwt(), "eyJhbGci"),
    (private_key(), private_key().split("\n")[1][:8]),
]
SPLIT[-1] = (pem := private_key(), pem.split("\n")[1][:8])


@pytest.mark.parametrize(("secret", "part"), SPLIT, ids=range(len(SPLIT)))
@pytest.mark.parametrize("tail", ["", " and more", " x" * 4000])
def test_a_secret_that_the_bound_splits_is_masked(secret, part, tail):
    """Wherever in it the bound is, no half of it is stored."""
    for offset in range(len(secret) + 4):
        text = "x" * (200 - offset) + " " + secret + tail
        assert part not in Plain(202).dumps(text)
        assert part not in Plain(250).dumps({"a": [text]})
        assert part not in mask_beginning(text, 200)


@given(
    st.lists(st.sampled_from([text for text, _ in TRUE[::7]] + ["x " * 300, "y" * 500]), max_size=12),
    st.integers(1, 6000),
)
def test_many_secrets_and_a_bound(texts, bound):
    """What masks make room for has been looked at."""
    text = " \n ".join(texts)
    stored = Plain(bound).dumps(text)

    assert [] == [secret for each, secret in TRUE[::7] if each in texts and shows(stored, secret)]


def test_a_secret_far_behind_the_bound_is_not_looked_for():
    """No more work than the bound needs: the margin is all."""
    text = "x " * (MARGIN * 4) + f"sk-{KEY}"

    assert KEY not in Plain(100).dumps(text)


# --- where texts come from --------------------------------------------------------------------------------------------


class Shown:
    """An object with a text."""

    def __str__(self):
        return f"it has sk-{KEY}"


@pytest.mark.parametrize(
    "value",
    [
        f"sk-{KEY}",
        [f"sk-{KEY}"],
        {"question": {"deep": [f"Bearer {KEY}"]}},
        {f"sk-{KEY}": 1},
        dspy.Prediction(answer=f"sk-{KEY}"),
        Shown(),
        f"password={KEY}".encode(),
        {f"sk-{KEY}"},
        ValueError(f"sk-{KEY}"),
    ],
)
@pytest.mark.parametrize("secrets", [True, False])
def test_whatever_holds_the_text(value, secrets):
    """Module inputs and tool outputs, not arguments alone; keys, objects, bytes, sets."""
    text = Plain(2**20, secrets=secrets).dumps(value)

    assert KEY not in text
    assert MASK in text


def test_spans_events_and_statuses(traces):
    """A tool's output, a module's input, an exception's message and stack trace."""
    tool = dspy.Tool(lambda text: f"found sk-{KEY}", name="search")

    class Program(dspy.Module):
        def forward(self, question):
            tool(text="x")
            raise ValueError(f"cannot log in with password={KEY}")

    with pytest.raises(ValueError, match="cannot"):
        Program()(question=f"Bearer {KEY}")

    text = traces[0].to_json()
    assert KEY not in text
    assert text.count(MASK) >= 4
    assert "cannot log in with password=[masked]" in text


def test_an_exception_through_many_calls(traces):
    """200 calls that an exception passes store some hundred kilobytes, not 11 MB."""

    class Deep(dspy.Module):
        def __init__(self, depth):
            super().__init__()
            self.inner = Deep(depth - 1) if depth else None

        def forward(self, question):
            if self.inner is None:
                raise ValueError(f"token={KEY}")
            return self.inner(question=question)

    with pytest.raises(ValueError, match="token"):
        Deep(100)(question="@x")

    text = traces[0].to_json()
    assert KEY not in text
    assert len(text) < 1_500_000


def test_it_can_be_switched_off(captured):
    """For programs whose data look like secrets; names count all the same."""
    autolog(mask_contents=False, silent=True)
    dspy.Tool(lambda text, api_key: f"sk-{KEY}", name="search")(text=f"sk-{KEY}", api_key="planted")

    text = captured[0].to_json()
    assert 2 <= text.count(KEY)
    assert "planted" not in text


def test_images_stay():
    """Base64 that MLflow stores as an attachment, or shows, is not searched for tokens by chance."""
    image = "data:image/png;base64," + "AKIAABCDEFGHIJKLMNOP" * 20

    assert image == Plain(2**20, media=False)(image)


if __name__ == "__main__":  # what the docs say
    print(rates(), *rows(), sep="\n")  # noqa: T201 - a command for whoever edits them
