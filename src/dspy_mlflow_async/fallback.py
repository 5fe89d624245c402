"""Public names over MLflow's own tracing, for a DSPy or MLflow that lacks a name which nothing can be traced without.

``seams.listed.lost_ground`` decides. No file of the tracer is imported then, since it might not even import.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar

from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.seams.listed import lost_ground, taken

logger = logging.getLogger("dspy_mlflow_async")
_Result = TypeVar("_Result")

_OF_MLFLOW = ("log_traces", "log_traces_from_compile", "log_traces_from_eval", "log_compiles", "log_evals")
ThreadPoolExecutor = concurrent.futures.ThreadPoolExecutor


def autolog(
    log_traces: bool = True,
    log_traces_from_compile: bool = False,
    log_traces_from_eval: bool = True,
    log_compiles: bool = False,
    log_evals: bool = False,
    disable: bool = False,
    silent: bool = False,
    **_: Any,
) -> None:
    """Call ``mlflow.dspy.autolog`` with the arguments that it knows, and warn once that it traces in our place."""
    if not disable:
        _say_what_is_lost()
    values = (log_traces, log_traces_from_compile, log_traces_from_eval, log_compiles, log_evals)
    _autolog_of_mlflow(**dict(zip(_OF_MLFLOW, values, strict=True)), disable=disable, silent=silent)


@functools.cache  # once a process
def _say_what_is_lost() -> None:
    logger.warning(
        "These versions of DSPy and MLflow lack what dspy-mlflow-async stands on: %s. MLflow's own "
        "mlflow.dspy.autolog() traces in its place, and what dspy-mlflow-async adds to that is off. "
        "dspy-mlflow-async doctor says more.",
        "; ".join(map(str, lost_ground())),
    )


autolog.integration_name = "dspy"  # type: ignore[attr-defined]


@guarded
def _autolog_of_mlflow(**arguments: Any) -> None:
    import mlflow.dspy

    mlflow.dspy.autolog(**arguments)


def flush(timeout: float | None = None) -> bool:  # noqa: ARG001 - MLflow's waits as long as it takes
    """Flush MLflow's own exporter; return False, since it does not say whether it has stored everything."""
    _flush_mlflow()
    return False


@guarded
def _flush_mlflow() -> None:
    import mlflow

    mlflow.flush_trace_async_logging()


class _Uncounted:
    """Counts that are all 0, under every name: MLflow's own exporter does not count."""

    def __getattr__(self, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        return 0


def stats() -> Any:
    """Return counts that are all 0."""
    return _Uncounted()


def propagate(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Return the function as it is."""
    return function


def carry(**_: Any) -> Any:
    """Return nothing to speak of: MLflow's own tracing has nothing that other processes could take up."""
    return SimpleNamespace()


@contextlib.contextmanager
def attached(carried: Any) -> Iterator[None]:  # noqa: ARG001 - the tracer's signature
    """Leave the block as it is."""
    yield


@contextlib.contextmanager
def suppress() -> Iterator[None]:
    """Record nothing in this block, as far as ``mlflow.tracing.context`` reaches."""
    import mlflow

    with mlflow.tracing.context(enabled=False):
        yield


class _Block:
    """A block of sync or async code around a context manager."""

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._make = make
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Any:
        return self._stack.enter_context(self._make())

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    async def __aenter__(self) -> Any:
        return self.__enter__()

    async def __aexit__(self, *error: object) -> None:
        self.__exit__(*error)


class run(_Block):  # noqa: N801 - as the tracer's
    """``mlflow.start_run``, as a child of the run that is active in this thread."""

    def __init__(
        self,
        name: str | None = None,
        *,
        tags: Any = None,
        description: str | None = None,
        experiment_id: str | None = None,
        parent_run_id: str | None = None,
    ) -> None:
        def make() -> contextlib.AbstractContextManager[Any]:
            import mlflow

            is_nested = parent_run_id is None and mlflow.active_run() is not None
            return mlflow.start_run(
                run_name=name,
                nested=is_nested or parent_run_id is not None,
                tags=None if tags is None else dict(tags),
                description=description,
                experiment_id=experiment_id,
                parent_run_id=parent_run_id,
            )

        super().__init__(make)


class request(_Block):  # noqa: N801 - as the tracer's
    """A block that yields an empty record: MLflow's own tracing has no requests."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__(lambda: contextlib.nullcontext(_empty_record()))


def _empty_record() -> Any:
    return SimpleNamespace(trace_id=None, trace_ids=[], usage={}, cost=None, lm_calls=[], lm_calls_left_out=0)


class wrap:  # noqa: N801 - as the tracer's
    """A program with the same call forms, and nothing around its calls."""

    def __init__(self, program: Any, **_: Any) -> None:
        if not callable(program):
            raise TypeError(f"wrap takes a program that can be called, not {program!r}")
        self.__dict__["_program"] = program

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_program" not in self.__dict__:  # the latter while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._program, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._program, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program."""
        return self._program(*args, **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program without blocking the event loop."""
        import anyio.to_thread

        form = getattr(self._program, "acall", None)
        if form is None and inspect.iscoroutinefunction(self._program):
            form = self._program
        if form is not None:
            return await form(*args, **kwargs)
        result = await anyio.to_thread.run_sync(lambda: self._program(*args, **kwargs))
        return await result if inspect.isawaitable(result) else result


class TracingMiddleware:
    """ASGI middleware that passes everything on."""

    def __init__(self, app: Any, **_: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the call on to the app."""
        await self.app(scope, receive, send)


def TracingCallback(*, dependencies_schema: Any = None, **_: Any) -> Any:  # noqa: N802 - as the tracer's
    """Return MLflow's own callback, or one that does nothing."""
    make = taken("mlflow.dspy.callback:MlflowCallback")
    if make is not None:
        return make(dependencies_schema)
    from dspy.utils.callback import BaseCallback

    return BaseCallback()


def __getattr__(name: str) -> Any:
    """Raise an ImportError that says why, since nothing can take the place of the other names."""
    raise ImportError(
        f"dspy_mlflow_async.{name} cannot work with these versions of DSPy and MLflow: "
        + "; ".join(map(str, lost_ground()))
    )
