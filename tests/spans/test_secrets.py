"""Secrets are masked by the names that stand before them, in whatever holds the two, and ordinary names are not."""

import collections
import copy
import dataclasses
import functools
import sys
import time
import types
from typing import NamedTuple

import dspy
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_mlflow_async.spans.secret_names import MASK, is_secret, mask_in_text
from dspy_mlflow_async.spans.serialize import Plain

SECRET = "hunter2"  # noqa: S105 - nobody's


def plain(value, max_bytes=2**20, **options):
    """The plain form."""
    return Plain(max_bytes, **options)(value)


def stored(value, *, secrets=True, **options):
    """The text in the store."""
    return Plain(2**20, secrets=secrets, **options).dumps(value)


# --- names ------------------------------------------------------------------------------------------------------

SECRETS = """
api_key API_KEY Api-Key apikey X-Api-Key apiKey openaiApiKey APIKey openai_api_key azure.openai.api-key api_keys
Authorization authorization Proxy-Authorization auth bearer jwt
password passwd pwd passphrase passPhrase dbPassword db_password spring.datasource.password ssh-passphrase passwords
Cookie Set-Cookie cookie set_cookie setCookie session_cookie
token access_token accessToken AccessToken access-token oauth.access_token refresh_token refreshToken id_token idToken
auth_token github_token GITHUB_TOKEN HF_TOKEN hfToken bot_token botToken slack-bot-token azure_ad_token session_token
access_tokens X-Amz-Security-Token accesstoken clientsecret
client_secret clientSecret secret secrets webhookSecret secret_key secretKey SECRET-KEY aws_secret_access_key
aws_access_key_id private_key privateKey ssh_key signing_key accessKey
credentials credential creds vertex_credentials awsCredentials
"""

NO_SECRETS = """
max_tokens max_token maxTokens prompt_tokens promptTokens completion_tokens total_tokens token_count tokenCount
num_tokens num_token n_token tokens input_tokens cached_tokens reasoning_tokens max_completion_tokens maxOutputTokens
time_to_first_token cost_per_token eos_token pad_token stop_token next_page_token pageToken nextToken token_ids
tokenizer tokenization tokenized secretary secretariat passage passages pass password_hint passenger
author authors authority authored_by auth_type key keys keyword keywords monkey api_base public_key primary_key
cache_key question answer prompt cookies_eaten cookie_policy n credit compass jwt_algorithm
"""


@pytest.mark.parametrize("key", SECRETS.split())
def test_names_of_secrets(key):
    """Whole key names, in whatever case, with whatever between their words."""
    assert is_secret(key)
    assert {key: MASK} == plain({key: SECRET}, secrets=True)


@pytest.mark.parametrize("key", NO_SECRETS.split())
def test_names_of_no_secrets(key):
    """Counts of tokens, and the ordinary names of fields, stay."""
    assert not is_secret(key)
    assert {key: "shown"} == plain({key: "shown"}, secrets=True)


# --- what holds them --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Client:
    """A dataclass."""

    clientSecret: str  # noqa: N815 - a name in camel case
    retries: int = 3


class Model(pydantic.BaseModel):
    """A pydantic model."""

    privateKey: str  # noqa: N815 - a name in camel case
    client: object = None


class Login(NamedTuple):
    """A named tuple."""

    user: str
    password: str
    headers: object = None


class Headers(collections.abc.Mapping):
    """A mapping of its own, that must not be read: reading it is its own code."""

    def __init__(self, items):
        self._items = items

    def __getitem__(self, key):
        raise AssertionError("read")

    __iter__ = __len__ = keys = items = __getitem__

    def __repr__(self):
        return f"Headers({self._items!r})"


class Handmade:
    """An object whose text tells everything."""

    def __repr__(self):
        return f"Handmade(url='http://x', api_key={SECRET!r}, max_tokens=5)"


class Settings(types.SimpleNamespace):
    """A namespace that counts who looks at it."""

    looked = 0

    def __getattribute__(self, name):
        type(self).looked += name != "__class__"
        return super().__getattribute__(name)


HOLDERS = {
    "example": dspy.Example(api_key=SECRET, question="why"),
    "prediction": dspy.Prediction(api_key=SECRET, question="why"),
    "namespace": types.SimpleNamespace(api_key=SECRET, question="why"),
    "proxy": types.MappingProxyType({"api_key": SECRET, "question": "why"}),
    "user dict": collections.UserDict(api_key=SECRET, question="why"),
    "ordered": collections.OrderedDict(api_key=SECRET, question="why"),
}


