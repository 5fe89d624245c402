"""Conversion of any value of a program to plain JSON: bounded, without secrets, and never by changing the value."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

import pydantic

from dspy_mlflow_async.settings import Redact
from dspy_mlflow_async.spans import bounds
from dspy_mlflow_async.spans.bounds import Mark
from dspy_mlflow_async.spans.media import blocks_of, in_few_words, may_be_attached
from dspy_mlflow_async.spans.safe_inspection import beginning_of_text, behind, contain, contents_of, is_a, text_of
from dspy_mlflow_async.spans.secret_names import MASK, is_secret, mask_in_text, names_secret
from dspy_mlflow_async.spans.secret_patterns import SHORTEST_TOKEN
from dspy_mlflow_async.spans.secret_texts import MARGIN, mask
from dspy_mlflow_async.spans.unchanged import GUARDED_KEYS, MAX_DEPTH

CIRCULAR = "[circular]"

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_SHORT = 64  # characters
_LARGE = 10_000  # bits; Python refuses to write integers of more than 4,300 digits


def dump(value: Any) -> str:
    """JSON text of a plain value, as MLflow reads it back; what orjson has no words for takes the longer way."""
    return bounds.json_bytes(value).decode()


def with_floats_replaced(value: Any, replace: Callable[[float], Any]) -> Any:
    """Replace NaN and the infinities in a plain value by ``replace``: JSON has no numbers for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else replace(value)
    if isinstance(value, dict):
        return {key: with_floats_replaced(item, replace) for key, item in value.items()}
    if isinstance(value, list):
        return [with_floats_replaced(item, replace) for item in value]
    return value


def without_addresses(text: str) -> str:
    """Remove the memory addresses that Python shows from a text: they differ from process to process."""
    return _ADDRESS.sub("", text)


