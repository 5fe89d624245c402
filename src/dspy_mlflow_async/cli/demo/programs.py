"""The DSPy programs of the demo: a support desk that answers tickets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import dspy

Topic = Literal["account", "billing", "returns", "shipping", "technical"]

SOURCES = ("orders", "payments", "handbook")


class Classify(dspy.Signature):
    """Say what a customer's ticket is about."""

    ticket: str = dspy.InputField()
    topic: Topic = dspy.OutputField()


class LookUp(dspy.Signature):
    """Find what one source knows about a customer's ticket."""

    ticket: str = dspy.InputField()
    source: str = dspy.InputField()
    fact: str = dspy.OutputField()


class Answer(dspy.Signature):
    """Reply to a customer's ticket in one sentence."""

    ticket: str = dspy.InputField()
    notes: list[str] = dspy.InputField()
    reply: str = dspy.OutputField()


class SupportDesk(dspy.Module):
    """Finds the topic of a ticket, then replies: two calls in a row, async."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = dspy.Predict(Classify)
        self.answer = dspy.ChainOfThought(Answer)

    async def aforward(self, ticket: str) -> dspy.Prediction:
        """Reply to one ticket."""
        topic = (await self.classify.acall(ticket=ticket)).topic
        return await self.answer.acall(ticket=ticket, notes=[topic])


class ResearchDesk(dspy.Module):
    """Asks three sources about a ticket at once, in DSPy's worker threads, then replies."""

    def __init__(self) -> None:
        super().__init__()
        self.look_up = dspy.Predict(LookUp)
        self.answer = dspy.ChainOfThought(Answer)

    def forward(self, ticket: str) -> dspy.Prediction:
        """Reply to one ticket."""
        questions = [dspy.Example(ticket=ticket, source=source).with_inputs("ticket", "source") for source in SOURCES]
        in_parallel = dspy.Parallel(num_threads=len(SOURCES), disable_progress_bar=True)
        facts = in_parallel([(self.look_up, question) for question in questions])
        return self.answer(ticket=ticket, notes=[fact.fact for fact in facts])


class SecondLook(dspy.Module):
    """Finds the topic of a ticket, and then again with some thought: what the second call says counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict(Classify)
        self.second = dspy.ChainOfThought(Classify)

    async def aforward(self, ticket: str) -> dspy.Prediction:
        """Classify one ticket."""
        await self.first.acall(ticket=ticket)
        return await self.second.acall(ticket=ticket)


def right_topic(example: Any, prediction: Any, trace: Any = None) -> bool:  # noqa: ARG001 - DSPy's signature
    """Return whether the topic is the one in the data set: the metric of the demo."""
    return bool(example.topic == prediction.topic)


def classifiers() -> dict[str, Callable[[], dspy.Module]]:
    """Return the two programs that are evaluated at once: one answers at once, the other thinks first."""
    return {"direct": lambda: dspy.Predict(Classify), "reasoned": lambda: dspy.ChainOfThought(Classify)}
