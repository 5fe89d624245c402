"""What the result of ``evaluate_all`` shows: as text, as HTML, as a table; and latency, cost and memory behind it."""

import gc
import tracemalloc
import warnings

import dspy
import pytest
from small import examples

from dspy_mlflow_async import AsyncEvaluate, Case, aevaluate_all, evaluate_all
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
from dspy_mlflow_async.evaluate import summary
from dspy_mlflow_async.evaluate.comparison import CaseResult, CaseUsage, Comparison, ExampleCounts, Latency
from dspy_mlflow_async.evaluate.example_result import Outcome
from dspy_mlflow_async.evaluate.plot import plot_of_cases
from dspy_mlflow_async.evaluate.statistics import Difference

COMPARISON = Comparison(
    (
        CaseResult(
            "direct",
            "finished",
            run_id="1a",
            score=72.5,
            standard_error=3.2,
            counts=ExampleCounts(200),
            latency=Latency(0.612, 1.02),
            usage=CaseUsage(40_000, 1_200, 0.0103),
        ),
        CaseResult(
            "<b>reasoned",
            "stopped",
            run_id="2b",
            score=81.0,
            standard_error=2.8,
            counts=ExampleCounts(198, 3, "ValueError: no", (7, 9)),
            latency=Latency(1.43, 2.8),
            usage=CaseUsage(90_000, 8_750, 0.000391),
            difference=Difference(8.5, 2.5, 14.5, 198),
        ),
        CaseResult("broken", "failed", error=RuntimeError("boom"), counts=ExampleCounts(2, 2, "OSError: gone")),
    ),
    baseline="direct",
    run_id="0c",
    stopped_by="max_tokens: 7 of 6 tokens are used",
)

TEXT = """
case              score            difference   examples   errors   not run   p50 s   p95 s   tokens     cost $
────────────────────────────────────────────────────────────────────────────────────────────────────────────────
direct       72.5 ± 3.2                              200                       0.61    1.02   41,200     0.0103
<b>reasoned  81.0 ± 2.8   +8.5 [+2.5, +14.5]         198        3         2    1.43    2.80   98,750    0.00039
broken           failed                                2        2
Best: direct, 72.5.
Differences are from direct, with 95% intervals.
Stopped by max_tokens: 7 of 6 tokens are used; 2 examples were not run.
<b>reasoned: 3 examples failed, the first with ValueError: no
broken failed: RuntimeError: boom
broken: all 2 examples failed, the first with OSError: gone
Run: 0c
Go on with evaluate_all(..., resume="0c").
"""


def test_text():
    """``print`` shows a line per case, the columns that say something, and what else is to be known."""

    def words(text):
        return [" ".join(line.split()) for line in text.strip().splitlines() if not line.startswith("─")]

    assert words(TEXT) == words(str(COMPARISON))
    assert all(len(line) <= 120 for line in str(COMPARISON).splitlines())
    assert len({line.index("failed") for line in str(COMPARISON).splitlines() if line.startswith("broken  ")}) == 1


def test_html():
    """A notebook shows the same as a table, the best case in bold, and nothing unescaped."""
    html = COMPARISON._repr_html_()

    assert 3 == html.count("<tr><td>") + html.count('<tr style="font-weight:bold"><td>')
    assert '<tr style="font-weight:bold"><td>direct</td><td>72.5 ± 3.2</td>' in html
    assert "<td>&lt;b&gt;reasoned</td>" in html
    assert "<b>" not in html
    assert "<p>broken failed: RuntimeError: boom</p>" in html


def test_table():
    """``to_pandas`` gives a row per case, by name, with numbers as numbers."""
    table = COMPARISON.to_pandas()

    assert ["direct", "<b>reasoned", "broken"] == list(table.index)
    assert [72.5, 81.0] == list(table["score"][:2])
    assert (8.5, 2.5, 14.5) == tuple(table.loc["<b>reasoned", ["difference", "difference_low", "difference_high"]])
    assert [0, 2, 0] == list(table["not_run"])
    assert "RuntimeError: boom" == table.loc["broken", "error"]
    assert "OSError: gone" == table.loc["broken", "first_error"]
    assert 40_000 == table.loc["direct", "input_tokens"]


def test_plot():
    """However long the names are, and whatever is in them, there is room for the scores."""
    cases = [CaseResult("$x" * 200, "finished", score=50.0), CaseResult("b", "finished", score=60.0)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot = plot_of_cases(cases, "$x" * 200)

    assert plot.startswith(b"\x89PNG")


def test_latency():
    """Median and 95th percentile of the predictions, in seconds; one that did not begin has none."""
    devset = examples(size=102)
    outcomes = {n: Outcome(n, score=1.0, duration=n / 10) for n in range(101)} | {101: Outcome(101, error="too late")}
    result = summary.case_result(Case("a", len, devset=devset), outcomes, "finished")

    assert (5.0, 9.5) == pytest.approx((result.latency_p50, result.latency_p95))
    assert summary.case_result(Case("a", len, devset=devset), {}, "stopped").latency_p50 is None


def test_cost(traces, experiment):
    """What MLflow's prices say of the tokens, of program and judge together; it counts for ``max_cost``."""

    def answer(body):
        return {
            "content": "[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]",
            "usage": {"prompt_tokens": 1000, "completion_tokens": 100},
        }

    judge = dspy.Predict("question, said -> answer")

    async def metric(example, prediction):
        return (await judge.acall(question=example.question, said=prediction.answer)).answer == "yes"

    with LocalEndpoint(answer) as endpoint:
        lm = dspy.LM("openai/gpt-4o-mini", api_base=endpoint.api_base, api_key="none", cache=False)
        options = {"devset": examples(size=5), "metric": metric, "display_progress": False, "max_concurrency": 1}
        with dspy.context(lm=lm):
            whole = evaluate_all({"a": dspy.Predict("question -> answer")}, **options)
            stopped = evaluate_all({"a": dspy.Predict("question -> answer")}, max_cost=0.0008, **options)
    price = (1000 * 0.15 + 100 * 0.60) / 1_000_000  # OpenAI's, per million tokens

    assert pytest.approx(10 * price) == whole["a"].cost_usd
    assert () == stopped.unpriced
    assert stopped.stopped_by.startswith("max_cost: 0.00084 of 0.0008")
    assert 2 == stopped["a"].examples


class Answers(dspy.Module):
    async def aforward(self, question):
        return dspy.Prediction(answer=question)


async def is_equal(example, prediction):
    return example.answer == prediction.answer


async def one(devset):
    return await AsyncEvaluate(devset=devset, metric=is_equal, max_concurrency=50).acall(Answers())


async def two_at_once(devset):
    return await aevaluate_all(
        {"one": Answers(), "two": Answers()},
        devset=devset,
        metric=is_equal,
        max_concurrency=50,
        display_progress=False,
    )


@pytest.mark.parametrize("evaluate", [one, two_at_once])
@pytest.mark.long
async def test_memory(experiment, evaluate):
    """With 10,000 examples, what is in memory beside the results stays in proportion to the results."""

    async def measured(size):
        devset = examples(size=size)
        gc.collect()
        tracemalloc.start()
        try:
            result = await evaluate(devset)
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert result
        return kept / size, peak / size

    await measured(100)  # what is made once
    kept, peak = await measured(10_000)

    assert peak < 2.5 * kept
