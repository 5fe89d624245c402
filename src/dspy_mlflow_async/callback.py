"""DSPy callback that turns the events of DSPy into spans and runs; it keeps no state, so that all copies work alike."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

from dspy_mlflow_async import hooks
from dspy_mlflow_async.context import frame as frames
from dspy_mlflow_async.guard import guarded, place_of, report
from dspy_mlflow_async.runs.compile import Compile
from dspy_mlflow_async.runs.evaluation import ALWAYS_LOGGED, Evaluation
from dspy_mlflow_async.runs.handle import run_status
from dspy_mlflow_async.seams.installed import has_runs, needs_whole
from dspy_mlflow_async.seams.mlflow_autolog import StatelessCallback, add_dependencies_schema, portable
from dspy_mlflow_async.settings import Redact, Settings
from dspy_mlflow_async.spans import describe, tracer
from dspy_mlflow_async.spans.describe import Description
from dspy_mlflow_async.spans.observer import RequestObserver
from dspy_mlflow_async.spans.scopes import Region, SpanScope
from dspy_mlflow_async.spans.usage import Ledger, LmUsage, module_usage

logger = logging.getLogger("dspy_mlflow_async")
_Handler = TypeVar("_Handler", bound=Callable[..., None])


def _begins(handler: _Handler) -> _Handler:
    """Guard a start handler, and end what it has begun where it is interrupted.

    DSPy calls start handlers before its ``try``: no end would come.
    """
    place, end = place_of(handler), handler.__name__.replace("_start", "_end")

    @functools.wraps(handler)
    def start(self: Any, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        try:
            handler(self, call_id, instance, inputs)
        except Exception as error:  # noqa: BLE001 - as by `guarded`, without another call
            report(place, error)
        except BaseException as error:
            getattr(self, end)(call_id, None, error)
            raise

    return cast("_Handler", start)


def as_far_as_installed(settings: Settings, caller: str) -> Settings:
    """Return settings that log no runs where MLflow has none, and warn if they were to."""
    if not (settings.log_evals or settings.log_compiles) or has_runs():
        return settings
    wanted = " and ".join(name for name in ("log_evals", "log_compiles") if getattr(settings, name))
    logger.warning("dspy-mlflow-async: %s", needs_whole(f"{wanted} of {caller}"))
    return replace(settings, log_evals=False, log_compiles=False)


class TracingCallback(StatelessCallback):
    """Records DSPy's calls as MLflow spans; for ``dspy.context(callbacks=[...])`` and one object's ``callbacks=[...]``.

    ``autolog()`` installs one for the whole process. It is a subclass of ``mlflow.dspy.callback.MlflowCallback``,
    by which MLflow's ``autolog`` and model serving find their tracer, and shares none of its state.

    Args:
        log_traces: Record calls as spans.
        log_traces_from_compile: Also those that an optimizer's ``compile`` makes.
        log_traces_from_eval: Also those that ``dspy.Evaluate`` makes.
        log_compiles: Log each ``compile`` as a run.
        log_evals: Log each evaluation as a run.
        max_value_bytes: How many bytes the stored JSON text of a span's inputs, of its outputs, or of one of its
            attributes may have. What is longer is cut to its beginning; the mark for that may add up to 64 bytes.
        mask_contents: Mask what looks like a secret in every text.
        redact: Sees each value before it is stored, and returns what to store in its place.
        dependencies_schema: As ``MlflowCallback``'s, for a served model.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a ``max_value_bytes`` below 1.
    """

    can_be_switched = False  # whether its settings may change in the middle of a call

    def __new__(cls, *_: Any, **__: Any) -> TracingCallback:  # noqa: PYI034 - `Self` is newer than Python 3.10
        """Install the patches that tracing needs inside DSPy; an unpickled copy comes through here alone."""
        self = super().__new__(cls)
        hooks.serve(self)
        return self

    def __init__(
        self,
        *,
        log_traces: bool = True,
        log_traces_from_compile: bool = False,
        log_traces_from_eval: bool = True,
        log_compiles: bool = False,
        log_evals: bool = False,
        max_value_bytes: int = 1024 * 1024,
        mask_contents: bool = True,
        redact: Redact | None = None,
        dependencies_schema: dict[str, Any] | None = None,
    ) -> None:
        self.dependencies_schema = dependencies_schema
        settings = Settings(
            log_traces=log_traces,
            log_traces_from_compile=log_traces_from_compile,
            log_traces_from_eval=log_traces_from_eval,
            log_compiles=log_compiles,
            log_evals=log_evals,
            max_value_bytes=max_value_bytes,
            mask_contents=mask_contents,
            redact=redact,
        )
        self._own_settings = as_far_as_installed(settings, "TracingCallback")

    @classmethod
    def _of(cls, settings: Settings, dependencies_schema: dict[str, Any] | None) -> TracingCallback:
        """Make one with settings that have been checked."""
        self = cls.__new__(cls)
        self._own_settings, self.dependencies_schema = settings, dependencies_schema
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings in force; where this package is absent it is loaded as MLflow's own callback."""
        ours = type(self)._of, (self.settings or self._own_settings, self.dependencies_schema)
        return portable(ours, self.dependencies_schema)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracingCallback:
        """Return another one like it."""
        return self._of(self._own_settings, self.dependencies_schema)

    @property
    def settings(self) -> Settings | None:
        """The settings in force now, or None while this tracer is off."""
        return self._own_settings

    @property
    def is_on(self) -> bool:
        """Return whether this tracer records anything."""
        return True

    @property
    def optimizer_stack_level(self) -> int:
        """Number of compiles that this context is inside of."""
        return sum(1 for frame in frames.ancestors() if isinstance(frame.scope, CompileRegion))

    @optimizer_stack_level.setter
    def optimizer_stack_level(self, value: int) -> None:
        """Accept what the patches of ``mlflow.dspy.autolog`` count, and ignore it: the context knows."""

    def reset(self) -> None:
        """Do nothing: no state is kept."""

    # --- modules, LMs, adapters, tools, interpreters --------------------------------------------------------------

    @_begins
    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        scope = self._start(call_id, describe.describe_module, instance, inputs)
        if scope is not None:
            scope.show_outputs = functools.partial(describe.describe_outputs, instance)
            outermost = scope.ledger is None
            others = (ledgers_of(None), _request()) if outermost else ()
            scope.usage, scope.ledger = module_usage(scope.ledger, scope.span, *others)

    @_begins
    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        ledgers, request = ledgers_of(instance), _request()
        scope = self._start(call_id, describe.describe_lm, instance, inputs)
        if scope is not None:
            scope.usage = LmUsage(instance, ledgers if scope.ledger is None else [*ledgers, scope.ledger], request)
        elif (ledgers or request is not None) and not tracer.is_open(call_id):
            tracer.count_only(call_id, LmUsage(instance, ledgers, request))

    @_begins
    def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._start(call_id, describe.describe_adapter, instance, inputs, "format")

    @_begins
    def on_adapter_parse_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._start(call_id, describe.describe_adapter, instance, inputs, "parse")

    @_begins
    def on_tool_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if instance.name != describe.FINISH_TOOL:
            self._start(call_id, describe.describe_tool, instance, inputs)

    @_begins
    def on_interpreter_execute_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._start(call_id, describe.describe_interpreter, instance, inputs, "execute")

    @_begins
    def on_interpreter_tool_call_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._start(call_id, describe.describe_interpreter, instance, inputs, "tool_call")

    @_begins
    def on_interpreter_startup_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._start(call_id, describe.describe_interpreter, instance, inputs, "startup")

    @_begins
    def on_interpreter_shutdown_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._start(call_id, describe.describe_interpreter, instance, inputs, "shutdown")

    @guarded
    def _end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        tracer.end(call_id, outputs, exception)

    on_module_end = _end
    on_lm_end = _end
    on_adapter_format_end = _end
    on_adapter_parse_end = _end
    on_tool_end = _end
    on_interpreter_execute_end = _end
    on_interpreter_tool_call_end = _end
    on_interpreter_startup_end = _end
    on_interpreter_shutdown_end = _end

    # --- evaluations and compiles ---------------------------------------------------------------------------------

    @_begins
    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        settings = self.settings
        if settings is None or _has_begun(call_id):
            return
        evaluation, outer = Evaluation.of_call(instance, inputs, settings), frames.current()
        region = Region(isolated=True, suppressed=not settings.log_traces_from_eval)
        frame = frames.enter(call_id, region, evaluation=evaluation)
        region.enter()
        if outer is not None and outer.compile is not None and outer.example is None:
            evaluation.attempt(inputs.get("program"), outer.compile)
        metadata = inputs.get("callback_metadata") or {}
        if (settings.log_evals or metadata.get(ALWAYS_LOGGED)) and not metadata.get("disable_logging"):
            evaluation.open(instance, inputs, frame.compile)

    @guarded
    def on_evaluate_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        frame = frames.leave(call_id)
        if frame is not None:
            frame.evaluation.leave()
            frame.scope.leave()
            frame.evaluation.close(outputs, run_status(exception))

    @_begins
    def on_compile_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        settings = self.settings
        if settings is None or _has_begun(call_id):
            return
        outer = frames.current()
        is_outermost = outer is None or outer.compile is None  # random search calls bootstrap: one compile
        region = CompileRegion(isolated=False, suppressed=not settings.log_traces_from_compile)
        frame = frames.enter(call_id, region, compile=Compile(instance, inputs, settings) if is_outermost else None)
        region.enter()
        if is_outermost:
            hooks.compile_began()
            if settings.log_compiles:
                frame.compile.open()

    @guarded
    def on_compile_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        frame = frames.leave(call_id)
        if frame is None:
            return
        is_outermost = frame.parent is None or frame.parent.compile is not frame.compile
        if is_outermost:
            hooks.compile_ended()
            frame.compile.leave()
        frame.scope.leave()
        if is_outermost:
            frame.compile.close(outputs, run_status(exception))

    def _start(self, call_id: str, description: Callable[..., Description], *call: Any) -> SpanScope | None:
        settings = self.settings
        if settings is None or not settings.log_traces:
            if self.can_be_switched:
                tracer.enter_untraced(call_id)
            return None
        if not tracer.is_recording(heeds_switch=self.can_be_switched):
            return None
        add_dependencies_schema(self.dependencies_schema)
        return tracer.start(call_id, description(*call), settings)


class CompileRegion(Region):
    """A region that an optimizer's ``compile`` has begun."""

    __slots__ = ()


def _request() -> RequestObserver | None:
    """Return the request around a call that begins here, or None."""
    frame = frames.current()
    return None if frame is None else frame.request


def _has_begun(call_id: str) -> bool:
    """Return whether another callback of ours has recorded the start of this call: one is enough."""
    frame = frames.current()
    return frame is not None and frame.call_id == call_id


def ledgers_of(lm: Any) -> list[Ledger]:
    """Return the ledgers that count an LM call which begins here, besides its span."""
    frame = frames.current()
    if frame is None:
        return []
    example, compile_ = frame.example, frame.compile
    ledgers = [] if example is None else [example.ledger()]
    if compile_ is not None and compile_.run is not None:
        is_judging = example is not None and example.is_judging
        ledgers.append(compile_.ledger(lm, in_example=example is not None, is_judging=is_judging))
    return ledgers
