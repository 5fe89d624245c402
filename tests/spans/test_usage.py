"""Tokens, cost and cache hits: those of exactly one call, and the sum over a trace."""

import asyncio

import dspy
import mlflow
import pytest

from dspy_mlflow_async import suppress
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
from dspy_mlflow_async.spans.usage import token_usage
from dspy_mlflow_async.testing import tree
from echo import TIMEOUT, Barrier, Chain, EchoLM, marker

USAGE = "mlflow.chat.tokenUsage"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], {}),
        ([{}], {}),
        ([{"cost": 1.0}], {}),
        ([{"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}], (1, 2, 3)),
        ([{"prompt_tokens": 1, "completion_tokens": 2}], (1, 2, 3)),
        ([{"prompt_tokens": 1}], (1, 0, 1)),
        ([{"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}], (0, 0, 0)),
        ([{"total_tokens": 5}], (0, 0, 5)),
        ([{"prompt_tokens": 1, "completion_tokens": None}], (1, 0, 1)),
        ([{"prompt_tokens": 1, "completion_tokens": 2}] * 3, (3, 6, 9)),
        ([{"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}], (1, 2, 3)),
        ([{"input_tokens": 1, "output_tokens": 2}], (1, 2, 3)),
        ([{"prompt_tokens": 1, "completion_tokens": 2, "input_tokens": 1, "output_tokens": 2}], (1, 2, 3)),
        ([{"prompt_tokens": None, "input_tokens": 1, "completion_tokens": 2}], (1, 2, 3)),
        ([{"input_tokens": 1, "output_tokens": 2}, {"prompt_tokens": 3, "completion_tokens": 4}], (4, 6, 10)),
        ([{"prompt_tokens": True, "completion_tokens": "2"}], None),
        ([{"prompt_tokens": float("nan"), "completion_tokens": 1}], None),
        ([{"prompt_tokens": float("inf"), "completion_tokens": 1}], None),
    ],
)
def test_token_usage(entries, expected):
    """Providers' counts under MLflow's keys; what is no count is left out, and never raises."""
    found = token_usage(entries)

    if expected is None:
        assert all(isinstance(count, int) for count in found.values())
    else:
        keys = ("input_tokens", "output_tokens", "total_tokens")
        assert (dict(zip(keys, expected, strict=True)) if expected else {}) == found


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 7, "cache_creation_tokens": 2}},
        {"input_tokens": 10, "input_tokens_details": {"cached_tokens": 7, "cache_creation_tokens": 2}},
        {"input_tokens": 10, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 2},
        {
            "prompt_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 7, "cache_creation_tokens": 2},
            "cache_read_input_tokens": 7,
            "cache_creation_input_tokens": 2,
        },
    ],
    ids=["chat", "responses", "anthropic", "litellm"],
)
def test_cached_tokens(usage):
    """What a provider read from and wrote to its prompt cache, wherever it says so, and counted once."""
    found = token_usage([usage])

    assert (10, 7, 2) == (
        found["input_tokens"],
        found["cache_read_input_tokens"],
        found["cache_creation_input_tokens"],
    )


def usages(trace, name="EchoLM.__call__"):
    """Usage of each LM call by its marker."""
    return {marker(span): span.get_attribute(USAGE) for span in trace.data.spans if span.name == name}


def test_calls_at_once_do_not_mix(traces):
    """Twelve calls that are open at once: each span has the tokens of its own call."""
    dspy.configure(lm=EchoLM(during=Barrier(12)))
    markers = ["@" + "x" * n for n in range(1, 13)]
    examples = [dspy.Example(question=each).with_inputs("question") for each in markers]
    dspy.Parallel(num_threads=12, disable_progress_bar=True)(
        [(dspy.Predict("question -> answer"), e) for e in examples]
    )

    assert {each: len(each) for each in markers} == {
        each: usage["output_tokens"] for trace in traces for each, usage in usages(trace).items()
    }


async def test_tasks_at_once_do_not_mix(traces):
    """The same in tasks, whose calls end in another order than they began."""
    markers = ["@" + "x" * n for n in range(1, 7)]
    turns = {each: asyncio.Event() for each in markers}

    async def last_first(each):
        follower = "@" + "x" * len(each)
        if follower in turns:
            await asyncio.wait_for(turns[follower].wait(), TIMEOUT)
        turns[each].set()

    dspy.configure(lm=EchoLM(aduring=last_first))
    await asyncio.gather(*(dspy.Predict("question -> answer").acall(question=each) for each in markers))

    assert {each: len(each) for each in markers} == {
        each: usage["output_tokens"] for trace in traces for each, usage in usages(trace).items()
    }


def test_the_sum_over_a_trace_through_everything(traces):
    """Nested modules, workers, tasks: the root's sum is that of the LM spans, each counted once."""

    class Everything(dspy.Module):
        def __init__(self):
            super().__init__()
            self.chain = Chain()

        def forward(self, question):
            self.chain(question=question)
            self.chain.batch(
                [dspy.Example(question="@b").with_inputs("question")] * 3, num_threads=2, disable_progress_bar=True
            )

            async def tasks():
                await asyncio.gather(*(self.chain.acall(question="@ccc") for _ in range(2)))

            asyncio.run(tasks())
            return self.chain(question=question)

    Everything()(question="@a")

    (trace,) = traces
    lm_spans = [span for span in trace.data.spans if span.name == "EchoLM.__call__"]
    total = sum(span.get_attribute(USAGE)["total_tokens"] for span in lm_spans)
    root = next(span for span in trace.data.spans if span.parent_id is None)
    assert 14 == len(lm_spans)
    assert total == root.get_attribute(USAGE)["total_tokens"] == trace.info.token_usage["total_tokens"]


def test_calls_inside_a_user_span_count_for_the_trace(traces):
    """A trace whose root is a user's span has the sum, too."""
    with mlflow.start_span("mine"):
        Chain()(question="@a")
        Chain()(question="@a")

    assert 4 * 12 == traces[0].info.token_usage["total_tokens"]


def test_a_failing_call_is_counted_as_far_as_it_reported(traces):
    """A call that fails reports nothing here; its neighbours do."""

    def fail(each):
        if each == "@fails":
            raise ValueError(each)

    dspy.configure(lm=EchoLM(during=fail), adapter=dspy.ChatAdapter(use_json_adapter_fallback=False))
    with mlflow.start_span("mine"):
        Chain()(question="@a")
        with pytest.raises(ValueError, match="@fails"):
            Chain()(question="@fails")

    assert 2 * 12 == traces[0].info.token_usage["total_tokens"]


def test_a_tracker_of_the_users_beside_ours(traces):
    """Whether it stands in the context or in the configuration, the spans have their tokens as well."""
    tracker = dspy.utils.usage_tracker.UsageTracker()
    dspy.configure(usage_tracker=tracker)
    Chain()(question="@a")
    with dspy.track_usage() as inner:
        Chain()(question="@a")

    assert [2 * 12] * 2 == [trace.info.token_usage["total_tokens"] for trace in traces]
    assert {12} == {usage["total_tokens"] for trace in traces for usage in [*usages(trace).values()]}
    assert [["echo/one"]] * 2 == [list(each.usage_data) for each in (tracker, inner)]


def test_suppressed_calls_count_for_the_module_that_made_them(traces):
    """They have no span, and are in the sum of the module around them, as in DSPy's own ``get_lm_usage()``."""

    class Program(dspy.Module):
        def __init__(self):
            super().__init__()
            self.chain = Chain()

        def forward(self, question):
            with suppress():
                self.chain(question="@silent")
            return self.chain(question=question)

    Program()(question="@a")

    (trace,) = traces
    assert 2 == sum(span.name == "EchoLM.__call__" for span in trace.data.spans)
    assert 2 * 12 + 2 * 17 == trace.info.token_usage["total_tokens"]


# --- real HTTP --------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint():
    """An OpenAI-compatible endpoint on loopback that echoes the last marker."""

    def answer(body):
        found = next(iter(body["messages"][-1]["content"].split("@")[1:]), "?").split()[0]
        return {
            "content": f"[[ ## answer ## ]]\n@{found}\n\n[[ ## completed ## ]]",
            "usage": {"prompt_tokens": 100, "completion_tokens": len(found), "total_tokens": 100 + len(found)},
        }

    with LocalEndpoint(answer) as served:
        yield served


def model(endpoint, **kwargs):
    """DSPy's own LM at that endpoint."""
    return dspy.LM("openai/gpt-4o-mini", api_base=endpoint.api_base, api_key="sk-none", **kwargs)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_usage_and_cache_hits_over_http(traces, endpoint):
    """A real call has its tokens; the same call from DSPy's cache is a hit without tokens."""
    dspy.configure(lm=model(endpoint, cache=True))
    program = dspy.Predict("question -> answer")
    for _ in range(2):
        assert "@http" == program(question="@http").answer

    lms = [next(span for span in trace.data.spans if span.name == "LM.__call__") for trace in traces]
    assert [False, True] == [span.get_attribute("cache_hit") for span in lms]
    assert [104, None] == [(span.get_attribute(USAGE) or {}).get("total_tokens") for span in lms]
    assert 1 == len(endpoint.requests)
    assert ("openai/gpt-4o-mini", "openai") == tuple(
        lms[0].get_attribute(key) for key in ("mlflow.llm.model", "mlflow.llm.provider")
    )


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
async def test_usage_over_http_in_tasks(traces, endpoint):
    """Ten real calls at once: the sum of the traces is what the endpoint has reported."""
    dspy.configure(lm=model(endpoint, cache=False))
    markers = [f"@{'y' * n}" for n in range(1, 11)]
    await asyncio.gather(*(dspy.Predict("question -> answer").acall(question=each) for each in markers))

    assert {each: 100 + len(each) - 1 for each in markers} == {
        each: usage["total_tokens"] for trace in traces for each, usage in usages(trace, "LM.__call__").items()
    }
    assert sum(request.usage["completion_tokens"] for request in endpoint.requests) == sum(
        trace.info.token_usage["output_tokens"] for trace in traces
    )


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_cost_of_a_stored_trace(stored, endpoint):
    """MLflow prices each call by its model and tokens; the trace has the sum."""
    dspy.configure(lm=model(endpoint, cache=False))
    dspy.Predict("question -> answer")(question="@priced")

    (trace,) = stored()
    assert "Predict.forward" == tree(trace)[0]
    lm = next(span for span in trace.data.spans if span.name == "LM.__call__")
    assert 106 == lm.get_attribute(USAGE)["total_tokens"]
    if hasattr(trace.info, "cost"):  # mlflow >= 3.12 or so prices on the server
        assert trace.info.cost is None or trace.info.cost["total_cost"] > 0
