"""Budget of an ``evaluate_all`` in cost, tokens and time: when it is spent, nothing new starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from dspy_mlflow_async.evaluate.example_result import Outcome
from dspy_mlflow_async.evaluate.limits import Slots
from dspy_mlflow_async.runs.usage import cost_of
from dspy_mlflow_async.seams.mlflow_spans import TokenUsageKey

logger = logging.getLogger("dspy_mlflow_async")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on what may be spent.

    Attributes:
        cost: US dollars, or None.
        tokens: Input and output tokens together, or None.
        seconds: From the start, or None.
    """

    cost: float | None = None
    tokens: float | None = None
    seconds: float | None = None


class Budget:
    """Counter of what ended examples have spent, against the limits. It belongs to one event loop, so it needs no lock.

    Args:
        limits: The most that may be spent.
        slots: What is closed when it is.

    Attributes:
        reached: Which limit was reached, in words, or None.
        unpriced: The models that were used and whose price MLflow does not know, where there is a limit in dollars.
    """

    def __init__(self, limits: Limits, slots: Slots) -> None:
        self.reached: str | None = None
        self.unpriced: dict[str, None] = {}
        self._limits = limits
        self._slots = slots
        self._cost = 0.0
        self._tokens = 0

    def spend(self, outcome: Outcome) -> None:
        """Count an example that has ended."""
        for tokens in (outcome.program_tokens, outcome.metric_tokens):
            self._tokens += sum(counted.get(TokenUsageKey.TOTAL_TOKENS, 0) for counted in tokens.values())
            if self._limits.cost is not None:
                for model, counted in tokens.items():
                    self._pay(model, counted)
        limits = self._limits
        if limits.cost is not None and self._cost >= limits.cost:
            self._stop(f"max_cost: {self._cost:.4g} of {limits.cost:g} US dollars are spent")
        elif limits.tokens is not None and self._tokens >= limits.tokens:
            self._stop(f"max_tokens: {self._tokens} of {limits.tokens:g} tokens are used")

    def out_of_time(self) -> None:
        """Close the slots: the seconds are over."""
        self._stop(f"max_seconds: {self._limits.seconds:g} seconds are over")

    def _stop(self, reason: str) -> None:
        if self.reached is None:
            self.reached = reason
            self._slots.close()

    def _pay(self, model: str, counted: Mapping[str, int]) -> None:
        cost = cost_of({model: counted})
        self._cost += cost or 0.0
        if cost is None and model not in self.unpriced:
            self.unpriced[model] = None
            logger.warning("MLflow knows no price for %s: max_cost cannot count what it costs.", model)
