"""Access to DSPy: settings that only their owner may configure, worker threads, and the usage tracker."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import dspy
from dspy.dsp.utils.settings import main_thread_config, thread_local_overrides
from dspy.dsp.utils.utils import dotdict
from dspy.utils.usage_tracker import UsageTracker

from dspy_mlflow_async.seams.listed import taken

__all__ = [
    "ACTIVE_CALL_ID",
    "CUSTOM_TYPE_END_IDENTIFIER",
    "CUSTOM_TYPE_START_IDENTIFIER",
    "ParallelExecutor",
    "UsageTracker",
]

CUSTOM_TYPE_START_IDENTIFIER: str = taken(
    "dspy.adapters.types.base_type:CUSTOM_TYPE_START_IDENTIFIER", "<<CUSTOM-TYPE-START-IDENTIFIER>>"
)
CUSTOM_TYPE_END_IDENTIFIER: str = taken(
    "dspy.adapters.types.base_type:CUSTOM_TYPE_END_IDENTIFIER", "<<CUSTOM-TYPE-END-IDENTIFIER>>"
)
ACTIVE_CALL_ID: Any = taken("dspy.utils.callback_context:ACTIVE_CALL_ID")
# None where its items cannot be given a context: DSPy's worker threads then begin traces of their own.
ParallelExecutor: Any = taken("dspy.utils.parallelizer:ParallelExecutor")
if taken("dspy.utils.parallelizer:ParallelExecutor.execute") is None:
    ParallelExecutor = None


def global_callbacks() -> list[Any]:
    """Return the callbacks of ``dspy.configure``, whatever a ``dspy.context`` around us says."""
    return list(main_thread_config["callbacks"])


def change_callbacks(change: Callable[[list[Any]], list[Any]]) -> None:
    """Change the callbacks of ``dspy.configure`` in any thread or task, without becoming the owner of the settings.

    ``dspy.configure`` raises in every thread and task but the first that called it, and a call from here would
    make this one the first.

    Args:
        change: Makes the new list of the old one. Where a ``dspy.context`` around us has a list of its own, that is
            changed, too.
    """
    main_thread_config["callbacks"] = change(list(main_thread_config["callbacks"]))
    overrides = thread_local_overrides.get()
    if "callbacks" in overrides:
        thread_local_overrides.set(dotdict({**overrides, "callbacks": change(list(overrides["callbacks"] or ()))}))


def overrides() -> Any:
    """Return the settings that ``dspy.context`` has changed here."""
    return thread_local_overrides.get()


def restore_overrides(before: Any) -> None:
    """Put back, by value, what ``overrides`` returned."""
    thread_local_overrides.set(before)


# What belongs to one call, one stream or one thread, and means nothing in another process.
_OF_THIS_PROCESS = frozenset({
    "caller_modules", "caller_predict", "send_stream", "stream_listeners", "trace", "usage_tracker",
})  # fmt: skip


def settings_here() -> dict[str, Any]:
    """Return DSPy's settings in force here, as far as they mean something in another process."""
    here = {**main_thread_config, **thread_local_overrides.get()}
    return {name: value for name, value in here.items() if value is not None and name not in _OF_THIS_PROCESS}


def usage_tracker() -> UsageTracker | None:
    """Return the tracker in force here: that of ``dspy.context``, or else of ``dspy.configure``."""
    here = thread_local_overrides.get()
    tracker: UsageTracker | None = (here if "usage_tracker" in here else main_thread_config).get("usage_tracker")
    return tracker


def flattened(tracker: UsageTracker, entry: Any) -> dict[str, Any]:
    """Return a usage entry as DSPy keeps it: nested models as plain dicts."""
    flat: dict[str, Any] = tracker._flatten_usage_entry(entry)
    return flat


def override_usage_tracker(tracker: UsageTracker | None) -> None:
    """Set the usage tracker from here on, as ``dspy.context`` in no block, without freezing other settings."""
    before = thread_local_overrides.get()
    thread_local_overrides.set(dotdict({**before, "usage_tracker": tracker}))


def is_tracking_usage() -> bool:
    """Return whether the user has switched on ``track_usage`` here."""
    return bool(dspy.settings.track_usage)


def program_and_metric(function: Callable[[Any], Any]) -> tuple[Any, Any] | None:
    """Return the program and the metric in ``Evaluate``'s function for one example; None for one of another shape."""
    if not isinstance(function, types.FunctionType) or not {"program", "metric"} <= set(function.__code__.co_freevars):
        return None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells["program"].cell_contents, cells["metric"].cell_contents


def with_program_and_metric(
    function: Callable[[Any], Any],
    run_program: Callable[[Any, dict[str, Any]], Any],
    run_metric: Callable[..., Any],
) -> Callable[[Any], Any]:
    """Return ``Evaluate``'s function for one example, with its program and its metric called through these.

    ``Evaluate.__call__`` defines ``process_item`` over ``program`` and ``metric``; a copy of the function over other
    cells leaves both of them, and everything that reads their names, as they are.

    Args:
        function: What ``Evaluate`` gives its worker pool.
        run_program: Called with the program and its arguments by name.
        run_metric: Called with the metric and what it judges.

    Returns:
        The copy, or ``function`` itself where it is not of that shape.
    """
    if not isinstance(function, types.FunctionType):
        return function
    names = function.__code__.co_freevars
    if not {"program", "metric"} <= set(names):
        return function
    cells = dict(zip(names, function.__closure__ or (), strict=True))
    program, metric = cells["program"].cell_contents, cells["metric"].cell_contents
    cells["program"] = types.CellType(lambda **inputs: run_program(program, inputs))
    cells["metric"] = types.CellType(lambda *judged: run_metric(metric, *judged))
    return types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells[name] for name in names),
    )


def scores_by_program(data: Any, results: Any) -> list[tuple[Any, list[float]]]:
    """Return what a pool of ``SIMBA``'s has scored: each program with its scores, in the order in which it was given.

    It gives ``dspy.Parallel`` pairs of a function over ``program`` and ``metric`` and an example, and gets back dicts.
    Source: ``dspy.teleprompt.simba_utils.wrap_program``. Any other pool gives an empty list.
    """
    if not isinstance(data, list) or not isinstance(results, list) or len(data) != len(results):
        return []
    scores: list[tuple[Any, list[float]]] = []
    for pair, result in zip(data, results, strict=True):
        function = pair[0] if type(pair) is tuple and pair else None
        if type(function) is not types.FunctionType or type(result) is not dict:
            return []
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        score = result.get("score")
        if not {"program", "metric"} <= set(cells) or not isinstance(score, (int, float)):
            return []
        program = cells["program"].cell_contents
        if not scores or program is not scores[-1][0]:
            scores.append((program, []))
        scores[-1][1].append(float(score))
    return scores


def index_in_search(program: Any) -> int | None:
    """Return the number that ``SIMBA`` gives a program of its search; a copy that it changes has that of the original.

    It counts the program that it was given as 0, and then each candidate when its batch is over.
    """
    index = getattr(program, "__dict__", {}).get("simba_idx")
    return index if type(index) is int else None
