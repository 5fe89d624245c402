"""``evaluate_all``: one limit, a run per case, a comparison, budgets, and errors before anything runs."""

import asyncio
import copy
import json
import pickle
import threading
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path

import anyio
import dspy
import mlflow
import numpy as np
import pytest
from dspy.utils.callback import BaseCallback
from dspy.utils.parallelizer import ParallelExecutor
from small import examples, is_right

import dspy_mlflow_async
from dspy_mlflow_async import Case, aevaluate_all, evaluate_all
from dspy_mlflow_async.testing import tree
from echo import Chain, EchoLM, chain_tree, marker


class Half(Chain):
    """Right on every other question."""

    async def aforward(self, question):
        answer = await super().aforward(question)
        return answer if int(question.rpartition("-")[2]) % 2 == 0 else dspy.Prediction(answer="?")


class Broken(dspy.Module):
    async def aforward(self, question):
        raise RuntimeError("boom")


class InFlight:
    """Counts the LM calls that are open at once."""

    def __init__(self):
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    async def __call__(self, marker):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.005)
        self.now -= 1


def table(run, name):
    stored = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{name}"))
    return [dict(zip(stored["columns"], row, strict=True)) for row in stored["data"]]


async def evaluated(programs, **options):
    options = {"devset": examples(size=6), "metric": is_right, "display_progress": False, **options}
    return await aevaluate_all(programs, **options)


async def test_runs_traces_and_comparison(traces, runs):
    """Each case has a run of its own below one parent, its own traces, and its place in the comparison."""
    comparison = await evaluated({"good": Chain(), "half": Half(), "broken": Broken()}, max_errors=2)
    found = runs()
    parent = found["evaluate_all"]
    by_run = {}
    for trace in traces:
        by_run.setdefault(trace.info.request_metadata["mlflow.sourceRun"], []).append(tree(trace, marker))

    assert {"good": "FINISHED", "half": "FINISHED", "broken": "FAILED", "evaluate_all": "FINISHED"} == {
        name: run.info.status for name, run in found.items()
    }
    assert {parent.info.run_id} == {
        run.data.tags.get("mlflow.parentRunId") for name, run in found.items() if run is not parent
    }
    assert [chain_tree(f"@e-{n}") for n in range(6)] == sorted(by_run[found["good"].info.run_id])
    assert {"good": 100.0, "half": 50.0, "broken": None} == {name: comparison[name].score for name in comparison}
    assert "Execution cancelled due to errors or interruption." == str(comparison["broken"].error)
    assert 100.0 == found["good"].data.metrics["eval"]
    assert 6 == len(table(found["half"], "result_table.json"))
    assert {} == {name: run.data.tags for name, run in found.items() if "" in run.data.tags.values()}


async def test_parent_artifacts(traces, runs):
    """The parent has the comparison as a table, the score of each case and no other metric, and a plot."""
    await evaluated({"good": Chain(), "half, b/c": Half()})
    found = runs()
    parent = found["evaluate_all"]
    rows = table(parent, "comparison.json")
    png = mlflow.artifacts.download_artifacts(f"{parent.info.artifact_uri}/scores.png")

    assert ["good", "half, b/c"] == [row["case"] for row in rows]
    assert [None, -50.0] == [row["difference"] for row in rows]
    assert {"good/score": 100.0, "half_ b_c/score": 50.0} == parent.data.metrics
    assert 120 == found["good"].data.metrics["input_tokens"]

    assert b"\x89PNG\r\n\x1a\n" == Path(png).read_bytes()[:8]  # noqa: ASYNC240 - a test


async def test_zeros_for_usage_are_none(traces, runs):
    """Where the LM fills in zeros, the comparison has neither tokens nor a cost, and so the case's run."""
    zeros = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    with dspy.context(lm=EchoLM(usage=lambda marker: zeros, model="openai/gpt-4o-mini")):
        comparison = await evaluated({"good": Chain()})

    result = comparison["good"]
    assert (None, None, None) == (result.input_tokens, result.output_tokens, result.cost_usd)
    assert [] == [key for key in runs()["good"].data.metrics if "token" in key or "cost" in key]


