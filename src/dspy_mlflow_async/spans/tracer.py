"""Begins and ends spans, each under the call that caused it, with the state kept in the context's frames."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from opentelemetry.trace import Status, StatusCode

from dspy_mlflow_async.context import frame as frames
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.seams.dspy import ACTIVE_CALL_ID
from dspy_mlflow_async.seams.mlflow_lazy_span import LazySpan
from dspy_mlflow_async.seams.mlflow_media import CAN_ATTACH, extract_attachments
from dspy_mlflow_async.seams.mlflow_spans import (
    TRACE_CONTEXT,
    OpenSpan,
    SpanAttributeKey,
    TracingContext,
    Unsampled,
    current_context,
    disabled_context,
    finish_span,
    has_ended,
    is_context_enabled,
    is_live,
    reattach,
    start_span,
    without_span,
)
from dspy_mlflow_async.settings import Settings
from dspy_mlflow_async.spans import outcome as outcomes
from dspy_mlflow_async.spans.describe import Description
from dspy_mlflow_async.spans.door import Door
from dspy_mlflow_async.spans.media import without_media
from dspy_mlflow_async.spans.observer import Observer, RequestObserver
from dspy_mlflow_async.spans.outcome import Failure, failure_of
from dspy_mlflow_async.spans.scopes import Counting, Region, SampledOut, SpanScope, Untraced, Usage, abandoned
from dspy_mlflow_async.spans.serialize import dump
from dspy_mlflow_async.spans.usage import Ledger

_OK = Status(StatusCode.OK)
_KEPT = 4096  # characters of a text whose JSON is kept for other calls
_KEYS, _SIMPLE = frozenset({str}), frozenset({str, int, float, bool, type(None)})
_OUTCOMES = {outcome: dump(outcome) for outcome in (outcomes.OK, outcomes.LATE)}


@contextlib.contextmanager
def suppress() -> Iterator[None]:
    """Record nothing in this block and in all that it starts, in its tasks and in DSPy's worker threads.

    Spans of the user and of other MLflow integrations are silenced too; the rest of the process is not. The same
    as ``mlflow.tracing.context(enabled=False)``, and restored by value, so that the block may end in another task
    than it began in.
    """
    before = TRACE_CONTEXT.get()
    TRACE_CONTEXT.set(disabled_context())
    try:
        yield
    finally:
        TRACE_CONTEXT.set(before)


def is_recording(*, heeds_switch: bool = True) -> bool:
    """Return whether a call that begins here may get a span.

    Args:
        heeds_switch: Whether the tracer is the one that ``autolog`` switches, which begins nothing below a call that
            began while it was off.
    """
    if not is_context_enabled():
        return False
    frame = frames.current()
    scope = frame.scope if frame is not None else None
    if not isinstance(scope, Untraced) or scope.ended:
        return True
    return not (heeds_switch or isinstance(scope, SampledOut))


def enter_untraced(call_id: str) -> None:
    """Begin a call that gets no span, once for the outermost one."""
    frame = frames.current()
    if frame is None or not isinstance(frame.scope, Untraced) or frame.scope.ended:
        frames.enter(call_id, Untraced())


def start(call_id: str, description: Description, settings: Settings) -> SpanScope | None:
    """Begin a span under the innermost open one and make it current.

    Args:
        call_id: DSPy's id of the call.
        description: What is known of it.
        settings: The tracer's settings.

    Returns:
        The scope of the span, or None where MLflow records none here or this call has one already.
    """
    end_abandoned()
    frame = frames.current()
    if frame is not None and frame.call_id == call_id and not isinstance(frame.scope, Untraced):
        return None  # two of our callbacks on one call: one span
    request: RequestObserver | None = frame.request if frame is not None else None
    if request is not None:
        settings = request.adapt(settings)
    before = current_context()
    where, parent, enclosing = _parent(before, frame)
    root = enclosing.span.root if enclosing is not None and parent is not None else None
    inputs = Door(settings).shown(description.inputs, secrets=description.has_secrets)
    attributes = _attributes(description, settings)
    if inputs.text is not None:
        attributes[SpanAttributeKey.INPUTS] = inputs.text
    span = start_span(description.name, description.span_type, where, parent, root, attributes)
    if span is None:
        return None
    if isinstance(span, Unsampled):
        frames.enter(call_id, SampledOut(span, before))
        return None
    scope = SpanScope(span, before, settings, enclosing.ledger if enclosing is not None else None)
    frames.enter(call_id, scope)
    scope.enter()
    if inputs.text is None:
        attributes[SpanAttributeKey.INPUTS] = _without_media(span, inputs.with_media, settings)
        span.otel.set_attribute(SpanAttributeKey.INPUTS, attributes[SpanAttributeKey.INPUTS])
    if frame is not None and (frame.example is not None or request is not None):
        _tell(scope, frame.example, request, enclosing, attributes)
    return scope


def _tell(
    scope: SpanScope,
    example: Observer | None,
    request: RequestObserver | None,
    enclosing: SpanScope | None,
    attributes: Mapping[str, str],
) -> None:
    """Tell the example and the request around here of a span that has begun."""
    if example is not None:
        example.on_span_start(scope.span)
    if request is not None:
        request.on_span_start(scope.span)
        scope.request = request
        if enclosing is None or enclosing.request is not request:
            scope.told = request
            request.call_started(scope.span, attributes.get(SpanAttributeKey.INPUTS))


def count_only(call_id: str, usage: Usage) -> None:
    """Begin an LM call that gets no span: let ``usage`` count until it ends."""
    frame = frames.leave(call_id)  # where it was entered as untraced
    scope = frame.scope if frame is not None else None
    frames.enter(call_id, Counting(usage, scope if isinstance(scope, SampledOut) else None))


def parent_here() -> Any:
    """Return the OpenTelemetry span that a call which begins here gets as its parent: INVALID_SPAN for none."""
    where, parent, _ = _parent(current_context(), frames.current())
    return where.span if parent is None else parent


def enclosing_ledger() -> Ledger | None:
    """Return the ledger of the outermost module call around here, whose span shows its sum; None outside of any."""
    _, _, enclosing = _parent(current_context(), frames.current())
    return None if enclosing is None else enclosing.ledger


def is_open(call_id: str) -> bool:
    """Return whether the innermost call here is this one, and has a span or is counted."""
    frame = frames.current()
    return frame is not None and frame.call_id == call_id and isinstance(frame.scope, (SpanScope, Counting))


def end(call_id: str, outputs: Any, exception: BaseException | None) -> None:
    """End the call with this id, if this context has it: its span, its usage, and its place in the context.

    Args:
        call_id: DSPy's id of the call.
        outputs: What it returned.
        exception: What it raised, or None.
    """
    frame = frames.leave(call_id)
    scope = frame.scope if frame is not None else None
    if isinstance(scope, Counting):
        scope.usage.close(outputs, exception)
        scope = scope.left_out
    if isinstance(scope, Untraced):
        scope.ended = True
    if isinstance(scope, SampledOut):
        reattach(scope.before)
    if not isinstance(scope, SpanScope) or scope.ended:
        return
    scope.ended = True
    reattach(scope.before)
    if scope.usage is not None:
        scope.usage.close(outputs, exception)
    attributes: dict[str, str] = {}
    try:
        attributes |= _end_attributes(scope, outputs)
    finally:
        if scope.told is not None:
            scope.told.call_ended(
                scope.span, None if exception is not None else attributes.get(SpanAttributeKey.OUTPUTS)
            )
        end_span(scope.span, scope.settings, attributes, failure_of(exception) if exception is not None else None)


def end_abandoned() -> None:
    """End the spans of calls that were dropped without an end."""
    while abandoned:
        try:
            span, settings = abandoned.popleft()
        except IndexError:  # another thread was faster
            return
        _end_abandoned_span(span, settings)


@guarded
def _end_abandoned_span(span: OpenSpan, settings: Settings) -> None:
    end_span(span, settings, {}, outcomes.ABANDONED_FAILURE)


def _parent(where: TracingContext, frame: frames.Frame | None) -> tuple[TracingContext, Any | None, SpanScope | None]:
    """Return the current context for a new call, the span to begin under, and our innermost open scope.

    MLflow's current span is the innermost of ours and the user's. In a context that outlives the call it was
    copied in, that span may have ended, and an ended span is nobody's parent: then it is the innermost of our
    frames that is still open, or none.

    Args:
        where: What MLflow takes for current.
        frame: Our innermost frame.
    """
    if frame is not None and (scope := _current_scope(frame, where)) is not None:
        return where, where.span, scope
    while frame is not None and _is_left_behind(frame):
        if where.span is frame.scope.span.otel:
            where = frame.scope.before
        frame = frame.parent
    enclosing = _enclosing(frame)
    if type(where.span) is LazySpan:
        where = where._replace(span=where.span.begun())
    if is_live(where.span):
        return where, where.span, enclosing
    if not has_ended(where.span):
        return where, None, enclosing  # nothing, a remote parent, or sampled out: it is read from the context
    if enclosing is not None:
        return where, enclosing.span.otel, enclosing
    return without_span(where), None, None


def _current_scope(frame: frames.Frame, where: TracingContext) -> SpanScope | None:
    """Return the scope of our innermost frame where its span is current, and both are open: in nearly every call."""
    scope = frame.scope
    if (
        type(scope) is SpanScope
        and scope.span.otel is where.span
        and not scope.ended
        and is_live(where.span)
        and not _is_left_behind(frame)
    ):
        return scope
    return None


def _is_left_behind(frame: frames.Frame) -> bool:
    """Return whether DSPy has forgotten the call of this frame without reporting its end.

    That happens when a KeyboardInterrupt hits between the start handlers and the call. DSPy knows by then that
    another call, or none, is the innermost here. Of a frame that was carried here DSPy knows nothing; an id that
    none of our frames has belongs to a call that only another tracer is told of.
    """
    if ACTIVE_CALL_ID is None:
        return False
    active = ACTIVE_CALL_ID.get()
    if frame.call_id == active or frame.is_carried or not isinstance(frame.scope, SpanScope):
        return False
    return active is None or any(outer.call_id == active for outer in frames.lineage(frame.parent))


def _enclosing(frame: frames.Frame | None) -> SpanScope | None:
    for outer in frames.lineage(frame):
        scope = outer.scope
        if isinstance(scope, SpanScope) and not scope.ended:
            return scope
        if isinstance(scope, Region) and scope.isolated:
            return None
    return None


def _attributes(description: Description, settings: Settings) -> dict[str, str]:
    if not description.attributes:
        return {}
    given = description.attributes
    marks = None if settings.redact is not None else _marks(given)
    if marks is None:
        return _encoded(given, settings, description.has_secrets)
    return _encoded_before(tuple(given.items()), marks, settings, description.has_secrets).copy()


def _encoded(given: Mapping[str, Any], settings: Settings, has_secrets: bool) -> dict[str, str]:
    plain = Door(settings).plain(secrets=has_secrets)
    shown = plain(given)
    if not isinstance(shown, dict):  # the user's hook has replaced them as a whole
        shown = dict.fromkeys(given, shown)
    return {key: plain.encode(value) for key, value in shown.items()}


def _marks(given: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return what tells values apart that are equal; None where there is another than short texts and numbers."""
    values = given.values()
    kinds = (*map(type, values),)  # 1 is True
    if not (_SIMPLE.issuperset(kinds) and _KEYS.issuperset(map(type, given))):
        return None
    if any([len(value) > _KEPT for value in values if type(value) is str]):  # noqa: C419 - a generator costs more
        return None
    return (*kinds, *map(repr, values)) if float in kinds else kinds  # 0.0 is -0.0


