# ruff: noqa: E501, S311, SIM905, C901 - lists of texts, made at random, several in a line
"""Texts with secrets and texts that only look so, made anew the same way each time; nobody's secrets."""

import base64
import hashlib
import json
import random
import string
import uuid

_RANDOM = random.Random(13)
HEX, UPPER, ALNUM = "0123456789abcdef", string.ascii_uppercase + "234567", string.ascii_letters + string.digits
URL = ALNUM + "-_"


def some(characters, count):
    """So many characters, the last of which is no separator."""
    text = "".join(_RANDOM.choice(characters) for _ in range(count))
    return text[:-1] + "x" if text[-1] in "-_" and "x" in characters else text


def jwt():
    """A token with a header, claims and a signature."""
    parts = [{"alg": "HS256", "typ": "JWT"}, {"sub": some(ALNUM, 8), "iat": _RANDOM.randrange(10**9)}]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*encoded, some(URL, 43)])


def tokens():
    """One token of each kind that is known by its beginning."""
    yield from (
        f"sk-proj-{some(URL, 48)}", f"sk-svcacct-{some(URL, 60)}", f"sk-{some(ALNUM, 48)}", f"sk-{some(HEX, 32)}",
        f"sk-ant-api03-{some(URL, 93)}AA", f"sk-or-v1-{some(HEX, 64)}", f"sk-lf-{uuid.UUID(int=_RANDOM.getrandbits(128))}",
        f"hf_{some(string.ascii_letters, 34)}", f"gsk_{some(ALNUM, 52)}", f"pplx-{some(ALNUM, 48)}", f"xai-{some(ALNUM, 80)}",
        f"nvapi-{some(URL, 64)}", f"r8_{some(ALNUM, 37)}", f"tvly-{some(ALNUM, 32)}", f"pcsk_{some(ALNUM + '_', 70)}",
        f"lsv2_pt_{some(HEX, 32)}_{some(HEX, 10)}", f"dapi{some(HEX, 32)}", f"dapi{some(HEX, 32)}-2", f"AKIA{some(UPPER, 16)}",
        f"ASIA{some(UPPER, 16)}", f"AIza{some(ALNUM, 35)}", f"ya29.{some(URL, 60)}", f"GOCSPX-{some(ALNUM, 28)}",
        f"dop_v1_{some(HEX, 64)}", f"hvs.{some(ALNUM, 90)}", f"pul-{some(HEX, 40)}", f"dp.pt.{some(ALNUM, 43)}",
        f"ghp_{some(ALNUM, 36)}", f"gho_{some(ALNUM, 36)}", f"ghs_{some(ALNUM, 36)}", f"github_pat_{some(ALNUM, 22)}_{some(ALNUM, 59)}",
        f"glpat-{some(URL, 20)}", f"npm_{some(ALNUM, 36)}", f"pypi-AgEIcHlwaS5vcmc{some(URL, 60)}", f"rubygems_{some(HEX, 48)}",
        f"dckr_pat_{some(URL, 27)}", f"ATATT3{some(URL, 186)}", f"xoxb-{some(string.digits, 12)}-{some(string.digits, 12)}-{some(ALNUM, 24)}",
        f"xapp-1-{some(UPPER, 11)}-{some(string.digits, 13)}-{some(HEX, 64)}", f"SG.{some(URL, 22)}.{some(URL, 43)}",
        f"secret_{some(ALNUM, 43)}", f"ntn_{some(ALNUM, 46)}", f"lin_api_{some(ALNUM, 40)}", f"key-{some(HEX, 32)}",
        f"sk_live_{some(ALNUM, 24)}", f"rk_test_{some(ALNUM, 24)}", f"whsec_{some(ALNUM, 32)}", f"sq0atp-{some(ALNUM, 22)}",
        f"shpat_{some(HEX, 32)}", f"NRAK-{some(UPPER, 27)}", f"sntrys_{some(ALNUM, 60)}", f"glsa_{some(ALNUM, 32)}_{some(HEX, 8)}",
        f"PMAK-{some(HEX, 24)}-{some(HEX, 34)}", f"figd_{some(URL, 40)}", f"AGE-SECRET-KEY-1{some(UPPER, 58)}", jwt(), jwt(),
    )  # fmt: skip


AROUND = [
    "{}",
    "The key is {}.",
    "use {} for now, please",
    "'{}'",
    'He wrote: "{}"',
    "Incorrect API key provided: {}. You can find your API key at https://example.org/keys",
    '{{"note": "it is {}", "n": 1}}',
    "curl https://example.org/{}/getMe",
    "ValueError: call failed (key={})",
    "line one\n\t{}\nline three",
    "[{}]",
    "日本語 {} のキー",
    "credentials:{}",
]