async def test_one_limit_for_all():
    """Ten evaluations never make ten times the load."""
    in_flight = InFlight()
    with dspy.context(lm=EchoLM(aduring=in_flight)):
        await evaluated({f"case {n}": Chain() for n in range(10)}, max_concurrency=4)

    assert 4 == in_flight.most


async def test_without_a_tracer(captured, experiment):
    """Where no tracer is on, runs, tokens and the comparison are there all the same; traces are not."""
    comparison = await evaluated({"good": Chain()})
    untraced = len(captured)
    with_runs_off = await _with_tracer_that_logs_no_evaluations()

    assert (0, 6) == (untraced, len(captured))
    for result in (comparison["good"], with_runs_off["good"]):
        assert (100.0, 120, 48) == (result.score, result.input_tokens, result.output_tokens)
        assert 6 == len(table(mlflow.get_run(result.run_id), "result_table.json"))


async def _with_tracer_that_logs_no_evaluations():
    dspy_mlflow_async.autolog(silent=True, log_evals=False)
    return await evaluated({"good": Chain()}, run_name="other", devset=examples(size=6))


async def test_cases(traces):
    """One program over several devsets, metrics, LMs and adapters."""
    other = EchoLM(answer=lambda field, marker: "no")
    program = Chain()
    comparison = await evaluated(
        [
            Case("as it is", program),
            Case("another lm", program, lm=other),
            Case("json", program, adapter=dspy.JSONAdapter()),
            Case("two examples", program, devset=examples("@x", 2)),
            Case("another metric", program, metric=lambda example, prediction: 0.25),
            Case("strict", program, settings={"max_errors": 1}),
        ]
    )

    assert [100.0, 0.0, 100.0, 100.0, 25.0, 100.0] == [case.score for case in comparison.cases]
    assert [6, 6, 6, 2, 6, 6] == [case.examples for case in comparison.cases]
    assert [None, -100.0, 0.0, None, None, 0.0] == [
        case.difference and case.difference.mean for case in comparison.cases
    ]


async def test_raise_on_error(traces, runs):
    """The first case that fails ends all, with its exception."""
    hold = asyncio.Event()

    async def wait(marker):
        await hold.wait()

    with dspy.context(lm=EchoLM(aduring=wait)), pytest.raises(Exception, match="Execution cancelled"):
        await evaluated({"slow": Chain(), "broken": Broken()}, max_errors=1, raise_on_error=True)

    assert {"slow": "KILLED", "broken": "FAILED", "evaluate_all": "FAILED"} == {
        name: run.info.status for name, run in runs().items()
    }


@pytest.mark.parametrize(("budget", "spent"), [({"max_tokens": 100}, "max_tokens"), ({"max_cost": 0.0001}, "max_cost")])
async def test_budget(traces, runs, monkeypatch, budget, spent):
    """When it is reached nothing new starts, and the result says what was not run; a resume runs that."""
    monkeypatch.setattr(
        "dspy_mlflow_async.runs.usage.mlflow_runs.cost_in_usd", lambda model, tokens: tokens["total_tokens"] * 1e-6
    )
    programs = {"good": Chain(), "half": Half()}
    stopped = await evaluated(programs, max_concurrency=2, **budget)
    resumed = await evaluated(programs, max_concurrency=2, resume=stopped.run_id)

    assert spent in stopped.stopped_by
    for case in stopped.cases:
        assert "stopped" == case.status
        assert 6 == case.examples + len(case.not_run)
        # Whose run is opened first may have spent everything before the other's is.
        assert case.examples == (len(case.result.results) if case.result else 0)
    assert sum(case.examples for case in stopped.cases) > 0
    assert f"{sum(map(len, stopped.not_run.values()))} examples were not run" in str(stopped)
    assert {"good": 100.0, "half": 50.0} == {name: resumed[name].score for name in resumed}
    assert {} == resumed.not_run
    assert {"good", "half", "evaluate_all"} == set(runs())
    assert 6 == len(table(runs()["good"], "result_table.json"))
    assert 12 == len(traces)  # none was run again


