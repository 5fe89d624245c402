"""Text that is safe in a terminal or a log: no control characters, and no passwords in URIs."""

from __future__ import annotations

import logging
import re
import traceback
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

MASK = "***"
# C0 but tab and newline, DEL, C1, and what turns the direction of a line around: a terminal obeys them all.
# Sources: ECMA-48 (control functions), CVE-2021-42574 (bidirectional controls), Unicode's line separators.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_CONTROLS_AND_LINES = re.compile(f"{_CONTROLS.pattern[:-1]}\n]")
# What stands before the host of a URI. It ends at the last "@" before a slash, since passwords may have an "@" in them.
_USER_INFO = re.compile(r"(?i)\b([a-z][a-z0-9+.\-]{0,30})://([^\s/?#:@]*)(:[^\s/?#]*)?@")
# In the query of a URI: the drivers of PostgreSQL, MySQL and SQL Server take passwords there, clouds take tokens.
_SECRET_PARAMETER = re.compile(r"""(?i)([?&;][\w.\-]{0,40}(?:password|passwd|pwd|secret|token|key)=)[^&;#\s'"]+""")


def printable(text: object, *, one_line: bool = False) -> str:
    r"""Replace control characters, which a terminal would obey, by their escapes, as in ``\x1b``.

    Args:
        text: Anything with a text; an error's message, a run's name, a file's.
        one_line: Whether newlines are replaced, too, so that nobody can feign a line of its own.
    """
    pattern = _CONTROLS_AND_LINES if one_line else _CONTROLS
    return pattern.sub(_escape, str(text))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: ``1 record``, ``2,000 records``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def mask_uris(text: object) -> str:
    """Return a URI, or a text with URIs in it, in one line and with ``***`` for passwords and tokens."""
    shown = _USER_INFO.sub(_masked_user, printable(text, one_line=True))
    return _SECRET_PARAMETER.sub(rf"\g<1>{MASK}", shown)


def _masked_user(match: re.Match[str]) -> str:
    scheme, user, password = match.groups()
    if password is not None:
        return f"{scheme}://{user}:{MASK}@"
    # A lone name before a server's host is a token as often as a name.
    return f"{scheme}://{MASK if scheme.lower() in {'http', 'https'} else user}@"


def split_credentials(uri: str) -> tuple[str, tuple[str, str] | None]:
    """Part a server's URI from the user and password in it.

    Returns:
        The URI without them, and both, decoded; None where there are none.
    """
    parts = urlsplit(uri)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return uri, None
    name, _, password = user.partition(":")
    return urlunsplit(parts._replace(netloc=host)), (unquote(name), unquote(password))


class PrintableFilter(logging.Filter):
    """Makes what is put into a log line printable: errors and names come from models, users and servers."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, with its arguments and its traceback made printable."""
        if isinstance(record.args, tuple):
            record.args = tuple(map(_printable_argument, record.args))
        if record.exc_info and not record.exc_text:
            text = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            shown = "\n".join(map(mask_uris, text.split("\n")))
            if shown != text:  # else the formatter's own way of showing it stands
                record.exc_text = shown
        return True


def _printable_argument(argument: Any) -> Any:
    if isinstance(argument, (int, float)):
        return argument
    try:
        text = str(argument)
    except Exception:  # noqa: BLE001 - logging says so by itself when it formats the line
        return argument
    shown = mask_uris(text)
    return argument if shown == text else shown
