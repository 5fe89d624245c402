"""Options of a request scope, checked once, and their values for one call."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dspy_mlflow_async.async_programs import is_coroutine_function
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.requests import sampling
from dspy_mlflow_async.seams import mlflow_trace_settings
from dspy_mlflow_async.settings import Redact
from dspy_mlflow_async.spans.door import Door
from dspy_mlflow_async.workers import call_with_timeout

logger = logging.getLogger("dspy_mlflow_async")

# What MLflow shows and every store takes of a trace's metadata. Source: mlflow.tracing.constant.
MAX_ID_CHARACTERS = 250
MAX_VALUE_CHARACTERS = 4096
MAX_KEY_CHARACTERS = 250
MAX_SEEN_CHARACTERS = 65_536  # of a longer text that is cut to these; no more of it is looked at
CHECK_TIMEOUT = 5.0  # seconds

Text = str | int | Callable[..., Any] | None
Texts = Mapping[str, Any] | Callable[..., Any] | None
# True for what there is, False for nothing, or a function of what there is, as it is stored, that returns what to show.
Show = bool | Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Values:
    """Metadata, tags and destination for the traces of one call, ready to be set.

    Attributes:
        metadata: Trace metadata by key, session and user among them.
        tags: Trace tags by key.
        experiment_id: Where the traces go, or None for where they would go anyway.
    """

    metadata: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    experiment_id: str | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of ``wrap`` and ``request``; see there.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a sampling key that is not known, or a ratio outside 0 to 1.
    """

    name: str | None = None
    sample: sampling.Sample = 1.0
    session_id: Text = None
    user: Text = None
    tags: Texts = None
    metadata: Texts = None
    experiment_id: Text = None
    redact: Redact | None = None
    inputs: Show = True
    outputs: Show = True
    sampling: sampling.ByRatio | sampling.ByOutcome | None = field(init=False)

    def __post_init__(self) -> None:
        """Refuse what could only fail later, inside somebody's program."""
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"name must be a text, not {self.name!r}")
        for name in ("session_id", "user", "experiment_id"):
            value = getattr(self, name)
            if not _is_text(value) and value is not None and not callable(value):
                raise TypeError(f"{name} must be a text or a function of the call's arguments, not {value!r}")
        for name in ("tags", "metadata"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping) and not callable(value):
                raise TypeError(f"{name} must be a mapping or a function of the call's arguments, not {value!r}")
        if self.redact is not None and not callable(self.redact):
            raise TypeError(f"redact must be a function of one value, not {self.redact!r}")
        for name in ("inputs", "outputs"):
            _check_show(name, getattr(self, name))
        for name in ("session_id", "user", "experiment_id", "tags", "metadata", "redact", "inputs", "outputs"):
            refuse_async(name, getattr(self, name))
        if self.experiment_id == "":
            raise ValueError("experiment_id must not be empty")
        object.__setattr__(self, "sampling", sampling.parse(self.sample))

    def check_span(self) -> None:
        """Refuse what a request without a span would not show.

        Raises:
            ValueError: For ``inputs`` or ``outputs`` without a ``name``.
        """
        for name in ("inputs", "outputs"):
            if self.name is None and getattr(self, name) is not True:
                raise ValueError(f"{name}= is shown on the span that name= makes: give a name, too")

    def check_experiment(self) -> None:
        """Ask the store about the experiment, where it is known now.

        Raises:
            ValueError: Where the store says that traces cannot go there. A store that does not answer within
                some seconds does not hold up the start.
        """
        if _is_text(self.experiment_id):
            _check_experiment(str(self.experiment_id))

    def values(self, door: Door, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Values:
        """Return the values for a call with these arguments. A function that raises gives nothing; it is reported.

        Args:
            door: What is stored passes it.
            args: The arguments of the call.
            kwargs: The same by name.
        """
        kwargs = dict(kwargs or {})
        metadata = _texts(_ask(self.metadata, args, kwargs), args, kwargs, door)
        for key, value in ((mlflow_trace_settings.SESSION, self.session_id), (mlflow_trace_settings.USER, self.user)):
            said = _ask(value, args, kwargs)
            if said is not None and said != "":
                metadata[key] = cut(door.text(said, MAX_SEEN_CHARACTERS), MAX_ID_CHARACTERS)
        experiment_id = _ask(self.experiment_id, args, kwargs)
        return Values(
            metadata,
            _texts(_ask(self.tags, args, kwargs), args, kwargs, door),
            str(experiment_id) if experiment_id else None,
        )


def cut(text: str, limit: int) -> str:
    """Cut a text longer than ``limit`` characters, with a mark that tells it from others cut alike."""
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    mark = f"… [cut: {len(text)} characters, sha256 {digest}]"
    return text[: limit - len(mark)] + mark


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _check_show(name: str, value: Any) -> None:
    if not isinstance(value, bool) and not callable(value):
        raise TypeError(f"{name} must be True, False or a function of what would be shown, not {value!r}")


def refuse_async(name: str, value: Any) -> None:
    """Refuse a function that would only give a coroutine, where nobody could await it.

    Raises:
        TypeError: For a coroutine function, and for a mapping with one.
    """
    if isinstance(value, Mapping):
        for key, one in value.items():
            refuse_async(f"{name}[{key!r}]", one)
    elif is_coroutine_function(value):
        raise TypeError(f"{name} must not be async: it is asked where nothing can be awaited, not {value!r}")


def _ask(value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call(value, args, kwargs) if callable(value) else value


def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what the user's function returns, or None where it raises, which is reported once."""
    try:
        return function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - the user's function; the call goes on without what it would have said
        _warn_once(function, error)
        return None


_warned: set[Any] = set()


def _warn_once(function: Any, error: Exception) -> None:
    while isinstance(function, functools.partial):
        function = function.func
    # The code, not the function: one that is made anew for each request is reported once. A name would not tell two
    # lambdas apart.
    key = getattr(function, "__code__", type(function))
    if key not in _warned and len(_warned) < 1000:  # noqa: PLR2004 - a bound
        _warned.add(key)
        logger.warning(
            "dspy-mlflow-async: %s raised %s: %s; its value is left out of the traces.",
            getattr(function, "__qualname__", repr(function)),
            type(error).__name__,
            error,
        )


def _texts(said: Any, args: tuple[Any, ...], kwargs: dict[str, Any], door: Door) -> dict[str, str]:
    return _texts_of(said, args, kwargs, door) or {}


@guarded
def _texts_of(said: Any, args: tuple[Any, ...], kwargs: dict[str, Any], door: Door) -> dict[str, str] | None:
    if not isinstance(said, Mapping):
        return None
    values = {str(key): _ask(value, args, kwargs) for key, value in said.items()}
    return {
        cut(key, MAX_KEY_CHARACTERS): cut(door.text(value, MAX_SEEN_CHARACTERS, name=key), MAX_VALUE_CHARACTERS)
        for key, value in values.items()
        if value is not None
    }


def _check_experiment(experiment_id: str) -> None:
    try:
        answer = call_with_timeout(lambda: mlflow_trace_settings.why_not(experiment_id), CHECK_TIMEOUT)
    except Exception as error:  # noqa: BLE001 - the store may fail in any way
        logger.warning("dspy-mlflow-async: could not check experiment %s: %s", experiment_id, error)
        return
    if answer is not None:
        raise ValueError(f"traces cannot go to experiment {experiment_id!r}: {answer}")
