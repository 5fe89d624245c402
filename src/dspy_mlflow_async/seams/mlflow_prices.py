"""Prices of tokens as MLflow reckons them, without importing LiteLLM in a thread that the user does not know of.

The import takes seconds of CPU, and a thread that imports may wait for ever for one that holds MLflow's import hooks.
"""

from __future__ import annotations

import builtins
import functools
import os
from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import Any

from mlflow.tracing import utils as tracing_utils
from mlflow.tracing.constant import TokenUsageKey

from dspy_mlflow_async.seams.listed import taken
from dspy_mlflow_async.seams.litellm_prices import cost_of_tokens, is_imported
from dspy_mlflow_async.seams.mlflow_http import is_limited
from dspy_mlflow_async.seams.patching import Undo, over, patch, together

_PROVIDERS = "mlflow.utils.providers"
_CALCULATE = "mlflow.tracing.utils:calculate_cost_by_model_and_token_usage"

__all__ = ["cost_in_usd", "patch_prices"]


def cost_in_usd(model: str, tokens: Mapping[str, int]) -> float | None:
    """Return what MLflow reckons that these tokens cost, or None for a model without a known price."""
    provider, _, name = model.rpartition("/")
    calculate = taken(_CALCULATE)
    if calculate is not None and is_imported():
        cost = calculate(model, dict(tokens), provider.partition("/")[0] or None)
        return None if cost is None else float(cost["total_cost"])
    # MLflow would import it now, and it then looks for prices in the network, for seconds where there is none.
    providers = taken("mlflow.utils:providers")
    if providers is None or taken("mlflow.utils.providers:cost_per_token") is None:
        return None
    costs = _bundled(providers).cost_per_token(
        model=name,
        prompt_tokens=tokens.get(TokenUsageKey.INPUT_TOKENS, 0),
        completion_tokens=tokens.get(TokenUsageKey.OUTPUT_TOKENS, 0),
        custom_llm_provider=provider.partition("/")[0] or None,
        cache_read_input_tokens=tokens.get(TokenUsageKey.CACHE_READ_INPUT_TOKENS),
        cache_creation_input_tokens=tokens.get(TokenUsageKey.CACHE_CREATION_INPUT_TOKENS),
    )
    return None if costs is None else float(sum(costs))


def patch_prices() -> Undo:
    """Price the spans of our own writes by LiteLLM where the program has imported it, else by MLflow.

    Everybody else's calls are as they were.

    Returns:
        The undo.
    """
    calculate, providers = taken(_CALCULATE), taken("mlflow.utils:providers")
    if not isinstance(calculate, FunctionType) or providers is None:
        return lambda: None
    name = calculate.__name__
    owners = (taken("mlflow.tracing.otel:translation"), tracing_utils)
    return together(
        *(
            patch(owner, **{name: _without_import(getattr(owner, name), providers)})
            for owner in owners
            if hasattr(owner, name)
        )
    )


def _without_import(original: Any, providers: ModuleType) -> Any:
    offline = _offline(original, providers)

    @functools.wraps(original)
    def calculate_cost_by_model_and_token_usage(*args: Any, **kwargs: Any) -> Any:
        if not is_limited():
            return original(*args, **kwargs)
        if not is_imported():
            return offline(*args, **kwargs)
        return original(*args, **kwargs) if kwargs else cost_of_tokens(original, *args)

    return calculate_cost_by_model_and_token_usage


@functools.cache
def _bundled(providers: ModuleType) -> ModuleType:
    """Return MLflow's module of prices as it is where no catalog is in the network: with the prices that came with it.

    MLflow would ask the internet for the catalog of a provider, again and again, while a write holds the database or
    somebody waits for the end of an evaluation.
    """
    prices = ModuleType(_PROVIDERS)
    vars(prices).update(vars(providers))
    changes = os.environ.get("MLFLOW_MODEL_CATALOG_URI", "").startswith("file:")  # a mirror on this machine
    if not changes:
        vars(prices).update(_fetch_remote_provider=lambda _provider: None)
    for name in ("_load_provider", "_lookup_model_info", "cost_per_token"):
        if isinstance(function := getattr(providers, name, None), FunctionType):
            setattr(prices, name, over(function, vars(prices)))
    if not changes and hasattr(prices, "_lookup_model_info"):
        # For a model without a price MLflow looks into the catalogs of all providers, one after the other.
        vars(prices).update(_lookup_model_info=functools.lru_cache(maxsize=1024)(prices._lookup_model_info))
    return prices


def _offline(original: FunctionType, providers: ModuleType) -> Any:
    """Return MLflow's function as it is where LiteLLM is not installed and no catalog of prices is in the network."""
    prices = _bundled(providers)

    def import_(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "litellm":
            raise ImportError(name)
        return prices if name == _PROVIDERS else builtins.__import__(name, *args, **kwargs)

    names = vars(builtins) | {"__import__": import_}
    return over(original, original.__globals__ | {"__builtins__": names})
