"""Composition root: installs the tracer in DSPy and MLflow, and uninstalls it completely."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any, Literal

from dspy_mlflow_async import export as export_room
from dspy_mlflow_async import hooks
from dspy_mlflow_async.callback import TracingCallback, as_far_as_installed
from dspy_mlflow_async.runs import active_runs
from dspy_mlflow_async.seams.dspy import change_callbacks, global_callbacks
from dspy_mlflow_async.seams.listed import lost_features
from dspy_mlflow_async.seams.mlflow_autolog import (
    FLAVOR,
    MlflowCallback,
    is_own_autolog_on,
    note_autolog,
    own_autolog_module,
    patch_evaluation_config,
    turn_own_autolog_off,
)
from dspy_mlflow_async.seams.mlflow_client import missing_here, name_default_store
from dspy_mlflow_async.seams.mlflow_suppression import patch_trace_disabled
from dspy_mlflow_async.seams.mlflow_trace_settings import has_sampler, patch_sampler
from dspy_mlflow_async.seams.patching import Patches, Undo, patch, together
from dspy_mlflow_async.settings import OVERRIDE, Override, Redact, Settings
from dspy_mlflow_async.spans.tracer import end_abandoned

logger = logging.getLogger("dspy_mlflow_async")


class _Installation:
    """State of ``autolog`` in this process: settings and patches. ``lock`` guards all of it; no hot path takes it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.settings: Settings | None = None
        self.was_disabled = False
        self.export_options: export_room.ExportOptions | None = None
        self.beyond_mlflow: dict[str, Any] = {}  # arguments of the last call that MLflow's signature cannot name
        self.patches = Patches()
        self.has_said_what_is_lost = False

    def say_what_is_lost(self) -> None:
        """Warn once of the names of DSPy and MLflow without which a feature is off."""
        if not self.has_said_what_is_lost and (lost := lost_features()):
            self.has_said_what_is_lost = True
            logger.warning(
                "These versions of DSPy and MLflow lack what features of dspy-mlflow-async stand on, which are off: "
                "%s. dspy-mlflow-async doctor says more.",
                "; ".join(map(str, lost)),
            )


_installation = _Installation()
_SETTINGS_OF_MLFLOW = frozenset(
    ("log_traces", "log_traces_from_compile", "log_traces_from_eval", "log_compiles", "log_evals")
)


class AutologCallback(TracingCallback):
    """The callback that ``autolog`` installs: it follows the settings of the last ``autolog`` call.

    A copy that was pickled into a model, and is loaded where ``autolog`` was never called, goes by the settings it
    was pickled with.
    """

    can_be_switched = True

    def __init__(self, settings: Settings, dependencies_schema: dict[str, Any] | None = None) -> None:
        self.dependencies_schema = dependencies_schema
        self._own_settings = settings

    @property
    def settings(self) -> Settings | None:
        """The settings of the last ``autolog`` call, or None after ``autolog(disable=True)``."""
        override = OVERRIDE.get()
        if override is not None:
            return override.settings
        current = _installation.settings
        if current is not None:
            return current
        return None if _installation.was_disabled else self._own_settings

    @property
    def is_on(self) -> bool:
        """Return whether it records anything: not after ``autolog(disable=True)``."""
        return _installation.settings is not None or not _installation.was_disabled


