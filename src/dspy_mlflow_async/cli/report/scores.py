"""Conversion of a result table's score to a number, in whatever form the table has it."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

# A table holds the text of what JSON has no words for. In a Prediction's, a newline stands between fields only: those
# in a field's own text are escaped.
_FIELD = re.compile(r"(?:\APrediction\(|,)\n    score=(.+?)(?:,\n    |\n\))", re.DOTALL)
_CALL = re.compile(r"[\w.]+\((.*)\)")  # np.float32(0.5), Decimal('0.5'), Fraction(1, 3)
_TRUTH = {"True": 1.0, "False": 0.0}


def number_of(value: Any) -> float | None:
    """Return a score of a result table as a number, or None where it is none, NaN and infinities included."""
    if isinstance(value, dict):  # a Prediction with score and feedback
        value = value.get("score")
    if isinstance(value, str):
        value = _number_in(value)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _number_in(text: str) -> float | None:
    field = _FIELD.search(text)
    if field is None and text.startswith("Prediction("):
        return None  # one without a score
    text = field[1] if field else text
    call = _CALL.fullmatch(text)
    text = call[1].replace(", ", "/").strip("'\"") if call else text
    try:
        return _TRUTH[text] if text in _TRUTH else float(Fraction(text) if "/" in text else text)
    except (ValueError, ArithmeticError):
        return None
