"""Turns what spans show of values back into the values: pictures from attachments, the rest by the signature."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import dspy
import pydantic

from dspy_mlflow_async.seams.dspy import CUSTOM_TYPE_END_IDENTIFIER, CUSTOM_TYPE_START_IDENTIFIER
from dspy_mlflow_async.seams.mlflow_artifact_reads import read_attachment
from dspy_mlflow_async.spans.secret_names import MASK

_SCHEME = "mlflow-attachment"
_CUT = "[cut: "


def texts(value: Any) -> Iterator[str]:
    """Yield all texts in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def is_cut(value: Any) -> bool:
    """Return whether a part of a value was left out when it was stored."""
    return any(_CUT in text for text in texts(value))


def is_masked(value: Any) -> bool:
    """Return whether a part of a value was masked when it was stored."""
    return any(MASK in text for text in texts(value))


def with_pictures(value: Any, uri: str) -> Any:
    """Return a value with ``dspy.Image`` in place of the blocks of content that stand for one.

    Args:
        value: JSON.
        uri: The resolved tracking URI of the store that has the attachments.
    """
    if (
        isinstance(value, str)
        and value.startswith(CUSTOM_TYPE_START_IDENTIFIER)
        and value.endswith(CUSTOM_TYPE_END_IDENTIFIER)
    ):
        try:
            value = json.loads(value[len(CUSTOM_TYPE_START_IDENTIFIER) : -len(CUSTOM_TYPE_END_IDENTIFIER)])
        except ValueError:
            return value
    if isinstance(value, list):
        url = _url_of_picture(value)
        return dspy.Image(url=_whole(url, uri)) if url else [with_pictures(item, uri) for item in value]
    return {key: with_pictures(item, uri) for key, item in value.items()} if isinstance(value, dict) else value


def _url_of_picture(blocks: list[Any]) -> str | None:
    if len(blocks) != 1 or not isinstance(blocks[0], dict) or blocks[0].get("type") != "image_url":
        return None
    found = blocks[0].get("image_url")
    url = found.get("url") if isinstance(found, dict) else found
    return url if isinstance(url, str) else None


def _whole(url: str, uri: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != _SCHEME:
        return url
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}
    content = read_attachment(uri, query["trace_id"], parts.hostname or "")
    return f"data:{query['content_type']};base64,{base64.b64encode(content).decode()}"


def converters(signature: type[dspy.Signature] | None) -> dict[str, Callable[[Any], Any]]:
    """Return what makes values of a signature's fields of JSON, by field."""
    if signature is None:
        return {}
    return {name: functools.partial(_convert, field.annotation) for name, field in signature.fields.items()}


def _convert(annotation: Any, value: Any) -> Any:
    """Return a value of this type.

    Raises:
        pydantic.ValidationError: Where it cannot be one.
    """
    if annotation is str or isinstance(value, dspy.Image):
        return value
    return pydantic.TypeAdapter(annotation).validate_python(value)