def autolog(
    log_traces: bool = True,
    log_traces_from_compile: bool = False,
    log_traces_from_eval: bool = True,
    log_compiles: bool = False,
    log_evals: bool = False,
    disable: bool = False,
    silent: bool = False,
    *,
    context_runs: bool = True,
    propagate_threads: bool = False,
    max_value_bytes: int = 1024 * 1024,
    mask_contents: bool = True,
    redact: Redact | None = None,
    export: Literal["thread", "process"] = "thread",
    durable: bool = False,
    visible_after: float = 10.0,
    children_timeout: float = 30.0,
    max_waiting_bytes: int = 64 * 1024 * 1024,
    max_spool_bytes: int = 1024 * 1024 * 1024,
    exit_timeout: float = 10.0,
) -> None:
    """Trace DSPy with MLflow, right under concurrency: a drop-in for ``mlflow.dspy.autolog``.

    May be called again, at any time, from any thread and task; the last call's settings count.

    Args:
        log_traces: Record calls as spans.
        log_traces_from_compile: Also those that an optimizer's ``compile`` makes.
        log_traces_from_eval: Also those that ``dspy.Evaluate`` makes.
        log_compiles: Log each ``compile`` as a run.
        log_evals: Log each evaluation as a run.
        disable: Take the tracer out again. Calls that have begun still end their spans.
        silent: Say nothing on the log about what is replaced.
        context_runs: Let MLflow's active run follow the context inside ``with mlflow.start_run()``, so that tasks and
            DSPy's worker threads have the one they came from. False leaves MLflow's thread-local one alone.
        propagate_threads: Carry the tracing context into every ``threading.Thread`` and ``ThreadPoolExecutor`` of
            the process; ``propagate`` and ``ThreadPoolExecutor`` of this package do it one by one.
        max_value_bytes: How many bytes the stored JSON text of a span's inputs, of its outputs, or of one of its
            attributes may have. What is longer is cut to its beginning; the mark for that may add up to 64 bytes.
        mask_contents: Mask what looks like a secret in every text: tokens, passwords in addresses, ``NAME=value``.
            False where such texts are the program's data; what has the name of a secret is masked either way.
        redact: Sees each value before it is stored, containers before what they contain, and returns what to store
            in its place. Where it raises, a mask is stored.
        export: Who writes to the store: a thread of this process, or a child process that reads the spool.
        durable: Write each finished trace to the spool first, so that a killed process loses none.
        visible_after: Seconds after which a trace that is still open is stored with what has ended so far.
        children_timeout: Seconds that a finished root waits for its children.
        max_waiting_bytes: Bytes of finished traces that wait in memory; what exceeds them goes to the spool.
        max_spool_bytes: Bytes that a spool may have on disk, and never the last 5 % of the disk. What exceeds them and
            the memory is dropped, counted, with one warning; evaluations' results and traces with errors go last.
        exit_timeout: Seconds that the end of the process waits for the store; the rest goes to the spool.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For a ``max_value_bytes`` below 1, an unknown ``export``, or a negative bound.

    Source: ``mlflow.dspy.autolog`` for the first seven parameters.
    """
    as_mlflow: dict[str, Any] = {
        "log_traces": log_traces,
        "log_traces_from_compile": log_traces_from_compile,
        "log_traces_from_eval": log_traces_from_eval,
        "log_compiles": log_compiles,
        "log_evals": log_evals,
    }
    for_spans: dict[str, Any] = {
        "max_value_bytes": max_value_bytes,
        "mask_contents": mask_contents,
        "redact": redact,
    }
    for_export: dict[str, Any] = {
        "durable": durable,
        "visible_after": visible_after,
        "children_timeout": children_timeout,
        "max_waiting_bytes": max_waiting_bytes,
        "max_spool_bytes": max_spool_bytes,
        "exit_timeout": exit_timeout,
    }
    reach = {"context_runs": context_runs, "propagate_threads": propagate_threads}
    for name, value in {"disable": disable, "silent": silent, "durable": durable, **reach}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {value!r}")
    settings = Settings(**as_mlflow, **for_spans)
    options = export_room.ExportOptions(mode=export, **for_export)
    with _installation.lock:
        if disable:
            _uninstall()
        else:
            settings = as_far_as_installed(settings, "autolog")
            _installation.patches.set("default store", name_default_store)
            _installation.say_what_is_lost()
            if said := missing_here():
                logger.warning("dspy-mlflow-async: %s; traces wait on disk until then", said)
            _installation.beyond_mlflow = {**for_spans, **for_export, **reach, "export": export}
            _install_export(options)
            _install(settings, context_runs=context_runs, propagate_threads=propagate_threads, silent=silent)
        note_autolog({**as_mlflow, "disable": disable, "silent": silent})


# mlflow.autolog() and MLflow's registry of integrations look for this name on the function.
autolog.integration_name = FLAVOR  # type: ignore[attr-defined]


def is_installed() -> bool:
    """Return whether the tracer is on and DSPy still knows its callback."""
    return _installation.settings is not None and bool(_ours(global_callbacks()))


def is_disabled() -> bool:
    """Return whether the last ``autolog`` call was ``autolog(disable=True)``."""
    return _installation.settings is None and _installation.was_disabled


def current_settings() -> Settings | None:
    """Return the settings of the last ``autolog`` call, or None where there is none in force."""
    return _installation.settings


def arguments_here() -> dict[str, Any] | None:
    """Return the arguments with which ``autolog`` does elsewhere what it does here; None where it is off."""
    override = OVERRIDE.get()
    settings = _installation.settings if override is None else override.settings
    if settings is None:
        return None
    return {**_installation.beyond_mlflow, **{field.name: getattr(settings, field.name) for field in fields(settings)}}


