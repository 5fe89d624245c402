"""Says which names are those of secrets, and hides what stands behind such names in the text of objects."""

from __future__ import annotations

import functools
import re

MASK = "[masked]"

_NAMES = frozenset({
    "access_key", "access_token", "api_key", "auth", "auth_token", "authorization", "aws_access_key_id", "basic_auth",
    "bearer", "client_secret", "cookie", "cookies", "credential", "credentials", "creds", "encryption_key", "http_auth",
    "id_token", "jwt", "passphrase", "passwd", "password", "private_key", "proxy_auth", "proxy_authorization", "pwd",
    "refresh_token", "secret", "secret_key", "session_token", "set_cookie", "signing_key", "ssh_key",
    "subscription_key", "token", "x_api_key",
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
        *("signing_key", "ssh_key", "subscription_key", "authorization", "cookie", "credential", "credentials"),
        *("jwt", "passphrase", "passwd", "password", "passwords", "pwd", "secret", "secrets", "token"),
        *("access_tokens", "auth_tokens", "refresh_tokens"),
    )
)
# Before "token", these make the name of a number, of a piece of text, or of a place in a list. "tokens" is a number.
_TOKENS_THAT_ARE_NONE = frozenset({
    "audio", "average", "avg", "bos", "budget", "cached", "cancellation", "cls", "completion", "continuation", "cost",
    "count", "current", "each", "end", "eos", "first", "image", "input", "last", "latency", "mask", "max", "mean",
    "min", "n", "new", "next", "no", "num", "number", "output", "pad", "page", "per", "prefix", "previous", "price",
    "prompt", "reasoning", "remaining", "sep", "special", "start", "stop", "sub", "suffix", "text", "thinking", "total",
    "unk", "used", "vision", "word",
})  # fmt: skip
_LONGEST = 64  # characters; what is longer is no name

_HINTS = ("key", "token", "secret", "pass", "pwd", "auth", "cookie", "cred", "bearer", "jwt")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NO_WORD = re.compile(r"[^A-Za-z0-9]+")


def is_secret(key: str) -> bool:
    """Whether ``key`` as a whole names a secret, in whatever case and with whatever between its words.

    ``max_tokens`` does not.
    """
    return len(key) <= _LONGEST and _names_secret(key)


@functools.lru_cache(maxsize=4096)  # of short keys: longer ones are the program's data, and may be large
def _names_secret(key: str) -> bool:
    if not _may_name_a_secret(key):
        return False
    name = _NO_WORD.sub("_", _HUMP.sub("_", key)).strip("_").lower()
    if name in _WHOLE or name.replace("_", "") in _RUN_TOGETHER:
        return True
    if not name.endswith(_ENDINGS):
        return False
    *_, before, last = name.split("_")
    return last != "token" or before not in _TOKENS_THAT_ARE_NONE


def _may_name_a_secret(text: str) -> bool:
    lowered = text.lower()
    return any(hint in lowered for hint in _HINTS)


def names_secret(name: object) -> bool:
    """The same for what need not be a text: the first of a pair. Header names may be bytes (ASGI)."""
    if type(name) is bytes:
        return len(name) <= _LONGEST and is_secret(name.decode("latin-1"))
    return type(name) is str and is_secret(name)


# --- in the text of objects ---------------------------------------------------------------------------------------

# 'name': and ('name', as dicts and pairs are shown; name= as in the text of most objects; a line of headers.
_NAMED = re.compile(
    r"""(?P<opening>[(\[]\s*)?b?(?P<quote>['"])(?P<quoted>[^'"\\\n]{1,64})(?P=quote)\s*(?P<mark>[:,])\s*"""
    r"""|(?<![\w.\-])(?P<bare>[A-Za-z_][\w.\-]{0,63})=(?!=)"""
    r"""|^[ \t]*(?P<header>[A-Za-z][\w\-]{0,63}):[ \t]+""",
    re.MULTILINE,
)
_PIECE = re.compile(
    r"""(?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
    r"""|(?P<opening>[(\[{])|(?P<closing>[)\]}])|(?P<end>[,;&\n])|[^'"()\[\]{},;&\n]+|['"]""",
    re.DOTALL,
)
_SECOND = re.compile(r"""(?P<value>b?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"))\s*,?\s*[)\]]""", re.DOTALL)  # of a pair


def mask_in_text(text: str) -> str:
    """The text of an object without the values of what it names as secrets, so far as they can be told apart.

    Args:
        text: What ``str`` made of an object, such as ``Client(url='http://x', api_key='sk-1')``.
    """
    if not _may_name_a_secret(text):
        return text
    parts: list[str] = []
    done = 0
    for found in _NAMED.finditer(text):
        if found.start() < done or not is_secret(found["quoted"] or found["bare"] or found["header"]):
            continue
        begin = found.end()
        if found["mark"] == ",":
            second = _SECOND.match(text, begin) if found["opening"] else None
            if second is None:
                continue  # one of several texts in a row
            end = second.end("value")
        else:
            end = _end_of_line(text, begin) if found["header"] else _end_of_value(text, begin)
        if end > begin and text[begin:end] != "None":
            parts += (text[done:begin], MASK)
            done = end
    return "".join((*parts, text[done:])) if parts else text


def _end_of_line(text: str, begin: int) -> int:
    end = text.find("\n", begin)
    return len(text) if end < 0 else end


def _end_of_value(text: str, begin: int) -> int:
    depth = 0
    for piece in _PIECE.finditer(text, begin):
        if piece["opening"]:
            depth += 1
        elif depth and piece["closing"]:
            depth -= 1
        elif not depth and (piece["closing"] or piece["end"]):
            return piece.start()
    return len(text)
