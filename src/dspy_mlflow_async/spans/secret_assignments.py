"""Finds the values of secrets in texts by the names before them: ``NAME=value``, ``name: value``, JSON, headers.

A name alone does not make a secret of what follows, which may be code, prose, or a place to put one: precise rather
than greedy, since people come to read these texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from dspy_mlflow_async.spans.secret_names import is_secret
from dspy_mlflow_async.spans.secret_patterns import SHORTEST_TOKEN

SHORTEST = 8  # characters; what is shorter holds no secret that could be told apart
JUDGED = 256  # characters of a value by which it is judged
_LONGEST_QUOTED = 4096
_CHUNK = 16_384  # characters that one pass in C may take while other threads wait

Span = tuple[int, int]


def end_of(pattern: re.Pattern[bytes], data: bytes, begin: int) -> int:
    """End of a pattern's match at ``begin``; ``begin`` where it matches nothing there."""
    found = pattern.match(data, begin)
    return begin if found is None else found.end()


# The last letters of the names of secrets, as ``secrets.is_secret`` knows them, by how many they are. They stand before
# "=" or ":", with nothing, a quote, a blank, or both between. To look at the last one alone first is faster.
_LAST_LETTERS = (
    ("key", "eys", "pwd", "jwt", "pat", "sid", "nid", "_id", "-id", "sig", "uth"),
    ("pass", "_str", "-str", "nstr", "reds"),
    ("token", "okens", "ecret", "crets", "sword", "words", "asswd", "hrase", "scode", "ntial", "tials", "ookie"),
    ("okies", "earer"),
    ("zation", "string", "nature"),
)


def _behind(between: str) -> str:
    """A pattern for what stands behind such letters, ``between`` them and its own end."""
    last = "".join(sorted({letters[-1] for group in _LAST_LETTERS for letters in group}))
    endings = "|".join(f"(?<=(?:{'|'.join(group)}){between})" for group in _LAST_LETTERS)
    return f"(?<=[{last}]{between})(?:{endings})"


_BETWEEN = (".", r"[\"' \\].", r"[\"'\\][\"' ].")
_NAMED = re.compile(f"[=:](?:{'|'.join(map(_behind, _BETWEEN))})".encode())
_NAME_BACKWARDS = re.compile(rb"[ \t]{0,2}(?P<quote>[\"']\\{0,3})?(?P<name>[A-Za-z0-9_.\-]{1,64})")
_BLANKS = re.compile(rb"[ \t]{0,8}")
_QUOTE = re.compile(rb"[bBrRfFuU]{0,2}(?P<quote>\\{0,3}[\"'])")
_BARE = re.compile(rb"[^\s&;,'\"<>(){}\[\]|\\`]{1,256}")
_BARE_REST = re.compile(rb"[^\s&;,'\"<>(){}\[\]|\\`]*")
_LINE = re.compile(rb"[^\r\n\"'\\]{1,256}")
# Where a header ends: with its line, which may be written as an escape, or with the text that it stands in.
_END_OF_HEADER = re.compile(rb"[\r\n]|\\[rn]|[\"'](?=[ \t]{0,8}(?:[,})\]\r\n]|\Z))")
_HEADER_NAMES = frozenset({"authorization", "proxy-authorization", "cookie", "set-cookie"})
_SIGNATURES = frozenset({"sig", "x-amz-signature", "x-goog-signature"})
_NOT_ONE = frozenset(
    b"none null nil true false undefined str string int bytes bool any optional empty unset missing required redacted "
    b"masked hidden removed password secret token changeme test example dummy placeholder default".split()
)
PLACEHOLDER = re.compile(
    rb"[$<{%*]|\[?masked|x{3,}|\.{3}|your|my[-_]|os\.|env|insert|enter|replace|todo", re.IGNORECASE
)
_LETTER = re.compile(rb"[A-Za-z]")
_PATH = re.compile(rb"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*){0,20}\.?\Z")
_SURE = re.compile(
    r"pass(?:word|words|wd|phrase|code)?\Z|pwd\Z|key\Z|keys\Z|secret\Z|string\Z|conn[-_]?str\Z|pat\Z", re.IGNORECASE
)
_PASSWORD = re.compile(r"pass(?:word|words|wd|phrase|code)?\Z|pwd\Z", re.IGNORECASE)
_LEADS = (b"?", b"&", b";", b"--")
_MOST_QUOTES = 16  # in one value