@pytest.mark.parametrize("secrets", [True, False])
@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_what_holds_a_secret_is_shown_as_a_mapping_without_it(holder, secrets):
    """Tool arguments; and what is below ``headers`` in any value."""
    value = {"it": holder} if secrets else {"headers": holder}

    assert [{"api_key": MASK, "question": "why"}] == list(plain(value, secrets=secrets).values())


@pytest.mark.parametrize(
    "holder",
    [
        dspy.Example(question="why", max_tokens=5),
        dspy.Prediction(answer="so"),
        types.SimpleNamespace(tokenizer="t"),
        types.MappingProxyType({"author": "a"}),
        collections.UserDict(passage="p"),
        collections.deque(["token"]),
        Headers({"Accept": "x"}),
    ],
)
def test_what_holds_none_is_the_text_that_mlflow_stores(holder):
    """As it was: its text."""
    assert str(holder) == plain(holder, secrets=True)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ([("Authorization", SECRET), ("Accept", "*")], [["Authorization", MASK], ["Accept", "*"]]),
        ((["X-Api-Key", SECRET],), [["X-Api-Key", MASK]]),
        ([(b"authorization", SECRET.encode())], [["b'authorization'", MASK]]),
        ([("password", None)], [["password", None]]),
        ([("token", 1, 2), ("question", "password")], [["token", 1, 2], ["question", "password"]]),
        (["password", "question"], ["password", "question"]),
        ({"a": {b"cookie": SECRET}}, {"a": {"b'cookie'": MASK}}),
        ([{"name": "Authorization", "value": SECRET}], [{"name": "Authorization", "value": MASK}]),
        ({"value": [SECRET], "key": b"x-api-key"}, {"value": MASK, "key": "b'x-api-key'"}),
        ({"name": "Accept", "value": "*"}, {"name": "Accept", "value": "*"}),
        ({"name": "password", "value": None}, {"name": "password", "value": None}),
        ({"a": 1}.items(), "dict_items([('a', 1)])"),
        ({"pwd": SECRET}.items(), [["pwd", MASK]]),
        ({("pwd", SECRET)}, [["pwd", MASK]]),
        (collections.deque([{"pwd": SECRET}]), [{"pwd": MASK}]),
        (Login("me", SECRET), ["me", MASK, None]),
        (Client(SECRET), {"clientSecret": MASK, "retries": 3}),
        (Model(privateKey=SECRET, client=Client(SECRET)), {"privateKey": MASK, "client": "..."}),
        (dspy.Example(nested=[dspy.Example(pwd=SECRET)]), {"nested": [{"pwd": MASK}]}),
    ],
)
def test_pairs_and_records(value, shown):
    """Pairs of a name and its value, in lists and the like; fields of records."""
    found = plain(value, secrets=True)
    if isinstance(found, dict) and shown.get("client") == "...":  # how deep a model is dumped is pydantic's
        found = {**found, "client": "..."}

    assert shown == found
    assert SECRET not in stored(value)


def test_headers_in_any_value():
    """Below ``headers``, everywhere: pairs, and in records."""
    pairs = [("Authorization", SECRET)]
    for value in ({"headers": pairs}, dspy.Example(headers=pairs), Login("me", "shown", pairs)):
        assert SECRET not in stored(value, secrets=False)

    assert ["me", "shown", [["Authorization", MASK]]] == plain(Login("me", "shown", pairs))