class Plain:
    """One pass over one value, which makes plain JSON types of it.

    Follows ``mlflow.tracing.utils.TraceJSONEncoder`` in what becomes of each type, and shows, where that gives
    up, what it can: circular references, unprintable objects, keys that are not strings, deep nesting. What MLflow
    stores as the text of an object is stored as a mapping or list where the object holds a secret, which is masked.

    The pass itself counts no more than what is certain to be stored, and stops there; the text is then cut exactly.

    Args:
        max_bytes: How many bytes the JSON text of the value may have; beyond that it is cut, with marks, of which one
            is not counted: ``bounds.MARK_BYTES`` at most.
        redact: The user's hook, or None.
        secrets: Whether the values of keys that name secrets are masked everywhere, not only in headers and LM
            arguments.
        media: Whether long text that may be media is left whole, for MLflow to store as an attachment.
        contents: Whether texts are searched for what looks like a secret; False for what is not stored.
    """

    __slots__ = (
        *("_looks_inside", "_mask", "_max_bytes", "_media", "_path", "_redact", "_remaining", "_secrets"),
        *("has_attachments", "has_lazy", "has_secrets", "has_unusual_floats"),
    )

    def __init__(
        self,
        max_bytes: int,
        redact: Redact | None = None,
        *,
        secrets: bool = False,
        media: bool = True,
        contents: bool = True,
    ) -> None:
        self._max_bytes = self._remaining = max_bytes
        self._redact = redact
        self._secrets = secrets
        self._media = media
        self._mask = mask if contents else _as_it_is
        self._path: set[int] = set()
        self._looks_inside = False
        self.has_attachments = False
        self.has_lazy = False  # what evaluates itself when its text is asked for
        self.has_secrets = False
        self.has_unusual_floats = False

    def __call__(self, value: Any) -> Any:
        """Return the plain form of ``value``."""
        return self._plain(value, secrets=self._secrets)

    def dumps(self, value: Any) -> str:
        """Return the plain form of ``value`` as JSON text."""
        return self.encode(self(value))

    def encode(self, plain: Any) -> str:
        """JSON text of what this pass has made, within the bound unless there are attachments in it."""
        # orjson writes null for NaN, MLflow's json writes NaN.
        text = bounds.json_text(plain) if self.has_unusual_floats else dump(plain)
        if len(text) * 4 <= self._max_bytes or self.has_attachments:  # no character has more bytes than 4
            return text
        if (len(text) if text.isascii() else len(text.encode())) <= self._max_bytes:
            return text
        return bounds.cut(plain, self._max_bytes, has_unusual_floats=self.has_unusual_floats)

    def _plain(self, value: Any, *, secrets: bool, key: str | None = None) -> Any:
        if self._redact is not None:
            try:
                value = self._redact(value)
            except Exception:  # noqa: BLE001 - a hook that fails must not let the value through
                return MASK
        kind = type(value)
        if kind is str:
            if len(value) <= _SHORT and len(value) <= self._remaining:  # most values, and at most 4 bytes a character
                value = self._mask(value)
                self._remaining -= len(value)
                return value
            return self._text(value, key)
        if kind is bool or value is None:
            return value
        if kind is int:
            self._remaining -= 1
            return value if value.bit_length() < _LARGE else beginning_of_text(value, MARGIN)[0]
        if kind is float:
            self._remaining -= 3
            if not math.isfinite(value):
                self.has_unusual_floats = True
            return value
        if kind is dict or kind is list or kind is tuple:
            return self._container(value, secrets=secrets)
        return self._other(value, secrets=secrets)

    def _text(self, text: str, key: str | None) -> Any:
        if len(text) > _SHORT and (self._media or len(text) > self._remaining):
            if (blocks := blocks_of(text)) is not None:
                return self._container(blocks, secrets=False)
            if not self._media:  # no part of a medium is of any use
                text = in_few_words(text, key)
            elif may_be_attached(text, key):
                self.has_attachments = True
                return text
        most = max(self._remaining, 0) + MARGIN
        return self._bounded(text[:most], len(text), is_whole=len(text) <= most)

    def _bounded(self, text: str, total: int, unit: str = bounds.CHARACTERS, *, is_whole: bool) -> str:
        """Mask a text and cut it to what fits.

        Args:
            text: The text, or its beginning with ``MARGIN`` characters more than can fit: what can not is not
                looked at, and a secret that the bound would split is seen as a whole.
            total: How many characters the whole has, or of what else ``unit`` says.
            unit: What is counted.
            is_whole: Whether it is all of the text.
        """
        shown = self._mask(text)
        if is_whole:
            size = len(shown) if shown.isascii() else len(shown.encode("utf-8", "surrogatepass"))
            if size <= self._remaining:
                self._remaining -= size
                return shown
            total = len(shown)
        else:  # masks have made room, but what has no margin behind it stays out
            shown = shown[: max(len(shown) - MARGIN, 0)]
        kept = bounds.beginning(shown, self._remaining)
        self._remaining = 0
        return bounds.mark_of_text(kept, total, unit=unit)

    def _container(self, value: Any, *, secrets: bool) -> Any:
        identity = id(value)
        if identity in self._path:
            return CIRCULAR
        if len(self._path) >= MAX_DEPTH:
            return f"[nested deeper than {MAX_DEPTH}]"
        self._path.add(identity)
        try:
            return self._mapping(value, secrets) if is_a(value, dict) else self._sequence(value, secrets)
        except BaseException as error:  # noqa: BLE001 - a subclass may refuse to be read, or another thread change it
            contain(error)
            return self._as_text(value, secrets=secrets)
        finally:
            self._path.discard(identity)

    def _mapping(self, value: dict[Any, Any], secrets: bool) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        is_open = self._redact is None
        is_record = secrets and _is_secret_record(value)
        most = max(self._remaining, 0) + 1
        total = dict.__len__(value)
        for key, item in list(value.items() if type(value) is dict and total < most else islice(value.items(), most)):
            name = key if type(key) is str else self._key(key)
            if len(name) >= SHORTEST_TOKEN:
                name = self._mask(name[: most + MARGIN])
            remaining = self._remaining - len(name)
            if remaining < 0:
                plain["…"] = bounds.mark_of_items(len(plain), max(total, len(plain) + 1), "keys")
                break
            self._remaining = remaining
            if secrets and item is not None and (is_secret(name) or (is_record and name == "value")):
                plain[name] = MASK
                self.has_secrets = True
            elif item is None and is_open:
                plain[name] = None
            else:
                plain[name] = self._plain(item, secrets=secrets or name in GUARDED_KEYS, key=name)
        return plain

    def _sequence(self, value: Any, secrets: bool) -> list[Any]:
        plain: list[Any] = []
        kind = type(value)
        is_named = kind is not list and kind is not tuple and is_a(value, tuple)
        names = getattr(kind, "_fields", None) if is_named else None
        most = max(self._remaining, 0) + 1
        base = list if is_a(value, list) else tuple  # a subclass's own iterator may never end, and its length lie
        for item in base.__getitem__(value, slice(most)):
            if self._remaining <= 0:
                plain.append(bounds.mark_of_items(len(plain), base.__len__(value), "items"))
                break
            self._remaining -= 1
            if names is not None and len(plain) < len(names):
                plain.append(self._field(names[len(plain)], item, secrets))
            elif secrets and (type(item) is tuple or type(item) is list) and self._is_secret_pair(item):
                plain.append(self._plain([item[0], MASK], secrets=secrets))
            else:
                plain.append(self._plain(item, secrets=secrets))
        return plain

    def _field(self, name: str, item: Any, secrets: bool) -> Any:
        if secrets and item is not None and is_secret(name):
            self.has_secrets = True
            return MASK
        return self._plain(item, secrets=secrets or name in GUARDED_KEYS, key=name)

    def _is_secret_pair(self, item: Any) -> bool:
        if len(item) != 2 or item[1] is None or not names_secret(item[0]):  # noqa: PLR2004 - a name and its value
            return False
        self.has_secrets = True
        return True

    def _other(self, value: Any, *, secrets: bool) -> Any:
        try:
            found, is_lazy = behind(value)
            self.has_lazy |= is_lazy
            return self._plain(found, secrets=secrets) if is_lazy else self._shown(value, secrets=secrets)
        except BaseException as error:  # noqa: BLE001 - it may refuse to be looked at; its text still tells something
            contain(error)
            return self._as_text(value, secrets=secrets)

    def _shown(self, value: Any, *, secrets: bool) -> Any:
        # The order of TraceJSONEncoder: what json itself takes by subclass first, then models, then dataclasses.
        if is_a(value, Mark):
            return value
        if is_a(value, str):
            return self._text(str.__str__(value), None)
        if is_a(value, int):
            return self._plain(int(value), secrets=secrets)
        if is_a(value, float):
            return self._plain(float(value), secrets=secrets)
        if is_a(value, (dict, list, tuple)):
            return self._container(value, secrets=secrets)
        if is_a(value, pydantic.BaseModel):
            # A text for dspy.Image and the like, and whatever a RootModel holds.
            return self._plain(value.model_dump(), secrets=secrets)
        if is_dataclass(value) and not is_a(value, type):
            shown = {field.name: getattr(value, field.name) for field in fields(value)}
            return self._nested(value, shown, secrets=secrets)
        inside = contents_of(value, max(self._remaining, 0) + 1)
        if inside is not None and self._must_be_opened(value, inside, secrets=secrets):
            before, self._looks_inside = self._looks_inside, True
            try:
                return self._nested(value, inside, secrets=secrets)
            finally:
                self._looks_inside = before
        return self._as_text(value, secrets=secrets)

    def _must_be_opened(self, value: Any, inside: Any, *, secrets: bool) -> bool:
        if self._looks_inside:
            return True  # something around it does, or is being looked through
        look = Plain(self._remaining, secrets=secrets)
        look._path = set(self._path)
        look._looks_inside = True
        look._nested(value, inside, secrets=secrets)
        return look.has_secrets or look.has_lazy

    def _as_text(self, value: Any, *, secrets: bool) -> str:
        most = max(self._remaining, 0) + MARGIN
        text, total, unit = beginning_of_text(value, most)
        is_whole = unit == bounds.CHARACTERS and len(text) <= most
        text = text[:most]
        if secrets:
            masked = mask_in_text(text)
            self.has_secrets |= masked is not text
            text = masked
        if self._redact is not None:  # the hook has seen the object, and sees what is stored of it
            try:
                redacted = self._redact(text)
            except Exception:  # noqa: BLE001 - as above
                return MASK
            text = text_of(redacted)
            if len(text) > most:
                text, is_whole = text[:most], False
        return self._bounded(text, total, unit, is_whole=is_whole)

    def _key(self, key: Any) -> str:
        """A mapping's key as ``json`` writes it; what ``json`` refuses, as text."""
        if is_a(key, str):
            return str.__str__(key)
        if key is None or is_a(key, (bool, int, float)):
            return json.dumps(key)
        return beginning_of_text(key, max(self._remaining, 0) + MARGIN)[0]

    def _nested(self, owner: Any, shown: Any, *, secrets: bool) -> Any:
        """Convert ``shown`` in place of ``owner``, so that a circle through ``owner`` is noticed."""
        identity = id(owner)
        if identity in self._path:
            return CIRCULAR
        self._path.add(identity)
        try:
            return self._container(shown, secrets=secrets)
        finally:
            self._path.discard(identity)


def _as_it_is(text: str) -> str:
    return text


def _is_secret_record(record: dict[Any, Any]) -> bool:
    """Return whether this is the name of a secret and its value, as HTTP archives and cloud APIs write headers."""
    return record.get("value") is not None and (names_secret(record.get("name")) or names_secret(record.get("key")))
