"""The acts of the demo: each makes concurrent calls, and says beforehand what they must leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy
import mlflow
from mlflow import MlflowClient

from dspy_mlflow_async import Case, ThreadPoolExecutor, aevaluate_all, run
from dspy_mlflow_async.cli.demo import programs
from dspy_mlflow_async.cli.demo.check import SESSION
from dspy_mlflow_async.cli.demo.plan import Node, Planned, chain_of_thought, predict
from dspy_mlflow_async.cli.demo.script import Ticket
from dspy_mlflow_async.cli.report import reading, text

Advance = Callable[[], None]
Tickets = Sequence[Ticket]

_TRAINED_ON = 6  # tickets: each optimizer asks for each of them once a candidate
_KEY = "eval"  # DSPy's metric key for an evaluation inside a compile
_GUESSING = ("direct", "one-call")  # programs that do not think first, and have the topic wrong now and then


@dataclass(frozen=True, slots=True)
class Performed:
    """Result of an act of the demo.

    Attributes:
        problems: What beside the traces was not as it should be (with a scripted model only).
        shown: Tables and texts for the reader.
    """

    problems: list[str] = field(default_factory=list)
    shown: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Act:
    """One way of running DSPy programs at the same time.

    Attributes:
        name: A word.
        title: What it does, for the reader of the output.
        trees: The spans of each trace, by the word that marks its call; it makes one of each ticket.
        perform: Makes the calls, and reports each that is over.
        session: The session of all its traces; by default that word.
    """

    name: str
    title: str
    trees: Mapping[str, Node]
    perform: Callable[[Tickets, Advance], Performed]
    session: str = ""

    def plan(self, tickets: Tickets) -> list[Planned]:
        """Return the calls that it will make of the tickets, with their traces."""
        return [
            Planned(mark, ticket.id, tree, session=self.session)
            for mark, tree in self.trees.items()
            for ticket in tickets
        ]


@contextlib.contextmanager
def _session(name: str) -> Iterator[None]:
    """Give everything that the block starts a session, which each of its traces must then have."""
    with mlflow.tracing.context(metadata={SESSION: name}):
        yield


def _devset(tickets: Tickets, mark: str) -> list[dspy.Example]:
    return [dspy.Example(ticket=each.marked(mark), topic=each.topic).with_inputs("ticket") for each in tickets]


def _metric(advance: Advance) -> Callable[..., bool]:
    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        advance()
        return programs.right_topic(example, prediction, trace)

    return metric


def _wrong_scores(scores: Mapping[str, float], tickets: Tickets) -> list[str]:
    guessed = sum(ticket.guess == ticket.topic for ticket in tickets)
    expected = {
        name: round(100 * (guessed if name in _GUESSING else len(tickets)) / len(tickets), 2) for name in scores
    }
    return [
        f"The evaluation of {name} gave {scores[name]} instead of {expected[name]}."
        for name in expected
        if scores[name] != expected[name]
    ]


# --- many calls at once, in tasks and in DSPy's worker threads --------------------------------------------------------


def _replies(mark: str, make: Callable[[], Callable[..., Awaitable[Any]]]) -> Callable[[Tickets, Advance], Performed]:
    """Return what replies to all tickets at once."""

    def perform(tickets: Tickets, advance: Advance) -> Performed:
        desk = make()

        async def reply(ticket: Ticket) -> None:
            await desk(ticket=ticket.marked(mark))
            advance()

        async def reply_to_all() -> None:
            with _session(mark):
                await asyncio.gather(*map(reply, tickets))

        asyncio.run(reply_to_all())
        return Performed()

    return perform


# --- two evaluations at once ----------------------------------------------------------------------------------------


def _evaluate(tickets: Tickets, advance: Advance) -> Performed:
    def evaluate(name: str, program: dspy.Module) -> float:
        with _session(name):
            evaluator = dspy.Evaluate(devset=_devset(tickets, name), metric=_metric(advance), num_threads=4)
            return float(evaluator(program).score)

    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {name: pool.submit(evaluate, name, make()) for name, make in programs.classifiers().items()}
    return Performed(_wrong_scores({name: future.result() for name, future in futures.items()}, tickets))


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
    return Performed(_wrong_series(tree), ["\nEach optimizer has its own run, steps and scores:", text.run_table(tree)])


def _wrong_series(tree: reading.Node) -> list[str]:
    """Check that each compile has its own steps, from 0, one for each evaluation below it."""
    compiles, client = tree.children, MlflowClient()
    problems = [] if len(compiles) == len(programs.classifiers()) else [f"{len(compiles)} compiles have a run."]
    for each in compiles:
        steps = sorted(point.step for point in client.get_metric_history(each.run.info.run_id, _KEY))
        names = sorted(child.name for child in each.children)
        if steps != list(range(len(names))) or names != sorted(f"{_KEY}_{step}" for step in steps):
            problems.append(f"The compile {each.name} has steps {steps} and runs {', '.join(names)} below it.")
        unfinished = [one for one in (each, *each.children) if one.run.info.status != "FINISHED"]
        problems += [f"The run {one.name} is {one.run.info.status}." for one in unfinished]
    return problems


# --- three programs compared at once --------------------------------------------------------------------------------

_COMPARED = {
    "one-call": predict(),
    "with-reasoning": chain_of_thought(),
    "second-look": Node("SecondLook.forward", (predict(), chain_of_thought())),
}


def _compare(tickets: Tickets, advance: Advance) -> Performed:
    made = (dspy.Predict(programs.Classify), dspy.ChainOfThought(programs.Classify), programs.SecondLook())
    cases = [Case(name, program, devset=_devset(tickets, name)) for name, program in zip(_COMPARED, made, strict=True)]

    async def compare() -> Any:
        with _session("compare"):
            return await aevaluate_all(cases, metric=_metric(advance), max_concurrency=12, display_progress=False)

    comparison = asyncio.run(compare())
    problems = _wrong_scores({name: comparison[name].score for name in _COMPARED}, tickets)
    return Performed(problems, ["\nThree programs, evaluated at once and compared:", str(comparison)])


ACTS = (
    Act(
        "gather",
        "asyncio.gather over acall",
        {"gather": Node("SupportDesk.forward", (predict(), chain_of_thought()))},
        _replies("gather", lambda: programs.SupportDesk().acall),
    ),
    Act(
        "parallel",
        "dspy.Parallel inside a module, many such calls at once",
        {"parallel": Node("ResearchDesk.forward", (*(predict() for _ in programs.SOURCES), chain_of_thought()))},
        _replies("parallel", lambda: dspy.asyncify(programs.ResearchDesk())),
    ),
    Act(
        "evaluate",
        "two dspy.Evaluate at once, 4 threads each",
        {"direct": predict(), "reasoned": chain_of_thought()},
        _evaluate,
    ),
    Act("optimize", "two optimizers at once", {}, _optimize),  # no traces by default
    Act("compare", "aevaluate_all of three programs, 12 examples in flight", _COMPARED, _compare, "compare"),
)
