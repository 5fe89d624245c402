"""What ``evaluate_all`` says at a terminal: its run, how to go on, what failed, and a store that is away."""

import io
import logging
import re
import sys
import threading

import dspy
import matplotlib as mpl
import mlflow
import pytest
import rich
from rich.console import Console
from small import examples, is_right

import dspy_mlflow_async
from dspy_mlflow_async import aevaluate_all, evaluate_all
from dspy_mlflow_async.evaluate import summary
from dspy_mlflow_async.evaluate.comparison import CaseResult, CaseUsage, Comparison, ExampleCounts, Latency
from dspy_mlflow_async.evaluate.statistics import Difference
from echo import TIMEOUT, Chain, EchoLM
from mlflow_server import free_port


@pytest.fixture
def said(monkeypatch):
    """What the progress has written, as a log."""
    text = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=text, force_terminal=False, width=200))
    return text


class Failing(dspy.Module):
    """A program that the provider refuses."""

    async def aforward(self, question):
        raise ValueError("401: wrong key")


async def test_all_examples_that_fail_are_no_quiet_zero(said, traces, caplog):
    """The first error is said when it happens, and stands with the count in the comparison; log lines name the case."""
    comparison = await aevaluate_all({"good": Chain(), "bad": Failing()}, devset=examples(size=4), metric=is_right)

    told = "bad: all 4 examples failed, the first with ValueError: 401: wrong key"
    assert "bad: the first error: ValueError: 401: wrong key" in said.getvalue()
    assert told in str(comparison)
    assert told in comparison._repr_html_()
    assert 4 == sum("bad: Error for" in record.getMessage() for record in caplog.records)


def test_ctrl_c_says_how_to_go_on(said, traces):
    """One line with the run's id, and no frames of tasks above the interrupt."""

    class Interrupting(dspy.Module):
        async def aforward(self, question):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        evaluate_all({"one": Interrupting()}, devset=examples(size=2), metric=is_right)

    run_id = re.search(r"evaluate_all: run (\w+)", said.getvalue())[1]
    assert f'Stopped. Go on with evaluate_all(..., resume="{run_id}").' in said.getvalue()
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


async def test_a_budget_says_how_to_go_on(said, traces):
    """The printed comparison names the run to resume."""
    comparison = await aevaluate_all(
        {"one": Chain()}, devset=examples(size=9), metric=is_right, max_tokens=1, max_concurrency=1
    )

    assert f'Go on with evaluate_all(..., resume="{comparison.run_id}").' in str(comparison)


def test_progress_is_on_standard_error(monkeypatch):
    """What a program prints is its own: by default nothing of the progress goes to standard output."""
    monkeypatch.setattr(rich, "_console", Console())
    from dspy_mlflow_async.evaluate import progress

    assert progress.console_here().stderr


RESULTS = Comparison(
    tuple(
        CaseResult(
            f"a rather long name {number}", "finished", score=50.0, standard_error=3.2, counts=ExampleCounts(200),
            latency=Latency(0.6, 1.0), usage=CaseUsage(41_000, 200, 0.0103),
            difference=Difference(8.5, 2.5, 14.5, 200) if number else None,
        )
        for number in range(2)
    ),
    "a rather long name 0",
)  # fmt: skip


def test_a_table_follows_the_terminal(monkeypatch):
    """In 80 columns each case has one line, with what matters most; piped, nothing is cut or broken."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    narrow = str(RESULTS).splitlines()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    piped = str(RESULTS).splitlines()

    assert 80 >= max(map(len, narrow))
    assert all("a rather long name 1" in lines[3] and "+8.5 [+2.5, +14.5]" in lines[3] for lines in (narrow, piped))
    assert "41,200" in piped[3]


# --- a store that is away -----------------------------------------------------------------------------------------


@pytest.fixture
def away(monkeypatch):
    """A tracking URI at which nothing listens."""
    before = mlflow.get_tracking_uri()
    uri = f"http://127.0.0.1:{free_port()}"
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(before)


async def test_nothing_is_spent_without_a_store_that_is_required(away):
    """``require_store=True`` stops before the first example, with the reason in a sentence."""
    lm = EchoLM()
    with dspy.context(lm=lm), pytest.raises(ConnectionError, match="nothing listens there"):
        await aevaluate_all({"one": Chain()}, devset=examples(), metric=is_right, require_store=True)

    assert [] == lm.calls


async def test_a_resume_without_a_store_is_refused_at_once(away):
    """MLflow's own client would try for minutes, and then say that there is no such run."""
    with pytest.raises(ConnectionError, match="nothing listens there"):
        await aevaluate_all({"one": Chain()}, devset=examples(), metric=is_right, resume="0" * 32)


@pytest.mark.long
async def test_a_store_that_is_away_is_said_at_once(away, caplog):
    """Without it, what is found waits; that it does is said before the first example runs, without MLflow's retries."""
    with caplog.at_level(logging.WARNING, "dspy_mlflow_async"):
        comparison = await aevaluate_all(
            {"one": Chain()}, devset=examples(size=1), metric=is_right, display_progress=False
        )

    assert 100.0 == comparison["one"].score
    assert "nothing listens there (connection refused)" in caplog.records[0].getMessage()
    dspy_mlflow_async.flush(0)


def test_a_refused_resume_names_the_argument(said, traces):
    """Which argument of the LM differs is said by its name, and what to do."""

    def evaluate(base, **more):
        program = Chain()
        lm = EchoLM()
        lm.kwargs["api_base"] = base
        with dspy.context(lm=lm):
            return evaluate_all({"one": program}, devset=examples(size=3), metric=is_right, max_concurrency=1, **more)

    stopped = evaluate("http://here", max_tokens=1)
    with pytest.raises(ValueError, match="of the LM's arguments, api_base differ"):
        evaluate("http://there", resume=stopped.run_id)


async def test_nobody_waits_for_fonts(said, traces, tmp_path, monkeypatch):
    """Where Matplotlib has to look for fonts first, the plot is drawn behind the program's back, and comes later."""
    drawing, may_draw = threading.Event(), threading.Event()

    def draw(*_):
        drawing.set()
        assert may_draw.wait(TIMEOUT)
        return b"png"

    monkeypatch.setattr(mpl, "get_cachedir", lambda: str(tmp_path))
    monkeypatch.setattr(summary, "plot_of_cases", draw)
    comparison = await aevaluate_all({"one": Chain()}, devset=examples(size=1), metric=is_right)
    assert drawing.wait(TIMEOUT)
    assert "scores.png" not in artifacts_of(comparison.run_id)

    may_draw.set()
    for thread in threading.enumerate():
        if thread.name == "dspy-mlflow-async-fonts":
            thread.join(TIMEOUT)
    dspy_mlflow_async.flush()
    assert "scores.png" in artifacts_of(comparison.run_id)


def artifacts_of(run_id):
    return [each.path for each in mlflow.MlflowClient().list_artifacts(run_id)]
