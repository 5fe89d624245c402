"""Internals of ``dspy.Evaluate``, for evaluations that run in tasks instead of its worker threads."""

from __future__ import annotations

import copy
import logging
import types
from typing import Any

import dspy
from dspy.dsp.utils.settings import thread_local_overrides
from dspy.dsp.utils.utils import dotdict
from dspy.evaluate.evaluate import EvaluationResult
from dspy.utils.callback import with_callbacks

__all__ = ["EvaluationResult", "with_callbacks"]

# The loggers of dspy.utils.parallelizer and dspy.evaluate.evaluate: filters that people have set keep working.
PARALLELIZER_LOGGER = logging.getLogger("dspy.utils.parallelizer")
EVALUATE_LOGGER = logging.getLogger("dspy.evaluate.evaluate")


def isolate_settings() -> None:
    """Give this task its own copy of ``dspy.context``'s settings, and of the usage tracker in them.

    Source: ``ParallelExecutor._execute_parallel``, ``worker``. A task has its own context, so nothing is put back.
    """
    own = dotdict(thread_local_overrides.get())
    if own.get("usage_tracker"):
        own["usage_tracker"] = copy.deepcopy(own["usage_tracker"])
    thread_local_overrides.set(own)


def result_rows(results: list[Any], metric: Any) -> tuple[list[dict[str, Any]], str]:
    """Return the rows that ``dspy.Evaluate`` writes to files, and the name of the score's column."""
    name = metric.__name__ if isinstance(metric, types.FunctionType) else metric.__class__.__name__
    return dspy.Evaluate._prepare_results_output(results, name), name


def display_table(evaluator: dspy.Evaluate, results: list[Any], metric: Any, rows: bool | int) -> None:
    """Show the results as ``dspy.Evaluate`` shows them.

    Raises:
        ImportError: Where pandas is not installed.
    """
    _, name = result_rows(results[:1], metric)
    evaluator._display_result_table(evaluator._construct_result_table(results, name), rows, name)
