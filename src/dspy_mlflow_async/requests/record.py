"""Record of a request: its traces, and its LM calls in order, with tokens and cost; bounded in memory."""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import TYPE_CHECKING

from dspy_mlflow_async.settings import Redact, Settings
from dspy_mlflow_async.spans.observer import CallObserver, LmCall, RequestObserver

if TYPE_CHECKING:
    from dspy_mlflow_async.seams.mlflow_spans import OpenSpan

MAX_LM_CALLS = 1_000
MAX_TRACE_IDS = 1_000
FOLD_AT = 256


class Record:
    """Record of one ``request``, or of one call of a wrapped program. Complete when all calls in it have ended.

    It is told of the calls by whichever threads and tasks they run in. Those only append, and share no lock.

    Args:
        outer: The request around this one, which is told the same.
        redact: The request's own redaction.
    """

    def __init__(self, outer: RequestObserver | None = None, redact: Redact | None = None) -> None:
        self._outer = outer
        self._shows: CallObserver | None = None
        self._redact = redact
        self._adapted: tuple[Settings, Settings] | None = None
        self._calls: list[LmCall] = []
        self._trace_ids: dict[str, None] = {}
        # Beyond the cap calls wait here to be added up by model; one thread at a time does, none waits for it.
        self._overflow: deque[LmCall] = deque()
        self._folding = threading.Lock()
        self._folded: dict[str, Counter[str]] = {}
        self._folded_calls = 0

    # --- for the user ---------------------------------------------------------------------------------------------

    @property
    def trace_id(self) -> str | None:
        """MLflow's id of the request's first trace, ``tr-...``; None where it has none, for example if sampled out."""
        return next(iter(self.trace_ids), None)

    @property
    def trace_ids(self) -> list[str]:
        """The ids of its traces, in order, at most the first 1,000: one, unless the block makes several."""
        return list(self._trace_ids)

    @property
    def lm_calls(self) -> list[LmCall]:
        """LM calls that have ended, in the order they began, at most 1,000; see ``lm_calls_left_out``."""
        return sorted(self._calls[:MAX_LM_CALLS], key=lambda call: call.began)

    @property
    def lm_calls_left_out(self) -> int:
        """Number of LM calls beyond those that ``lm_calls`` holds. They count in ``usage`` and ``cost``."""
        with self._folding:
            return self._folded_calls + len(self._overflow) + max(0, len(self._calls) - MAX_LM_CALLS)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of all its LM calls: ``input_tokens``, ``output_tokens``, ``total_tokens``, as in MLflow.

        Empty where no provider reported any.
        """
        total: Counter[str] = Counter()
        for tokens in self._tokens_by_model().values():
            total.update(tokens)
        return dict(total)

    @property
    def cost(self) -> float | None:
        """Cost of these tokens in US dollars, by MLflow's prices; None where a model's price is not known."""
        from dspy_mlflow_async.seams.mlflow_runs import cost_in_usd

        costs = [cost_in_usd(model, tokens) for model, tokens in self._tokens_by_model().items() if tokens]
        return None if None in costs else float(sum(cost for cost in costs if cost is not None))

    def __repr__(self) -> str:
        return f"<request {self.trace_id}: {len(self._calls)} LM calls, {self.usage.get('total_tokens', 0)} tokens>"

    # --- for the tracer -------------------------------------------------------------------------------------------

    def on_span_start(self, span: OpenSpan) -> None:
        """Note that a span starts."""
        self.saw_trace(span.trace_id)
        if self._outer is not None:
            self._outer.on_span_start(span)

    def saw_trace(self, trace_id: str) -> None:
        """Note that the request has this trace."""
        if trace_id not in self._trace_ids and len(self._trace_ids) < MAX_TRACE_IDS:
            self._trace_ids[trace_id] = None

    def show_by(self, shows: CallObserver) -> None:
        """Tell ``shows`` of the request's outermost DSPy calls, so that its root can show them."""
        self._shows = shows

    def call_started(self, span: OpenSpan, inputs: str | None) -> None:
        """Note that an outermost DSPy call starts, with the JSON text of its inputs."""
        if self._shows is not None:
            self._shows.call_started(span, inputs)
        if self._outer is not None:
            self._outer.call_started(span, inputs)

    def call_ended(self, span: OpenSpan, outputs: str | None) -> None:
        """Note that it has ended, with the JSON text of its outputs; None where it has not returned."""
        if self._shows is not None:
            self._shows.call_ended(span, outputs)
        if self._outer is not None:
            self._outer.call_ended(span, outputs)

    def lm_call_ended(self, call: LmCall) -> None:
        """Note that an LM call has ended."""
        if len(self._calls) < MAX_LM_CALLS:
            self._calls.append(call)
        else:
            self._overflow.append(call)
            if len(self._overflow) >= FOLD_AT and self._folding.acquire(blocking=False):
                try:
                    self._fold()
                finally:
                    self._folding.release()
        if self._outer is not None:
            self._outer.lm_call_ended(call)

    def adapt(self, settings: Settings) -> Settings:
        """Return the tracer's settings with the request's own redaction before the tracer's."""
        if self._outer is not None:
            settings = self._outer.adapt(settings)
        if self._redact is None:
            return settings
        known = self._adapted
        if known is None or known[0] is not settings:
            known = self._adapted = (settings, settings.with_redact(self._redact))
        return known[1]

    def _fold(self) -> None:
        while self._overflow:
            call = self._overflow.popleft()  # only who holds the lock takes
            self._folded.setdefault(call.model, Counter()).update(call.tokens)
            self._folded_calls += 1

    def _tokens_by_model(self) -> dict[str, Counter[str]]:
        with self._folding:
            self._fold()
            by_model = {model: Counter(tokens) for model, tokens in self._folded.items()}
        for call in list(self._calls):
            by_model.setdefault(call.model, Counter()).update(call.tokens)
        return by_model
