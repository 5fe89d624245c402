"""Each LM call counts once in a trace's total, in an evaluation and in a request, whoever has recorded it."""

import dspy
import litellm
import mlflow
import openai
import pytest

from dspy_mlflow_async import request
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
from echo import Chain, EchoLM

USAGE = "mlflow.chat.tokenUsage"
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture
def endpoint():
    """An endpoint where what DSPy asks costs 150 tokens, and anything else 2."""

    def answer(body):
        if "[[ ##" not in str(body):
            return {"content": "yes", "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
        return {
            "content": "[[ ## answer ## ]]\n@a\n\n[[ ## completed ## ]]",
            "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150},
        }

    with LocalEndpoint(answer) as served:
        dspy.configure(
            lm=dspy.LM("openai/gpt-4o-mini", api_base=served.api_base, api_key="none", cache=False),
        )
        yield served


@pytest.fixture
def openais():
    """MLflow's integration for OpenAI is on."""
    mlflow.openai.autolog(silent=True)
    yield
    mlflow.openai.autolog(disable=True, silent=True)


@pytest.fixture
def litellms():
    """MLflow's integration for LiteLLM is on."""
    mlflow.litellm.autolog(silent=True)
    yield
    mlflow.litellm.autolog(disable=True, silent=True)


HELLO = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}


def ask_openai(endpoint):
    with openai.OpenAI(base_url=endpoint.api_base, api_key="none") as client:
        return client.chat.completions.create(**HELLO)


async def aask_openai(endpoint):
    async with openai.AsyncOpenAI(base_url=endpoint.api_base, api_key="none") as client:
        return await client.chat.completions.create(**HELLO)


class Program(dspy.Module):
    """Asks by the way, and then DSPy's LM."""

    def __init__(self, ask):
        super().__init__()
        self.answer = dspy.Predict("question -> answer")
        self.ask = ask

    def forward(self, question):
        self.ask()
        return self.answer(question=question)


def totals(trace):
    """The sum on the root, and that of the trace."""
    root = next(span for span in trace.data.spans if span.parent_id is None)
    return (root.get_attribute(USAGE) or {}).get("total_tokens"), trace.info.token_usage["total_tokens"]


def test_a_call_of_openais_inside_forward(traces, openais, endpoint):
    """It counts in the sum of the module and in the trace's."""
    Program(lambda: ask_openai(endpoint))(question="@a")

    assert (152, 152) == totals(traces[0])


def test_nothing_but_a_call_of_openais(traces, openais, endpoint):
    """Where DSPy asks no LM, the sum is that of the others."""

    class Bare(dspy.Module):
        def forward(self, question):
            return ask_openai(endpoint)

    Bare()(question="@a")

    assert (2, 2) == totals(traces[0])


async def test_async_calls_of_openais(traces, openais, endpoint):
    """The same from a coroutine, and below a span of the user's."""

    class Async(dspy.Module):
        def __init__(self):
            super().__init__()
            self.answer = dspy.Predict("question -> answer")

        async def aforward(self, question):
            with mlflow.start_span("mine"):
                await aask_openai(endpoint)
            return await self.answer.acall(question=question)

    await Async().acall(question="@a")

    assert (152, 152) == totals(traces[0])


def test_calls_in_worker_threads(traces, openais, endpoint):
    """Each of several programs inside a module, in DSPy's threads, counts once."""

    class Many(dspy.Module):
        def __init__(self):
            super().__init__()
            self.one = Program(lambda: ask_openai(endpoint))

        def forward(self, question):
            examples = [dspy.Example(question=question).with_inputs("question")] * 4
            return self.one.batch(examples, num_threads=4, disable_progress_bar=True)

    Many()(question="@a")

    assert (4 * 152, 4 * 152) == totals(traces[0])