NAMES = """
api_key API_KEY apiKey x-api-key OPENAI_API_KEY password DB_PASSWORD dbPassword passwd pwd secret client_secret
clientSecret access_token refresh_token auth_token AWS_SECRET_ACCESS_KEY private_key account_key AccountKey
connection_string github_pat passcode encryption_key signing_key session_token sessionid
""".split()
FORMS = [
    "{name}={value}",
    "export {name}={value}",
    "--{name}={value} --verbose",
    "--{name} {value} --verbose",
    "https://example.org/x?{name}={value}&page=2",
    "https://example.org/x?page=2&{name}={value}",
    '{{"{name}": "{value}", "max_tokens": 5}}',
    "{{'{name}': '{value}'}}",
    '{name} = "{value}"',
    "Client(url='http://x', {name}='{value}', retries=3)",
    "{name}: {value}",
    'body={{\\"{name}\\": \\"{value}\\"}}',
    "{name}='{value}'",
    "  {name}: '{value}'",
    "Server=tcp:x;{name}={value};Encrypt=true",
    '"{name}" => "{value}"',
]
HEADERS = [
    ("Authorization: Bearer {}", 32),
    ("authorization: bearer {}", 20),
    ("Proxy-Authorization: Token {}", 24),
    ("'Authorization': 'Bearer {}'", 40),
    ('-H "Authorization: Bearer {}" https://x', 32),
    ("{{'headers': {{'Authorization': 'Bearer {}'}}}}", 32),
    ("Cookie: sid={}; theme=dark", 24),
    ("Set-Cookie: session={}; Path=/; HttpOnly", 24),
    ("X-Api-Key: {}", 32),
    ("x-goog-api-key: {}", 32),
    ("Bearer {}", 40),
    ("he sent Bearer {} by mail", 24),
    ("https://x.blob.core.windows.net/c?sv=2024&sig={}%3D", 43),
    ("https://b.s3.amazonaws.com/k?X-Amz-Signature={}", 64),
    ("https://hooks.slack.com/services/T0123/B0123/{}", 24),
    ("https://discord.com/api/webhooks/123456/{}", 60),
]
ADDRESSES = [
    "postgres://ada:{}@db.example.org:5432/app",
    "postgresql+psycopg2://ada:{}@localhost/app",
    "redis://:{}@cache:6379/0",
    "amqp://guest:{}@rabbit//",
    "mongodb+srv://ada:{}@cluster0.example.net/?retryWrites=true",
    "https://ada:{}@example.org/repo.git",
    "fatal: could not read from 'https://oauth2:{}@gitlab.example.org/a/b.git'",
    "curl -u ada:{} https://example.org",
]


def private_key(kind="RSA "):
    """A key in PEM."""
    lines = "\n".join(some(ALNUM + "+/", 64) for _ in range(8))
    return f"-----BEGIN {kind}PRIVATE KEY-----\n{lines}\n-----END {kind}PRIVATE KEY-----"


