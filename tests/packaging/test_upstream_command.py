"""The comparison of other people's suites with our autolog on and off, on a small suite of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2]
SUITE = """
import dspy

def test_alike():
    assert True

def test_fails_both_ways():
    assert not dspy.settings.callbacks, "a callback is there"
    raise RuntimeError("no callback is there")

def test_without_callbacks():
    assert not dspy.settings.callbacks, "a callback is there"
"""
WAITS_WITH_US = """
import sys
import threading

def test_ends_before():
    pass

def test_fails_before():
    assert False, "before"

def test_waits():
    if "dspy_mlflow_async" in sys.modules:
        threading.Event().wait()

def test_never_reached():
    pass
"""
DIES_WITH_US = """
import os
import sys

def test_ends_before():
    pass

def test_dies():
    if "dspy_mlflow_async" in sys.modules:
        os._exit(7)
"""
LOADS_US = """
def test_alike():
    import mlflow.tracking  # loads what is registered with MLflow

    assert mlflow.tracking

def test_loads_us():
    import dspy_mlflow_async
"""
FAILS_BOTH_WAYS = "dspy: tests/test_small.py::test_fails_both_ways"
WITHOUT_CALLBACKS = "dspy: tests/test_small.py::test_without_callbacks"


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "upstream", str(folder), *arguments]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=240, check=False)


def checkout(folder: Path, suite: str = SUITE) -> None:
    (folder / "dspy").mkdir()
    (folder / "dspy" / "__init__.py").write_text("raise RuntimeError('not the installed one')")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_small.py").write_text(suite)


def test_only_what_differs_is_told(tmp_path):
    """A test that our callback breaks is told with its failure, for exit code 1; one that fails both ways is
    told where the reasons are of two kinds.
    """
    checkout(tmp_path)

    done = compare(tmp_path, "--report", str(tmp_path / "report.json"))

    rows = [line for line in done.stdout.splitlines() if line.startswith("| `dspy: ")]
    assert rows == [f"| `{WITHOUT_CALLBACKS}` | passed → failure | DIFFERS |"]
    assert "\n  on: AssertionError: a callback is there" in done.stdout
    assert "3 compared, 2 of them pass without us; 1 different, 1 of them not listed." in done.stdout
    assert done.returncode == 1
    assert f"{FAILS_BOTH_WAYS} fails both ways, for reasons of two kinds\n  off: RuntimeError: no cal" in done.stdout
    told, alike = json.loads((tmp_path / "report.json").read_text())
    assert (alike["test"], alike["off"]["status"], alike["on"]["status"]) == (FAILS_BOTH_WAYS, "failure", "failure")
    assert (told["test"], told["off"]["status"], told["on"]["status"]) == (WITHOUT_CALLBACKS, "passed", "failure")
    assert "assert not dspy.settings.callbacks" in told["on"]["text"]


@pytest.mark.parametrize(
    ("direction", "mark", "code"), [("passed → failure", "wanted", 0), ("failure → passed", "DIFFERS", 1)]
)
def test_a_difference_is_wanted_in_the_listed_direction_alone(tmp_path, direction, mark, code):
    """What turned round since it was listed is reported like one that nobody listed."""
    checkout(tmp_path)
    page = tmp_path / "wanted.md"
    page.write_text(
        f"| test | off → on | reason |\n|---|---|---|\n| `{WITHOUT_CALLBACKS}` | {direction} | a reason |\n"
    )

    done = compare(tmp_path, "--wanted", str(page), "-k", "callbacks")

    assert f"| `{WITHOUT_CALLBACKS}` | passed → failure | {mark} |" in done.stdout
    assert done.returncode == code


@pytest.mark.long
def test_what_ended_before_a_hanging_test_is_kept(tmp_path):
    """Its process is ended after the time given; the side that hangs is told, and no test that had ended is lost."""
    checkout(tmp_path, WAITS_WITH_US)

    done = compare(tmp_path, "--timeout", "25")

    name = "dspy: tests/test_small.py"
    rows = [line for line in done.stdout.splitlines() if line.startswith("| `dspy: ")]
    assert rows == [
        f"| `{name}::test_never_reached` | passed → no result | DIFFERS |",
        f"| `{name}::test_waits` | passed → timed out | DIFFERS |",
    ]
    assert "  on: no end within 25 s" in done.stdout
    assert "  on: not reached: no end within 25 s" in done.stdout
    assert "4 compared, 3 of them pass without us" in done.stdout
    assert done.returncode == 1


def test_what_ended_before_a_crash_is_kept(tmp_path):
    """A test that ends its process is told with the exit code, and a file that cannot be imported is named."""
    checkout(tmp_path, DIES_WITH_US)
    (tmp_path / "tests" / "test_heavy.py").write_text("import no_such_module\n")

    done = compare(tmp_path, "--together")

    rows = [line for line in done.stdout.splitlines() if line.startswith("| `dspy: ")]
    assert rows == ["| `dspy: tests/test_small.py::test_dies` | passed → crashed | DIFFERS |"]
    assert "  on: pytest ended with exit code 7" in done.stdout
    reason = "ModuleNotFoundError: No module named 'no_such_module'"
    assert f"Not compared, no result either way: dspy: tests/test_heavy.py ({reason})" in done.stdout
    assert "3 compared, 2 of them pass without us; 1 different, 1 of them not listed." in done.stdout
    assert done.returncode == 1


@pytest.mark.long
def test_the_side_without_us_is_without_us(tmp_path):
    """A test that loads this package there fails, rather than compare ours with ours; MLflow does not load it there."""
    checkout(tmp_path, LOADS_US)

    done = compare(tmp_path)

    rows = [line for line in done.stdout.splitlines() if line.startswith("| `dspy: ")]
    assert rows == ["| `dspy: tests/test_small.py::test_loads_us` | error → passed | DIFFERS |"]
    assert "dspy_mlflow_async is loaded on the side that is without it" in done.stdout
    assert done.returncode == 1


@pytest.mark.long
def test_a_selection_without_a_difference_is_a_success(tmp_path):
    """With -k, only the tests selected are compared."""
    checkout(tmp_path)

    done = compare(tmp_path, "-k", "alike")

    assert "1 compared, 1 of them pass without us; 0 different, 0 of them not listed." in done.stdout
    assert done.returncode == 0


@pytest.mark.long
def test_tests_that_never_pass_compare_nothing(tmp_path):
    """Where all fail without us, that nothing differs says nothing; why they do is said."""
    checkout(tmp_path)

    done = compare(tmp_path, "-k", "fails_both_ways")

    assert done.returncode == 2
    assert "do not fit what is installed (RuntimeError: no callback is there)" in done.stderr


def test_a_folder_without_checkouts_is_said(tmp_path):
    """Nothing was compared, which is no success."""
    done = compare(tmp_path)

    assert done.returncode == 2
    assert "No checkout of MLflow or DSPy" in done.stderr
