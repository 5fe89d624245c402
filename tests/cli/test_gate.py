"""The command ``gate``, on runs of real evaluations in a sqlite store."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.etree import ElementTree as ET

import dspy
import mlflow
import pytest
from typer.testing import CliRunner

import dspy_mlflow_async
from dspy_mlflow_async import aevaluate_all
from dspy_mlflow_async.cli import app
from dspy_mlflow_async.cli.gate.checks import FAILED, HELD, UNKNOWN, Baseline, Rules, Subject
from dspy_mlflow_async.evaluate import summary
from dspy_mlflow_async.evaluate.statistics import paired_difference
from echo import TIMEOUT, Chain
from mlflow_server import free_port


def examples(size=8):
    return [dspy.Example(question=f"@e-{n}", answer=f"@e-{n}").with_inputs("question") for n in range(size)]


def is_right(example, prediction, trace=None):
    return example.answer == prediction.answer


class RightUntil(dspy.Module):
    """Right on the questions below a number, and fails on the last of all."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    async def aforward(self, question):
        place = int(question.rpartition("-")[2])
        if place == 7:
            raise ValueError("no\x00t this one")
        return dspy.Prediction(answer=question if place < self.number else "?")


@pytest.fixture
def evaluated(store_uri, tmp_path, monkeypatch):
    """A function that evaluates programs, in an experiment of the test's own."""
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr(summary, "plot_of_cases", lambda *_: b"png")  # half of the time; nobody looks at it here
    name = tmp_path.name
    experiment_id = mlflow.create_experiment(name, artifact_location=(tmp_path / "artifacts").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment_id)

    async def evaluate(programs, run_name="nightly", **options):
        options = {"devset": examples(), "metric": is_right, "display_progress": False, **options}
        found = await aevaluate_all(programs, run_name=run_name, **options)
        dspy_mlflow_async.flush()
        return found

    evaluate.experiment = name
    return evaluate


@pytest.fixture
def gate(monkeypatch):
    """A function that gives what the command prints, and its exit code."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        result = CliRunner().invoke(app, ["gate", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result.exit_code, result.output

    return call


async def test_bounds_of_a_run(evaluated, gate, tmp_path):
    """A line per bound with what was found, reasons below, 0 or 1 as exit code, and JUnit's XML."""
    comparison = await evaluated({"small": RightUntil(6)})
    file = tmp_path / "gate.xml"
    held = gate(
        comparison.run_id, "--min", "score=0.75", "--min", "score=75%", "--max", "errors=1", "--min", "examples=8"
    )
    code, failed = gate("--min", "score=0.8", "--max", "errors=5%", "--max", "latency_p99=60", "--junit", str(file))
    suite = ET.parse(file).getroot()[0]  # noqa: S314 - our own

    assert 0 == held[0], held[1]
    assert re.search(r"nightly/small +score +≥ 0.75 +0.75 ± 0.1637 +ok", held[1])
    assert re.search(r"nightly/small +score +≥ 75% +75% ± 16.37% +ok", held[1])
    assert 1 == code
    assert re.search(r"score +≥ 0.8 +0.75 ± 0.1637 +FAILED", failed)
    assert "FAILED: nightly/small: score is 0.75 ± 0.1637, and must be ≥ 0.8." in failed
    assert "errors is 12.5%, and must be ≤ 5%" in failed
    assert re.search(r"latency_p99 +≤ 60 s +[\d.e-]+ s +ok", failed)
    assert ("3", "2", "0") == tuple(suite.get(key) for key in ("tests", "failures", "errors"))
    assert ["nightly/small"] * 3 == [case.get("classname") for case in suite]
    assert [True, True, False] == [case.find("failure") is not None for case in suite]


async def test_every_metric_of_the_run_can_be_bound(evaluated, gate):
    """By the name that MLflow shows; one that there is not is told with those that there are, and ends with 2."""
    comparison = await evaluated({"small": RightUntil(6)})
    mlflow.MlflowClient().log_metric(comparison["small"].run_id, "my/own", 3.0)
    code, output = gate(
        comparison["small"].run_id, "--min", "my/own=3", "--max", "eval=80", "--max", "scor=1", "--max", "cost=2"
    )

    assert 2 == code
    assert re.search(r"my/own +≥ 3 +3 +ok", output)
    assert re.search(r"eval +≤ 80 +75 +ok", output)
    assert "ERROR: small has no metric scor; did you mean score? It has: errors, eval, examples" in output
    assert "ERROR: small: the cost is not known: MLflow has no price for the model" in output


async def test_percent_by_mistake(evaluated, gate):
    """A bound of 80 on a score from 0 to 1 does not hold, and what was meant is said."""
    await evaluated({"small": RightUntil(7)})
    code, output = gate("--min", "score=80")

    assert 1 == code
    assert "in percent it is score=80%." in output


