"""Masking of secrets in texts, by their form and by what stands before them: tokens, addresses, assignments.

Every text that is stored comes through here, so the search is cheap first: a few passes in C over a copy with one
byte a character find the places that are looked at more closely. It is linear for every text: each place is looked
at once, within a bound around it. Repetitions in the patterns are of one set of characters, bounded, or both.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
from collections.abc import Callable, Iterator

from dspy_mlflow_async.spans.secret_assignments import (
    JUDGED,
    PLACEHOLDER,
    SHORTEST,
    Span,
    end_of,
    is_value,
    looks_random,
    may_have_values,
    may_name_values,
    values,
)
from dspy_mlflow_async.spans.secret_names import MASK, is_secret
from dspy_mlflow_async.spans.secret_patterns import SHORTEST_TOKEN, TOKENS

MARGIN = 4096  # characters behind a bound that are looked at, so that a secret which it splits is known for one
_CHUNK = 16_384  # characters that one pass in C may take while other threads wait
KEPT_SHORT, KEPT_LONG = 256, 32_768  # characters of the texts whose result is kept


def mask(text: str) -> str:
    """The text with ``MASK`` in place of each secret that it shows; itself where it shows none."""
    size = len(text)
    if size < SHORTEST:
        return text
    if size <= KEPT_SHORT:
        return masked_short(text)
    return masked_long(text) if size <= KEPT_LONG else masked(text)


def mask_beginning(text: str, most: int) -> str:
    """The first characters of a text, masked before it is cut: no half of a secret is left."""
    if len(text) <= most + MARGIN:
        return mask(text)[:most]
    shown = mask(text[: most + MARGIN])
    return shown[: max(len(shown) - MARGIN, 0)][:most]


def masked(text: str) -> str:
    """Mask a text, whether it was seen before or not."""
    spans = _spans(text.encode("ascii", "replace"))
    if not spans:
        return text
    parts: list[str] = []
    done = 0
    for begin, end in sorted(spans):
        if end <= done:
            continue
        if begin >= done:
            parts += (text[done:begin], MASK)
        done = end
    return "".join((*parts, text[done:]))


# One text is shown on several spans of a call: a prompt where it is formatted, sent and answered.
masked_short = functools.lru_cache(maxsize=4096)(masked)
masked_long = functools.lru_cache(maxsize=64)(masked)


def _spans(data: bytes) -> list[Span]:
    """The places of secrets, in no order. Most texts have nothing that is looked at more closely."""
    spans: list[Span] = []
    runs = data.translate(_RUN_CHARACTERS)
    if _RUN in runs:
        spans += _tokens(data, runs)
    lowered = data.lower()
    if (b"=" in data or b":" in data) and may_have_values(lowered):
        spans += values(data, lowered)
    if b"://" in data:
        spans += _addresses(data)
    if b"bearer" in lowered:
        spans += _credentials(data, lowered, b"bearer", looks_random)
    if b"basic" in lowered:
        spans += _credentials(data, lowered, b"basic", _is_basic)
    if b"-----BEGIN " in data:
        spans += _private_keys(data)
    if b" -" in data or data[:1] == b"-":
        spans += _options(data)
    return spans


def may_hold_secrets(text: str) -> bool:
    """Return False only where ``mask`` masks nothing, in whatever text this part of it stood between two quotes.

    Cheaper, and less precise: the name of a secret is enough, whatever follows. Many parts are looked at at once where
    a quote and ``=`` follow each, as what stands behind a part may be a value.
    """
    data = text.encode("ascii", "replace")
    lowered = data.lower()
    if may_have_values(lowered) and may_name_values(data, lowered):
        return True
    runs = data.translate(_RUN_CHARACTERS)
    return (
        (_RUN in runs and _has_any(_tokens(data, runs)))
        or (b"://" in data and _has_any(_addresses(data)))
        or (b"bearer" in lowered and _has_any(_credentials(data, lowered, b"bearer", looks_random)))
        or (b"basic" in lowered and _has_any(_credentials(data, lowered, b"basic", _is_basic)))
        or b"-----BEGIN " in data
        or ((b" -" in data or data[:1] == b"-") and any(_may_be_option(found) for found in _OPTION_NAME.finditer(data)))
    )


def _has_any(spans: Iterator[Span]) -> bool:
    return next(spans, None) is not None


# --- tokens -------------------------------------------------------------------------------------------------------

_RUN = b"a" * SHORTEST_TOKEN
_RUN_CHARACTERS = bytes(
    ord("a") if chr(code).isascii() and (chr(code).isalnum() or chr(code) in "_-.") else ord(" ") for code in range(256)
)
_PREFIX = re.compile(
    "|".join(sorted((re.escape(p) for each in TOKENS for p in each.prefixes), key=len, reverse=True)).encode()
)
_FORMS = {prefix.encode(): each.form for each in TOKENS for prefix in each.prefixes}
_TOKEN_REST = re.compile(rb"[A-Za-z0-9_\-]*")


def _tokens(data: bytes, runs: bytes) -> Iterator[Span]:
    begin = runs.find(_RUN)
    while begin >= 0:
        end = runs.find(b" ", begin + SHORTEST_TOKEN)
        end = len(data) if end < 0 else end
        if data[max(begin - 8, 0) : begin] != b";base64,":  # an image
            yield from _tokens_of_run(data, begin, end)
        begin = runs.find(_RUN, end)


def _tokens_of_run(data: bytes, begin: int, end: int) -> Iterator[Span]:
    done = begin
    for chunk in range(begin, end, _CHUNK):
        for found in _PREFIX.finditer(data, chunk, min(chunk + _CHUNK + 32, end)):
            start = found.start()
            if start < done or (start > 0 and data[start - 1 : start].isalnum()):
                continue
            whole = _FORMS[found.group()].match(data, start)
            if whole is not None:
                done = end_of(_TOKEN_REST, data, whole.end())
                yield start, done


# --- addresses ------------------------------------------------------------------------------------------------------

_USER_INFO = re.compile(rb"://[^\s/?#@:'\"<>\\]{0,256}:(?P<password>[^\s/?#'\"<>]{1,512})@(?=[\w\[])")
_HOOK = re.compile(
    rb"://(?:hooks\.slack\.com/(?:services|workflows|triggers)|(?:\w{1,10}\.)?discord(?:app)?\.com/api/webhooks"
    rb"|[\w\-]{1,64}\.webhook\.office\.com/webhookb2)/(?P<path>[\w/\-@.]{16,512})"
)
_PLACEHOLDERS_OF_URLS = (b"password", b"pass", b"pwd", b"pw", b"secret")


def _addresses(data: bytes) -> Iterator[Span]:
    place = data.find(b"://")
    while place >= 0:
        info = _USER_INFO.match(data, place)
        if info is not None and not (
            PLACEHOLDER.match(info["password"]) or info["password"].lower() in _PLACEHOLDERS_OF_URLS
        ):
            yield info.span("password")
        hook = _HOOK.match(data, place)
        if hook is not None:
            yield hook.span("path")
        place = data.find(b"://", place + 3)


# --- credentials of HTTP, keys, command lines -------------------------------------------------------------------------

_CREDENTIAL_REST = re.compile(rb"[A-Za-z0-9\-._~+/=]*")
_CREDENTIAL = re.compile(rb"(?:[ \t]|%20|\+){1,4}(?P<value>[A-Za-z0-9\-._~+/]{8,256}={0,2})")


def _is_basic(value: bytes) -> bool:
    try:
        decoded = base64.b64decode(
            value[: len(value) & ~3] if len(value) >= JUDGED else value + b"=" * (-len(value) % 4), validate=True
        )
    except (binascii.Error, ValueError):
        return False
    return b":" in decoded and decoded.isascii() and decoded.decode().isprintable()


def _credentials(data: bytes, lowered: bytes, word: bytes, check: Callable[[bytes], bool]) -> Iterator[Span]:
    place = lowered.find(word)
    while place >= 0:
        end = place + len(word)
        found = _CREDENTIAL.match(data, end)
        if found is not None and check(found["value"]):
            end = end_of(_CREDENTIAL_REST, data, found.end())
            yield found.start("value"), end
        place = lowered.find(word, end)


_BEGIN = re.compile(rb"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_KEY_LINE = re.compile(rb"(?:\s|\\[nrt]){0,16}(?:[A-Za-z0-9+/=]{1,4096}|[A-Za-z\-]{1,20}: [^\r\n\\]{1,80})")


def _private_keys(data: bytes) -> Iterator[Span]:
    place = data.find(b"-----BEGIN ")
    while place >= 0:
        begin = _BEGIN.match(data, place)
        end = place + 11
        if begin is not None:
            limit = begin.end() + 4 * MARGIN
            following = data.find(b"-----BEGIN ", begin.end(), limit)
            end = data.find(b"-----END ", begin.end(), limit if following < 0 else following)
            if end < 0:
                end = _end_of_lines(data, begin.end())
            if end > begin.end():
                yield begin.end(), end
        place = data.find(b"-----BEGIN ", end)


def _end_of_lines(data: bytes, begin: int) -> int:
    """End of the lines of a key that was cut: before the first that is none."""
    end = begin
    while (line := _KEY_LINE.match(data, end)) is not None:
        if line.end() - line.start() < 16 and line.end() < len(data):  # noqa: PLR2004 - a word
            break
        end = line.end()
    return end


_OPTION = re.compile(rb"--(?P<name>[A-Za-z][\w\-]{1,62}) {1,4}(?P<quote>[\"']?)(?P<value>[^\s\"'`]{4,4096})")
_USER_OPTION = re.compile(rb"(?:-u|--user)[ =]{1,4}[\"']?[^\s:\"']{1,128}:(?!//)(?P<value>[^\s\"'`]{3,512})")

_OPTION_NAME = re.compile(rb"(?<![^ ])(?:--(?P<name>[A-Za-z][\w\-]{1,62}) |(?:-u|--user)[ =])")


def _may_be_option(found: re.Match[bytes]) -> bool:
    return found["name"] is None or found["name"] == b"user" or is_secret(found["name"].decode())


def _options(data: bytes) -> Iterator[Span]:
    place = 0 if data[:1] == b"-" else data.find(b" -") + 1
    while place > 0 or data[place : place + 1] == b"-":
        found = _OPTION.match(data, place)
        if found is not None and is_secret(found["name"].decode()):
            name = found["name"].decode()
            if is_value(
                found["value"], name, is_plain=bool(found["quote"]) or looks_random(found["value"]), is_assigned=True
            ):
                yield found.span("value")
        user = _USER_OPTION.match(data, place)
        if user is not None and not PLACEHOLDER.match(user["value"]):
            yield user.span("value")
        place = data.find(b" -", place + 1) + 1
        if place == 0:
            return
