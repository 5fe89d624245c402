"""The command ``report``, on runs of real evaluations in a sqlite store."""

import csv
import io
import json
import re
from decimal import Decimal
from fractions import Fraction

import dspy
import mlflow
import numpy as np
import pytest
from typer.testing import CliRunner

import dspy_mlflow_async
from dspy_mlflow_async import aevaluate_all
from dspy_mlflow_async.cli import app
from dspy_mlflow_async.cli.report.scores import number_of
from dspy_mlflow_async.cli.report.text import spark_line
from echo import Chain
from mlflow_server import free_port


def examples(size=6):
    return [dspy.Example(question=f"@e-{n}", answer=f"@e-{n}").with_inputs("question") for n in range(size)]


def is_right(example, prediction, trace=None):
    return example.answer == prediction.answer


class Half(Chain):
    """Right on every other question, and fails on one."""

    async def aforward(self, question):
        if question == "@e-1":
            raise ValueError("<no> & nothing")
        answer = await super().aforward(question)
        return answer if int(question.rpartition("-")[2]) % 2 == 0 else dspy.Prediction(answer="?")


@pytest.fixture
def report(monkeypatch):
    """A function that calls the command and gives its output."""
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments, code=0):
        result = CliRunner().invoke(app, ["report", *arguments])
        assert code == result.exit_code, result.output
        return result.output

    return call


@pytest.fixture
async def comparison(stored):
    """Two cases, evaluated and stored with their traces."""
    with mlflow.start_run(experiment_id=stored.experiment_id):
        comparison = await aevaluate_all(
            {"good": Chain(), "half": Half()}, devset=examples(), metric=is_right, display_progress=False
        )
    stored()
    return comparison


async def test_run_tree(comparison, report):
    """The runs below a run, indented, with status, score, traces, errors and tokens."""
    dspy_mlflow_async.flush()
    lines = report(comparison.run_id).splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.strip()}

    assert ["evaluate_all", "evaluate_all", "FINISHED"] == rows["evaluate_all"][:3]
    assert ["good", "evaluation", "FINISHED", "100.0"] == rows["good"][:4]
    assert ["half", "evaluation", "FINISHED", "50.0"] == rows["half"][:4]
    assert ["  good", "  half"] == sorted(line[:6] for line in lines[-3:-1])
    assert "half: One example failed: ValueError: <no> & nothing" == lines[-1]
    assert ["±", "0.0"] == rows["good"][4:6]
    assert "6" == rows["good"][7]
    assert "-50.0" == rows["half"][6]
    assert ["6", "1"] == rows["half"][10:12]


async def test_the_newest_is_reported_and_listed(comparison, report):
    """Without an id the newest evaluation is meant; ``--list`` names them, ``--last`` takes several."""
    dspy_mlflow_async.flush()

    assert report() == report(comparison.run_id) == report("--last", "1")
    assert comparison.run_id in report("--list")
    assert comparison["good"].run_id not in report("--list")


async def test_a_report_for_programs(comparison, report):
    """JSON and CSV have a record for each run, cases in the order given, numbers as numbers."""
    dspy_mlflow_async.flush()
    records = json.loads(report("--json"))
    rows = list(csv.DictReader(io.StringIO(report("--csv"))))

    assert ["evaluate_all", "good", "half"] == [record["name"] for record in records] == [row["name"] for row in rows]
    assert [None, 100.0, 50.0] == [record["score"] for record in records]
    assert (-50.0, 6, 1) == tuple(records[2][key] for key in ("difference", "examples", "errors"))


async def test_a_comparison_shows_the_answers(comparison, report):
    """What each program answered stands below its score."""
    text = report("--compare", comparison.run_id)

    assert "answer=@e-3" in text
    assert "answer=?" in text


async def test_a_killed_evaluation_is_reported_as_far_as_it_came(stored, report):
    """How many examples were done, and their score, tokens and errors, though it has no result table."""

    class Stops(Half):
        async def aforward(self, question):
            if question == "@e-3":
                raise KeyboardInterrupt
            return await super().aforward(question)

    with mlflow.start_run(experiment_id=stored.experiment_id), pytest.raises(KeyboardInterrupt):
        await aevaluate_all(
            {"half": Stops()}, devset=examples(), metric=is_right, display_progress=False, max_concurrency=1
        )
    dspy_mlflow_async.flush()
    (record,) = [each for each in json.loads(report("--json")) if each["kind"] == "evaluation"]

    assert "3 of 6 done" in report()
    assert (3, "KILLED", 1) == (record["examples"], record["status"], record["errors"])
    assert pytest.approx(200 / 3) == record["score"]
    assert 0 < record["tokens"]


def test_a_server_that_is_down_is_said_at_once(report, monkeypatch):
    """Not after MLflow's retries, and not as a run that is not there."""
    before = mlflow.get_tracking_uri()
    try:
        output = report("x", "--tracking-uri", f"http://127.0.0.1:{free_port()}", code=2)
    finally:
        mlflow.set_tracking_uri(before)

    assert "nothing listens there (connection refused)" in output


async def test_compare(comparison, report):
    """Evaluations side by side: the examples that differ, with what failed."""
    text = report("--compare", comparison.run_id)
    apart = report("--compare", comparison["good"].run_id, comparison["half"].run_id, "--limit", "1")

    assert "3 of 6 examples differ" in text
    line = next(line for line in text.splitlines() if "@e-1" in line)
    assert ["0 (failed)", "1", "question=@e-1, answer=@e-1"] == sorted(re.split(r"  +", line.strip()))
    assert "and 2 more" in apart


def told(score):
    """A score with what is to be said of it; the text looks like a field of its own."""
    return dspy.Prediction(feedback=",\n    score=7,\n    so so", score=score)


