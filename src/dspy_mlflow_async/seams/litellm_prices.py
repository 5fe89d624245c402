"""Prices of tokens by LiteLLM, asked once a minute for a model that costs so much a token, and reckoned in between.

LiteLLM takes 0.3 ms of CPU to price a call of a model that it knows, and 0.5 ms for one that it does not know (1.110):
as much as a writer takes for all the rest of a small trace.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mlflow.tracing.constant import CostKey, TokenUsageKey

Cost = dict[str, float]
Calculate = Callable[[Any, Any, Any], "Cost | None"]

# What LiteLLM's list may say of a price that is so much a token, whatever the hour and however many there are.
_VARIANTS = ("", "_batches", "_priority", "_flex")  # tiers of a service that nobody asks for here
_SIMPLE = frozenset(
    name + variant
    for name, variant in itertools.product(
        (
            *("input_cost_per_token", "output_cost_per_token", "output_cost_per_reasoning_token"),
            *("input_cost_per_audio_token", "output_cost_per_audio_token", "input_cost_per_image_token"),
            *("cache_read_input_token_cost", "cache_creation_input_token_cost", "cache_read_input_audio_token_cost"),
            *("cache_creation_input_token_cost_above_1hr", "search_context_cost_per_query"),
            "google_maps_grounding_cost_per_query",
        ),
        _VARIANTS,
    )
)
_TELLING = ("cost", "pric", "tier", "peak")  # in a key that has to do with prices
_CACHED = (TokenUsageKey.CACHE_READ_INPUT_TOKENS, TokenUsageKey.CACHE_CREATION_INPUT_TOKENS)
_VALID_SECONDS = 60.0
_MOST_MODELS = 1024


class _Tariff(NamedTuple):
    """Price of a model, as far as it is known.

    Attributes:
        size: How many models LiteLLM's list has; whoever registers one may change what another is taken for.
        name: The model's name there; none has "" where it is not on the list.
        entry: What the list says of it; None where it says nothing.
        until: When it is asked again, on the monotonic clock.
        rates: US dollars for a token of input and of output; None where LiteLLM knows no price.
        is_simple: Whether that is all there is to it; otherwise LiteLLM is asked each time.
    """

    size: int
    name: str
    entry: dict[str, Any] | None
    until: float
    rates: tuple[float, float] | None
    is_simple: bool


_tariffs: dict[tuple[str, str | None], _Tariff] = {}


def is_imported() -> bool:
    """Return whether LiteLLM is there for use. While another thread imports it, whoever uses it waits for that."""
    module = sys.modules.get("litellm")
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


def cost_of_tokens(
    calculate: Calculate, model: str | None, usage: Mapping[str, int] | None, provider: str | None = None
) -> Cost | None:
    """Return what MLflow reckons for these tokens; where LiteLLM is imported, without asking it each time.

    Args:
        calculate: MLflow's function, which asks LiteLLM where that is imported.
        model: The model's name.
        usage: Its tokens, by the names of ``TokenUsageKey``.
        provider: The provider's name, if it is known.

    Returns:
        The US dollars by the names of ``CostKey``; None for a model without a known price.
    """
    prices = getattr(sys.modules.get("litellm"), "model_cost", None) if is_imported() else None
    tokens = _plain_tokens(usage)
    if tokens is None or type(prices) is not dict or type(model) is not str or type(provider) not in _NAMES:
        return calculate(model, usage, provider)
    tariff = _tariffs.get((model, provider))
    if tariff is None or not _is_valid(tariff, prices):
        if len(_tariffs) >= _MOST_MODELS:
            _tariffs.clear()
        _tariffs[model, provider] = tariff = _asked(calculate, prices, model, provider)
    if not tariff.is_simple:
        return calculate(model, usage, provider)
    return None if tariff.rates is None else _cost(tariff.rates, tokens)


def _plain_tokens(usage: Mapping[str, int] | None) -> tuple[int, int] | None:
    """Return the tokens of input and of output; None where there is none of a kind, or where some came from a cache."""
    if type(usage) is not dict or any(map(usage.get, _CACHED)):
        return None
    of_input, of_output = usage.get(TokenUsageKey.INPUT_TOKENS), usage.get(TokenUsageKey.OUTPUT_TOKENS)
    if type(of_input) is int and type(of_output) is int and of_input > 0 and of_output > 0:
        return of_input, of_output
    return None


def _is_valid(tariff: _Tariff, prices: Mapping[str, Any]) -> bool:
    try:
        is_same = bool(prices.get(tariff.name) == tariff.entry)
    except Exception:  # noqa: BLE001 - whatever somebody has registered there
        return False
    return is_same and tariff.size == len(prices) and time.monotonic() < tariff.until


def _asked(calculate: Calculate, prices: Mapping[str, Any], model: str, provider: str | None) -> _Tariff:
    """Return what LiteLLM says of a model, after asking it for some tokens and for more of them."""
    # The names that LiteLLM looks for, in its order.
    names = (f"{(provider or '').lower()}/{model}", model, model.partition("/")[2])
    name = next(filter(prices.__contains__, names), "")
    found = prices.get(name)
    entry = dict(found) if type(found) is dict else None
    costs = [calculate(model, dict(zip(_KINDS, tokens, strict=True)), provider) for tokens in _SAMPLES]
    is_unknown = costs == [None, None]  # for some providers it asks the network first, and waits
    rates = None if is_unknown or entry is None else _rates(entry)
    # As text, since 0 is not 0.0 where it is stored.
    is_simple = is_unknown or (rates is not None and repr(costs) == repr([_cost(rates, tokens) for tokens in _SAMPLES]))
    return _Tariff(len(prices), name, entry, time.monotonic() + _VALID_SECONDS, rates, is_simple)


_KINDS = (TokenUsageKey.INPUT_TOKENS, TokenUsageKey.OUTPUT_TOKENS)
_NAMES = (str, type(None))
_NUMBERS = (int, float)
_SAMPLES = ((1_009, 211), (31_013, 4_003))


def _rates(entry: dict[str, Any]) -> tuple[float, float] | None:
    """Return what a token of input and of output costs; None where the list says more of its price."""
    if not _SIMPLE.issuperset(filter(_has_to_do_with_prices, entry)):
        return None
    of_input, of_output = entry.get("input_cost_per_token"), entry.get("output_cost_per_token")
    return (of_input, of_output) if isinstance(of_input, _NUMBERS) and isinstance(of_output, _NUMBERS) else None


def _has_to_do_with_prices(key: Any) -> bool:
    return type(key) is not str or any(word in key for word in _TELLING)


def _cost(rates: tuple[float, float], tokens: tuple[int, int]) -> Cost:
    of_input, of_output = (float(count) * rate for count, rate in zip(tokens, rates, strict=True))
    return {CostKey.INPUT_COST: of_input, CostKey.OUTPUT_COST: of_output, CostKey.TOTAL_COST: of_input + of_output}
