"""A language model whose answers alone are faked, and small programs to call it with."""

from __future__ import annotations

import re
import threading
from types import SimpleNamespace

import dspy

TIMEOUT = 20.0  # seconds; the bound of every wait in these tests

_MARKER = re.compile(r"@[\w./-]+")
_FIELD = re.compile(r"\[\[ ## (\w+) ## \]\]|`(\w+)`")


class EchoLM(dspy.BaseLM):
    """Fills every output field with the last marker (``@`` and a word) of the last message.

    Args:
        during: Called with the marker while a call is open; raises what the call shall raise, waits for an event.
        aduring: The same for async calls; by default ``during``.
        answer: Text of one output field, from its name and the marker.
        usage: What the provider reports, from the marker.
        model: The model's name.
    """

    forward_contract = "legacy"  # dspy 3.3 wants it said

    def __init__(self, during=None, aduring=None, answer=None, usage=None, model="echo/one", **kwargs):
        super().__init__(model, "chat", 0.0, 1000, cache=False, **kwargs)
        self.during = during or (lambda marker: None)
        self.aduring = aduring
        self.answer = answer or (lambda field, marker: marker)
        self.usage = usage or usage_of
        self.calls = []

    def forward(self, prompt=None, messages=None, **kwargs):
        marker = self._begin(prompt, messages)
        self.during(marker)
        return self._respond(marker, prompt, messages)

    async def aforward(self, prompt=None, messages=None, **kwargs):
        marker = self._begin(prompt, messages)
        if self.aduring is not None:
            await self.aduring(marker)
        else:
            self.during(marker)
        return self._respond(marker, prompt, messages)

    def _begin(self, prompt, messages):
        marker = find_marker(_last(prompt, messages))
        self.calls.append(marker)
        return marker

    def _respond(self, marker, prompt, messages):
        text = _last(prompt, messages)
        _, found, instruction = text.rpartition("Respond with")
        fields = [a or b for a, b in _FIELD.findall(instruction)] if found else []
        if "JSON" in instruction:
            import json

            content = json.dumps({field: self.answer(field, marker) for field in fields})
        elif fields:
            answers = [f"[[ ## {name} ## ]]\n{self.answer(name, marker)}" for name in fields if name != "completed"]
            content = "\n\n".join([*answers, "[[ ## completed ## ]]"])
        else:
            content = self.answer(None, marker)
        message = SimpleNamespace(content=content, tool_calls=None)
        return SimpleNamespace(
            choices=[SimpleNamespace(message=message, finish_reason="stop")],
            usage=self.usage(marker),
            model=self.model,
        )


def usage_of(marker):
    """Ten tokens in, and as many out as the marker has characters."""
    return {"prompt_tokens": 10, "completion_tokens": len(marker), "total_tokens": 10 + len(marker)}


def find_marker(text):
    """The last marker of a text, or an empty text."""
    found = _MARKER.findall(str(text))
    return found[-1] if found else ""


def _last(prompt, messages):
    if not messages:
        return prompt or ""
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class Barrier:
    """Lets ``parties`` calls meet inside the LM, so that they are certainly open at the same time."""

    def __init__(self, parties):
        self._barrier = threading.Barrier(parties, timeout=TIMEOUT)

    def __call__(self, marker):
        self._barrier.wait()


class Chain(dspy.Module):
    """Two predictors, one after the other."""

    def __init__(self):
        super().__init__()
        self.first = dspy.Predict("question -> draft")
        self.second = dspy.Predict("draft -> answer")

    def forward(self, question):
        return self.second(draft=self.first(question=question).draft)

    async def aforward(self, question):
        first = await self.first.acall(question=question)
        return await self.second.acall(draft=first.draft)


def predict_tree(marker=None, lm="EchoLM"):
    """The tree of one ``dspy.Predict``, with the marker beside each name if one is given."""
    names = ("Predict.forward", "ChatAdapter.format", f"{lm}.__call__", "ChatAdapter.parse")
    nodes = [name if marker is None else (name, marker) for name in names]
    root, *below = [(node,) if marker is None else node for node in nodes]
    return (*root, [(*node, []) for node in below])


def chain_tree(marker=None):
    """The tree of one ``Chain``."""
    root = ("Chain.forward",) if marker is None else ("Chain.forward", marker)
    return (*root, [predict_tree(marker), predict_tree(marker)])


def marker(span):
    """A detail for ``tree``: the one marker that the inputs of a span hold."""
    return find_marker(span.inputs)


def feedback_on(trace):
    """The feedback on a trace, without the expectations: what its example has as labels."""
    return [assessment for assessment in trace.info.assessments if assessment.feedback is not None]


class Switching(dspy.Module):
    """Switches traces off in the middle of its call."""

    def __init__(self, switch):
        super().__init__()
        self.switch = switch

    def forward(self, question):
        self.switch(log_traces=False)
        return dspy.Prediction(answer=question)