def may_have_values(lowered: bytes) -> bool:
    """Return whether the end of a secret's name may stand before a sign, where that can be said in one short pass."""
    return len(lowered) > _CHUNK or _NAMED.search(lowered) is not None


def values(data: bytes, lowered: bytes) -> Iterator[Span]:
    """The places of the values of secrets.

    Args:
        data: The text, one byte a character; what is not ASCII is "?".
        lowered: The same in lower case.
    """
    done = 0
    for chunk in range(0, len(lowered), _CHUNK):
        for found in _NAMED.finditer(lowered, chunk, min(chunk + _CHUNK, len(lowered))):
            if found.start() >= done and (span := _value_at(data, found.start())) is not None:
                done = span[1]
                yield span


def may_name_values(data: bytes, lowered: bytes) -> bool:
    """Return whether the name of a secret stands before a sign, whatever is behind it."""
    return any(_name_at(data, found.start()) is not None for found in _NAMED.finditer(lowered))


def _name_at(data: bytes, sign: int) -> tuple[str, re.Match[bytes], bytes] | None:
    """The name of a secret before the ``=`` or ``:`` at ``sign``, where it stands backwards, and what it stands in."""
    before = data[max(sign - 80, 0) : sign]
    named = _NAME_BACKWARDS.match(before[::-1])
    if named is None:
        return None
    name = named["name"][::-1].decode("ascii")
    if before[: len(before) - named.end()].endswith(b"\\") and name[0] in "nrt":  # an escape in the text of a text
        name = name[1:]
    name = name.lstrip("-.")
    return (name, named, before) if is_secret(name) or name.lower() in _SIGNATURES else None


def _value_at(data: bytes, sign: int) -> Span | None:
    """The secret behind the ``=`` or ``:`` at ``sign``, if there is one."""
    known = _name_at(data, sign)
    if known is None:
        return None
    name, named, before = known
    is_assigned = data[sign] == ord("=")
    behind = sign + 1
    following = data[behind : behind + 2]
    if following[:1] in (b"=", b":") or (not is_assigned and following == b"//"):
        return None
    if is_assigned and following[:1] == b">":  # Ruby, PHP
        behind += 1
    begin = end_of(_BLANKS, data, behind)
    if name.lower() in _HEADER_NAMES:
        opening = before[: len(before) - named.end()][-1:]
        span = _header(data, begin, opening, is_cookie="ookie" in name)
        if span is not None:
            return span
    quoted = _QUOTE.match(data, begin)
    if quoted is not None:
        return _quoted(data, quoted.end(), quoted["quote"], name, is_assigned=is_assigned)
    # Without a blank on either side it may stand in an address or on a command line.
    is_tight = is_assigned and begin == sign + 1 and named.start("name") == 0
    lead = b"--" if named["name"].endswith(b"--") else before[: len(before) - named.end()][-1:]
    return _bare(data, begin, name, lead if is_tight else None, is_assigned=is_assigned)


def _bare(data: bytes, begin: int, name: str, lead: bytes | None, *, is_assigned: bool) -> Span | None:
    """The secret at ``begin`` without quotes; ``lead`` is what stands before the name, or None for code."""
    bare = _BARE.match(data, begin)
    if bare is None:
        return None
    follows = data[bare.end() : bare.end() + 1]
    is_plain = lead is not None and (lead in _LEADS or follows == b";" or name.isupper())
    if name.lower() in _SIGNATURES and lead not in (b"?", b"&"):
        return None
    if not is_plain and follows in (b"(", b"["):
        return None
    if not is_value(bare.group(), name, is_plain=is_plain, is_assigned=is_assigned):
        return None
    return begin, end_of(_BARE_REST, data, bare.end())


