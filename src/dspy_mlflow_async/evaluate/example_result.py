"""Outcome of one example of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Tokens = Mapping[str, Mapping[str, int]]

NO_TOKENS: Tokens = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one example that has ended, well or not.

    Attributes:
        index: Its place in the devset.
        prediction: What the program returned; None for a failed example.
        score: What the metric returned; None for a failed example.
        error: What the program or the metric raised, as text, or None.
        duration: How long the program took, in seconds, or None where it did not begin.
        trace_id: MLflow's id of the prediction's trace, or None where there is none.
        program_tokens: The LM calls of the program: by model, numbers of tokens under MLflow's keys.
        metric_tokens: The same of the metric.
    """

    index: int
    prediction: Any = None
    score: Any = None
    error: str | None = None
    duration: float | None = None
    trace_id: str | None = None
    program_tokens: Tokens = field(default_factory=lambda: NO_TOKENS)
    metric_tokens: Tokens = field(default_factory=lambda: NO_TOKENS)

    @property
    def has_failed(self) -> bool:
        """True if the failure score counts for it."""
        return self.error is not None


def number_of(score: Any) -> float | None:
    """Return a score as a number: of a ``Prediction`` its ``score``; None for what is none."""
    try:
        return float(score)
    except Exception:  # noqa: BLE001 - the user's own type
        return None