# A predictor and an LM have the same attributes in each of their calls, and traces that wait share their texts.
@functools.lru_cache(maxsize=256)
def _encoded_before(
    items: tuple[tuple[str, Any], ...],
    marks: tuple[Any, ...],  # noqa: ARG001 - for the cache
    settings: Settings,
    has_secrets: bool,
) -> dict[str, str]:
    return _encoded(dict(items), settings, has_secrets)


def _end_attributes(scope: SpanScope, outputs: Any) -> dict[str, str]:
    attributes: dict[str, str] = {}
    if outputs is not None:
        text, with_media = Door(scope.settings).shown(
            outputs if scope.show_outputs is None else scope.show_outputs(outputs)
        )
        attributes[SpanAttributeKey.OUTPUTS] = (
            _without_media(scope.span, with_media, scope.settings) if text is None else text
        )
    if scope.usage is not None:
        for key, value in scope.usage.attributes(outputs).items():
            attributes[key] = dump(value)
        if scope.ledger is not None and SpanAttributeKey.CHAT_USAGE in attributes:
            scope.ledger.span_ids.append(scope.span.number)
    return attributes


def _without_media(span: OpenSpan, shown: Any, settings: Settings) -> str:
    """JSON text with references in place of media; text that only looked like media is bounded like everything else."""
    shown = extract_attachments(span, shown) if CAN_ATTACH else without_media(shown)
    return Door(replace(settings, redact=None)).plain().dumps(shown)


def abandon(span: OpenSpan, settings: Settings) -> None:
    """Leave a span whose call is gone to be ended later; safe to call from ``__del__``."""
    abandoned.append((span, settings))


def end_span(span: OpenSpan, settings: Settings, attributes: dict[str, str], failure: Failure | None) -> None:
    """End a span with its outcome, and with the exception that ended it.

    Args:
        span: The span.
        settings: Those it began with.
        attributes: JSON texts by key.
        failure: What the call raised, or None.
    """
    is_late = span.root is not span.otel and has_ended(span.root)
    if failure is None:
        attributes["outcome"] = _OUTCOMES[outcomes.LATE if is_late else outcomes.OK]
        finish_span(span, attributes, _OK)
        return
    failure = Door(settings).failure(failure)
    attributes["outcome"] = dump(failure.outcome)
    if is_late:
        attributes["late"] = dump(value=True)
    event = {
        "exception.message": failure.message,
        "exception.type": failure.type,
        "exception.stacktrace": failure.stacktrace,
    }
    finish_span(span, attributes, Status(StatusCode.ERROR, f"{failure.type}: {failure.message}"), event)