async def test_max_seconds():
    """A budget of time; what is in flight ends."""

    async def wait(marker):
        await asyncio.sleep(0.05)

    with dspy.context(lm=EchoLM(aduring=wait)):
        comparison = await evaluated({"good": Chain()}, devset=examples(size=500), max_concurrency=2, max_seconds=0.5)

    assert "max_seconds" in comparison.stopped_by
    assert 0 < comparison["good"].examples < 500
    assert comparison["good"].result.score == 100.0


async def test_resume_runs_only_what_is_missing(traces, runs):
    """Finished examples are read back, failed ones too; the result is that of an uninterrupted one."""

    def unfair(example, prediction, trace=None):
        if example.question == "@e-1":
            raise ValueError("unfair")
        return dspy.Prediction(score=0.5, feedback="so so") if example.question == "@e-2" else True

    whole = await evaluated({"good": Chain()}, metric=unfair, run_name="whole")
    lm = EchoLM()
    with dspy.context(lm=lm):
        stopped = await evaluated({"good": Chain()}, metric=unfair, max_concurrency=1, max_tokens=50)
        before = len(lm.calls)
        resumed = await evaluated({"good": Chain()}, metric=unfair, resume=stopped.run_id)
    again = await evaluated({"good": Chain()}, metric=unfair, resume=stopped.run_id)

    def shown(comparison):
        case = comparison["good"]
        return (
            case.score,
            case.standard_error,
            case.errors,
            case.input_tokens,
            case.output_tokens,
            [(example.question, p.toDict(), float(score)) for example, p, score in case.result.results],
        )

    assert 0 < before < 12
    assert 12 == len(lm.calls)
    assert shown(whole) == shown(resumed) == shown(again)
    assert stopped["good"].run_id == resumed["good"].run_id


async def test_resume_after_too_many_errors(traces):
    """In a case that too many failed examples have ended, these are run again: nothing else could help it."""
    is_down = True

    class Moody(Chain):
        async def aforward(self, question):
            if is_down and question == "@e-4":
                raise ConnectionError("down")
            return await super().aforward(question)

    failed = await evaluated({"moody": Moody()}, max_errors=1, max_concurrency=1)
    is_down = False
    traces.clear()
    resumed = await evaluated({"moody": Moody()}, max_errors=1, resume=failed.run_id)

    assert "failed" == failed["moody"].status
    assert 100.0 == resumed["moody"].score
    assert 2 == len(traces)


@pytest.mark.parametrize("in_loop", [False, True])
def test_sync(traces, runs, in_loop):
    """``evaluate_all`` works without a loop, and inside one, as in a notebook; DSPy's settings go with it."""

    def evaluate():
        with dspy.context(lm=EchoLM(answer=lambda field, marker: "no")):
            return evaluate_all({"good": Chain()}, devset=examples(size=2), metric=is_right, display_progress=False)

    async def in_a_loop():
        return evaluate()

    comparison = asyncio.run(in_a_loop()) if in_loop else evaluate()

    assert 0.0 == comparison["good"].score
    assert {"good", "evaluate_all"} == set(runs())


def test_nothing_stays_patched_where_somebody_keeps_the_context(experiment):
    """Without a tracer an evaluation has one of its own, and what that needs goes when the evaluation is over."""
    before = ParallelExecutor.execute
    kept = []

    def keep(example, prediction):
        kept.append(copy_context())  # as LiteLLM's logging worker does
        assert before is not ParallelExecutor.execute
        return 1.0

    result = evaluate_all({"a": Chain()}, devset=examples(size=2), metric=keep, display_progress=False)

    assert (2, 100.0) == (len(kept), result["a"].score)
    assert before is ParallelExecutor.execute


