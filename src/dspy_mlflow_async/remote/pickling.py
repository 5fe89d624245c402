"""Pickles for other processes: by cloudpickle, part by part, with LMs that leave their history behind."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Mapping
from typing import Any, Literal

import cloudpickle
import dspy

from dspy_mlflow_async.composition import AutologCallback
from dspy_mlflow_async.seams.dspy import global_callbacks
from dspy_mlflow_async.seams.mlflow_spans import EXCLUDE_LM_PARAMS
from dspy_mlflow_async.spans.secret_names import names_secret
from dspy_mlflow_async.spans.secret_texts import mask

logger = logging.getLogger("dspy_mlflow_async")

Secrets = Literal["carried", "environment"]
_NO_SECRETS = frozenset({"api_base", "base_url", "headers", "extra_headers"})  # of MLflow's list: looked into instead


class NotCarriedError(TypeError):
    """Error of something that cannot go to another process; its text says what that is."""


def check_secrets(secrets: Any) -> Secrets:
    """Return how secrets travel.

    Raises:
        ValueError: For what is no way.
    """
    if secrets not in ("carried", "environment"):
        raise ValueError(f"secrets must be 'carried' or 'environment', not {secrets!r}")
    return "environment" if secrets == "environment" else "carried"


def dumps(name: str, value: Any, secrets: Secrets = "carried") -> bytes:
    """Pickle a part of what goes to another process.

    Args:
        name: What an error calls it.
        value: The part.
        secrets: Whether the keys of LMs go along, or are left to the environment over there.

    Raises:
        NotCarriedError: Where it cannot be pickled.
    """
    file = io.BytesIO()
    try:
        _Pickler(file, secrets).dump(value)
    except Exception as error:  # noqa: BLE001 - it may hold anything: a lock, a client, a generator
        why = mask(f"{type(error).__name__}: {error}")
    else:
        return file.getvalue()
    raise NotCarriedError(f"{name} cannot be sent to another process ({why})")  # a chained error might show a key


def loads(data: bytes) -> Any:
    """Return what ``dumps`` was given."""
    return cloudpickle.loads(data)


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO, secrets: Secrets) -> None:
        super().__init__(file)
        self._leaves_keys = secrets == "environment"

    def reducer_override(self, obj: Any) -> Any:
        """Pickle an LM bare, whatever holds it."""
        if isinstance(obj, dspy.BaseLM):
            return _bare(obj, leaves_keys=self._leaves_keys).__reduce_ex__(4)
        return super().reducer_override(obj)


def _bare(lm: Any, *, leaves_keys: bool) -> Any:
    bare = copy.copy(lm)
    attributes = vars(bare)
    if "history" in attributes:
        attributes["history"] = []
    if leaves_keys:
        for name, value in list(attributes.items()):
            if _is_key(name):
                attributes[name] = None
            elif isinstance(value, dict):
                attributes[name] = _without_keys(value)
    return bare


def _is_key(name: object) -> bool:
    return names_secret(name) or (name in EXCLUDE_LM_PARAMS and name not in _NO_SECRETS)


def _without_keys(values: Mapping[Any, Any]) -> dict[Any, Any]:
    return {
        name: _without_keys(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if not _is_key(name)
    }


# --- DSPy's settings ------------------------------------------------------------------------------------------------


def dump_settings(settings: Mapping[str, Any], secrets: Secrets = "carried") -> bytes:
    """Pickle DSPy's settings, each by itself, so that an error can say which one it is.

    Callbacks that cannot be pickled stay here, with a warning: they watch, and change no result. The tracer's own is
    the one that is installed over there.

    Raises:
        NotCarriedError: Where another setting cannot be pickled.
    """
    parts: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "callbacks":
            parts[name] = _dump_callbacks(value or (), secrets)
        else:
            parts[name] = dumps(f"DSPy's setting {name!r}", value, secrets)
    return cloudpickle.dumps(parts)


def load_settings(data: bytes) -> dict[str, Any]:
    """Return settings for ``dspy.context``, with the tracer of this process among the callbacks."""
    parts: dict[str, Any] = loads(data)
    own = [each for each in global_callbacks() if isinstance(each, AutologCallback)]
    settings = {name: loads(part) for name, part in parts.items() if name != "callbacks"}
    return {**settings, "callbacks": [*map(loads, parts.get("callbacks", ())), *own]}


def _dump_callbacks(callbacks: Any, secrets: Secrets) -> list[bytes]:
    dumped = []
    for each in callbacks:
        if isinstance(each, AutologCallback):
            continue
        try:
            dumped.append(dumps("a callback", each, secrets))
        except NotCarriedError as error:
            logger.warning("The callback %s is not called in other processes: %s.", type(each).__name__, error)
    return dumped
