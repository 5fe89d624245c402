"""Tokens and cost of many LM calls, added up by model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dspy_mlflow_async.seams import mlflow_runs
from dspy_mlflow_async.seams.mlflow_spans import TokenUsageKey
from dspy_mlflow_async.spans.usage import Ledger, token_usage


class TotalUsage(NamedTuple):
    """Tokens and cost of some LM calls.

    Attributes:
        calls: How many there were, those answered from DSPy's cache included.
        input_tokens: None where no provider reported any.
        output_tokens: The same.
        cost_usd: In US dollars; None where the price of a model that was used is not known.
    """

    calls: int
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float | None


def tokens_by_model(ledgers: Iterable[Ledger]) -> dict[str, dict[str, int]]:
    """The numbers of tokens in all these ledgers, by model, under MLflow's keys; models without any are left out.

    No call is without tokens: where all counts are 0, LiteLLM or the LM itself has filled in what nobody reported.
    """
    by_model: dict[str, list[Any]] = defaultdict(list)
    for ledger in ledgers:
        for model, usage in ledger.entries:
            by_model[model].append(usage)
    tokens = {model: token_usage(usages) for model, usages in by_model.items()}
    return {model: counted for model, counted in tokens.items() if any(counted.values())}


def restore(ledger: Ledger, tokens: Mapping[str, Mapping[str, int]]) -> None:
    """Put into a ledger what ``tokens_by_model`` has read from another."""
    for model, counted in tokens.items():
        usage: dict[str, Any] = {name: counted.get(key) for key, name in _PROVIDER_KEYS.items()}
        usage["prompt_tokens_details"] = {name: counted.get(key) for key, name in _PROVIDER_DETAILS.items()}
        ledger.entries.append((model, usage))


_PROVIDER_KEYS = {
    TokenUsageKey.INPUT_TOKENS: "prompt_tokens",
    TokenUsageKey.OUTPUT_TOKENS: "completion_tokens",
    TokenUsageKey.TOTAL_TOKENS: "total_tokens",
}
_PROVIDER_DETAILS = {
    TokenUsageKey.CACHE_READ_INPUT_TOKENS: "cached_tokens",
    TokenUsageKey.CACHE_CREATION_INPUT_TOKENS: "cache_creation_tokens",
}


def cost_of(tokens: Mapping[str, Mapping[str, int]]) -> float | None:
    """Cost of these tokens, by model, in US dollars; None where the price of one of the models is not known."""
    costs = [mlflow_runs.cost_in_usd(model, counted) for model, counted in tokens.items()]
    return None if any(cost is None for cost in costs) else sum(cost for cost in costs if cost is not None)


def add_up(ledgers: Iterable[Ledger]) -> TotalUsage:
    """The usage in all these ledgers."""
    ledgers = list(ledgers)
    calls = sum(ledger.calls for ledger in ledgers)
    tokens = tokens_by_model(ledgers)
    if not tokens:
        return TotalUsage(calls, None, None, None)
    return TotalUsage(
        calls,
        sum(counted[TokenUsageKey.INPUT_TOKENS] for counted in tokens.values()),
        sum(counted[TokenUsageKey.OUTPUT_TOKENS] for counted in tokens.values()),
        cost_of(tokens),
    )