def test_under_a_run_of_the_users(traces, runs):
    """The parent run is a child of the run that is open."""
    with mlflow.start_run(run_name="mine") as mine:
        evaluate_all({"good": Chain()}, devset=examples(size=2), metric=is_right, display_progress=False)
        assert mlflow.active_run().info.run_id == mine.info.run_id

    assert mine.info.run_id == runs()["evaluate_all"].data.tags["mlflow.parentRunId"]


def test_in_trio():
    """Where the loop is trio's, the error names what to await instead."""

    async def main():
        evaluate_all({"good": Chain()}, devset=examples(size=1), metric=is_right)

    with pytest.raises(RuntimeError, match=r"await aevaluate_all\(...\)"):
        anyio.run(main, backend="trio")


async def test_iterator_as_devset(traces):
    """An iterator that cases share is read once, and each has all its examples."""
    shared = iter(examples(size=3))
    comparison = await evaluated([Case("a", Chain(), devset=shared), Case("b", Chain(), devset=shared)], devset=None)

    assert [3, 3] == [case.examples for case in comparison.cases]
    assert 0.0 == comparison["b"].difference.mean


def test_case_is_a_value():
    """A case can be hashed, pickled and copied, with what it holds."""
    case = Case("a", len, devset=[1], settings={"max_errors": 1})

    assert 1 == len({case, Case("a", len, devset=[1], settings={"max_errors": 1})})
    assert case == pickle.loads(pickle.dumps(case)) == copy.deepcopy(case)  # noqa: S301 - its own


class NoForward(dspy.Module):
    pass


BAD = [
    ({"programs": {}}, ValueError, "nothing to evaluate"),
    ({"programs": {"a": NoForward()}}, TypeError, "neither forward nor aforward"),
    ({"programs": {"a": Chain}}, TypeError, r"Chain\(...\)"),
    ({"programs": {"a": 7}}, TypeError, "not int"),
    ({"programs": Chain()}, TypeError, "mapping"),
    ({"programs": [Chain()]}, TypeError, "must be a Case"),
    ({"programs": [Case("a", Chain()), Case("a", Chain())]}, ValueError, "more than one 'a'"),
    ({"devset": []}, ValueError, "at least one example"),
    ({"devset": None}, ValueError, "no devset"),
    ({"metric": None}, ValueError, "no metric"),
    ({"metric": "exact"}, TypeError, "not str"),
    ({"baseline": "b"}, ValueError, "baseline"),
    ({"max_concurrency": 0}, ValueError, "at least 1"),
    ({"max_concurrency": -3}, ValueError, "at least 1"),
    ({"max_concurrency": 2.5}, TypeError, "whole number"),
    ({"timeout": 0}, ValueError, "more than 0 seconds"),
    ({"max_cost": -1}, ValueError, "US dollars"),
    ({"max_tokens": "many"}, TypeError, "tokens"),
    ({"seed": -1}, ValueError, "seed"),
    ({"devset": 5}, TypeError, "list of dspy.Example, not 5"),
    ({"failure_score": "x"}, TypeError, "failure_score must be a number"),
    ({"max_errors": "x"}, TypeError, "max_errors must be a number"),
    ({"max_errors": -1}, ValueError, "0 or more"),
    ({"run_name": 5}, TypeError, "run_name"),
    ({"resume": "no-such-run"}, ValueError, "there is no run"),
    ({"resume": 7}, TypeError, "run id"),
]


