"""Inputs and outputs of a request's root: those of the first DSPy call below it, and of the last one."""

from __future__ import annotations

import json
from typing import Any

from dspy_mlflow_async.requests.options import Show, call
from dspy_mlflow_async.seams.mlflow_call_span import trace_number_of
from dspy_mlflow_async.seams.mlflow_live import attributes_of, write
from dspy_mlflow_async.seams.mlflow_spans import OpenSpan, SpanAttributeKey
from dspy_mlflow_async.settings import Settings
from dspy_mlflow_async.spans.door import Door
from dspy_mlflow_async.spans.outcome import Failure


class Preview:
    """Inputs and outputs of a request's root: JSON texts that its calls have stored already; nothing is evaluated.

    It is told of the request's outermost DSPy calls by whichever threads and tasks they run in.

    Args:
        inputs: What to show as inputs.
        outputs: What to show as outputs.
        settings: What the root's span goes by.
    """

    __slots__ = ("_has_inputs", "_inputs", "_last_failed", "_outputs", "_outputs_text", "_root", "_settings")

    def __init__(self, inputs: Show, outputs: Show, settings: Settings) -> None:
        self._inputs = inputs
        self._outputs = outputs
        self._settings = settings
        self._root: Any | None = None  # OpenTelemetry's span, where it is recorded
        self._has_inputs = False
        self._outputs_text: str | None = None
        self._last_failed = False

    def begin(self, root: OpenSpan) -> None:
        """Note that the root has begun."""
        self._root = root.otel
        self._has_inputs = SpanAttributeKey.INPUTS in attributes_of(root.otel)

    def call_started(self, span: OpenSpan, inputs: str | None) -> None:
        """Show the inputs of the first call: now, so that a trace that is still open is not blank."""
        root = self._root
        if self._has_inputs or inputs is None or root is None or root.end_time is not None or not self._has(span):
            return
        self._has_inputs = True
        text = self._of_text(self._inputs, inputs)
        if text is not None and SpanAttributeKey.INPUTS not in attributes_of(root):
            write(root, {SpanAttributeKey.INPUTS: text})

    def call_ended(self, span: OpenSpan, outputs: str | None) -> None:
        """Note what a call has returned; None for a call that has not."""
        if self._root is not None and self._has(span):
            self._last_failed = outputs is None
            if outputs is not None:
                self._outputs_text = outputs

    def _has(self, span: OpenSpan) -> bool:
        """Return whether the call is in the root's trace; an evaluation in the request makes traces of its own."""
        root = self._root
        return root is not None and span.trace_number == trace_number_of(root)

    def of_inputs(self, value: Any) -> str | None:
        """Return the text to show of the request's own inputs; None where there are none."""
        return None if value is None else self._of_text(self._inputs, self._text_of(value))

    def of_outputs(self, value: Any, failure: Failure | None) -> str | None:
        """Return the text to show as the outputs of a request that is over.

        Args:
            value: The request's own outputs; None for those of its last call.
            failure: What ended it, or None.
        """
        if value is not None:
            return self._of_text(self._outputs, self._text_of(value))
        root, text = self._root, self._outputs_text
        if root is None or text is None or SpanAttributeKey.OUTPUTS in attributes_of(root):
            return None  # there is none, or the user has set one
        return None if failure is not None and self._last_failed else self._of_text(self._outputs, text)

    def close(self) -> None:
        """Let go of the span and the texts: whoever keeps the request's record keeps this."""
        self._root = self._outputs_text = None

    def _text_of(self, value: Any) -> str:
        return Door(self._settings).plain().dumps(value)

    def _of_text(self, show: Show, text: str) -> str | None:
        """Return the text to show of a JSON text that has passed the door; None for nothing."""
        if isinstance(show, bool):
            return text if show else None
        shown = call(show, (json.loads(text),), {})
        return None if shown is None else self._text_of(shown)