def _header(data: bytes, begin: int, opening: bytes, *, is_cookie: bool) -> Span | None:
    """The value of a header; ``opening`` is what stands before its name, which may be the quote that closes it."""
    quoted = _QUOTE.match(data, begin)
    if quoted is not None:
        begin, opening = quoted.end(), quoted["quote"]
    line = _LINE.match(data, begin)
    if line is None:
        return None
    value = line.group().strip()
    if is_cookie:
        is_one = b"=" in value and not PLACEHOLDER.match(value)
    else:
        scheme, _, rest = value.partition(b" ")
        rest = rest.strip()
        is_one = bool(rest) and scheme.isalpha() and not PLACEHOLDER.match(rest) and (b" " not in rest or b"=" in rest)
        is_one = is_one and (looks_random(rest) or scheme.lower() in (b"bearer", b"basic", b"token", b"apikey"))
        is_one = is_one or (not rest and looks_random(value))
    if not is_one:
        return None
    found = _END_OF_HEADER.search(data, line.end())
    end = len(data) if found is None else found.start()
    closing = data.find(opening, begin, end + 1) if opening and opening in b"\"'\\\"\\'" else -1
    return begin, end if closing < 0 else closing


def _quoted(data: bytes, begin: int, quote: bytes, name: str, *, is_assigned: bool) -> Span | None:
    line = data.find(b"\n", begin, begin + _LONGEST_QUOTED)
    limit = min(begin + _LONGEST_QUOTED, len(data)) if line < 0 else line
    end = _closing(data, begin, limit, quote)
    value = data[begin:end]
    if b" " in value and not (is_assigned and _PASSWORD.search(name) and len(value) <= 64):  # noqa: PLR2004 - no sentence
        return None
    return (begin, end) if is_value(value, name, is_plain=False, is_assigned=is_assigned, is_quoted=True) else None


def _closing(data: bytes, begin: int, limit: int, quote: bytes) -> int:
    """End of a text that began with ``quote``; ``limit`` where it does not end, or has many quotes in it."""
    place = begin - 1
    for _ in range(_MOST_QUOTES):
        place = data.find(quote, place + 1, limit)
        if place < 0:
            break
        is_escaped = data[place - 1 : place] == b"\\" and data[place - 2 : place] != b"\\\\"
        if place == begin or len(quote) > 1 or not is_escaped:
            return place
    return limit


def is_value(value: bytes, name: str, *, is_plain: bool, is_assigned: bool, is_quoted: bool = False) -> bool:
    """Return whether what stands behind the name of a secret is one, rather than code, prose, or a place for one."""
    if len(value) < 4 or PLACEHOLDER.match(value) or value.lower() in _NOT_ONE:  # noqa: PLR2004 - too short to be kept secret
        return False
    word, known = value.rstrip(b"0123456789").lower(), name.lower().encode()
    if word and (word in known or known in word):
        return False  # token=token2, "api_key": "api_key"
    if is_plain:
        return True
    is_sure = _SURE.search(name) is not None
    if value.isdigit():
        return _PASSWORD.search(name) is not None and (is_assigned or len(value) >= SHORTEST or "code" in name.lower())
    if is_quoted:
        return is_sure or looks_random(value)
    if _PASSWORD.search(name) and len(value) >= 6 and _has_digit(value) and b"." not in value:  # noqa: PLR2004 - "hunter2"
        return True
    if _PATH.match(value) and not (is_assigned or looks_random(value)):
        return False  # a type, a word
    if _PATH.match(value) and not _has_digit(value):
        return len(value) >= 2 * SHORTEST_TOKEN and b"." not in value and not _is_word(value)
    return (is_sure and is_assigned) or looks_random(value)


def looks_random(value: bytes) -> bool:
    """Return whether it looks random: letters and digits mixed, or long and no words."""
    if len(value) < SHORTEST or not _LETTER.search(value):
        return False
    return _has_digit(value) or (len(value) >= SHORTEST_TOKEN and not _is_word(value))


def _is_word(value: bytes) -> bool:
    """Return whether it is made of words, perhaps with hyphens, underscores or humps between, as names in code are."""
    humps = sum(map(_is_hump, value, value[1:]))
    return not _has_digit(value) and (humps * 5 <= len(value) or value.isupper())


def _is_hump(before: int, after: int) -> bool:
    return 97 <= before <= 122 and 65 <= after <= 90  # noqa: PLR2004 - "a" to "z", "A" to "Z"


def _has_digit(value: bytes) -> bool:
    return any(48 <= code <= 57 for code in value)  # noqa: PLR2004 - "0" to "9"
