"""The acts of the demo that end in a score: two optimizers at once, and three programs compared at once."""

from __future__ import annotations

import asyncio
import contextlib
import io
from typing import Any

import dspy
from mlflow import MlflowClient

from dspy_mlflow_async import Case, ThreadPoolExecutor, aevaluate_all, run
from dspy_mlflow_async.cli.demo import programs
from dspy_mlflow_async.cli.demo.acts import Act, Advance, Performed, Tickets, session
from dspy_mlflow_async.cli.demo.plan import Node, Planned, chain_of_thought, predict
from dspy_mlflow_async.cli.report import reading, text

_TRAINED_ON = 6  # tickets: each optimizer asks for each of them once a candidate
_KEY = "eval"  # DSPy's metric key for an evaluation inside a compile


def _devset(tickets: Tickets, act: str) -> list[dspy.Example]:
    return [dspy.Example(ticket=each.marked(act), topic=each.topic).with_inputs("ticket") for each in tickets]


# --- two optimizers at once -----------------------------------------------------------------------------------------


def _optimize(tickets: Tickets, advance: Advance) -> Performed:  # noqa: ARG001 - nobody knows how long they take
    def compile_program(name: str, program: dspy.Module) -> None:
        optimizer = dspy.BootstrapFewShotWithRandomSearch(
            metric=programs.right_topic,
            max_bootstrapped_demos=1,
            max_labeled_demos=2,
            num_candidate_programs=1,
            num_threads=4,
        )
        optimizer.compile(program, trainset=_devset(tickets[:_TRAINED_ON], f"train-{name}"))

    # DSPy's optimizers print what they try; side by side nobody can read it.
    silence = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with silence[0], silence[1], run("two optimizers at once") as parent, ThreadPoolExecutor(max_workers=2) as pool:
        for future in [pool.submit(compile_program, name, make()) for name, make in programs.classifiers().items()]:
            future.result()
    tree = reading.read(parent.info.run_id)
    return Performed(
        _wrong_series(parent), ["\nEach optimizer has its own run, steps and scores:", text.run_table(tree)]
    )


def _wrong_series(parent: Any) -> list[str]:
    """Check that each compile has its own steps, from 0, one for each evaluation below it."""
    client = MlflowClient()

    def below(run_id: str) -> list[Any]:
        return list(
            client.search_runs([parent.info.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{run_id}'")
        )

    compiles = below(parent.info.run_id)
    problems = [] if len(compiles) == len(programs.classifiers()) else [f"{len(compiles)} compiles have a run."]
    for each in compiles:
        steps = sorted(point.step for point in client.get_metric_history(each.info.run_id, _KEY))
        children = below(each.info.run_id)
        names = sorted(child.info.run_name for child in children)
        if steps != list(range(len(children))) or names != sorted(f"{_KEY}_{step}" for step in steps):
            problems.append(f"The compile {each.info.run_name} has steps {steps} and runs {', '.join(names)} below it.")
        problems += [
            f"The run {one.info.run_name} is {one.info.status}."
            for one in (each, *children)
            if one.info.status != "FINISHED"
        ]
    return problems


# --- three programs compared at once --------------------------------------------------------------------------------

_TREES = {
    "one-call": predict(),
    "with-reasoning": chain_of_thought(),
    "second-look": Node("SecondLook.forward", (predict(), chain_of_thought())),
}


def _plan_compare(tickets: Tickets) -> list[Planned]:
    return [Planned(name, each.id, tree, session="compare") for name, tree in _TREES.items() for each in tickets]


def _compare(tickets: Tickets, advance: Advance) -> Performed:
    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        advance()
        return programs.right_topic(example, prediction, trace)

    made = (dspy.Predict(programs.Classify), dspy.ChainOfThought(programs.Classify), programs.SecondLook())
    cases = [Case(name, program, devset=_devset(tickets, name)) for name, program in zip(_TREES, made, strict=True)]

    async def compare() -> Any:
        with session("compare"):
            return await aevaluate_all(cases, metric=metric, max_concurrency=12, display_progress=False)

    comparison = asyncio.run(compare())
    right = {
        "one-call": sum(each.guess == each.topic for each in tickets),
        "with-reasoning": len(tickets),
        "second-look": len(tickets),
    }
    expected = {name: round(100 * count / len(tickets), 2) for name, count in right.items()}
    scores = {name: comparison[name].score for name in expected}
    problems = [
        f"The evaluation of {name} gave {scores[name]} instead of {expected[name]}."
        for name in expected
        if scores[name] != expected[name]
    ]
    return Performed(problems, ["\nThree programs, evaluated at once and compared:", str(comparison)])


ACTS = (
    Act("optimize", "two optimizers at once", lambda tickets: [], _optimize),  # noqa: ARG005 - no traces by default
    Act("compare", "aevaluate_all of three programs, 12 examples in flight", _plan_compare, _compare),
)