async def test_cases_and_names(evaluated, gate):
    """Each case of a run is judged, one by ``--case`` or as RUN/CASE; runs are found by name, newest first."""
    await evaluated({"good": RightUntil(1)})
    await evaluated({"good": RightUntil(8), "half": RightUntil(4)})
    in_all = gate("nightly", "--min", "score=0.6")
    alone = gate("nightly", "--case", "good", "--min", "score=0.6")
    named = gate("nightly/half", "--min", "score=0.6")
    both = gate("nightly/half", "nightly/good", "--max", "score=0.6")
    code, unknown = gate("nightly", "--case", "bad", "--min", "score=0.6")

    assert 1 == in_all[0]
    assert re.search(r"nightly/good .* 0.875 ± \S+ +ok", in_all[1])
    assert re.search(r"nightly/half .* 0.5 ± \S+ +FAILED", in_all[1])
    assert 0 == alone[0]
    assert "half" not in alone[1]
    assert 1 == named[0]
    assert re.search(r"half .* ok\s+good .* FAILED", both[1])
    assert (2, True) == (code, "nightly has no case 'bad'; it has: good, half" in unknown)


async def test_a_name_in_several_experiments(evaluated, gate, monkeypatch):
    """Which run is meant is not guessed: MLflow's variable or ``--experiment`` says it."""
    await evaluated({"good": RightUntil(8)}, run_name="shared")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", mlflow.create_experiment(f"other-{evaluated.experiment}"))
    await evaluated({"good": RightUntil(2)}, run_name="shared")
    here = gate("shared", "--min", "score=0.8")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    code, output = gate("shared", "--min", "score=0.8")

    assert 1 == here[0]
    assert (2, True) == (code, "several experiments have a run called 'shared': choose by --experiment" in output)
    assert 0 == gate("shared", "--min", "score=0.8", "--experiment", evaluated.experiment)[0]
    assert "there is no experiment 'nowhere'" in gate("--min", "score=0.8", "--experiment", "nowhere")[1]


async def test_not_worse_than_another_run(evaluated, gate):
    """Scores are compared example by example, with the interval shown; noise alone does not fail."""
    before = await evaluated({"program": RightUntil(7)})
    await evaluated({"program": RightUntil(6)})
    noise = gate("nightly", "--not-worse-than", "previous")
    certain = gate("nightly", "--not-worse-than", before.run_id, "--certain")
    tolerated = gate("nightly", "--not-worse-than", before.run_id, "--certain", "--tolerance", "50%")
    await evaluated({"program": RightUntil(1)}, run_name="broken")
    worse = gate("broken", "--not-worse-than", "nightly")

    assert 0 == noise[0], noise[1]
    assert re.search(
        r"score +not worse than program of 20\S+ \S+ +-12.5 points \[-37.5, \+0.0] on 8 examples +ok", noise[1]
    )
    assert 1 == certain[0]
    assert "may be worse than program" in certain[1]
    assert (0, True) == (tolerated[0], "by more than 50 points" in tolerated[1])
    assert 1 == worse[0]
    assert "FAILED: broken/program is worse than program of" in worse[1]
    assert "and by more than chance explains." in worse[1]


async def test_not_worse_than_a_case_beside_it(evaluated, gate):
    """The name of a case names that of the same run, which is not compared with itself."""
    await evaluated({"old": RightUntil(7), "new": RightUntil(7)})
    code, output = gate("nightly", "--not-worse-than", "old")

    assert 0 == code
    assert re.search(r"nightly/new +score +not worse than old +\+0.0 points", output)
    assert 1 == output.count("not worse")
    assert re.search("new +score", gate("nightly/new", "--not-worse-than", "old")[1])
    assert "cannot be compared with itself" in gate("nightly/old", "--not-worse-than", "old")[1]


async def test_examples_that_only_one_has(evaluated, gate):
    """Examples in common are compared, and how many were left out is said; with none, it cannot be told."""
    await evaluated({"program": RightUntil(7)}, devset=examples(4))
    await evaluated({"program": RightUntil(7)})
    assert (
        "+0.0 points [+0.0, +0.0] on 4 examples (4 only here, 0 only there)" in gate("--not-worse-than", "previous")[1]
    )

    await evaluated({"program": RightUntil(7)}, devset=examples()[5:7])
    await evaluated({"program": RightUntil(7)}, devset=examples(4))
    code, output = gate("--not-worse-than", "previous")
    assert (2, True) == (code, "have no example in common" in output)


async def test_other_metrics_and_first_runs(evaluated, gate):
    """Scores of two metrics are not compared, and a name that only the run itself has is no baseline."""

    def lenient(example, prediction):
        return 1.0

    await evaluated({"program": RightUntil(7)})
    alone = gate("--not-worse-than", "previous")
    unknown = gate("--not-worse-than", "main")
    await evaluated({"program": RightUntil(7)}, metric=lenient)
    code, output = gate("--not-worse-than", "previous")

    assert (2, True) == (alone[0], "there is no finished run called 'nightly' before this one" in alone[1])
    assert (2, True) == (
        unknown[0],
        "there is no other finished run 'main', by id or by name, in its exp" in unknown[1],
    )
    assert (2, True) == (code, "was scored by lenient, and program of" in output)