def true_examples():
    """Texts, each with the secret in it that must not be stored."""
    for token in tokens():
        yield from ((form.format(token), token) for form in AROUND)
    for name in NAMES:
        for form in FORMS:
            value = some(ALNUM, _RANDOM.choice([10, 16, 24, 40]))[:-2] + "4x"
            yield form.format(name=name, value=value), value
    for form, size in HEADERS:
        for _ in range(4):
            value = some(ALNUM, size - 2) + "7x"
            yield form.format(value), value
    for form in ADDRESSES:
        for value in ("hunter2", "p@ss1word", "correct-horse", some(ALNUM, 24), "s3cr3t!$&x"):
            yield form.format(value), value
    for user, password in (("ada", "hunter2"), ("aladdin", "opensesame"), ("svc", some(ALNUM, 30))):
        value = base64.b64encode(f"{user}:{password}".encode()).decode()
        yield f"Authorization: Basic {value}", value
        yield f"sent Basic {value} to it", value
    for kind in ("", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED "):
        key = private_key(kind)
        body = key.split("\n")[3]
        yield f"the file holds\n{key}\nand no more", body
        yield json.dumps({"file": key}), body
        yield repr(key), body
        yield key[: len(key) // 2], body
    for value in ("hunter2", "1q2w3e", "letmein1", "Tr0ub4dor&3"):
        yield from ((f"password={value}", value), (f"password: {value}", value), (f'"password": "{value}"', value))


PROMPTS = [
    "Your input fields are:\n1. `question` (str): the question\n2. `token` (str): one token\n\n[[ ## question ## ]]\n{question}",
    "Your output fields are:\n1. `password_strength` (Literal['weak', 'strong']):\n2. `secret` (bool): whether it is one",
    "Respond with the corresponding output fields, starting with the field `[[ ## answer ## ]]`.",
    "In adhering to this structure, your objective is: Given the fields `question`, produce the fields `answer`.",
    '{"type": "object", "properties": {"password": {"type": "string"}, "api_key": {"type": "string", "minLength": 8}}}',
    '{"required": ["password", "token"], "title": "Login", "description": "auth: none"}',
    "Explain how a bearer token is sent in the Authorization header.",
    "What is the secret of a good password: length, or symbols?",
    "Summarize: the bearer of this letter is authorized to enter. Key: see below.",
    "Basic authentication is simple; Basic training lasts ten weeks.",
    "Token: a unit of text. Secret: something kept hidden. Password: a word that lets you pass.",
    "The key to success: practice. Author: Jane Austen. Passage: 12 of 40.",
    "Passwords must have at least 8 characters, e.g. one digit and one symbol.",
    "How do I rotate my API key? Your API key: see the settings page.",
    "Set OPENAI_API_KEY to your key. export OPENAI_API_KEY=your-key-here",
    "OPENAI_API_KEY=<your key>", "API_KEY=${API_KEY}", "API_KEY=$API_KEY make test", "password=********", "token=...",
    'api_key="YOUR_API_KEY"', "api_key='{api_key}'", "password=%s", "secret=[masked]", "token=None", "auth=False",
    "AUTH_TOKEN=", "password: ", "password:\n  type: string", "secret: true", "token: null", "auth: basic",
    '"token": " the", "logprob": -0.31', '"token": "hello", "logprob": -0.1, "bytes": [104]', '"tokens": ["a", "b"]',
    '"top_logprobs": [{"token": "World", "logprob": -1.2}]', '"finish_reason": "stop", "total_tokens": 150',
    "max_tokens=500, temperature=0.7, top_p=1", "usage: prompt_tokens=12, completion_tokens=34", "num_tokens: 12345",
    "eos_token='</s>', pad_token='<pad>', bos_token=None", "tokenizer=GPT2Tokenizer(vocab_size=50257)",
    "primary_key: id, foreign_key: user_id", "key=lambda item: item[1]", "sorted(rows, key=len)", "cache_key=question",
    "https://example.org/search?q=password+reset&page=2", "https://example.org/?page_token=abc", "mailto:ada@example.org",
    "ssh://git@github.com/owner/repo.git", "git@github.com:owner/repo.git", "https://user@example.org/path",
    "http://localhost:8080/v1/models", "see http://a:80/@user", "postgres://user:password@localhost/db", "redis://cache:6379/0",
    "postgresql://$USER:$PASSWORD@host/db", "https://<user>:<password>@host/", "12:30:45@noon", "ratio 3:4@2x",
    "The JWT header is base64; eyJ is how it begins.", "AKIA is the prefix of AWS keys.", "tokens begin with sk- or ghp_",
    "-----BEGIN CERTIFICATE-----\nMIIDdzCCAl+gAwIBAgIEAgAAuTANBgkqhkiG9w0BAQUFADBaMQswCQYDVQQGEwJJ\n-----END CERTIFICATE-----",
    "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE\n-----END PUBLIC KEY-----",
    "a PEM file begins with -----BEGIN PRIVATE KEY----- and some base64 follows, which nobody should paste here.",
    "Use --token to pass a token, --password to be asked for one.", "--token-limit 500 --max-tokens=20", "-u root", "ls -u a:b",
    "set-cookie parsing: see RFC 6265", "Cookie: none", "Authorization: required", "Authorization: see the docs, section 2",
    "CookieCutter template; cookies: chocolate, oat", "session_id=3f2504e0-4f89-41d3-9a0c-0305e82c3301", "session: 12",
]  # fmt: skip
CODE = [
    "def login(user: str, password: str, token: Token | None = None) -> Session:",
    "password = get_password(user)", "token = tokens[0]", "secret = os.environ['SECRET']", "api_key=os.getenv('API_KEY')",
    "client = Client(api_key=api_key, token=self.token)", "auth = HTTPBasicAuth(user, password)", "if token == other_token:",
    "self._password = password", "token: str = Field(default=...)", "credentials: Credentials", "assert secret is not None",
    "auth=auth, cookies=cookies, cert=cert", "headers = {'Authorization': f'Bearer {token}'}", "lm = dspy.LM('openai/gpt-4o', api_key=key)",
    "Authorization: Bearer ${{ secrets.GITHUB_TOKEN }}", "password: ${{ secrets.PASSWORD }}", "token: ${TOKEN}", "password=args.password",
    "access_token = response.json()['access_token']", "token = token.strip().lower()", "secret=secrets.token_hex(16)",
    "return {'token': token, 'user': user}", "const apiKey = process.env.API_KEY;", "let token = await getToken();",
    "private_key=load_pem(path)", "class TokenError(ValueError): pass", "for token in tokenizer.tokenize(text):", "token=token2",
    "password = Column(String(128), nullable=False)", "api_key: Optional[SecretStr] = None", "auth: AuthConfig = AuthConfig()",
    "import secrets; secrets.choice(words)", "PASSWORD_MIN_LENGTH = 12", "SECRET_KEY = config.secret_key", "token := next(it)",
    "some_very_long_function_name_that_goes_on_and_on(argument_number_one)", "sk-learn-contrib/imbalanced-learn-examples",
    "from sklearn.feature_extraction.text import TfidfVectorizer", "sk_learn_pipeline_with_many_steps_2024", "hf_hub_download(repo_id='x')",
    "npm_config_registry=https://registry.example.org", "key-value-store-implementation-notes", "xai-explainability-methods-for-tabular",
    "secret_santa_assignment_generator_for_large_groups", "AIza", "dapi", "dose-response-relationship-of-ibuprofen", "shpat_",
]  # fmt: skip
NAMES_OF_THINGS = [
    "meta-llama/Llama-3.3-70B-Instruct-Turbo", "openai/gpt-4o-mini-2024-07-18", "anthropic/claude-3-5-sonnet-20241022",
    "arn:aws:iam::123456789012:role/service-role/MyLambdaRole", "projects/my-project/locations/us-central1/endpoints/1234567890",
    "tr-0319c5a1c80a2a4a2e799221284a0634", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "chatcmpl-9aBcDeFgHiJkLmNoPqRsTuVwXyZ01",
    "call_abc123DEF456ghi789JKL012", "msg_01XFDUDYJgAACzvnptvVoYEL", "toolu_01A09q90qw90lq917835lq9", "req_7f3c2b1a9d8e4f5061728394a5b6c7d8",
    "asst_abc123abc123abc123abc123", "file-BK7bzQj3FfZFXr7DbL6xJwfo", "ft:gpt-3.5-turbo:my-org:custom:id", "run_1234567890abcdef1234567890abcdef",
    "2024-07-18T12:34:56.789012+00:00", "/usr/local/lib/python3.11/site-packages/dspy/predict/predict.py", "v1.2.3-rc.1+build.5114f85",
    "ISBN 978-3-16-148410-0", "DE89 3704 0044 0532 0130 00", "+49 30 901820", "4111-1111-1111-1111", "192.168.0.1:8080", "fe80::1ff:fe23:4567:890a",
    "com.example.very.long.package.name.SomeClass$InnerClass", "https://example.org/a/b/c-d-e-f-g-h?utm_source=news&utm_medium=mail#part",
]  # fmt: skip


def false_examples():
    """Texts that must stay as they are."""
    yield from PROMPTS + CODE + NAMES_OF_THINGS
    for _ in range(40):
        data = _RANDOM.randbytes(900)
        yield str(uuid.UUID(int=_RANDOM.getrandbits(128)))
        yield hashlib.md5(data).hexdigest()  # noqa: S324 - it is a hash
        yield f"commit {hashlib.sha1(data).hexdigest()}"  # noqa: S324 - it is a hash
        yield f"sha256:{hashlib.sha256(data).hexdigest()}"
        yield f"data:image/png;base64,{base64.b64encode(data).decode()}"
        yield base64.b64encode(data).decode()
        yield f"id={uuid.UUID(int=_RANDOM.getrandbits(128))}, trace_id={data[:16].hex()}"
        yield f'{{"digest": "{hashlib.sha256(data).hexdigest()}", "total_tokens": {data[0]}, "etag": "{data[:8].hex()}"}}'
        yield " ".join(_RANDOM.choice(WORDS) for _ in range(30)) + "."


WORDS = """
the a token tokens secret password key keys author passage of is was with bearer basic authority credit cookie for and
session private public access code compass passport monkey keyboard authentic secretary tokenizer passenger bypass in
""".split()
