"""Pictures, recordings and files in texts, as DSPy and providers write them, found and replaced by a few words.

MLflow stores what it recognises beside the trace, as attachments. For that it has to get each as a text of its own,
and whole: not within the text of ``dspy.Image``, and not cut.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import Any

import orjson

from dspy_mlflow_async.seams.dspy import CUSTOM_TYPE_END_IDENTIFIER, CUSTOM_TYPE_START_IDENTIFIER

SHORT = 1024  # characters; less of a medium is shown as it is where it cannot be attached

# Below these keys, MLflow takes base64 for media: see LiveSpan._try_convert_structured_content.
ATTACHMENT_KEYS = frozenset({"data", "b64_json", "bytes", "file_data", "result"})
_DATA_URI = re.compile(r"data:[\w.+/;=-]{0,200}?;base64,[A-Za-z0-9+/=_-]*")
_BASE64 = re.compile(r"[A-Za-z0-9+/=_-]*")


def may_be_attached(text: str, key: str | None) -> bool:
    """Return whether MLflow may recognise a text, which stands below this key, as a medium."""
    return key in ATTACHMENT_KEYS or is_data_uri(text)


def may_hold_media(text: str) -> bool:
    """Return False only for a text in which nothing is a medium, unless it stands below a key that tells so."""
    return CUSTOM_TYPE_START_IDENTIFIER in text or ";base64," in text


def is_data_uri(text: str) -> bool:
    """Return whether a text begins as a medium in base64."""
    return text.startswith("data:") and ";base64," in text[:200]


def blocks_of(text: str) -> list[Any] | None:
    """The blocks of content in the text of ``dspy.Image``, ``Audio``, ``File`` and the like, and the texts between.

    None where it has none with a medium in it, so that what is no more than a URL is stored as MLflow stores it.
    Source: ``dspy.adapters.types.base_type.split_message_content_for_custom_types``.
    """
    if CUSTOM_TYPE_START_IDENTIFIER not in text:
        return None
    before, *pieces = text.split(CUSTOM_TYPE_START_IDENTIFIER)
    blocks: list[Any] = [{"type": "text", "text": before}] if before else []
    has_media = False
    for piece in pieces:
        content, end, after = piece.partition(CUSTOM_TYPE_END_IDENTIFIER)
        found = _loaded(content) if end else None
        if found is None:
            return None
        for block in found:
            has_media |= _has_media(block)
            blocks.append(_with_data_uri(block))
        if after:
            blocks.append({"type": "text", "text": after})
    return blocks if has_media else None


def _loaded(content: str) -> list[Any] | None:
    # Within a list that the adapter has written as JSON, the block is escaped once more.
    for text in (content, content.replace('\\"', '"')):
        try:
            found = orjson.loads(text)
        except (ValueError, UnicodeError):
            continue
        if isinstance(found, list):
            return found
    return None


def _has_media(value: Any, key: str | None = None) -> bool:
    if isinstance(value, dict):
        return any(_has_media(item, name) for name, item in value.items())
    return isinstance(value, str) and (is_data_uri(value) or (key in ATTACHMENT_KEYS and _is_base64(value)))


def _with_data_uri(block: Any) -> Any:
    """``dspy.Document``'s block with its PDF as a data URI: MLflow knows it in no other form."""
    source = block.get("source") if isinstance(block, dict) and block.get("type") == "document" else None
    if not isinstance(source, dict) or source.get("type") != "base64" or not isinstance(source.get("data"), str):
        return block
    return {**block, "source": {**source, "data": f"data:{source.get('media_type')};base64,{source['data']}"}}


def _is_base64(text: str) -> bool:
    return len(text) > SHORT and _BASE64.fullmatch(text[:SHORT]) is not None


def in_few_words(text: str, key: str | None = None) -> str:
    """Replace each medium in a text by its type, its size and a hash of its bytes."""
    if key in ATTACHMENT_KEYS and _is_base64(text):
        return _told("base64", text)
    if len(text) <= SHORT or ";base64," not in text:
        return text

    def told(found: re.Match[str]) -> str:
        head, _, content = found[0].partition(";base64,")
        return _told(head.removeprefix("data:") or "base64", content) if len(content) > SHORT else found[0]

    return _DATA_URI.sub(told, text)


def _told(kind: str, content: str) -> str:
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        data = content.encode("utf-8", "surrogatepass")
    return f"[{kind}, {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:16]}]"


def without_media(value: Any, key: str | None = None) -> Any:
    """Replace each medium in a plain value by a few words."""
    if isinstance(value, str):
        return in_few_words(value, key)
    if isinstance(value, dict):
        return {name: without_media(item, name) for name, item in value.items()}
    return [without_media(item) for item in value] if isinstance(value, list) else value
