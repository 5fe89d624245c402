"""Names of secrets, and masking of the values behind such names in the text of objects."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

MASK = "[masked]"

_NAMES = frozenset({
    "access_key", "access_token", "account_key", "api_key", "auth", "auth_key", "auth_token", "authorization",
    "aws_access_key_id", "basic_auth", "bearer", "client_secret", "conn_str", "connection_string", "cookie",
    "cookies", "credential", "credentials", "creds", "encryption_key", "http_auth", "id_token", "jwt",
    "master_key", "passcode", "passphrase", "passwd", "password", "private_key", "proxy_auth",
    "proxy_authorization", "pwd", "refresh_token", "secret", "secret_key", "session_token", "set_cookie",
    "signing_key", "ssh_key", "subscription_key", "token", "x_api_key",
})  # fmt: skip
# Cookies; "session_id" is MLflow's, and no secret.
_ONE_WORD = frozenset({
    "sessionid", "jsessionid", "phpsessid", "csrftoken", "xsrftoken", "csrfmiddlewaretoken", "apitoken",
})  # fmt: skip
_PLURALS = frozenset({
    "access_keys", "access_tokens", "api_keys", "auth_tokens", "bearer_tokens", "passwords", "private_keys",
    "refresh_tokens", "secret_keys", "secrets", "session_tokens",
})  # fmt: skip
_WHOLE = _NAMES | _PLURALS
_RUN_TOGETHER = frozenset(name.replace("_", "") for name in _WHOLE)  # "accesstoken", "setcookie"
_ENDINGS = tuple(
    f"_{ending}"
    for ending in (
        *("access_key", "api_key", "api_keys", "apikey", "encryption_key", "private_key", "secret_key"),
        *("account_key", "auth_key", "connection_string", "conn_str", "master_key", "passcode", "service_role_key"),
        *("signing_key", "ssh_key", "subscription_key", "authorization", "cookie", "credential", "credentials"),
        *("jwt", "passphrase", "passwd", "password", "passwords", "pwd", "secret", "secrets", "token"),
        *("access_tokens", "auth_tokens", "refresh_tokens"),
    )
)
# Before "pat" or "pass", these make the name of a personal access token, or of a password.
_OWNERS = {
    "pat": frozenset({"ado", "azure", "databricks", "devops", "github", "gitlab", "jira", "snowflake"}),
    "pass": frozenset({
        "admin", "database", "db", "email", "ftp", "mail", "mongo", "mysql", "pg", "postgres", "proxy", "rabbitmq",
        "redis", "root", "smtp", "ssh", "sudo", "user",
    }),
}  # fmt: skip
# Before "token", these make the name of a number, of a piece of text, or of a place in a list. "tokens" is a number.
_TOKENS_THAT_ARE_NONE = frozenset({
    "audio", "average", "avg", "bos", "budget", "cached", "cancellation", "cls", "completion", "continuation", "cost",
    "count", "current", "each", "end", "eos", "first", "image", "input", "last", "latency", "mask", "max", "mean",
    "min", "n", "new", "next", "no", "num", "number", "output", "pad", "page", "per", "prefix", "previous", "price",
    "prompt", "reasoning", "remaining", "sep", "special", "start", "stop", "sub", "suffix", "text", "thinking", "total",
    "unk", "used", "vision", "word",
})  # fmt: skip
LONGEST_NAME = 64  # characters; what is longer is no name

_HINTS = (
    "key",
    "token",
    "secret",
    "pass",
    "pwd",
    "auth",
    "cookie",
    "cred",
    "bearer",
    "jwt",
    "pat",
    "sessid",
    "sessionid",
    "conn",
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NO_WORD = re.compile(r"[^A-Za-z0-9]+")


def is_secret(key: str) -> bool:
    """Return whether ``key`` as a whole names a secret, in any case and with any separators between its words.

    ``max_tokens`` does not.
    """
    return len(key) <= LONGEST_NAME and _names_secret(key)


@functools.lru_cache(maxsize=4096)  # of short keys: longer ones are the program's data, and may be large
def _names_secret(key: str) -> bool:
    if not may_name_a_secret(key):
        return False
    name = _NO_WORD.sub("_", _HUMP.sub("_", key)).strip("_").lower()
    if name in _WHOLE or name in _ONE_WORD or name.replace("_", "") in _RUN_TOGETHER:
        return True
    before, _, last = name.rpartition("_")
    before = before.rpartition("_")[2]
    if before in _OWNERS.get(last, ()):
        return True
    if not name.endswith(_ENDINGS):
        return False
    return last != "token" or before not in _TOKENS_THAT_ARE_NONE


def may_name_a_secret(text: str) -> bool:
    """Return whether a text has a word in it without which none names a secret."""
    lowered = text.lower()
    return any(hint in lowered for hint in _HINTS)


def names_secret(name: object) -> bool:
    """Return whether the first of a pair names a secret. It need not be a text: header names may be bytes (ASGI)."""
    if type(name) is bytes:
        return len(name) <= LONGEST_NAME and is_secret(name.decode("latin-1"))
    return type(name) is str and is_secret(name)


# --- in the text of objects ---------------------------------------------------------------------------------------

# 'name': and ('name', as dicts and pairs are shown; name= as in the text of most objects; a line of headers.
_NAMED = re.compile(
    r"""(?P<opening>[(\[]\s{0,64})?b?(?P<quote>['"])(?P<quoted>[^'"\\\n]{1,64})(?P=quote)\s{0,64}(?P<mark>[:,])\s{0,64}"""
    r"""|(?<![\w.\-])(?P<bare>[A-Za-z_][\w.\-]{0,63})=(?!=)"""
    r"""|^[ \t]{0,64}(?P<header>[A-Za-z][\w\-]{0,63}):[ \t]{1,64}""",
    re.MULTILINE,
)
_LONGEST_NAMED = 512  # characters; what _NAMED finds is shorter
_CHUNK = 16_384  # characters that are searched while other threads wait
_SIGN = re.compile(r"""['"()\[\]{},;&\n\\]""")
_QUOTED_BY = re.compile(r"""(?:^|\W)[bBrRfFuU]{0,2}\Z""")
_AFTER_PAIR = re.compile(r"""\s*(?:,\s*)?[)\]]""")


def mask_in_text(text: str) -> str:
    """Mask the values of named secrets in the text of an object, as far as they can be told apart.

    Linear in the length of the text: what a value has been looked for in is not looked at again.

    Args:
        text: What ``str`` made of an object, such as ``Client(url='http://x', api_key='sk-1')``.
    """
    if not may_name_a_secret(text):
        return text
    parts: list[str] = []
    done = looked = 0
    for found in _named(text):
        if found.start() < done or not is_secret(found["quoted"] or found["bare"] or found["header"]):
            continue
        begin = found.end()
        if found["mark"] == ",":
            if not found["opening"] or begin < looked:
                continue  # one of several texts in a row
            end, looked = _end_of_second(text, begin)
            if end is None:
                continue
        else:
            end = _end_of_line(text, begin) if found["header"] else _end_of_value(text, begin)
        if end > begin and text[begin:end] != "None":
            parts += (text[done:begin], MASK)
            done = end
    return "".join((*parts, text[done:])) if parts else text


def _named(text: str) -> Iterator[re.Match[str]]:
    """Candidates for names, searched piece by piece, so that other threads go on between."""
    done = 0
    for begin in range(0, len(text), _CHUNK):
        end = begin + _CHUNK
        for found in _NAMED.finditer(text, max(begin, done), min(end + _LONGEST_NAMED, len(text))):
            if found.start() >= end:
                break
            done = found.end()
            yield found


def _end_of_line(text: str, begin: int) -> int:
    end = text.find("\n", begin)
    return len(text) if end < 0 else end


def _end_of_second(text: str, begin: int) -> tuple[int | None, int]:
    """End of the second text of a pair, None where there is none, and the place up to which it was searched."""
    quote = begin + text.startswith("b", begin)
    if text[quote : quote + 1] not in {"'", '"'}:
        return None, begin
    end = _end_of_quoted(text, quote)
    return (end if _AFTER_PAIR.match(text, end) or end == len(text) else None), end


def _end_of_quoted(text: str, begin: int) -> int:
    """Place behind the quote that closes the one at ``begin``; the end where none does."""
    quote, place = text[begin], begin
    while (found := _SIGN.search(text, place + 1)) is not None:
        place = found.start()
        if text[place] == "\\":
            place += 1
        elif text[place] == quote:
            return place + 1
    return len(text)


def _end_of_value(text: str, begin: int) -> int:
    depth, place = 0, begin
    while (found := _SIGN.search(text, place)) is not None:
        sign, place = found.group(), found.end()
        if sign in "([{":
            depth += 1
        elif sign in "'\"":
            if _QUOTED_BY.search(text[max(begin, found.start() - 3) : found.start()]):  # not the apostrophe of a word
                place = _end_of_quoted(text, found.start())
        elif depth and sign in ")]}":
            depth -= 1
        elif not depth and sign != "\\":
            return found.start()
    return len(text)