async def test_a_run_that_is_not_whole(evaluated, gate):
    """One that a budget has stopped fails, one that is still at work cannot be judged; both on request only."""
    stopped = await evaluated({"program": Chain()}, max_tokens=1, max_concurrency=1)
    code, output = gate("--min", "score=0.1")
    assert (1, True) == (code, "was not finished: max_tokens, 7 not run" in output)
    assert 0 == gate("--min", "score=0.1", "--allow-unfinished")[0]

    mlflow.MlflowClient().update_run(stopped["program"].run_id, status="RUNNING")
    code, output = gate("--min", "score=0.1")
    assert (2, True) == (code, "is still running, max_tokens, 7 not run: ask again when it is over" in output)
    assert "score" not in output.splitlines()[2]


async def test_markdown(evaluated, gate):
    """For the summary of a job: a table, and the reasons as a list."""
    await evaluated({"program": RightUntil(6)})
    code, output = gate("--min", "score=0.8", "--markdown")
    head, _, row, _, reason = output.splitlines()

    assert 1 == code
    assert "| run | check | wanted | found | verdict |" == head
    assert "| nightly/program | score | ≥ 0.8 | 0.75 ± 0.1637 | FAILED |" == row
    assert reason.startswith("- FAILED: nightly/program: score is")


def test_a_server_that_is_down(gate, tmp_path):
    """Said at once in the words of the other commands; JUnit's file has it as an error."""
    before = mlflow.get_tracking_uri()
    file = tmp_path / "gate.xml"
    try:
        code, output = gate(
            "--min", "score=1", "--tracking-uri", f"http://127.0.0.1:{free_port()}", "--junit", str(file)
        )
    finally:
        mlflow.set_tracking_uri(before)

    assert (2, True) == (code, "nothing listens there (connection refused)" in output)
    assert "connection refused" in ET.parse(file).getroot()[0][0][0].get("message")  # noqa: S314 - our own


def test_no_run_at_all(gate, store_uri, monkeypatch):
    """A run that is not there is said with the store that was asked, and so is a file that cannot be written."""
    code, output = gate("no-such-run", "--min", "score=1")

    assert (2, True) == (code, f"there is no run 'no-such-run', by id or by name, in {store_uri}" in output)
    assert "there is no run '" + "0" * 32 in gate("0" * 32, "--min", "score=1")[1]
    assert "cannot write no/such/folder.xml" in gate("x", "--min", "score=1", "--junit", "no/such/folder.xml")[1]


@pytest.mark.parametrize(
    ("before", "after", "tolerance", "is_certain", "verdict"),
    [
        ([1] * 20, [1] * 20, 0, True, HELD),  # the same
        ([1] * 20, [0] * 20, 0, False, FAILED),  # all worse
        ([1] * 20, [1] * 19 + [0], 0, False, HELD),  # one of twenty: chance
        ([1] * 20, [1] * 19 + [0], 0, True, FAILED),
        ([1] * 20, [1] * 12 + [0] * 8, 0, False, FAILED),  # eight of twenty: no chance
        ([1] * 20, [1] * 12 + [0] * 8, "70%", False, HELD),
        ([1] * 20, [1] * 12 + [0] * 8, 0.7, True, HELD),
        ([0] * 20, [1] * 20, 0, True, HELD),  # better
        ([1], [0], 0, False, FAILED),  # one pair has no noise to hide in
        ([1], [0], 1, False, HELD),
        ([], [], 0, False, UNKNOWN),
    ],
)
def test_what_worse_means(before, after, tolerance, is_certain, verdict):
    """Worse is what lies wholly below the tolerance with its 95 % interval; ``certain`` turns the doubt around."""
    rules = Rules.of(tolerance=tolerance, is_certain=is_certain)
    difference = paired_difference(dict(enumerate(after)), dict(enumerate(before)), seed=0)
    (check,) = rules.judge(Subject("new", {}), Baseline(Subject("old", {}), difference))

    assert verdict == check.verdict


def test_a_mean_that_is_not_quite_its_number(gate):
    """0.1 + 0.2 is 0.3 to a person."""
    (check,) = Rules.of(maxima={"score": 0.3}).judge(Subject("a", {"score": 0.1 + 0.2}))

    assert HELD == check.verdict


def test_a_server_that_hangs(gate, tmp_path, monkeypatch):
    """One that says its version and then nothing more is waited for as long as ``--timeout`` says."""
    released = threading.Event()

    class Hangs(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/version":
                released.wait(TIMEOUT)
            self.send_response(200 if self.path == "/version" else 404)
            self.end_headers()
            self.wfile.write(b"3.17.2")

        def log_message(self, *_):
            pass

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before = mlflow.get_tracking_uri()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hangs) as server:
        uri = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever).start()
        try:
            code, output = gate("0" * 32, "--min", "score=1", "--timeout", "1", "--tracking-uri", uri)
        finally:
            mlflow.set_tracking_uri(before)
            released.set()
            server.shutdown()

    assert (2, True) == (code, f"{uri} has not answered within 1 s; --timeout says how long to wait" in output)
