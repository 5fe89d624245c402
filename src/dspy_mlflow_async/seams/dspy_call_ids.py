"""Ids of DSPy's calls, made without asking the system for each."""

from __future__ import annotations

import uuid
from typing import Any

import dspy.utils.callback as dspy_callback

from dspy_mlflow_async.seams.own_ids import random_bits
from dspy_mlflow_async.seams.patching import ModuleStandIn, Undo, patch

_uuid4 = uuid.uuid4
_UNKNOWN = uuid.SafeUUID.unknown
_set = object.__setattr__
_new: Any = object.__new__
_FREE = ~(0xF << 76 | 0x3 << 62)  # all bits but those of the version and the variant
_VERSION_4 = 0x4 << 76 | 0x2 << 62


def patch_call_ids() -> Undo:
    """Make DSPy's ids of calls from random numbers of our own.

    ``with_callbacks`` makes one by ``uuid.uuid4()`` for each call that has callbacks. That asks the system, and lets go
    of the interpreter meanwhile: a caller then waits until the thread that writes lets go of it. Where this DSPy makes
    them elsewhere, it does.

    Returns:
        The undo.
    """
    if getattr(dspy_callback, "uuid", None) is not uuid or not _makes_uuids():
        return lambda: None
    return patch(dspy_callback, uuid=_Uuid(uuid))


class _Uuid(ModuleStandIn):
    """Module ``uuid``, with ``uuid4`` of ours."""

    @staticmethod
    def uuid4() -> uuid.UUID:
        """Return a random UUID, as ``uuid.uuid4`` does, and by that where somebody has put another there."""
        if uuid.uuid4 is not _uuid4:
            return uuid.uuid4()
        made: uuid.UUID = _new(uuid.UUID)
        _set(made, "int", random_bits(128) & _FREE | _VERSION_4)  # as its constructor does, which checks much
        _set(made, "is_safe", _UNKNOWN)
        return made


def _makes_uuids() -> bool:
    """Return whether what is made here is what the constructor makes."""
    try:
        made = _Uuid.uuid4()
        return made == uuid.UUID(bytes=made.bytes, version=4) and made.is_safe is _UNKNOWN
    except Exception:  # noqa: BLE001 - a future Python may keep its UUIDs elsewhere; then it makes them
        return False