@pytest.mark.parametrize(
    "value",
    [
        Headers({"Authorization": f"Bearer {SECRET}"}),
        Handmade(),
        functools.partial(print, api_key=SECRET),
        collections.ChainMap({"githubToken": SECRET}),
        [Handmade()],
        dspy.Example(inside=Handmade()),
    ],
)
def test_secrets_in_the_text_of_objects(value):
    """What is stored as its text, and shows a secret behind its name there."""
    text = stored(value)

    assert SECRET not in text
    assert MASK in text


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Client(url='u', api_key='s, t', n=5)", f"Client(url='u', api_key={MASK}, n=5)"),
        ("Client(api_key=s t, n=5)", f"Client(api_key={MASK}, n=5)"),
        ("{'credentials': {'a': [1, ')']}, 'b': 2}", f"{{'credentials': {MASK}, 'b': 2}}"),
        ('[("Authorization", "Bearer x"), ("a", "b")]', f'[("Authorization", {MASK}), ("a", "b")]'),
        (r"[(b'cookie', b'it\'s')]", f"[(b'cookie', {MASK})]"),
        ("['password', 'question', 'answer']", "['password', 'question', 'answer']"),
        ("Host: x\nAuthorization: Bearer a, b\nAccept: *", f"Host: x\nAuthorization: {MASK}\nAccept: *"),
        ("http://x?api_key=abc&n=1", f"http://x?api_key={MASK}&n=1"),
        ("Client(api_key=None, token_count=5)", "Client(api_key=None, token_count=5)"),
        ("Client(token='unended", f"Client(token={MASK}"),
        ("token == 5", "token == 5"),
        ("nothing of the kind", "nothing of the kind"),
    ],
)
def test_masks_in_texts(text, masked):
    """From the name to the end of its value; the rest stays."""
    assert masked == mask_in_text(text)


def test_texts_of_the_programs_own_are_not_searched():
    """A text is what people come to read."""
    assert ["api_key='x'"] == plain(["api_key='x'"], secrets=True)


def test_no_code_of_an_objects_runs_for_it():
    """A namespace's own ``__getattribute__``, a mapping's own methods: as often as for its text alone."""
    value = Settings(api_key=SECRET)
    str(value)
    for_its_text, Settings.looked = Settings.looked, 0

    assert {"api_key": MASK} == plain(value, secrets=True)
    assert Settings.looked <= for_its_text


def test_circles_through_objects():
    """An object inside itself."""
    value = types.SimpleNamespace(api_key=SECRET)
    value.me = [value]

    assert {"api_key": MASK, "me": ["[circular]"]} == plain(value, secrets=True)


def test_deep_objects_take_no_longer_than_they_are_deep():
    """Each is looked through once, not once for each that is around it."""
    looked = []

    class Counted:
        def __repr__(self):
            looked.append(self)
            return "text"

    value = types.SimpleNamespace(inside=Counted())
    for _ in range(50):
        value = types.SimpleNamespace(inside=value)
    plain({"it": value, "pwd": SECRET}, secrets=True)

    assert len(looked) <= 2


def test_redact_sees_what_is_stored_of_an_object():
    """The object, and what stands for it."""
    value = dspy.Example(pwd=SECRET, email="a@b.c")

    assert {"pwd": MASK, "email": "x"} == plain(
        value, secrets=True, redact=lambda each: "x" if each == "a@b.c" else each
    )


VALUES = st.recursive(
    st.text(max_size=10) | st.sampled_from(["password", "Authorization", SECRET]) | st.none() | st.binary(max_size=5),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from(["apiKey", "headers", "question", "x"]), inner, max_size=3),
        st.builds(dspy.Example, password=inner, question=inner),
        st.builds(types.SimpleNamespace, token=inner, tokens=inner),
        st.builds(Login, inner, inner, inner),
        st.builds(collections.UserDict, st.dictionaries(st.just("cookie"), inner)),
    ),
    max_leaves=12,
)


@given(VALUES, st.booleans())
def test_nothing_is_changed_and_nothing_raises(value, secrets):
    """Whatever holds whatever."""
    before = copy.deepcopy(value)
    stored(value, secrets=secrets).encode()

    assert before == value


@given(VALUES)
def test_no_secret_behind_its_name_is_stored(value):
    """However deep, and in whatever it is inside."""

    def hide(secret):
        return {"pairs": [("Authorization", secret), value], "object": dspy.Example(it=[value], pwd=secret)}

    text = stored(hide("a-secret-of-its-own"))

    assert "a-secret-of-its-own" not in text


@pytest.mark.parametrize(
    "text", ["(" * 50_000, "'" * 50_001, "token='" * 10_000, "key" + "a" * 200_000, "('token', " * 10_000]
)
def test_long_texts_take_no_long_time(text):
    """The search is linear, or nearly so: no text of an object holds the program up."""
    began = time.thread_time()
    mask_in_text(text)

    assert time.thread_time() - began < 5  # seconds; milliseconds where it is linear, minutes where it is not


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


def test_long_keys_are_not_kept():
    """A dict key of a program may be large, and is nobody's secret."""
    key = "x" * 100_000 + "_password"
    before = sys.getrefcount(key)
    assert not is_secret(key)

    assert before == sys.getrefcount(key)