@pytest.mark.parametrize("kind", [told, np.float32, np.bool_, Fraction, lambda n: told(np.float64(n))])
async def test_scores_of_any_kind(stored, report, kind):
    """What ``dspy.Evaluate`` can add up is a number in a report, whatever the metric's type."""

    def metric(example, prediction):
        return kind(int(prediction.answer == example.answer))

    with mlflow.start_run(experiment_id=stored.experiment_id):
        comparison = await aevaluate_all(
            {"good": Chain(), "half": Half()}, devset=examples(), metric=metric, display_progress=False, max_errors=9
        )
    text = report("--compare", comparison.run_id)
    tree = report(comparison.run_id)

    assert {"good": 100.0, "half": 50.0} == {case.name: case.score for case in comparison.cases}
    assert "3 of 6 examples differ" in text
    assert ["0", "1", "question=@e-3, answer=@e-3"] == sorted(re.split(r"  +", _line(text, "@e-3").strip()))
    assert "█▁█▁█▁" in _line(tree, "half")


def _line(text, part):
    return next(line for line in text.splitlines() if part in line)


@pytest.mark.parametrize(
    ("stored", "number"),
    [
        (0.5, 0.5),
        (True, 1.0),
        ({"score": 0.25, "feedback": "x"}, 0.25),
        ("0.5", 0.5),
        ("False", 0.0),
        ("1/4", 0.25),
        (str(dspy.Prediction(score=0.5)), 0.5),
        (str(dspy.Prediction(score=True, feedback="x")), 1.0),
        (str(dspy.Prediction(score=Fraction(1, 4))), 0.25),
        (str(dspy.Prediction(score=Decimal("0.5"))), 0.5),
        (str(dspy.Prediction(feedback="score=0.5")), None),
        ("1/0", None),
        ("nan", None),
        (float("inf"), None),
        ("fine", None),
        (None, None),
    ],
)
def test_score_of_a_table(stored, number):
    """A number as such, as the text of an object, or in the text of a prediction; else none."""
    assert number == number_of(stored)


async def test_page(comparison, report, tmp_path):
    """One page with everything in it, and nothing unescaped."""
    file = tmp_path / "report.html"
    report(comparison.run_id, "--html", str(file), "--compare")
    page = file.read_text()

    assert page.count("data:image/png;base64,") == 1
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "&lt;no&gt; &amp; nothing" in page
    assert "<no>" not in page


class Broken(dspy.Module):
    async def aforward(self, question):
        raise ValueError(f"no {question}\n[red]at all")


@pytest.mark.parametrize("how", ["text", "html"])
async def test_stopped_and_failed(stored, report, tmp_path, how):
    """What a budget has stopped says so, and what it left out; a failed case tells what its examples raised."""
    options = {"devset": examples(), "metric": is_right, "display_progress": False, "max_concurrency": 1}
    with mlflow.start_run(experiment_id=stored.experiment_id):
        failed = await aevaluate_all({"broken": Broken()}, max_errors=2, **options)
    with mlflow.start_run(experiment_id=stored.experiment_id):
        stopped = await aevaluate_all({"good": Chain()}, max_tokens=1, **options)
    stored()
    file = tmp_path / "report.html"
    text = report(failed.run_id, stopped.run_id, "--html", str(file))
    page = file.read_text()

    said = "2 examples failed, the first with ValueError: no @e-0 [red]at all"
    assert said in str(failed)
    assert f"broken: {said}" in (text if how == "text" else page)
    assert 2 == (text if how == "text" else page).count("max_tokens, 5 not run")  # the case and its parent
    assert re.search(r"good +evaluation +FINISHED +100\.0 +▅ +max_tokens", text)


async def test_missing_folder(comparison, report, tmp_path):
    """A sentence and exit code 2, no traceback."""
    assert "cannot write" in report(comparison.run_id, "--html", str(tmp_path / "no" / "report.html"), code=2)


def test_unknown_run(store_uri, report):
    """A clear error, and exit code 2."""
    assert "there is no run 'nope'" in report("nope", code=2)


async def test_nothing_to_compare(comparison, report):
    """One evaluation is not compared with itself."""
    assert "there are 1" in report("--compare", comparison["good"].run_id, code=2)


def test_compile(traces, experiment_id, report):
    """A compile shows its best score and its series."""
    dspy_mlflow_async.autolog(silent=True, log_compiles=True, log_evals=True)
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=is_right, max_bootstrapped_demos=1, max_labeled_demos=1, num_candidate_programs=1, num_threads=1
    )
    optimizer.compile(Chain(), trainset=examples(2), valset=examples(2))
    run = next(
        run for run in mlflow.search_runs([experiment_id], output_format="list") if "dspy.optimizer" in run.data.tags
    )
    rows = [line.split() for line in report(run.info.run_id).splitlines()[2:]]

    assert ["compile", "FINISHED", "100.0"] == rows[0][1:4]
    assert {"evaluation"} == {row[1] for row in rows[1:]}
    assert 3 < len(rows)


@pytest.fixture
def experiment_id(request, store_uri, monkeypatch):
    """A fresh experiment, the active one while the test runs."""
    experiment_id = mlflow.create_experiment(f"{request.node.nodeid}-{id(request)}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment_id)
    return experiment_id


def test_spark_line():
    """Bars from the lowest to the highest; many values are averaged."""
    assert "" == spark_line([])
    assert "▁█" == spark_line([0, 1])
    assert "▅▅" == spark_line([3, 3])
    assert "▁█" == spark_line([0, float("nan"), 1, float("inf")])
    assert "" == spark_line([float("nan")])
    assert "▁▂▃▄▅▆▇█" == spark_line(range(800), width=8)
