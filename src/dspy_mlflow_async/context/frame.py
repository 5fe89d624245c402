"""The innermost call of this context: one variable, immutable frames, each linked to its parent."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple


class Frame(NamedTuple):
    """One DSPy call, evaluation or compile that has begun and not ended in this context.

    A frame is never changed: a copied context may share it with other tasks and threads. What must change
    lives in the values it points to, which this module does not look into.

    Attributes:
        call_id: DSPy's id of the call, or one of our own.
        parent: The frame that was current when the call began.
        scope: What the call holds until its end (a span, or the state to restore).
        evaluation: The innermost evaluation around the call.
        example: The example of it that is being worked on.
        compile: The outermost compile around the call.
        request: The innermost request around the call.
        is_carried: Whether it was current elsewhere and was brought here by a ``Carrier``.
    """

    call_id: str
    parent: Frame | None
    scope: Any = None
    evaluation: Any = None
    example: Any = None
    compile: Any = None
    request: Any = None
    is_carried: bool = False


_current: ContextVar[Frame | None] = ContextVar("dspy_mlflow_async_frame", default=None)

# The carrier takes the variable to other threads; nobody else sets it.
VARIABLE = _current

current = _current.get


def enter(
    call_id: str,
    scope: Any = None,
    *,
    evaluation: Any = None,
    example: Any = None,
    compile: Any = None,  # noqa: A002 - DSPy's word
    request: Any = None,
) -> Frame:
    """Begin a call: make a child of the current frame and make that current.

    Args:
        call_id: The id that ``leave`` will be given.
        scope: What the call holds until its end.
        evaluation: The evaluation that the call begins; by default the one around it, with its example.
        example: The example that the call begins; by default the one around it.
        compile: The compile that the call begins; by default the one around it.
        request: The request that the call begins; by default the one around it.

    Returns:
        The new frame.
    """
    parent = _current.get()
    if parent is not None:
        if evaluation is None:
            evaluation = parent.evaluation
            example = parent.example if example is None else example
        if compile is None:
            compile = parent.compile  # noqa: A001 - DSPy's word
        if request is None:
            request = parent.request
    frame = Frame(call_id, parent, scope, evaluation, example, compile, request)
    _current.set(frame)
    return frame


def leave(call_id: str) -> Frame | None:
    """End a call: make the parent of its frame current.

    The parent is restored by value. A ``Token`` would not do: it can only be reset in the context that made it,
    and a call may begin in one and end in another.

    Returns:
        The frame that ended, or None where this context has none with that id (a second end, or an end in a
        foreign context); then nothing changes.
    """
    frame = _current.get()
    while frame is not None and frame.call_id != call_id:
        frame = frame.parent
    if frame is not None:
        _current.set(frame.parent)
    return frame


def to_carry() -> Frame | None:
    """Return the current frame as it is current where a ``Carrier`` brings it."""
    frame = _current.get()
    return None if frame is None else frame._replace(is_carried=True)


def lineage(frame: Frame | None) -> Iterator[Frame]:
    """Yield ``frame`` and those around it, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.parent


def ancestors() -> Iterator[Frame]:
    """Yield the frames of this context, innermost first."""
    return lineage(_current.get())
