"""The programs that are measured, and the language models that answer them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import dspy

ANSWER = "[[ ## answer ## ]]\nyes, all of it\n\n[[ ## completed ## ]]"


class ScriptedLM(dspy.LM):
    """Answers at once, in this process; everything of DSPy's around a request runs as for any other LM.

    A subclass of ``dspy.LM``, since OpenInference records no LM call of a plain ``dspy.BaseLM``.
    """

    forward_contract = "legacy"  # DSPy 3.3 wants it said

    def __init__(self) -> None:
        super().__init__("openai/scripted", cache=False)

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:  # noqa: ARG002 - DSPy's signature
        """The answer, as a provider gives it."""
        message = SimpleNamespace(content=ANSWER, tool_calls=None)
        return SimpleNamespace(
            choices=[SimpleNamespace(message=message, finish_reason="stop")],
            usage={"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            model="scripted",
        )

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        """The same for ``acall``."""
        return self.forward(prompt, messages, **kwargs)


def make_lm(latency_ms: int, endpoint: str | None) -> dspy.LM:
    """The LM of a cell: in this process without latency, over real HTTP with one."""
    if not latency_ms:
        return ScriptedLM()
    return dspy.LM(f"openai/scripted-{latency_ms}", api_base=endpoint, api_key="none", cache=False)


class Nest(dspy.Module):
    """A module around a module, ``depth`` levels in all."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner = Nest(depth - 1) if depth > 2 else dspy.Predict("question -> answer")  # noqa: PLR2004

    def forward(self, question: str) -> Any:
        """What the innermost says."""
        return self.inner(question=question)

    async def aforward(self, question: str) -> Any:
        """What the innermost says."""
        return await self.inner.acall(question=question)


class Wide(dspy.Module):
    """Calls one predictor ``width`` times, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.predict = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        """What the last says."""
        for _ in range(self.width - 1):
            self.predict(question=question)
        return self.predict(question=question)

    async def aforward(self, question: str) -> Any:
        """What the last says."""
        for _ in range(self.width - 1):
            await self.predict.acall(question=question)
        return await self.predict.acall(question=question)


def make_program(depth: int, width: int) -> dspy.Module:
    """One ``dspy.Predict`` (4 spans: module, adapter format, LM, adapter parse), wrapped or repeated."""
    if width > 1:
        return Wide(width)
    return Nest(depth) if depth > 1 else dspy.Predict("question -> answer")


def span_count(depth: int, width: int) -> int:
    """How many spans MLflow's and our tracer record for one call of that program."""
    return 1 + 4 * width if width > 1 else depth + 3


def make_question(payload: int) -> str:
    """A text of ``payload`` bytes."""
    text = "Is everything there, in the right place, and once? "
    return (text * (payload // len(text) + 1))[:payload]


def metric(example: Any, prediction: Any, trace: Any = None) -> float:  # noqa: ARG001 - DSPy's signature
    """Whether there is an answer."""
    return float(bool(prediction.answer))
