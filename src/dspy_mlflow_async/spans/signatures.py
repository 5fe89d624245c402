"""Texts of a signature, cached: they are the same for every call of a predictor, and slow to make."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import dspy


class SignatureTexts(NamedTuple):
    """Texts of a ``dspy.Signature`` that spans show.

    Attributes:
        short: ``question -> answer``.
        full: Its ``repr``, with instructions and fields.
    """

    short: str
    full: str


def texts_of(signature: type[dspy.Signature]) -> SignatureTexts:
    """The texts of a signature, made anew only when its instructions or fields have changed."""
    fingerprint = _fingerprint(signature)
    known = _known.get(signature)
    if known is not None and known[0] == fingerprint:
        return known[1]
    texts = SignatureTexts(signature.signature, repr(signature))
    _known[signature] = (fingerprint, texts)
    return texts


# By class, weakly. Two threads that miss at once both make the same texts.
_known: weakref.WeakKeyDictionary[type[dspy.Signature], tuple[Any, SignatureTexts]] = weakref.WeakKeyDictionary()


def _fingerprint(signature: type[dspy.Signature]) -> tuple[Any, ...]:
    """Key of the cached texts: DSPy makes a new class for a change, and some programs write into the old one."""
    fields = [
        (name, field.annotation, field.default, dict(field.json_schema_extra or {}))
        for name, field in signature.model_fields.items()
    ]
    return signature.__doc__, fields
