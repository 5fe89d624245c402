"""What is compared: each contestant is put into a fresh process, told to finish what it stores, and taken out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Undo = Callable[[], None]


def _nothing() -> None: ...


def _same(program: Any) -> Any:
    return program


@dataclass(frozen=True, slots=True)
class Installed:
    """A contestant that is in place in this process.

    Attributes:
        flush: Returns when everything that has ended is stored.
        uninstall: Takes it out.
        wrap: Makes of a program what is called in its place; for calls in threads only.
        report: What it says of itself, after ``flush``.
    """

    flush: Callable[[], Any] = _nothing
    uninstall: Callable[[], Any] = _nothing
    wrap: Callable[[Any], Any] = _same
    report: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to trace, or not to.

    Attributes:
        id: Its name on the command line and in the results.
        title: Its name in reports.
        install: Puts it into this process. Gets what the cell wants it to log besides: ``log_evals``, ``log_compiles``.
        stores: Whether traces go to the cell's store.
        is_ours: Whether a missing trace fails the run.
        is_peer: Whether the run goes on without it where it is not installed.
        color: Of its line in plots.
        server_store: The scheme of the store behind the cell's ``mlflow server``.
    """

    id: str
    title: str
    install: Callable[..., Installed]
    color: str
    stores: bool = False
    is_ours: bool = False
    is_peer: bool = False
    server_store: str = "sqlite"


def _off(**logs: bool) -> Installed:  # noqa: ARG001 - nothing is logged
    return Installed()


def _floor(**logs: bool) -> Installed:  # noqa: ARG001 - nothing is logged
    import dspy
    from dspy.utils.callback import BaseCallback

    dspy.configure(callbacks=[BaseCallback()])
    return Installed(uninstall=lambda: dspy.configure(callbacks=[]))


def _patched_floor(**logs: bool) -> Installed:  # noqa: ARG001 - nothing is logged
    import dspy
    from dspy.utils.callback import BaseCallback
    from mlflow.dspy.callback import MlflowCallback

    from dspy_mlflow_async.seams.dspy_arguments import patch_arguments
    from dspy_mlflow_async.seams.dspy_call_ids import patch_call_ids
    from dspy_mlflow_async.seams.dspy_dispatch import patch_handlers

    class Empty(MlflowCallback):  # type: ignore[misc]
        """Empty callback of the class that our patches serve."""

        def __init__(self) -> None: ...

    for name in filter(lambda name: name.startswith("on_"), dir(BaseCallback)):
        setattr(Empty, name, getattr(BaseCallback, name))
    undos = [patch_arguments(), patch_call_ids(), patch_handlers()]
    dspy.configure(callbacks=[Empty()])

    def uninstall() -> None:
        dspy.configure(callbacks=[])
        for undo in reversed(undos):
            undo()

    return Installed(uninstall=uninstall)


def _ours(**options: Any) -> Callable[..., Installed]:
    def install(**logs: bool) -> Installed:
        import dataclasses

        import dspy_mlflow_async

        dspy_mlflow_async.autolog(silent=True, **options, **logs)
        return Installed(
            flush=dspy_mlflow_async.flush,
            uninstall=lambda: dspy_mlflow_async.autolog(disable=True, silent=True),
            report=lambda: dataclasses.asdict(dspy_mlflow_async.stats()),
        )

    return install


def _ours_suppressed(**logs: bool) -> Installed:
    import dataclasses

    import dspy_mlflow_async

    def wrap(program: Any) -> Any:
        def suppressed(**inputs: Any) -> Any:
            with dspy_mlflow_async.suppress():  # in the thread that calls: plain threads inherit nothing
                return program(**inputs)

        return suppressed

    return dataclasses.replace(_ours()(**logs), wrap=wrap)


def _mlflow(**logs: bool) -> Installed:
    import mlflow
    import mlflow.dspy

    mlflow.dspy.autolog(silent=True, **logs)

    def uninstall() -> None:
        mlflow.flush_trace_async_logging(terminate=True)
        mlflow.dspy.autolog(disable=True, silent=True)

    return Installed(flush=mlflow.flush_trace_async_logging, uninstall=uninstall)


def _openinference(**logs: bool) -> Installed:  # noqa: ARG001 - it logs no runs
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    uninstall, _ = _instrument(SimpleSpanProcessor(exporter))

    def report() -> dict[str, Any]:
        spans = exporter.get_finished_spans()
        is_lm = [(span.attributes or {}).get("openinference.span.kind") == "LLM" for span in spans]
        return {"spans_in_memory": len(spans), "lm_spans": sum(is_lm)}

    return Installed(uninstall=uninstall, report=report)


def _openinference_otlp(**logs: bool) -> Installed:  # noqa: ARG001 - it logs no runs
    import mlflow
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(
        endpoint=f"{mlflow.get_tracking_uri()}/v1/traces",
        headers={"x-mlflow-experiment-id": os.environ["MLFLOW_EXPERIMENT_ID"]},  # as mlflow.set_experiment leaves it
    )
    uninstall, provider = _instrument(BatchSpanProcessor(exporter))
    return Installed(flush=lambda: provider.force_flush(600_000), uninstall=uninstall)


def _instrument(processor: Any) -> tuple[Undo, Any]:
    """Let OpenInference trace DSPy into a provider of its own, as its documentation says."""
    from openinference.instrumentation.dspy import DSPyInstrumentor
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()
    provider.add_span_processor(processor)
    instrumentor = DSPyInstrumentor()
    instrumentor.instrument(tracer_provider=provider)

    def uninstall() -> None:
        instrumentor.uninstrument()
        provider.shutdown()

    return uninstall, provider


OFF = "off"
FLOOR = "floor"
OURS = "ours"
MLFLOW = "mlflow"
PATCHED = "floor-patched"
PLUGIN = "ours-plugin"
OPENINFERENCE = "openinference"
OTLP = "openinference-otlp"

CONTESTANTS = {
    contestant.id: contestant
    for contestant in (
        Contestant(OFF, "tracing off", _off, "#999999"),
        Contestant(FLOOR, "empty callback", _floor, "#555555"),
        Contestant(PATCHED, "empty callback, our patches of DSPy", _patched_floor, "#888888"),
        Contestant("ours-silent", "ours, log_traces=False", _ours(log_traces=False), "#7fc8a9", is_ours=True),
        Contestant("ours-suppress", "ours, in suppress()", _ours_suppressed, "#b5ddc9", is_ours=True),
        Contestant(OURS, "ours", _ours(), "#00754a", stores=True, is_ours=True),
        Contestant("ours-durable", "ours, durable=True", _ours(durable=True), "#1f77b4", stores=True, is_ours=True),
        Contestant(
            "ours-process", 'ours, export="process"', _ours(export="process"), "#7a4fb5", stores=True, is_ours=True
        ),
        Contestant(
            PLUGIN,
            "ours, and our store in the server",
            _ours(),
            "#4fa3a5",
            stores=True,
            is_ours=True,
            server_store="dspy+sqlite",
        ),
        Contestant(MLFLOW, "mlflow.dspy.autolog()", _mlflow, "#d1495b", stores=True),
        Contestant(OPENINFERENCE, "OpenInference, in memory", _openinference, "#edae49", is_peer=True),
        Contestant(OTLP, "OpenInference + OTLP", _openinference_otlp, "#b57a12", stores=True, is_peer=True),
    )
}
