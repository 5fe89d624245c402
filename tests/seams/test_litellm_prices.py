"""What LiteLLM is asked once for a model is, for each call of it, what LiteLLM would have said."""

import itertools
import types

import dspy
import litellm
import pytest
from mlflow.tracing.utils import calculate_cost_by_model_and_token_usage

from dspy_mlflow_async import export
from dspy_mlflow_async.seams import litellm_prices
from dspy_mlflow_async.seams.litellm_prices import cost_of_tokens
from echo import EchoLM

USAGES = (
    *({"input_tokens": 1, "output_tokens": 1}, {"input_tokens": 977, "output_tokens": 83, "total_tokens": 1060}),
    *({"input_tokens": 150_001, "output_tokens": 7}, {"input_tokens": 900_000, "output_tokens": 70_001}),
    *({"input_tokens": 10, "output_tokens": 0}, {"input_tokens": 0, "output_tokens": 5}, {"input_tokens": 7}, {}, None),
    {"input_tokens": 50, "output_tokens": 5, "cache_read_input_tokens": 0, "cache_creation_input_tokens": None},
    {"input_tokens": 50, "output_tokens": 5, "cache_read_input_tokens": 40, "cache_creation_input_tokens": 10},
)

ASKING = {"github_copilot", "chatgpt", "ollama", "ollama_chat"}  # LiteLLM asks the network for what these are
STARTS = itertools.count(1000.0, 1000.0)  # of the clock of each test


class Asked:
    """MLflow's function, which notes when it is asked."""

    def __init__(self):
        self.count = 0

    def __call__(self, *args):
        self.count += 1
        return calculate_cost_by_model_and_token_usage(*args)


@pytest.fixture(autouse=True)
def now(monkeypatch):
    """The time, at which nothing is known of any price."""
    start = next(STARTS)
    monkeypatch.setattr(litellm_prices, "time", types.SimpleNamespace(monotonic=lambda: start))
    return start


def models():
    """Some of the models of LiteLLM's list, each with its provider and without, and some that are not on it."""
    chats = [
        (name, entry)
        for name, entry in litellm.model_cost.items()
        if entry.get("mode") in {"chat", "responses"} and entry.get("litellm_provider") not in ASKING
    ]
    for name, entry in chats[::17]:
        yield name, None
        yield name.partition("/")[2] or name, entry.get("litellm_provider")
    for name in ("gpt-4o-mini", "scripted", "echo/one", "", None):
        for provider in ("openai", "OpenAI", "nobody", None):
            yield name, provider


def test_costs_are_what_litellm_says():
    """To the last bit, for models of all sorts and any usage."""
    asked, simple = Asked(), 0
    for model, provider in models():
        expected = [calculate_cost_by_model_and_token_usage(model, usage, provider) for usage in USAGES]
        cost_of_tokens(asked, model, USAGES[0], provider)
        before = asked.count

        assert repr(expected) == repr([cost_of_tokens(asked, model, usage, provider) for usage in USAGES]), model
        simple += asked.count == before + 6  # those without tokens of a kind, or with some from a cache
    assert simple > 100


@pytest.mark.parametrize("model", ["gpt-4o-mini", "scripted"])
def test_a_model_is_asked_for_once(model):
    """Whether its price is known or not, and however many tokens there are."""
    asked = Asked()
    for count in range(1, 50):
        cost_of_tokens(asked, model, {"input_tokens": count, "output_tokens": count}, "openai")

    assert asked.count == 2  # for few tokens, and for many


def test_a_price_that_somebody_registers_counts_at_once():
    """That of a model that was not on the list, and another one for it then."""
    usage, costs = {"input_tokens": 1000, "output_tokens": 10}, []
    for price in (None, 1.0, 2.0):
        if price is not None:
            entry = {"input_cost_per_token": price, "output_cost_per_token": 0.0, "litellm_provider": "openai"}
            litellm.register_model({"registered-here": entry})
        costs.append(cost_of_tokens(Asked(), "registered-here", usage, "openai"))

    assert costs[0] is None
    assert [1000.0, 2000.0] == [cost["input_cost"] for cost in costs[1:]]


def test_what_is_not_so_much_a_token_is_asked_each_time():
    """A price that depends on how many tokens there are, or on the hour, is LiteLLM's to reckon."""
    rate, above = "input_cost_per_token", "input_cost_per_token_above_200k_tokens"
    name, entry = next((name, entry) for name, entry in litellm.model_cost.items() if entry.get(above))
    asked = Asked()
    for count in (1000, 300_000):
        cost = cost_of_tokens(asked, name, {"input_tokens": count, "output_tokens": 1}, None)
        assert pytest.approx(entry[above if count > 200_000 else rate] * count) == cost["input_cost"]

    assert asked.count == 4


def test_it_is_asked_again_after_a_minute(now, monkeypatch):
    """Some of what LiteLLM says it asks others for."""
    asked, usage = Asked(), {"input_tokens": 10, "output_tokens": 1}
    cost_of_tokens(asked, "scripted", usage, "openai")
    monkeypatch.setattr(litellm_prices, "time", types.SimpleNamespace(monotonic=lambda: now + 61.0))
    cost_of_tokens(asked, "scripted", usage, "openai")

    assert asked.count == 4


def test_writing_traces_asks_litellm_seldom(stored, monkeypatch):
    """The writer's work on a trace is not that of LiteLLM on its price."""
    asked = []
    cost_per_token = litellm.cost_per_token
    monkeypatch.setattr(litellm, "cost_per_token", lambda **names: asked.append(1) or cost_per_token(**names))
    dspy.configure(lm=EchoLM(model="openai/gpt-4o-mini"))
    predict = dspy.Predict("question -> answer")
    for number in range(40):
        predict(question=f"@{number}")
    export.flush()

    assert len(asked) <= 4  # two for the proof of the rows, which is of other spans, and two for all of these
    assert {True} == {trace.info.cost["total_cost"] > 0 for trace in stored()}
