"""The pytest plugin: an evaluation in a test, what it must keep, and what it shows where it does not."""

import itertools
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from xml.etree import ElementTree as ET

import execnet
import mlflow
import pytest
import source

from dspy_mlflow_async.evaluate import summary

PLUGIN = "dspy_mlflow_async.pytest_plugin"
# Pytest finds it by itself where the wheel is installed; a tree on the path has no entry points.
IS_FOUND = any(each.value == PLUGIN for each in entry_points(group="pytest11"))
LOAD = [] if IS_FOUND else ["-p", PLUGIN]
HEAD = """
import dspy
import pytest
from echo import EchoLM

devset = [dspy.Example(question=f"@e-{n}", answer=f"@e-{n}").with_inputs("question") for n in range(4)]

class Program(dspy.Module):
    def __init__(self, right=4):
        super().__init__()
        self.right = right

    async def aforward(self, question):
        return dspy.Prediction(answer=question if int(question[-1]) < self.right else "something else")

def exact(example, prediction, trace=None):
    return example.answer == prediction.answer

how = {"devset": devset, "metric": exact}
"""
INI = "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
ONE_TEST = """
@pytest.mark.evaluate(min={"score": 0.8})
async def test_it(evaluation):
    await evaluation.acall(Program(3), **how)
"""
_numbers = itertools.count()


@pytest.fixture
def run(tmp_path, store_uri, monkeypatch, capsys):
    """A function that runs tests by pytest, in this process, and gives the exit code and what it prints."""
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(tmp_path / "spool"))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setattr(summary, "plot_of_cases", lambda *_: b"png")  # half of the time; nobody looks at it here
    experiment_id = mlflow.create_experiment(tmp_path.name, artifact_location=(tmp_path / "artifacts").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment_id)
    (tmp_path / "pytest.ini").write_text(INI)

    def call(code, *arguments, plugins=()):
        file = tmp_path / f"test_of_a_user_{next(_numbers)}.py"
        file.write_text(HEAD + code)
        capsys.readouterr()
        options = ["-c", tmp_path / "pytest.ini", "--rootdir", tmp_path, "--import-mode=importlib", "--strict-markers"]
        options += [*LOAD, "-p", "no:cacheprovider", "-p", "no:timeout", *arguments]
        return pytest.main([str(each) for each in (*options, file)], list(plugins)), capsys.readouterr().out

    return call


def test_pytest_finds_it():
    """The entry point leads to the module."""
    assert {"dspy_mlflow_async": PLUGIN} == source.pyproject()["project"]["entry-points"]["pytest11"]


