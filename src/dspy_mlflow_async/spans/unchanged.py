"""JSON text of a value that ``Plain`` would show as it is, made after one look at each of its parts.

Most of what a program passes around is plain JSON without secrets. Of that, a pass of ``Plain`` makes an equal copy,
for several times as much.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import orjson

from dspy_mlflow_async.spans.media import ATTACHMENT_KEYS, may_hold_media
from dspy_mlflow_async.spans.secret_names import is_secret, names_secret
from dspy_mlflow_async.spans.secret_patterns import SHORTEST_TOKEN
from dspy_mlflow_async.spans.secret_texts import KEPT_LONG, KEPT_SHORT, mask, masked

# Below these, secrets are masked whatever the span: HTTP headers, and the LM arguments that modules hand on.
GUARDED_KEYS = frozenset({
    *("headers", "Headers", "extra_headers", "default_headers", "http_headers"),
    *("config", "lm", "lm_kwargs", "model_list"),
})  # fmt: skip
MAX_DEPTH = 200

_MOST_PARTS = 10_000  # of a value that is looked at here
_LONGEST_KEYS = 1024  # characters of a mapping's keys whose look is kept
_dumps = orjson.dumps
_OPTIONS = orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS
_Seen = list[tuple[Any, tuple[str, ...] | None]]


def unchanged_text(value: Any, max_bytes: int, *, secrets: bool) -> str | None:
    """Return what a pass of ``Plain`` makes of a value, where it changes nothing.

    Args:
        value: Any value.
        max_bytes: How many bytes the text may have.
        secrets: Whether the values of keys that name secrets are masked everywhere.

    Returns:
        None where it may change something: where a part has a type that JSON does not know, the name or the looks of a
        secret, or those of a medium; where there are very many parts, or deep ones; or where somebody changes the value
        meanwhile.
    """
    parts, seen = [value], _Seen()
    try:
        if not _are_shown(parts, max_bytes, seen, secrets=secrets):
            return None
        text = _dumps(value, None, _OPTIONS)
        return text.decode() if len(text) <= max_bytes and _are_still(parts, seen) else None
    except (TypeError, ValueError, RuntimeError):  # a key that is no text; what orjson refuses; a mapping that changes
        return None


def _are_shown(  # noqa: C901, PLR0912 - a call for each part would cost as much as the look at it
    parts: list[Any], most: int, seen: _Seen, *, secrets: bool
) -> bool:
    """Return whether all values are shown as they are.

    Args:
        parts: A value; gets all that is in it, level by level.
        most: How many characters the longer texts may have.
        seen: Gets the containers, each with its keys if it is a mapping.
        secrets: Whether keys may name secrets.
    """
    for part in parts:  # grows on the way
        kind = type(part)
        if kind is str:
            if len(part) <= KEPT_SHORT:
                if not _is_short_shown(part):
                    return False
            else:
                most -= len(part)
                if most < 0 or not _is_long_shown(part):
                    return False
        elif kind is dict:
            if len(part) > _MOST_PARTS:
                return False
            keys = (*part,)
            seen.append((part, keys))
            if keys:
                if len("".join(keys)) > _LONGEST_KEYS or not _are_plain_keys(keys, secrets):
                    return False
                parts += part.values()
        elif kind is list or kind is tuple:
            if len(part) > _MOST_PARTS:
                return False
            seen.append((part, None))
            parts += part
            if secrets and any(map(_may_be_secret_pair, part)):
                return False
        elif kind is float:
            if not math.isfinite(part):
                return False
        elif part is not None and kind is not bool and kind is not int:
            return False
        if len(parts) > _MOST_PARTS:
            return False
    return len(seen) < MAX_DEPTH


def _are_still(parts: list[Any], seen: _Seen) -> bool:
    """Return whether these are still the parts: another thread may have the value in hand."""
    now = parts[:1]
    for container, keys in seen:
        if keys is None:
            now += container
        elif len(container) == len(keys) and all(map(operator.is_, container, keys)):
            now += container.values()
        else:
            return False
    return len(now) == len(parts) and all(map(operator.is_, now, parts))


def _is_shown(text: str) -> bool:
    return not may_hold_media(text) and masked(text) == text


# One text is shown on several spans of a call, and a predictor's in each of its calls.
_is_short_shown = functools.lru_cache(maxsize=4096)(_is_shown)
_is_kept_shown = functools.lru_cache(maxsize=64)(_is_shown)


def _is_long_shown(text: str) -> bool:
    return (_is_kept_shown if len(text) <= KEPT_LONG else _is_shown)(text)


@functools.lru_cache(maxsize=1024)
def _are_plain_keys(keys: tuple[str, ...], secrets: bool) -> bool:
    if not _TELLING.isdisjoint(keys) or any(len(key) >= SHORTEST_TOKEN and mask(key) != key for key in keys):
        return False
    # A record of a name and its value, as HTTP archives write headers, may name a secret, too.
    return not (secrets and ("value" in keys or any(map(is_secret, keys))))


_TELLING = GUARDED_KEYS | ATTACHMENT_KEYS


def _may_be_secret_pair(item: Any) -> bool:
    return (type(item) is tuple or type(item) is list) and len(item) > 0 and names_secret(item[0])