BAD_CASES = [
    ({"name": ""}, ValueError, "needs a name"),
    ({"settings": {"nope": 1}}, TypeError, "no nope"),
    ({"settings": 5}, TypeError, "must be a mapping"),
    ({"lm": EchoLM(), "settings": {"lm": EchoLM()}}, TypeError, "lm of its own"),
    ({"lm": "openai/gpt-4o"}, TypeError, r"must be a dspy\.LM"),
    ({"program": "not a program"}, TypeError, "not str"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD_CASES)
def test_bad_case(options, error, text):
    """A case says at once what is wrong with it, where it is made."""
    with pytest.raises(error, match=text):
        Case(**{"name": "a", "program": Chain(), **options})


@pytest.mark.parametrize(("options", "error", "text"), BAD)
async def test_bad_input(experiment, options, error, text):
    """A clear error, before anything runs and before any run is made."""
    lm = EchoLM()
    options = {"programs": {"a": Chain()}, **options}
    with dspy.context(lm=lm), pytest.raises(error, match=text):
        await evaluated(options.pop("programs"), **options)

    assert [] == lm.calls
    assert [] == mlflow.search_runs([experiment], output_format="list")


async def test_resume_of_something_else(traces, runs):
    """A resume that would mix two evaluations is refused, and says what differs."""
    program, lm = Chain(), EchoLM()
    metric = lambda example, prediction: 1  # noqa: E731 - two lambdas have one name
    done = await evaluated([Case("good", program, lm=lm)], metric=metric)

    for other, text in [
        ({"programs": {"better": program}}, "evaluates the cases good"),
        ({"programs": [Case("good", Half(), lm=lm)]}, r"another program \(Chain-\w+ then, Half-\w+ now\)"),
        ({"devset": examples("@other", 6)}, "another devset"),
        ({"metric": lambda example, prediction: 0}, "another metric"),
        ({"programs": [Case("good", program, lm=EchoLM(model="echo/two"))]}, "EchoLM echo/two"),
        ({"programs": [Case("good", program, adapter=dspy.JSONAdapter())]}, "another adapter .*JSONAdapter"),
        ({"programs": [Case("good", program, lm=lm, settings={"max_errors": 7})]}, "another settings .*max_errors"),
        ({"resume": done["good"].run_id}, "not one of evaluate_all"),
    ]:
        options = {"programs": [Case("good", program, lm=lm)], "resume": done.run_id, "metric": metric, **other}
        with pytest.raises(ValueError, match=text):
            await evaluated(options.pop("programs"), **options)

    assert 100.0 == (await evaluated([Case("good", program, lm=lm)], metric=metric, resume=done.run_id))["good"].score


async def test_stopped_before_it_began(traces, runs):
    """A case of which nothing was run has no score, and says what stopped it; so does one of which some was run."""
    stopped = await evaluated({"one": Chain(), "two": Chain()}, max_concurrency=1, max_tokens=1)
    before = {name: run.data for name, run in runs().items()}
    whole = await evaluated({"one": Chain(), "two": Chain()}, resume=stopped.run_id)
    after = {name: run.data for name, run in runs().items()}

    late, begun = sorted(stopped.cases, key=lambda case: case.examples)

    assert ["stopped", "stopped"] == [case.status for case in stopped.cases]
    assert (None, None, 0, 6) == (late.score, late.result, late.examples, len(late.not_run))
    assert {begun.name: 1, late.name: 0} == {name: before[name].metrics["examples"] for name in stopped}
    assert "eval" not in before[late.name].metrics
    assert {begun.name: "5", late.name: "6", "evaluate_all": "11"} == {
        name: data.tags["dspy_mlflow_async.not_run"] for name, data in before.items()
    }
    assert {"max_tokens"} == {data.tags["dspy_mlflow_async.stopped_by"].partition(":")[0] for data in before.values()}
    assert {"one": 6, "two": 6} == {name: after[name].metrics["examples"] for name in whole}
    assert {("", "0")} == {
        (data.tags["dspy_mlflow_async.stopped_by"], data.tags["dspy_mlflow_async.not_run"]) for data in after.values()
    }
    assert [100.0, 100.0] == [case.score for case in whole.cases]


async def test_best_is_not_a_stopped_one(traces):
    """A score over the examples that a budget left is not the best, unless there is no other."""
    first = await evaluated({"half": Half(), "good": Chain()}, devset=examples(size=2))
    cases = [replace(case, status="stopped" if case.name == "good" else "finished") for case in first.cases]
    all_stopped = [replace(case, status="stopped") for case in first.cases]

    assert "good" == first.best.name
    assert "half" == replace(first, cases=tuple(cases)).best.name
    assert "good" == replace(first, cases=tuple(all_stopped)).best.name


async def test_no_price(traces):
    """A limit in dollars that cannot count says so in the result."""
    comparison = await evaluated({"good": Chain()}, max_cost=0.000001)

    assert ("echo/one",) == comparison.unpriced
    assert "MLflow knows no price for echo/one: max_cost has not counted that." in str(comparison)


async def test_callbacks_of_a_case(traces, runs):
    """Callbacks among a case's settings stand beside the tracer: its tokens count, and it has its run."""
    heard = []

    class Hears(BaseCallback):
        def on_lm_start(self, call_id, instance, inputs):
            heard.append(call_id)

    comparison = await evaluated(
        [Case("good", Chain(), settings={"callbacks": [Hears()]}), Case("none", Chain(), settings={"callbacks": []})]
    )

    assert 12 == len(heard)
    assert [120, 120] == [case.input_tokens for case in comparison.cases]
    assert 12 == len(traces)
    assert {"evaluate_all", "good", "none"} == runs().keys()


NAMES = [
    (["good", "half, b/c"], ["good", "half_ b_c"]),
    (["a/b", "a_b", "a?b"], ["a_b 2", "a_b", "a_b 3"]),
    (["日本", "中国"], ["日本", "中国"]),
    (["..", ".", "a:b"], ["__", "_", "a_b"]),
    (["x" * 300 + "1", "x" * 300 + "2"], ["x" * 150, "x" * 150 + " 2"]),
    (["A?", "a!"], ["A_", "a_ 2"]),
]


@pytest.mark.parametrize(("names", "expected"), NAMES)
async def test_metric_names(traces, runs, names, expected):
    """The score of each case is in the parent run, under a readable name of its own, and one that MLflow takes."""
    await evaluated({name: Chain() for name in names}, devset=examples(size=1))
    metrics = runs()["evaluate_all"].data.metrics

    assert {f"{name}/score" for name in expected} == metrics.keys()


class Judge:
    def judge(self, example, prediction):
        return example.answer == prediction.answer


async def test_devsets_and_metrics_that_are_equal(traces):
    """Cases are compared where devset and metric are equal, also two lists of arrays, and a method looked up twice."""

    def devset():
        return [dspy.Example(**example, vector=np.arange(3)).with_inputs("question") for example in examples(size=4)]

    judge = Judge()
    comparison = await evaluated(
        [Case("good", Chain(), devset(), judge.judge), Case("half", Half(), devset(), judge.judge)], metric=None
    )

    assert -50.0 == comparison["half"].difference.mean


async def test_what_fails_in_comparing(traces, runs, monkeypatch):
    """The results are there all the same."""

    def fail(*args):
        raise RuntimeError("no")

    monkeypatch.setattr("dspy_mlflow_async.evaluate.summary.with_differences", fail)
    monkeypatch.setattr("dspy_mlflow_async.evaluate.summary.plot_of_cases", fail)
    comparison = await evaluated({"good": Chain(), "half": Half()})

    assert [100.0, 50.0] == [case.score for case in comparison.cases]
    assert "FINISHED" == runs()["evaluate_all"].info.status


@pytest.mark.long
async def test_ten_thousand_examples():
    """Bounded time for table and plot, and no more tasks than the limit."""
    most = 0

    class Answers(dspy.Module):
        async def aforward(self, question):
            nonlocal most
            most = max(most, len(asyncio.all_tasks()))
            return dspy.Prediction(answer=question)

    async def metric(example, prediction):
        return example.answer == prediction.answer

    with anyio.fail_after(60):
        comparison = await evaluated(
            {"a": Answers(), "b": Answers()}, devset=examples(size=10_000), metric=metric, max_concurrency=50
        )

    assert [100.0, 100.0] == [case.score for case in comparison.cases]
    assert most < 80
