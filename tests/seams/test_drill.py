"""The drill on the names whose loss would cost most, and what stands in where nothing of ours can be traced."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from pathlib import Path

import dspy
import mlflow
import pytest
from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor

import dspy_mlflow_async
from drill.distort import classes_of
from dspy_mlflow_async import fallback
from dspy_mlflow_async.seams import check, listed
from dspy_mlflow_async.seams.check import Seam
from echo import Chain, EchoLM

HERE = Path(__file__).resolve().parents[2]
# Those by which every trace was, or would be, lost: overridden methods, hot names, names taken at import, instances'.
DANGEROUS = (
    "MlflowV3SpanProcessor._start_trace",
    "MlflowV3SpanExporter._should_enable_async_logging",
    "provider:_get_mlflow_span_processor",
    "provider:mlflow_runtime_context",
    "settings:thread_local_overrides",
    "callback:_get_on_start_handler",
    "Span._attachments",
    "display:get_display_handler",
)


def drill(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "drill", *arguments]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.skipif(sys.platform == "win32", reason="the drill forks")
@pytest.mark.long
def test_programs_run_on_without_the_most_dangerous_names():
    """Each is taken away, and once more exchanged: results are right, traces stored, the loss said once and known."""
    done = drill(*DANGEROUS)

    rows = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert [] == [row for row in rows if " BAD " in row], done.stdout + done.stderr[-2000:]
    assert 0 == done.returncode, done.stdout + done.stderr[-2000:]
    assert len(rows) >= 2 * len(DANGEROUS)
    # It was no drill where nothing was lost: the loss of the first three is said.
    assert [] == [row for row in rows if "_start_trace:" in row and "has " not in row]


def test_no_object_is_asked_for_its_class():
    """The drill looks through all objects of the process, and a lazy one raises or loads where it is asked."""

    class Lazy:
        @property
        def __class__(self):
            raise RuntimeError("there are no settings yet")

    lazy = Lazy()

    assert MlflowV3SpanProcessor in classes_of(("mlflow",))
    assert gc.is_tracked(lazy)  # so it was among them


@pytest.mark.parametrize(
    ("value", "shape", "is_fit"),
    [
        (lambda a, b: None, "(a, b)", True),
        (lambda a, b, c=1: None, "(a, b)", True),
        (lambda a, *, b: None, "(a, b=)", True),
        (lambda a, b, c: None, "(a, b)", False),
        (lambda a, b, *, c: None, "(a, b)", False),
        (lambda a: None, "(a, b=)", False),
        ("text", "()", False),
        ({}, ".get .pop", True),
        ([], ".get", False),
        (dict, "", True),
        (None, "?.get", True),
        (1, "?.get", False),
        (lambda a: None, "(a, b) | (a)", True),
        (lambda a, b, c: None, "(a, b) | (a)", False),
    ],
)
def test_shapes(value, shape, is_fit):
    """A value fits where it may be called as we call it, and has the attributes that we ask it for."""
    assert check.fits(value, shape) is is_fit


def test_faults_are_told_apart():
    """What has gone and what has changed are faults; what may be absent is none, but is where it has changed."""
    home = "mlflow.tracing.provider"
    seams = [
        Seam(f"{home}:no_such_name", "r"),
        Seam(f"{home}:no_such_name", "r", is_optional=True),
        Seam(f"{home}:trace_disabled", "r", shape="(f)"),
        Seam(f"{home}:trace_disabled", "r", shape="(f, g)", is_optional=True),
        Seam("mlflow.entities.span:Span._span", "r", shape=".no_such_attribute"),
    ]

    found = [(fault.seam.path.rpartition(":")[2], fault.text) for fault in check.faults(seams)]

    assert [("no_such_name", "has gone"), ("trace_disabled", "has changed"), ("Span._span", "has changed")] == found


def test_nothing_is_lost_here():
    """With the versions that are installed, no ground is lost, and no feature."""
    assert () == listed.lost_ground()
    assert [] == check.faults(listed.SEAMS)


def test_every_public_name_has_a_stand_in():
    """Where the ground is lost each public name is there still, or says in one sentence why it cannot be."""
    own = {name for name in dspy_mlflow_async.__all__ if name in vars(fallback)}

    assert all(callable(getattr(fallback, name)) for name in own)
    assert {"AsyncEvaluate", "Case", "aevaluate_all", "evaluate_all"} == set(dspy_mlflow_async.__all__) - own
    with pytest.raises(
        ImportError, match=r"dspy_mlflow_async\.Case cannot work with these versions of DSPy and MLflow"
    ):
        fallback.Case  # noqa: B018


def test_stand_ins_change_nothing():
    """Programs behave as without us: wrapped, propagated, in a request, and below middleware."""
    program = Chain()
    with dspy.context(lm=EchoLM()):
        wrapped = fallback.wrap(program, session_id="s", sample=0.5)
        with fallback.request("r", user="u") as record, fallback.suppress():
            assert "@a" == wrapped(question="@a").answer
            assert "@b" == fallback.propagate(program)(question="@b").answer
        assert "@c" == asyncio.run(wrapped.acall(question="@c")).answer

    assert (None, []) == (record.trace_id, record.lm_calls)
    assert 3 == asyncio.run(fallback.wrap(lambda number: number + 1).acall(2))
    assert 0 == fallback.stats().started

    async def app(scope, receive, send):
        return scope

    assert asyncio.run(fallback.TracingMiddleware(app, name="n")("scope", None, None)) is None


def test_the_stand_in_for_run_is_a_run():
    """It nests below the run that is active, in sync and async code."""

    async def inner():
        async with fallback.run("inner") as run:
            mlflow.log_metric("m", 1.0)
            return run

    with fallback.run("outer", tags={"k": "v"}) as outer:
        inside = asyncio.run(inner())

    assert inside.data.tags["mlflow.parentRunId"] == outer.info.run_id
    assert "FINISHED" == mlflow.get_run(outer.info.run_id).info.status


def test_the_stand_in_for_autolog_is_mlflows():
    """MLflow's own traces the calls, one warning says so, and nobody vouches for what it stores."""
    fallback.autolog(log_evals=True, durable=True)
    try:
        with dspy.context(lm=EchoLM()):
            Chain()(question="@a")
        assert fallback.flush(10) is False
    finally:
        fallback.autolog(disable=True)

    assert 1 == len(mlflow.search_traces(return_type="list"))
