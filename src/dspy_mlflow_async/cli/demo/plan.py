"""Expected span trees of the demo's traces, written down before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

LM_CALL = "LM.__call__"
PREDICT = "Predict.forward"


@dataclass(frozen=True, slots=True)
class Node:
    """Span and its descendants; the order of siblings says nothing, since they may run at the same time."""

    name: str
    children: tuple[Node, ...] = ()

    def __post_init__(self) -> None:
        """Sort the children, so that equal trees compare equal."""
        object.__setattr__(self, "children", tuple(sorted(self.children, key=repr)))

    def paths(self, above: str = "") -> Iterator[str]:
        """Yield each span as the names from the root down to it."""
        path = f"{above} > {self.name}" if above else self.name
        yield path
        for child in self.children:
            yield from child.paths(path)

    def without_adapters(self) -> Node:
        """Return the tree less its adapter spans, and with one LM call a predictor.

        A model that is not scripted may answer in the wrong form; DSPy then asks again through another adapter.
        """
        seen: dict[str, Node] = {}
        kept: list[Node] = []
        for child in self.children:
            if child.name.endswith((".format", ".parse")):
                continue
            if child.name == LM_CALL:
                seen[child.name] = child
            else:
                kept.append(child.without_adapters())
        return Node(self.name, (*kept, *seen.values()))


@dataclass(frozen=True, slots=True)
class Planned:
    """One call of a program, and the one trace that it must give.

    Attributes:
        act: The name of the act that makes the call.
        id: The ticket's number.
        tree: The spans.
        session: The session of the trace; by default the name of the act.
    """

    act: str
    id: str
    tree: Node = field(repr=False)
    session: str = ""

    @property
    def marker(self) -> str:
        """Marker in this call's inputs, and in no other call's."""
        return f"{self.act}/{self.id}"


def predict() -> Node:
    """Return the spans of one ``dspy.Predict``."""
    return Node(PREDICT, (Node("ChatAdapter.format"), Node(LM_CALL), Node("ChatAdapter.parse")))


def chain_of_thought() -> Node:
    """Return the spans of one ``dspy.ChainOfThought``."""
    return Node("ChainOfThought.forward", (predict(),))


def difference(planned: Node, found: Node) -> str:
    """Describe in words what is missing from a tree or stands in it unplanned; empty where the two are equal."""
    if planned == found:
        return ""
    wanted, there = Counter(planned.paths()), Counter(found.paths())
    words = [f"missing: {_list(wanted - there)}"] if wanted - there else []
    words += [f"not planned: {_list(there - wanted)}"] if there - wanted else []
    return "; ".join(words) or "spans stand under the wrong one of several equal parents"


def _list(paths: Counter[str]) -> str:
    return ", ".join(path if count == 1 else f"{count} x {path}" for path, count in sorted(paths.items()))
