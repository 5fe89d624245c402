"""Wrapper that makes every call of a program a request of its own."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, cast

import dspy

from dspy_mlflow_async.async_programs import async_form, is_coroutine_function
from dspy_mlflow_async.requests import sampling
from dspy_mlflow_async.requests.lazy_root import Beginning
from dspy_mlflow_async.requests.options import Options, Show, Text, Texts
from dspy_mlflow_async.requests.scope import Scope
from dspy_mlflow_async.requests.stream import stream_in
from dspy_mlflow_async.settings import Redact
from dspy_mlflow_async.spans.describe import describe_outputs
from dspy_mlflow_async.workers import in_thread

# What `copy` and `pickle` ask an object for: the program's own would make a copy of it, and not of what wraps it.
_COPYING = frozenset(
    {"__copy__", "__deepcopy__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__"}
)


def wrap(
    program: Any,
    *,
    name: str | None = None,
    sample: sampling.Sample = 1.0,
    session_id: Text = None,
    user: Text = None,
    tags: Texts = None,
    metadata: Texts = None,
    experiment_id: Text = None,
    redact: Redact | None = None,
    inputs: Show = True,
    outputs: Show = True,
) -> Wrapped:
    """Give each call of a program a scope of its own: session, user, tags, destination and sampling.

    They hold for all that the call starts, in tasks and in DSPy's threads, and for nothing else. Where a function is
    given in place of a value, it is called with the call's arguments; where it raises, the value is left out::

        answer = wrap(program, session_id=lambda question, chat: chat, sample={"ok": 0.05, "error": 1.0})
        prediction = await answer.acall(question="...", chat="c-17")

    Args:
        program: A ``dspy.Module``, or any function.
        name: A name for the calls: each is then below a span of this name, with its arguments and its result.
        sample: As for ``request``: a ratio from 0 to 1, or ratios by outcome.
        session_id: MLflow's session, or a function of the call's arguments.
        user: MLflow's user, or a function.
        tags: Trace tags by key, or a function that returns them; a single value may be a function too.
        metadata: Trace metadata by key, alike.
        experiment_id: The experiment that the traces go to, or a function.
        redact: Sees each value of these calls before it is stored, before ``autolog``'s own ``redact``.
        inputs: What the span of ``name`` shows as its inputs: True for the call's arguments, False for nothing, or a
            function of them, as they are stored (masked, bounded JSON), that returns what to show.
        outputs: The same of the call's result.

    Returns:
        The program with the same call forms, ``__call__``, ``acall``, ``stream`` and ``batch``. Everything else is
        the program's own.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For an unknown key of ``sample``, a ratio outside 0 to 1, ``inputs`` or ``outputs`` without
            ``name``, or an experiment that the store does not have. A store that does not answer within some seconds
            is not waited for.
    """
    if not callable(program):
        raise TypeError(f"wrap takes a program that can be called, not {program!r}")
    if isinstance(program, type) and issubclass(program, dspy.Module):
        name = program.__name__
        raise TypeError(f"wrap takes a program, and {name} is a class; pass an instance of it: {name}(...)")
    options = Options(name, sample, session_id, user, tags, metadata, experiment_id, redact, inputs, outputs)
    options.check_span()
    options.check_experiment()
    return Wrapped(program, options)


class Wrapped:
    """Program returned by ``wrap``: each call is a request of its own."""

    _program: Any
    _options: Options

    def __init__(self, program: Any, options: Options) -> None:
        self.__dict__.update(_program=program, _options=options)

    def __getattr__(self, name: str) -> Any:
        """Return the program's attribute, for everything but the call forms."""
        if name in _COPYING or "_program" not in self.__dict__:  # the latter while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._program, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the attribute on the program."""
        setattr(self._program, name, value)

    def __repr__(self) -> str:
        return f"wrap({self._program!r})"

    def __wrapped_program__(self) -> Any:
        """Return the program itself, for ``async_form``."""
        return self._program

    # --- the call forms -------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program, as a request."""
        if is_coroutine_function(self._program):
            return self.acall(*args, **kwargs)
        call = _Call(self._scope(args, kwargs), self._shown)
        with call:
            call.result = self._program(*args, **kwargs)
        return call.result

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program without blocking the event loop, as a request; a sync-only one runs in a worker thread."""
        call = _Call(self._scope(args, kwargs), self._shown)
        with call:
            call.result = await call_async(self._program, *args, **kwargs)
        return call.result

    def stream(
        self,
        *args: Any,
        stream_listeners: Sequence[Any] | None = None,
        status_message_provider: Any | None = None,
        include_final_prediction_in_output_stream: bool = True,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        """Call the program and give what it streams, as ``dspy.streamify`` does, as one request until its end.

        It may be broken off at any point, and closed by any task; the calls under way are then cancelled.

        Args:
            args: The program's arguments.
            stream_listeners: As for ``dspy.streamify``.
            status_message_provider: The same.
            include_final_prediction_in_output_stream: The same.
            kwargs: The program's arguments by name.
        """
        callee = _Callee(self._program)

        def values() -> AsyncGenerator[Any, None]:
            streamer = dspy.streamify(
                cast("dspy.Module", callee),
                status_message_provider=status_message_provider,
                stream_listeners=list(stream_listeners or ()),
                include_final_prediction_in_output_stream=include_final_prediction_in_output_stream,
                is_async_program=True,
            )
            return cast("AsyncGenerator[Any, None]", streamer(*args, **kwargs))

        return stream_in(self._scope(args, kwargs), values, self._shown)

    def batch(self, examples: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``dspy.Module.batch``, each example a request of its own."""
        if isinstance(self._program, dspy.Module) and type(self._program).batch is not dspy.Module.batch:
            with_examples: Callable[..., Any] = self._program.batch  # the program's own way, as one request
            return Wrapped(with_examples, self._options)(examples, *args, **kwargs)
        return dspy.Module.batch(cast("dspy.Module", self), list(examples), *args, **kwargs)

    # --------------------------------------------------------------------------------------------------------------

    def _scope(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Scope:
        name = self._options.name
        if name is None:
            return Scope(self._options, args, kwargs)
        inputs = {**kwargs, "args": list(args)} if args else kwargs
        return Scope(self._options, args, kwargs, lambda: Beginning(name, inputs))

    def _shown(self, result: Any) -> Any:
        return None if self._options.name is None else describe_outputs(self._program, result)


class _Call:
    """Block in which one call of a program runs, as a request.

    Attributes:
        result: What the call returns, once it has.
    """

    def __init__(self, scope: Scope, shown: Callable[[Any], Any]) -> None:
        self.result: Any = None
        self._scope = scope
        self._shown = shown

    def __enter__(self) -> None:
        self._scope.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._scope.leave()
        self._scope.close(error, self._shown(self.result))


class _Callee:
    """Adapter from any program to what ``streamify`` wants: an object with ``acall``."""

    def __init__(self, program: Any) -> None:
        self._program = program

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        return await call_async(self._program, *args, **kwargs)


async def call_async(program: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a program in whichever way does not block the event loop."""
    form = async_form(program)
    if form is not None:
        return await form(*args, **kwargs)
    result = await in_thread(program, *args, **kwargs)
    return await result if inspect.isawaitable(result) else result  # a sync function may give a coroutine
