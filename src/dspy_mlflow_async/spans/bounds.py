"""Cuts plain values so that their JSON text keeps to a number of bytes, and says what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import orjson

MARK_BYTES = 64  # what the one mark that is not counted takes at most, with everything around it

CHARACTERS, BYTES, ITEMS = "characters", "bytes", "items"

_STEP = 65_536  # characters or items that are tried at once

_Write = Callable[[Any], bytes]
_Whole = TypeVar("_Whole", str, "list[Any]")


class Mark(str):
    """Text of a mark that says how much is missing, or a text that ends with one.

    Attributes:
        kept: How many characters of the text are the value's; None where it stands for items or keys.
        total: How many characters, items or keys the value has.
        unit: In what ``total`` is counted.
    """

    __slots__ = ("kept", "total", "unit")

    kept: int | None
    total: int
    unit: str


def mark_of_text(kept: str, total: int, *, missing: int | None = None, unit: str = CHARACTERS) -> Mark:
    """The beginning of a text, and how much of it is missing.

    Of a text that was never made as a whole, what it is the text of is counted.
    """
    missing = total - len(kept) if missing is None else missing
    mark = Mark(f"{kept}… [cut: {f'{missing} of ' if unit == CHARACTERS else ''}{total} {unit}]")
    mark.kept, mark.total, mark.unit = len(kept), total, unit
    return mark


def mark_of_items(kept: int, total: int, kind: str) -> Mark:
    """Mark in the place of the items, or keys, that are missing."""
    mark = Mark(f"[cut: {total - kept} of {total} {kind}]")
    mark.kept, mark.total, mark.unit = None, total, kind
    return mark


def beginning(text: str, max_bytes: int) -> str:
    """The beginning of a text, of so many bytes in UTF-8 at most."""
    content = text[: max(max_bytes, 0)].encode("utf-8", "surrogatepass")
    end = max(max_bytes, 0)
    if len(content) <= end:
        return content.decode("utf-8", "surrogatepass")
    while content[end] & 0xC0 == 0x80:  # noqa: PLR2004 - inside a character of several bytes
        end -= 1
    return content[:end].decode("utf-8", "surrogatepass")


def json_text(plain: Any) -> str:
    """JSON text of a plain value, lone surrogates escaped, whose size is the sum of those of its parts."""
    text = json.dumps(plain, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode()


def json_bytes(plain: Any) -> bytes:
    """JSON text in bytes, made faster than by ``json_text``; NaN and the infinities are null."""
    try:
        return orjson.dumps(plain)
    except (TypeError, ValueError):  # an integer beyond 64 bits, or a lone surrogate
        return json_text(plain).encode()


def _json_bytes_with_nan(plain: Any) -> bytes:
    return json_text(plain).encode()


def cut(plain: Any, max_bytes: int, *, has_unusual_floats: bool = False) -> str:
    """JSON text of as much of a plain value as has so many bytes, and of the marks that say what is missing.

    What is kept is the beginning: each text is a prefix of the one that it was, each list and mapping the first of
    its items. One mark, the innermost, is not counted; those of what is around it are.

    Args:
        plain: JSON types alone, whose text is longer than that.
        max_bytes: How many bytes the text may have, but for ``MARK_BYTES`` more.
        has_unusual_floats: Whether NaN or an infinity is among them.
    """
    write: _Write = _json_bytes_with_nan if has_unusual_floats else json_bytes
    # "null", "false" and the empty ones are shorter than any mark.
    return (_cut(plain, max_bytes, write) if plain and plain is not True else write(plain)).decode()


def _cut(value: Any, room: int, write: _Write) -> bytes:
    """The text of as much of ``value``, which is larger than ``room``, as fits."""
    if isinstance(value, dict):
        return b"{%b}" % b",".join(_parts_of_mapping(value, room, write))
    if isinstance(value, list):
        return b"[%b]" % b",".join(_parts_of_sequence(value, room, write))
    if isinstance(value, Mark):
        text, total, unit = value[: value.kept], value.total, value.unit
    else:
        text = value if isinstance(value, str) else json_text(value)  # a number, which may have thousands of digits
        total, unit = len(text), CHARACTERS
    kept, _, parts = _as_many_as_fit(text, room - 2, lambda piece: write(piece)[1:-1])
    parts.append(write(mark_of_text("", total, missing=total - kept, unit=unit))[1:-1])
    return b'"%b"' % b"".join(parts)


def _parts_of_sequence(value: list[Any], room: int, write: _Write) -> list[bytes]:
    items, total = value, len(value)
    if isinstance(items[-1], Mark) and items[-1].kept is None:
        items, total = items[:-1], items[-1].total
    # Each with a comma, which the last has not.
    taken, left, parts = _as_many_as_fit(items, room - 1, lambda piece: write(piece)[1:-1], apart=1)
    if taken < len(items):
        is_last = taken + 1 == total
        mark = b"" if is_last else write(mark_of_items(taken + 1, total, "items"))
        space = left - 1 - (0 if is_last else len(mark) + 1)
        if _can_be_cut(items[taken], space):
            parts.append(_cut(items[taken], space, write))
            return parts if is_last else [*parts, mark]
    return [*parts, write(mark_of_items(taken, total, "items"))]


def _parts_of_mapping(value: dict[str, Any], room: int, write: _Write) -> list[bytes]:
    pairs, total = list(value.items()), len(value)
    if pairs[-1][0] == "…" and isinstance(pairs[-1][1], Mark):
        total = pairs.pop()[1].total
    taken, left, parts = _as_many_as_fit(pairs, room - 1, lambda piece: write(dict(piece))[1:-1], apart=1)
    if taken < len(pairs):
        is_last = taken + 1 == total
        key, item = pairs[taken]
        beginning_ = write(key) + b":"
        mark = b"" if is_last else write({"…": mark_of_items(taken + 1, total, "keys")})[1:-1]
        space = left - 1 - len(beginning_) - (0 if is_last else len(mark) + 1)
        if _can_be_cut(item, space):
            parts.append(beginning_ + _cut(item, space, write))
            return parts if is_last else [*parts, mark]
    return [*parts, write({"…": mark_of_items(taken, total, "keys")})[1:-1]]


def _can_be_cut(item: Any, space: int) -> bool:
    return space >= len("[]") and isinstance(item, (str, list, dict)) and bool(item)


def _as_many_as_fit(
    whole: _Whole, room: int, write: Callable[[_Whole], bytes], *, apart: int = 0
) -> tuple[int, int, list[bytes]]:
    """Count the first items of ``whole`` that fit into ``room`` bytes; return also the bytes left, and their text.

    Args:
        whole: A text, or a list.
        room: How many bytes there are.
        write: Makes the text of some of them.
        apart: What each needs beside its text.
    """
    taken, step, parts = 0, max(1, min(_STEP, len(whole))), list[bytes]()
    while step and taken < len(whole):
        piece = whole[taken : taken + step]
        text = write(piece)
        if len(text) + apart <= room:
            taken, room = taken + len(piece), room - len(text) - apart
            parts.append(text)
        else:
            step = min(step // 2, max(room, 0))
    return taken, room, parts
