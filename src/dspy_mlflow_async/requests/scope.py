"""Scope of one request: traces that begin inside have its session, user, tags, destination and sampling."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any
from weakref import WeakValueDictionary

from dspy_mlflow_async import export
from dspy_mlflow_async.composition import current_settings, ensure_sampler, is_disabled
from dspy_mlflow_async.context import frame as frames
from dspy_mlflow_async.context.carrier import Carrier
from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.requests import sampling
from dspy_mlflow_async.requests.lazy_root import Beginning, Root, RootTrace
from dspy_mlflow_async.requests.options import Options, Show, Text, Texts, Values
from dspy_mlflow_async.requests.preview import Preview
from dspy_mlflow_async.requests.record import Record
from dspy_mlflow_async.seams.mlflow_lazy_span import LazySpan, Promise
from dspy_mlflow_async.seams.mlflow_spans import (
    TRACE_CONTEXT,
    TracingContext,
    attach,
    current_context,
    extended_context,
    reattach,
)
from dspy_mlflow_async.seams.mlflow_trace_settings import DESTINATION, RATIO, destination
from dspy_mlflow_async.settings import Redact, Settings
from dspy_mlflow_async.spans.door import Door
from dspy_mlflow_async.spans.observer import RequestObserver
from dspy_mlflow_async.spans.outcome import Failure, failure_of

_numbers = itertools.count()
_DEFAULTS = Settings()
# What decides on a trace where it begins.
_DECISIVE = (export.KEEPS, RATIO, DESTINATION, TRACE_CONTEXT)


class Scope:
    """Context variables of one request, set by ``enter`` and put back, by value, by ``leave``.

    The block may end in another task or thread than it began in (a generator, a cancelled task): then there is
    nothing of it to put back there, and nothing is touched.

    Args:
        options: What was asked for.
        args: The arguments of the call, for options that are functions of them.
        kwargs: The same by name.
        describe: What the span around it shows, if there is to be one.
        remote: The caller's span in another process, or nothing.

    Attributes:
        options: What was asked for.
        values: What that is for this call.
        decisive: What holds inside and decides on a trace where it begins.
        where: What is current around it; None where it promises no span.
        record: What happens inside.
        root: The span around it, if there is to be one.
    """

    def __init__(
        self,
        options: Options,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        describe: Callable[[], Beginning] | None = None,
        remote: Any | None = None,
    ) -> None:
        self.options = options
        self.values = Values()
        self.decisive = Carrier({})
        self.where: TracingContext | None = None
        self.record = Record()
        self.root: Root | None = None
        self.id = f"request-{next(_numbers)}"
        self._arguments = args, dict(kwargs or {})
        self._describe = describe
        self._remote = remote
        self._before: list[tuple[Any, Any]] = []

    def enter(self) -> Record:
        """Begin the scope here. A failure of ours leaves the program without a scope, and running."""
        self._enter()
        return self.record

    @guarded
    def _enter(self) -> None:
        self.record = Record(self._outer_record(), self.options.redact)
        self.values = self.options.values(Door(self._settings()), *self._arguments)
        self._set_variables()
        # Whatever an inner scope says by the time a span begins: it is this one's.
        self.decisive = Carrier({variable: variable.get() for variable in _DECISIVE})
        if is_disabled():
            return
        here = current_context()
        promise = self._promise(here)
        if promise is not None:
            self.where = here
            attach(promise, here)

    def _outer_record(self) -> RequestObserver | None:
        """Return the record of the request around this one."""
        outer = frames.current()
        return None if outer is None else outer.request

    def _promise(self, here: TracingContext) -> LazySpan | None:
        """Return what stands for the span around this scope until that begins; None where there is to be none."""
        if self._describe is None:
            return None
        self.root = self._new_root(self.options, self.values, RootTrace(here, self.decisive, self._remote))
        return self.root.promise

    def _new_root(
        self, options: Options, values: Values, trace: RootTrace, successor: Callable[[], Promise | None] = lambda: None
    ) -> Root:
        settings = self._settings()
        preview = Preview(options.inputs, options.outputs, settings)
        self.record.show_by(preview)
        return Root(self.record, preview, settings, functools.partial(self._beginning, values), trace, successor)

    def _beginning(self, values: Values) -> Beginning:
        beginning = self._describe() if self._describe is not None else Beginning("request")
        if self._remote is None:
            return beginning
        # The caller's trace is the caller's; what we know of the request stays with its span.
        return beginning._replace(attributes={**beginning.attributes, **values.metadata, **values.tags})

    def _settings(self) -> Settings:
        settings = current_settings() or _DEFAULTS
        return self.record.adapt(settings)

    def _set_variables(self) -> None:
        values = self.values
        frames.enter(self.id, self, request=self.record)
        if values.metadata or values.tags:
            self._set(TRACE_CONTEXT, extended_context(metadata=values.metadata, tags=values.tags))
        if values.experiment_id is not None:
            self._set(DESTINATION, destination(values.experiment_id))
        how = self.options.sampling
        if isinstance(how, sampling.ByRatio):
            ensure_sampler()
            self._set(RATIO, how.ratio)
        elif how is not None:
            self._set(export.KEEPS, how.keeps)

    def _set(self, variable: Any, value: Any) -> None:
        self._before.append((variable, variable.get()))
        variable.set(value)

    def leave(self) -> None:
        """Put back what was there before, in the context that ``enter`` was called in."""
        self._leave()

    @guarded
    def _leave(self) -> None:
        if frames.leave(self.id) is None:
            return
        if self.where is not None:
            reattach(self.where)
        for variable, value in reversed(self._before):
            variable.set(value)

    def close(
        self, error: BaseException | Failure | None, outputs: Any = None, attributes: Mapping[str, Any] | None = None
    ) -> None:
        """End the span of the request, which is over. May be called anywhere, once."""
        if self.root is not None:
            self._close(error, outputs, attributes)

    @guarded
    def _close(self, error: BaseException | Failure | None, outputs: Any, attributes: Mapping[str, Any] | None) -> None:
        failure = failure_of(error) if isinstance(error, BaseException) else error
        if self.root is not None:
            self.root.end(failure, outputs, attributes)


class request:  # noqa: N801 - used like a function
    """Scope for a ``with`` or ``async with`` block: what begins in it, in tasks and DSPy's threads, belongs to it.

    Session, user, tags, metadata, destination and sampling hold for the traces that begin inside and for no other.
    After the block, and within, what was yielded tells what happened, without asking the store::

        with dma.request(session_id="s-17", user="ada") as r:
            program(question="...")

        print(r.trace_id, r.usage, r.cost, r.lm_calls)

    Args:
        name: With a name, all calls of the block are one trace, below a span of this name, which begins with the
            first of them. Without one, each call is the trace that it would be anyway.
        sample: The share of traces to keep, from 0 to 1, decided when a trace begins, by its id; or shares by outcome,
            ``{"ok": 0.05, "error": 1.0, "cancelled": 1.0, "slow": 10.0}``, decided when it has ended; what is not
            named is kept. ``slow`` is in seconds: whatever took longer is kept. A trace that began outside, or in the
            caller's process, is not decided on here.
        session_id: MLflow's session of the traces. Cut at 250 characters, with a mark.
        user: MLflow's user of the traces. Cut alike.
        tags: Trace tags by key.
        metadata: Trace metadata by key.
        experiment_id: The experiment that the traces go to.
        redact: Sees each value before it is stored, as ``autolog``'s ``redact`` and before it.
        inputs: What the span of ``name`` shows as its inputs. True for those of the first DSPy call of the block,
            False for none, or a function of them, as they are stored (masked, bounded JSON), that returns what to show.
        outputs: The same of the outputs of the last call that has returned.

    Yields:
        A ``Record`` with ``trace_id``, ``usage`` (tokens), ``cost`` (US dollars) and ``lm_calls``.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For an unknown key of ``sample``, a ratio outside 0 to 1, or ``inputs`` or ``outputs`` without
            ``name``.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        sample: sampling.Sample = 1.0,
        session_id: Text = None,
        user: Text = None,
        tags: Texts = None,
        metadata: Texts = None,
        experiment_id: Text = None,
        redact: Redact | None = None,
        inputs: Show = True,
        outputs: Show = True,
    ) -> None:
        options = Options(name, sample, session_id, user, tags, metadata, experiment_id, redact, inputs, outputs)
        options.check_span()
        self._options = options
        # Those of the blocks that are open: several inside each other, and in any number of tasks and threads. The
        # context of a block keeps its scope; one that is dropped with its context is abandoned.
        self._scopes: WeakValueDictionary[str, Scope] = WeakValueDictionary()

    def __enter__(self) -> Record:
        """Begin the scope."""
        name = self._options.name
        scope = Scope(self._options, describe=None if name is None else lambda: Beginning(name))
        self._scopes[scope.id] = scope
        return scope.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put back what was before, and end the span around the block, if there is one."""
        scope = self._innermost()
        if scope is not None:
            scope.leave()
            scope.close(error)

    def _innermost(self) -> Scope | None:
        """Return the scope of the block that ends here."""
        for frame in frames.ancestors():
            scope = self._scopes.pop(frame.call_id, None)
            if scope is not None:
                return scope
        # The block ends in another context than it began in. Of several nobody could say which one it is.
        scopes = list(self._scopes.values())
        return self._scopes.pop(scopes[0].id, None) if len(scopes) == 1 else None

    async def __aenter__(self) -> Record:
        """Begin the scope. Nothing of it blocks."""
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put back what was before, and end the span around the block, if there is one."""
        self.__exit__(kind, error, traceback)
