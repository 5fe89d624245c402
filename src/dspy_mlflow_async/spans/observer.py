"""Interfaces of the observers of spans and LM calls: an evaluation's example, a request of a service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from dspy_mlflow_async.settings import Settings


class LmCall(NamedTuple):
    """One LM call that has ended.

    Attributes:
        model: The model's name, as the LM has it.
        began: When it began, in seconds of ``time.perf_counter()``.
        latency: How long it took, in seconds.
        tokens: ``input_tokens``, ``output_tokens``, ``total_tokens`` and, where reported, the cached ones; empty
            where no provider reported any, as for an answer from DSPy's cache.
        cache_hit: Whether the answer came from DSPy's cache; None where that is not known.
        outcome: ``ok``, ``error``, ``cancelled`` or ``abandoned``.
    """

    model: str
    began: float
    latency: float
    tokens: Mapping[str, int]
    cache_hit: bool | None
    outcome: str


class Observer(Protocol):
    """Observer of the spans inside of it, such as an evaluation's example."""

    def on_span_start(self, span: Any) -> None:
        """Take note of a span that begins."""


class CallObserver(Protocol):
    """Observer of the outermost DSPy calls of a request."""

    def call_started(self, span: Any, inputs: str | None) -> None:
        """Take note of a call that begins, and of the JSON text of its inputs."""

    def call_ended(self, span: Any, outputs: str | None) -> None:
        """Take note of its end, and of the JSON text of its outputs; None where it has not returned."""


class RequestObserver(Observer, CallObserver, Protocol):
    """Observer of the spans and LM calls inside of a request."""

    def lm_call_ended(self, call: LmCall) -> None:
        """Take note of an LM call that has ended, with a span of its own or not."""

    def adapt(self, settings: Settings) -> Settings:
        """Return the settings for a span that begins here, given the tracer's."""