def ensure_sampler() -> None:
    """Let the ratios of ``wrap`` and ``request`` count, until ``autolog(disable=True)``."""
    if "sampler" in _installation.patches and has_sampler():
        return
    with _installation.lock:
        _installation.patches.take_out("sampler")
        _installation.patches.set("sampler", lambda: patch_sampler(export_room.count_sampled))


def _install(settings: Settings, *, context_runs: bool, propagate_threads: bool, silent: bool) -> None:
    _replace_mlflow(silent=silent)
    _installation.settings = settings
    hooks.switch(is_on=True, carries_always=propagate_threads)
    if context_runs:
        active_runs.ensure_installed()
    else:
        active_runs.uninstall()
    change_callbacks(lambda present: present if _ours(present) else [*present, AutologCallback(settings)])


def _install_export(options: export_room.ExportOptions) -> None:
    if _installation.export_options != options:
        _installation.patches.renew("export", lambda: export_room.install(options, housekeeping=end_abandoned))
        _installation.export_options = options


def _uninstall(*, keep: tuple[str, ...] = ()) -> None:
    _installation.settings = None
    _installation.was_disabled = True
    _installation.export_options = None
    _installation.patches.take_out_all(but=keep)
    active_runs.uninstall()
    change_callbacks(lambda present: [c for c in present if not isinstance(c, AutologCallback)])
    hooks.switch(is_on=False)


def _ours(callbacks: Iterable[Any]) -> list[AutologCallback]:
    return [callback for callback in callbacks if isinstance(callback, AutologCallback)]


def _replace_mlflow(*, silent: bool) -> None:
    """Take MLflow's own tracer out, lest there be two, and let a later ``mlflow.dspy.autolog()`` come to us."""
    foreign = [c for c in global_callbacks() if type(c) is MlflowCallback]
    # Once `mlflow.dspy.autolog` comes to us, what MLflow notes of its integration is ours.
    if foreign or ("mlflow" not in _installation.patches and is_own_autolog_on()):
        turn_own_autolog_off()
        change_callbacks(lambda present: [c for c in present if type(c) is not MlflowCallback])
        if not silent:
            logger.info("mlflow.dspy.autolog() was on; dspy-mlflow-async replaces it.")
    elif "mlflow" not in _installation.patches:
        turn_own_autolog_off()  # what it had patched is in place, and works again as soon as ours is noted as on
    _installation.patches.set("mlflow", _redirect_mlflow_autolog)


def _redirect_mlflow_autolog() -> Undo:
    import mlflow.dspy

    module = own_autolog_module()
    undos = [
        # Whoever holds the original function would patch compile and Evaluate under us.
        patch(module, safe_patch=lambda *args, **kwargs: None),  # noqa: ARG005 - safe_patch's signature
    ]
    original = mlflow.dspy.autolog
    if original is not autolog:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def redirected(*args: Any, **kwargs: Any) -> None:
            arguments = signature.bind(*args, **kwargs).arguments
            if OVERRIDE.get() is not None:
                _override(arguments)
                return
            if arguments.pop("disable", False):
                # MLflow's evaluations switch off and on again: the way back must lead here.
                with _installation.lock:
                    _uninstall(keep=("mlflow",))
                    note_autolog({**arguments, "disable": True})
                return
            if not arguments.get("silent"):
                logger.info("dspy-mlflow-async traces DSPy in place of mlflow.dspy.autolog(), with the same settings.")
            autolog(**arguments, **_installation.beyond_mlflow)

        redirected.__module__ = "mlflow.dspy"  # where it is found, so that it pickles by its name
        undos.append(patch(mlflow.dspy, autolog=redirected))
    return together(*undos, patch_evaluation_config(_settings_of_this_context), patch_trace_disabled())


@contextlib.contextmanager
def _settings_of_this_context() -> Iterator[None]:
    """Let what ``mlflow.dspy.autolog`` is told inside hold in this context alone, until the block ends."""
    before = OVERRIDE.get()
    OVERRIDE.set(before or Override(_installation.settings))
    try:
        yield
    finally:
        OVERRIDE.set(before)


def _override(arguments: dict[str, Any]) -> None:
    settings = _installation.settings or Settings()
    known = {name: value for name, value in arguments.items() if name in _SETTINGS_OF_MLFLOW}
    OVERRIDE.set(Override(None if arguments.get("disable") else replace(settings, **known)))