def test_calls_side_by_side_in_one_trace(traces, openais, endpoint):
    """Two modules below one span of the user's: each has its own, the trace the sum."""
    program = Program(lambda: ask_openai(endpoint))
    with mlflow.start_span("mine"):
        program(question="@a")
        ask_openai(endpoint)
        program(question="@a")

    modules = [span for span in traces[0].data.spans if span.name == "Program.forward"]
    assert [152, 152] == [span.get_attribute(USAGE)["total_tokens"] for span in modules]
    assert 2 * 152 + 2 == traces[0].info.token_usage["total_tokens"]


def test_litellm_recorded_beside_and_below_dspys_lm(traces, litellms, openais, endpoint):
    """A call of LiteLLM's by the way counts; what it records of ``dspy.LM``'s own call is no second one."""
    Program(
        lambda: litellm.completion(
            "openai/gpt-4o-mini",
            messages=[{"role": "user", "content": "hello"}],
            api_base=endpoint.api_base,
            api_key="none",
        )
    )(question="@a")

    assert 2 == len(endpoint.requests)
    assert (152, 152) == totals(traces[0])


class OverOpenAI(dspy.BaseLM):
    """An LM that is a call of OpenAI's, with what it says of its usage or without."""

    forward_contract = "legacy"

    def __init__(self, endpoint, *, reports):
        super().__init__("openai/gpt-4o-mini", cache=False)
        self.client = openai.OpenAI(base_url=endpoint.api_base, api_key="none")
        self.reports = reports

    def forward(self, prompt=None, messages=None, **kwargs):
        response = self.client.chat.completions.create(model="gpt-4o-mini", messages=messages)
        if not self.reports:
            response.usage = None
        return response


@pytest.mark.parametrize("reports", [True, False])
def test_an_lm_over_openais_client(traces, openais, endpoint, reports):
    """The call counts once, whether DSPy is told of its usage or only the span below the LM's has it."""
    lm = OverOpenAI(endpoint, reports=reports)
    with lm.client, dspy.context(lm=lm):
        dspy.Predict("question -> answer")(question="@a")

    assert (150, 150) == totals(traces[0])


class Untold(EchoLM):
    """An LM whose calls DSPy tells nobody of: it reports their usage by itself, and somebody else records them."""

    def __call__(self, prompt=None, messages=None, **kwargs):
        with mlflow.start_span("somebody's", span_type="CHAT_MODEL") as span:
            span.set_attribute(USAGE, {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12})
            dspy.settings.usage_tracker.add_usage("m", {"prompt_tokens": 10, "completion_tokens": 2})
            return ["[[ ## answer ## ]]\n@a\n\n[[ ## completed ## ]]"]


def test_a_call_that_both_have_heard_of(traces):
    """What an LM tells DSPy of and another integration has recorded is one call."""
    with dspy.context(lm=Untold()):
        dspy.Predict("question -> answer")(question="@a")

    assert (12, 12) == totals(traces[0])


def test_an_evaluation_and_a_request_count_them(store_uri, traces, openais, endpoint):
    """The run of an evaluation and the record of a request have these tokens, too."""
    import dspy_mlflow_async

    dspy_mlflow_async.autolog(log_evals=True, silent=True)
    program = Program(lambda: ask_openai(endpoint))
    devset = [dspy.Example(question="@a", answer="@a").with_inputs("question")] * 2
    dspy.Evaluate(devset=devset, metric=lambda gold, pred, trace=None: True, num_threads=2)(program)
    with request() as handled:
        program(question="@a")
    dspy_mlflow_async.flush()

    (run,) = mlflow.search_runs(output_format="list", search_all_experiments=True)
    assert (2 * 101, 2 * 51) == (run.data.metrics["input_tokens"], run.data.metrics["output_tokens"])
    assert (2, 152) == (len(handled.lm_calls), handled.usage["total_tokens"])


def test_a_trace_without_others_is_as_before(traces):
    """Nothing is added where nobody else records."""
    Chain()(question="@a")

    assert (24, 24) == totals(traces[0])
