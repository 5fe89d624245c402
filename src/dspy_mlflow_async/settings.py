"""Settings of the tracer: one frozen record, replaced as a whole when it changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any

import cloudpickle

Redact = Callable[[Any], Any]

logger = logging.getLogger("dspy_mlflow_async")


def mask_everything(value: Any) -> str:  # noqa: ARG001 - whatever it is
    """Mask the value, in place of a ``redact`` that did not survive pickling."""
    return "[masked]"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one tracer.

    The first five are ``mlflow.dspy.autolog``'s, with its defaults and meaning.

    Attributes:
        log_traces: Record calls as spans.
        log_traces_from_compile: Also those that an optimizer's ``compile`` makes.
        log_traces_from_eval: Also those that ``dspy.Evaluate`` makes.
        log_compiles: Log each ``compile`` as a run.
        log_evals: Log each evaluation as a run.
        max_value_bytes: How many bytes the stored JSON text of a span's inputs, of its outputs, or of one of its
            attributes may have. What is longer is cut to its beginning; the mark for that may add up to 64 bytes.
        mask_contents: Mask what looks like a secret in every text; names of secrets count either way.
        redact: Sees each value before it is stored, containers before what they contain, and returns what to
            store in its place. Where it raises, a mask is stored.
    """

    log_traces: bool = True
    log_traces_from_compile: bool = False
    log_traces_from_eval: bool = True
    log_compiles: bool = False
    log_evals: bool = False
    max_value_bytes: int = 1024 * 1024
    mask_contents: bool = True
    redact: Redact | None = None

    def __post_init__(self) -> None:
        """Refuse what could only fail later, inside somebody's program."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"{field.name} must be True or False, not {value!r}")
        if isinstance(self.max_value_bytes, bool) or not isinstance(self.max_value_bytes, int):
            raise TypeError(f"max_value_bytes must be a number of bytes, not {self.max_value_bytes!r}")
        if self.max_value_bytes < 1:
            raise ValueError(f"max_value_bytes must be at least 1, not {self.max_value_bytes}")
        if self.redact is not None and not callable(self.redact):
            raise TypeError(f"redact must be a function of one value, not {self.redact!r}")

    def with_redact(self, redact: Redact) -> Settings:
        """Return these settings with ``redact`` applied before their own."""
        own = self.redact
        if own is None:
            return replace(self, redact=redact)

        def both(value: Any) -> Any:
            return own(redact(value))

        return replace(self, redact=both)

    def __copy__(self) -> Settings:
        """Return itself: it never changes."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Settings:
        """Return itself: it never changes, and a hook may hold what cannot be copied."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle ``redact`` by itself, so that one that cannot be pickled keeps nothing else from it."""
        plain = tuple(getattr(self, field.name) for field in fields(self) if field.name != "redact")
        return _unpickled, (plain, None if self.redact is None else _pickled(self.redact))


@dataclass(frozen=True, slots=True)
class Override:
    """Settings of one context, in place of the process's.

    Attributes:
        settings: The settings; None where the tracer is off there.
    """

    settings: Settings | None


# Set while MLflow's evaluations switch autologging on and off: their wishes are for their own context.
OVERRIDE: ContextVar[Override | None] = ContextVar("dspy_mlflow_async_settings", default=None)


def _pickled(redact: Redact) -> bytes:
    try:
        pickled: bytes = cloudpickle.dumps(redact)
    except Exception:  # noqa: BLE001 - it may hold anything: a lock, a client, a model
        logger.warning("redact cannot be pickled (%r): the pickled tracer will mask every value.", redact)
        return cloudpickle.dumps(mask_everything)
    return pickled


def _unpickled(plain: tuple[Any, ...], redact: bytes | None) -> Settings:
    settings = Settings(*plain)
    if redact is None:
        return settings
    try:
        return replace(settings, redact=cloudpickle.loads(redact))
    except Exception:  # what it is made of may be missing here; nothing may pass for that
        logger.warning("redact cannot be unpickled: every value will be masked.", exc_info=True)
        return replace(settings, redact=mask_everything)
