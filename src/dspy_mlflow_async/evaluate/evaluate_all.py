"""Many evaluations at once, under one limit and one budget, each in its own run, and compared."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.to_thread
import dspy
from anyio.from_thread import start_blocking_portal

from dspy_mlflow_async.evaluate import calling
from dspy_mlflow_async.evaluate.budget import Limits
from dspy_mlflow_async.evaluate.case import Case, cases_of
from dspy_mlflow_async.evaluate.comparison import Comparison
from dspy_mlflow_async.evaluate.remote_examples import Crew, check, workers_of
from dspy_mlflow_async.evaluate.session import Options, Session
from dspy_mlflow_async.remote.workers import Workers

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


async def aevaluate_all(
    programs: Mapping[str, Any] | Iterable[Case],
    *,
    devset: Sequence[dspy.Example] | None = None,
    metric: Callable[..., Any] | None = None,
    baseline: str | None = None,
    max_concurrency: int | None = None,
    timeout: float | None = None,  # noqa: ASYNC109 - per example, not of this call
    workers: int | Workers | None = None,
    max_errors: int | None = None,
    provide_traceback: bool | None = None,
    failure_score: float = 0.0,
    raise_on_error: bool = False,
    max_cost: float | None = None,
    max_tokens: int | None = None,
    max_seconds: float | None = None,
    resume: str | None = None,
    run_name: str = "evaluate_all",
    seed: int = 0,
    display_progress: bool = True,
    require_store: bool = False,
) -> Comparison:
    """Evaluate several programs at once, each in its own run below one parent run, and compare them.

    All share one limit: ten evaluations never make ten times the load, and each gets its fair part of it. A case
    that fails ends its own run FAILED and is reported; the others go on. ::

        comparison = await aevaluate_all({"short": short, "long": long}, devset=devset, metric=metric)
        print(comparison)

    Args:
        programs: Programs by name, or a list of ``Case`` where devset, metric, LM or adapter differ.
        devset: The examples.
        metric: A function of an example and a prediction, sync or async.
        baseline: The name of the case that the others are compared with; by default the first.
        max_concurrency: How many examples of all cases together may be in flight; by default
            ``dspy.settings.async_max_workers``.
        timeout: Seconds that an example may take; one that takes longer is a failed one.
        workers: Processes that evaluate the examples: a number of them on this machine, or ``Processes``, ``Ray`` or
            ``Executor`` of ``dspy_mlflow_async.remote``. By default this process does. All other limits hold for all
            of them together; ``comparison.workers`` tells what each has done.
        max_errors: How many failed examples end a case; by default ``dspy.settings.max_errors``.
        provide_traceback: Log failed examples with their traceback; by default ``dspy.settings.provide_traceback``.
        failure_score: The score of a failed example.
        raise_on_error: Let the first case that fails end all of them, with its exception.
        max_cost: US dollars, by MLflow's prices. When examples that have ended have cost so much, no further one
            starts; those in flight end.
        max_tokens: The same for input and output tokens.
        max_seconds: The same for time.
        resume: The id of the parent run of an earlier, interrupted call with the same cases. Finished examples are
            read back from the store and not run again, failed ones included; except in a case that too many failed
            examples have ended, where these are run again. What the earlier call has spent is not counted.
        run_name: The name of the parent run.
        seed: Of the bootstrap confidence intervals.
        display_progress: Show a line per case and a total, on standard error.
        require_store: Stop before anything is spent where the store does not answer, or does not create the run.
            Otherwise the evaluations go on without it, and what they find is stored when it is back.

    Returns:
        The result of each case, and how they compare: score in percent with its standard error, errors, latency,
        tokens, cost, and the paired difference from the baseline with a bootstrap confidence interval. The parent
        run has the same as a table (``comparison.json``), the scores as metrics, and a plot (``scores.png``).

    Raises:
        TypeError: For an argument of the wrong type, and for a program, a metric or a setting that cannot be sent to
            workers; says which.
        ValueError: For no case, two of one name, an unknown baseline, an empty devset, no metric, a limit out of
            range, or a run that is unknown or does not fit. Nothing has run then.
        ConnectionError: With ``require_store`` or ``resume``, where the store cannot be reached. Nothing has run then.
        Exception: What a case raised, with ``raise_on_error``.
    """
    cases = cases_of(programs, devset, metric)
    names = [case.name for case in cases]
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline must be the name of a case ({', '.join(names)}), not {baseline!r}")
    limit = dspy.settings.async_max_workers if max_concurrency is None else max_concurrency
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number, 0 or more, not {seed!r}")
    if not isinstance(run_name, str):
        raise TypeError(f"run_name must be a text, not {run_name!r}")
    options = Options(
        max_concurrency=calling.check_limit(limit),
        timeout=calling.check_positive(timeout, "timeout", "seconds"),
        max_errors=calling.check_max_errors(max_errors),
        provide_traceback=provide_traceback,
        failure_score=calling.check_number(failure_score, "failure_score"),
        raise_on_error=raise_on_error,
        limits=Limits(
            cost=calling.check_positive(max_cost, "max_cost", "US dollars"),
            tokens=calling.check_positive(max_tokens, "max_tokens", "tokens"),
            seconds=calling.check_positive(max_seconds, "max_seconds", "seconds"),
        ),
        run_name=run_name,
        seed=seed,
        display_progress=display_progress,
        require_store=require_store,
    )
    crew = None if (found := workers_of(workers)) is None else Crew(found)
    if crew is not None:
        await anyio.to_thread.run_sync(check, cases)
    return await Session(cases, baseline or names[0], options, crew).run(resume)


def _without_await(function: Callable[_Arguments, Coroutine[Any, Any, _Result]]) -> Callable[_Arguments, _Result]:
    """Return the same function for code that is not async, with the same arguments."""

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        calling.check_keywords(kwargs, call.__name__, inspect.signature(function).parameters)
        begin = functools.partial(function, *args, **kwargs)
        if _is_in_trio():
            raise RuntimeError(f"in trio, use `await {function.__name__}(...)` in place of {call.__name__}(...)")
        if not _is_loop_running():
            return _run(begin)
        # A notebook: its loop is blocked while this runs, so the evaluations get a thread with a loop of their own.
        with start_blocking_portal() as portal:
            return portal.call(begin)

    call.__name__ = call.__qualname__ = function.__name__.removeprefix("a")
    return call


evaluate_all = _without_await(aevaluate_all)


def _run(begin: Callable[[], Coroutine[Any, Any, _Result]]) -> _Result:
    try:
        return anyio.run(begin)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None  # hundreds of lines of tasks' frames tell nobody anything
    except asyncio.CancelledError:
        if sys.version_info >= (3, 11):
            raise
        # Ctrl-C cancels the task; anyio tells that from a cancellation by what tasks cannot do before Python 3.11.
        raise KeyboardInterrupt from None


def _is_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _is_in_trio() -> bool:
    trio = sys.modules.get("trio")
    return trio is not None and bool(trio.lowlevel.in_trio_task())