def test_what_the_docs_show(run):
    """The page's test passes as it stands."""
    page = (source.TREE / "docs" / "ci-gate.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)

    assert 0 == run(code)[0]


def test_a_comparison_on_failure(run, tmp_path):
    """A test that fails shows the comparison and the worst examples; its scores are in pytest's own XML."""
    file = tmp_path / "junit.xml"
    code, printed = run(
        """
def test_one(evaluation):
    result = evaluation(Program(3), **how)
    assert result.score > 90

async def test_several(evaluation):
    comparison = await evaluation.acall({"good": Program(), "bad": Program(1)}, **how)
    assert comparison["bad"].score > 90
""",
        f"--junitxml={file}",
    )
    properties = {each.get("name"): each.get("value") for each in ET.parse(file).iter("property")}  # noqa: S314 - our own

    assert 1 == code
    assert "assert 75.0 > 90" in printed
    assert re.search(r"^Program +75.0 ± 25.0 +4", printed, re.MULTILINE)
    assert "Program, the worst examples:" in printed
    assert re.search(r"question=@e-3, answer=@e-3 +answer=something else +0$", printed, re.MULTILINE)
    assert re.search(r"^bad +25.0 ± 25.0 +-75.0 \[", printed, re.MULTILINE)
    assert "good, the worst examples:" not in printed
    assert ("75.0", "25.0") == (properties["evaluation.Program.score"], properties["evaluation.bad.score"])


def test_bounds_of_a_mark(run):
    """A test whose body passes fails where its evaluations do not keep what the mark says, with the gate's table."""
    code, printed = run("""
@pytest.mark.evaluate(min={"score": 0.7}, max={"errors": "5%"})
def test_kept(evaluation):
    evaluation(Program(3), **how)

@pytest.mark.evaluate(min={"score": "80%"})
def test_not_kept(evaluation):
    evaluation(Program(), **how)
    evaluation({"a": Program(2)}, **how)

@pytest.mark.evaluate(max={"cost": 1})
def test_unknown(evaluation):
    evaluation(Program(), **how)

@pytest.mark.evaluate(min={"score": "much"})
def test_mistaken(evaluation):
    raise AssertionError("it is not run")

@pytest.mark.evaluate(min_score=1)
def test_mistaken_too(evaluation):
    raise AssertionError("it is not run")

@pytest.mark.evaluate(min={"score": 1})
def test_without_an_evaluation(evaluation):
    pass

@pytest.mark.evaluate(min={"score": 1})
def test_without_the_fixture():
    pass

@pytest.mark.evaluate
def test_of_somebody_else():
    pass
""")

    assert 1 == code
    assert "4 failed, 2 passed, 2 errors" in printed
    assert re.search(r"^a +score +≥ 80% +50% ± 28.87% +FAILED", printed, re.MULTILINE)
    assert re.search(r"^Program +score +≥ 80% +100% ± 0% +ok", printed, re.MULTILINE)
    assert "Program: the cost is not known" in printed
    assert "@pytest.mark.evaluate: min score must be a number, such as 0.8 or 80%, not 'much'" in printed
    assert "unexpected keyword argument 'min_score'" in printed
    assert "nothing was judged: the test has evaluated nothing" in printed
    assert "nothing was judged: the test does not use the fixture `evaluation`" in printed
    assert "it is not run" not in printed.replace('raise AssertionError("it is not run")', "")


def test_not_worse_than_the_run_before(run):
    """A mark compares with a run in the store, and shows which examples differ."""
    code, printed = run("""
against_main = pytest.mark.evaluate(not_worse_than="main", certain=True)

@against_main
def test_first(evaluation):
    evaluation(Program(), run_name="first", **how)

def test_main(evaluation):
    evaluation(Program(), run_name="main", **how)

@against_main
def test_same(evaluation):
    evaluation(Program(), run_name="pr 1", **how)

@against_main
def test_worse(evaluation):
    evaluation(Program(2), run_name="pr 2", **how)
""")

    assert 1 == code
    assert "2 failed, 2 passed" in printed
    assert "there is no other finished run 'main'" in printed
    assert re.search(r"pr 2/Program +score +not worse than Program of .* -50.0 points .* FAILED", printed)
    assert "2 of 4 examples differ" in printed
    assert "answer=something else" in printed


def test_a_failed_case(run):
    """An evaluation that ends with an exception fails the test by its name, and is shown."""
    code, printed = run("""
class Broken(dspy.Module):
    async def aforward(self, question):
        raise ValueError("no such model")

def test_it(evaluation):
    evaluation({"broken": Broken()}, max_errors=2, **how)
""")

    assert 1 == code
    assert "broken failed: " in printed
    assert "2 examples failed, the first with ValueError: no such model" in printed


def subprocess_of_pytest(folder, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *LOAD, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_suite_without_evaluations_pays_nothing(tmp_path):
    """Neither DSPy nor MLflow, nor any module of ours but the plugin, is imported for a test that evaluates nothing."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (tmp_path / "conftest.py").write_text(
        "import sys\n"
        "def pytest_sessionfinish():\n"
        "    roots = {'dspy', 'mlflow', 'rich', 'typer', 'anyio', 'numpy', 'dspy_mlflow_async'}\n"
        "    print('imported', sorted(name for name in sys.modules if name.partition('.')[0] in roots))\n"
    )
    (tmp_path / "test_it.py").write_text("def test_it():\n    pass\n")
    done = subprocess_of_pytest(
        tmp_path, "-s", *([] if LOAD else ["-p", "dspy_mlflow_async"]), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )

    assert 0 == done.returncode, done.stdout + done.stderr
    assert f"imported ['dspy_mlflow_async', '{PLUGIN}']" in done.stdout


class Sending:
    """Sends each report as xdist's workers do, and takes what arrives."""

    def pytest_configure(self, config):
        self.config = config
        self.arrived = []

    def pytest_runtest_logreport(self, report):
        hook = self.config.hook
        data = execnet.loads(execnet.dumps(hook.pytest_report_to_serializable(config=self.config, report=report)))
        self.arrived.append(hook.pytest_report_from_serializable(config=self.config, data=data))


def test_what_xdist_sends(run):
    """What a failed test has evaluated can be sent home by a worker; `python3 run.py tour` has a real one do it."""
    sending = Sending()
    run(ONE_TEST, plugins=[sending])
    (report,) = [each for each in sending.arrived if each.when == "call"]

    assert "Program: score is 0.75 ± 0.25, and must be ≥ 0.8" in report.longreprtext
    assert "question=@e-3" in dict(report.sections)["Captured evaluation call"]
    assert 75.0 == dict(report.user_properties)["evaluation.Program.score"]
