"""Sanitizing step before anything is stored: whatever this package writes is redacted, masked and bounded here.

Spans, artifacts, params, tags, metadata, sessions, users, feedback and exceptions pass it. ``Plain`` does the work;
nothing else makes one, which a test of the structure holds.
"""

from __future__ import annotations

import json
import logging
from typing import Any, NamedTuple

import dspy
import orjson

from dspy_mlflow_async.context import frame as frames
from dspy_mlflow_async.settings import Settings
from dspy_mlflow_async.spans.outcome import Failure, stacktrace_of
from dspy_mlflow_async.spans.safe_inspection import text_of
from dspy_mlflow_async.spans.secret_names import MASK, is_secret
from dspy_mlflow_async.spans.secret_texts import mask, mask_beginning
from dspy_mlflow_async.spans.serialize import Plain
from dspy_mlflow_async.spans.unchanged import unchanged_text

MAX_DOCUMENT_BYTES = 1024**3  # an artifact: what somebody loads again is not cut
MAX_FAILURE_BYTES = 64 * 1024  # of a message, and of a stack trace: each span that an exception passes stores both

_DEFAULTS = Settings()


class MaskingFilter(logging.Filter):
    """Masks secrets in the lines of our log: errors and names come from models, users and servers."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, with its arguments and its traceback masked."""
        if isinstance(record.args, tuple):
            record.args = tuple(map(_masked_argument, record.args))
        if record.exc_info and record.exc_info[1] is not None:
            text = record.exc_text or stacktrace_of(record.exc_info[1])
            shown = mask_beginning(text, MAX_FAILURE_BYTES)
            if record.exc_text or shown != text:  # else the formatter's own way of showing it stands
                record.exc_text = shown
        return True


def _masked_argument(argument: Any) -> Any:
    if isinstance(argument, (int, float)):
        return argument
    text = text_of(argument)
    shown = mask(text)
    return argument if shown == text else shown


logging.getLogger("dspy_mlflow_async").addFilter(MaskingFilter())


class Shown(NamedTuple):
    """Form in which a value is shown on a span.

    Attributes:
        text: Its JSON text; None where it holds what MLflow may take for media.
        with_media: Its plain form there, with all of that.
    """

    text: str | None
    with_media: Any = None


class Door:
    """Redaction, masking and bounds by the settings of one tracer, for each kind of value that is stored.

    Attributes:
        settings: The tracer's, with the request's own redaction.
    """

    __slots__ = ("settings",)

    def __init__(self, settings: Settings = _DEFAULTS) -> None:
        self.settings = settings

    @classmethod
    def here(cls, settings: Settings | None = None) -> Door:
        """Return the door of the request around this place.

        Args:
            settings: Those of the tracer; by default those of the one that DSPy knows here.
        """
        if settings is None:
            found = (getattr(callback, "settings", None) for callback in dspy.settings.callbacks or ())
            settings = next((each for each in found if isinstance(each, Settings)), _DEFAULTS)
        frame = frames.current()
        request = frame.request if frame is not None else None
        return cls(settings if request is None else request.adapt(settings))

    def plain(self, most: int | None = None, *, secrets: bool = False, media: bool = False) -> Plain:
        """Return a pass over one value.

        Args:
            most: How many bytes its JSON text may have; by default as many as the settings say.
            secrets: Whether what has the name of a secret is masked everywhere, not only in headers and LM arguments.
            media: Whether long text that may be media is left whole, for MLflow to store as an attachment.
        """
        return Plain(
            self.settings.max_value_bytes if most is None else most,
            self.settings.redact,
            secrets=secrets,
            media=media,
            contents=self.settings.mask_contents,
        )

    def shown(self, value: Any, *, secrets: bool = False) -> Shown:
        """Redact, mask and bound a value for a span.

        Args:
            value: Any value.
            secrets: Whether what has the name of a secret is masked everywhere.
        """
        if self.settings.redact is None and self.settings.mask_contents:
            text = unchanged_text(value, self.settings.max_value_bytes, secrets=secrets)
            if text is not None:
                return Shown(text)
        plain = self.plain(secrets=secrets, media=True)
        shown = plain(value)
        return Shown(None, shown) if plain.has_attachments else Shown(plain.encode(shown))

    def text(self, value: Any, most: int, *, name: str = "") -> str:
        """Convert a value to text of so many characters at most.

        Args:
            value: A text, a number, or whatever shows itself as text.
            most: How many characters.
            name: Its key, or nothing. Of a path with dots, the last part may name a secret, and each below an LM.
        """
        if _names_secret(name):
            return MASK
        if self.settings.redact is not None:
            try:
                value = self.settings.redact(value)
            except Exception:  # noqa: BLE001 - a hook that fails must not let the value through
                return MASK
        text = value if type(value) is str else text_of(value)
        return mask_beginning(text, most) if self.settings.mask_contents else text[:most]

    def document(self, content: bytes) -> bytes:
        """Redact and mask a JSON document, such as a program's state; the same bytes where there is nothing to hide."""
        before = json.loads(content)
        plain = self.plain(MAX_DOCUMENT_BYTES)
        after = plain(_without_secrets(before))
        if after == before:
            return content
        if plain.has_unusual_floats:
            return json.dumps(after, indent=2).encode("utf-8", "surrogatepass")
        return orjson.dumps(after, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    def failure(self, failure: Failure) -> Failure:
        """Redact, mask and bound the message and the stack trace of an exception."""
        most = min(self.settings.max_value_bytes, MAX_FAILURE_BYTES)
        message, stacktrace = (self._failure_text(text, most) for text in (failure.message, failure.stacktrace))
        return failure._replace(message=message, stacktrace=stacktrace)

    def _failure_text(self, text: str, most: int) -> str:
        shown = self.plain(most)(text)
        return shown if isinstance(shown, str) else text_of(shown)


def _names_secret(path: str) -> bool:
    *parts, last = path.split(".")
    below = parts[parts.index("lm") + 1 :] if "lm" in parts else ()
    return is_secret(path) or is_secret(last) or any(map(is_secret, below))


# Where a program's state holds what its examples hold, whose fields may have any name.
_DATA = frozenset({"demos", "train", "traces", "signature", "extended_signature", "fields"})


def _without_secrets(state: Any) -> Any:
    """A program's state without the texts whose keys name secrets. Other values may be predictors of that name."""
    if isinstance(state, list):
        return [_without_secrets(item) for item in state]
    if not isinstance(state, dict):
        return state
    return {
        key: item if key in _DATA else MASK if isinstance(item, str) and is_secret(key) else _without_secrets(item)
        for key, item in state.items()
    }
