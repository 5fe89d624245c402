"""Scripted answers of the demo's endpoint: each ticket's own data, for the fields that a prompt asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from dspy_mlflow_async.cli.llm_endpoint import text_of

_MARKER = re.compile(r"#([a-z-]+/\d+)")
_FIELD = re.compile(r"\[\[ ## (\w+) ## ]]")


@dataclass(frozen=True, slots=True)
class Ticket:
    """One row of the data set.

    Attributes:
        id: Its number, two digits.
        ticket: What the customer wrote.
        topic: What it is about.
        guess: What a model takes it to be about that does not think first.
        reply: What the customer should be told.
    """

    id: str
    ticket: str
    topic: str
    guess: str
    reply: str

    def marked(self, act: str) -> str:
        """Return the customer's words with the marker of this ticket in this act, which no other call's inputs have."""
        return f"{self.ticket} (#{act}/{self.id})"


def load_tickets() -> tuple[Ticket, ...]:
    """Return the data set that ships with the package."""
    rows = json.loads(files(__package__).joinpath("tickets.json").read_text(encoding="utf-8"))
    return tuple(Ticket(**row) for row in rows)


def markers_in(text: str) -> set[str]:
    """Return the markers in a text: ``act/id`` of each call whose values it holds."""
    return set(_MARKER.findall(text))


class Script:
    """Answer a chat-completions request about a marked ticket.

    Args:
        tickets: The data set.
    """

    def __init__(self, tickets: Iterable[Ticket]) -> None:
        self._tickets = {ticket.id: ticket for ticket in tickets}

    def __call__(self, body: dict[str, Any]) -> str:
        """Return the fields that the prompt asks for, in the form of DSPy's ``ChatAdapter``.

        Raises:
            ValueError: For a prompt with no marker, or with several that no optimizer has put there.
        """
        text = text_of(body)
        found = markers_in(text)
        if len({marker for marker in found if not marker.startswith("train-")} or {""}) != 1 or not found:
            raise ValueError(f"a prompt must have one marker, this one has {sorted(found)}")
        marker = _MARKER.findall(text)[-1]  # an optimizer's examples stand before the question
        ticket = self._tickets[marker.partition("/")[2]]
        wanted = [name for name in _FIELD.findall(text.rpartition("Respond with")[2]) if name != "completed"]
        answers = {
            "reasoning": f"The words of #{marker} point to {ticket.topic}.",
            "topic": ticket.topic if "reasoning" in wanted else ticket.guess,
            "fact": f"On file for #{marker}: {ticket.topic}, first contact, customer since 2021.",
            "reply": f"{ticket.reply} (#{marker})",
        }
        fields = [f"[[ ## {name} ## ]]\n{answers[name]}" for name in wanted]
        return "\n\n".join([*fields, "[[ ## completed ## ]]"])
