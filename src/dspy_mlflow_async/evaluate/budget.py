"""What an ``evaluate_all`` may spend: when it is spent, nothing new starts."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from dspy_mlflow_async.evaluate.outcome import Outcome
from dspy_mlflow_async.evaluate.slots import Slots
from dspy_mlflow_async.runs.usage import cost_of
from dspy_mlflow_async.seams.mlflow import TokenUsageKey

logger = logging.getLogger("dspy_mlflow_async")


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that may be spent.

    Attributes:
        cost: US dollars, or None.
        tokens: Input and output tokens together, or None.
        seconds: From the start, or None.
    """

    cost: float | None = None
    tokens: float | None = None
    seconds: float | None = None


class Budget:
    """What the examples that have ended have spent. It belongs to one event loop, so it needs no lock.

    Args:
        limits: The most that may be spent.
        slots: What is closed when it is.

    Attributes:
        reached: Which limit was reached, in words, or None.
    """

    def __init__(self, limits: Limits, slots: Slots) -> None:
        self.reached: str | None = None
        self._limits = limits
        self._slots = slots
        self._cost = 0.0
        self._tokens = 0
        self._has_warned = False

    def spend(self, outcome: Outcome) -> None:
        """Count an example that has ended."""
        for tokens in (outcome.program_tokens, outcome.metric_tokens):
            self._tokens += sum(counted.get(TokenUsageKey.TOTAL_TOKENS, 0) for counted in tokens.values())
            if tokens and self._limits.cost is not None:
                cost = cost_of(tokens)
                self._cost += cost or 0.0
                if cost is None:
                    self._warn(", ".join(tokens))
        limits = self._limits
        if limits.cost is not None and self._cost >= limits.cost:
            self._stop(f"max_cost: {self._cost:.4g} of {limits.cost:g} US dollars are spent")
        elif limits.tokens is not None and self._tokens >= limits.tokens:
            self._stop(f"max_tokens: {self._tokens} of {limits.tokens:g} tokens are used")

    def out_of_time(self) -> None:
        """The seconds are over."""
        self._stop(f"max_seconds: {self._limits.seconds:g} seconds are over")

    def _stop(self, reason: str) -> None:
        if self.reached is None:
            self.reached = reason
            self._slots.close()

    def _warn(self, models: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning("MLflow knows no price for %s: max_cost cannot count what it costs.", models)
