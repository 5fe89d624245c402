"""The acts of the demo: each makes concurrent calls, and says beforehand what they must leave behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy
import mlflow

from dspy_mlflow_async import ThreadPoolExecutor
from dspy_mlflow_async.cli.demo import programs
from dspy_mlflow_async.cli.demo.check import SESSION
from dspy_mlflow_async.cli.demo.plan import Node, Planned, chain_of_thought, predict
from dspy_mlflow_async.cli.demo.script import Ticket

Advance = Callable[[], None]
Tickets = Sequence[Ticket]


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
        plan: The calls it will make of the tickets, with their traces.
        perform: Makes the calls, and reports each that is over.
    """

    name: str
    title: str
    plan: Callable[[Tickets], list[Planned]]
    perform: Callable[[Tickets, Advance], Performed]


@contextlib.contextmanager
def session(name: str) -> Iterator[None]:
    """Give everything that the block starts a session, which each of its traces must then have."""
    with mlflow.tracing.context(metadata={SESSION: name}):
        yield


# --- asyncio.gather over acall --------------------------------------------------------------------------------------


def _plan_gather(tickets: Tickets) -> list[Planned]:
    tree = Node("SupportDesk.forward", (predict(), chain_of_thought()))
    return [Planned("gather", ticket.id, tree) for ticket in tickets]


def _gather(tickets: Tickets, advance: Advance) -> Performed:
    desk = programs.SupportDesk()

    async def reply(ticket: Ticket) -> None:
        await desk.acall(ticket=ticket.marked("gather"))
        advance()

    async def reply_to_all() -> None:
        with session("gather"):
            await asyncio.gather(*(reply(ticket) for ticket in tickets))

    asyncio.run(reply_to_all())
    return Performed()


# --- dspy.Parallel inside a module, several such calls at once ------------------------------------------------------


def _plan_parallel(tickets: Tickets) -> list[Planned]:
    tree = Node("ResearchDesk.forward", (*(predict() for _ in programs.SOURCES), chain_of_thought()))
    return [Planned("parallel", ticket.id, tree) for ticket in tickets]


def _parallel(tickets: Tickets, advance: Advance) -> Performed:
    desk = dspy.asyncify(programs.ResearchDesk())

    async def reply(ticket: Ticket) -> None:
        await desk(ticket=ticket.marked("parallel"))
        advance()

    async def reply_to_all() -> None:
        with session("parallel"):
            await asyncio.gather(*(reply(ticket) for ticket in tickets))

    asyncio.run(reply_to_all())
    return Performed()


# --- two evaluations at once ----------------------------------------------------------------------------------------


def _plan_evaluate(tickets: Tickets) -> list[Planned]:
    trees = {"direct": predict(), "reasoned": chain_of_thought()}
    return [Planned(name, ticket.id, tree) for name, tree in trees.items() for ticket in tickets]


def _evaluate(tickets: Tickets, advance: Advance) -> Performed:
    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        advance()
        return programs.right_topic(example, prediction, trace)

    def evaluate(name: str, program: dspy.Module) -> float:
        devset = [
            dspy.Example(ticket=ticket.marked(name), topic=ticket.topic).with_inputs("ticket") for ticket in tickets
        ]
        with session(name):
            return float(dspy.Evaluate(devset=devset, metric=metric, num_threads=4)(program).score)

    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {name: pool.submit(evaluate, name, make()) for name, make in programs.classifiers().items()}
    right = {"direct": sum(ticket.guess == ticket.topic for ticket in tickets), "reasoned": len(tickets)}
    expected = {name: round(100 * count / len(tickets), 2) for name, count in right.items()}
    scores = {name: future.result() for name, future in futures.items()}
    problems = [
        f"The evaluation of {name} gave {scores[name]} instead of {expected[name]}."
        for name in expected
        if scores[name] != expected[name]
    ]
    return Performed(problems)


ACTS = (
    Act("gather", "asyncio.gather over acall", _plan_gather, _gather),
    Act("parallel", "dspy.Parallel inside a module, many such calls at once", _plan_parallel, _parallel),
    Act("evaluate", "two dspy.Evaluate at once, 4 threads each", _plan_evaluate, _evaluate),
)
