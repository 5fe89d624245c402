"""The comparison of other people's suites with our autolog on and off, on a small suite of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
SUITE = """
import dspy

def test_alike():
    assert True

def test_fails_both_ways():
    assert False

def test_without_callbacks():
    assert not dspy.settings.callbacks
"""


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "upstream", str(folder), *arguments]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=240, check=False)


def checkout(folder: Path) -> None:
    (folder / "dspy").mkdir()
    (folder / "dspy" / "__init__.py").write_text("raise RuntimeError('not the installed one')")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_small.py").write_text(SUITE)


def test_only_what_differs_is_told(tmp_path):
    """A test that our callback breaks is told and gives exit code 1; one that fails both ways is not."""
    checkout(tmp_path)

    done = compare(tmp_path)

    rows = [line for line in done.stdout.splitlines() if line.startswith("| dspy: ")]
    name = "dspy: tests/test_small.py::tests.test_small::test_without_callbacks"
    assert rows == [f"| {name} | passed | failure | DIFFERS |"]
    assert "3 compared, 2 of them pass without us; 1 different, 1 of them not listed." in done.stdout
    assert done.returncode == 1


def test_a_selection_without_a_difference_is_a_success(tmp_path):
    """With -k, only the tests selected are compared."""
    checkout(tmp_path)

    done = compare(tmp_path, "-k", "alike")

    assert "1 compared, 1 of them pass without us; 0 different, 0 of them not listed." in done.stdout
    assert done.returncode == 0


def test_tests_that_never_pass_compare_nothing(tmp_path):
    """Where all fail without us, that nothing differs says nothing."""
    checkout(tmp_path)

    done = compare(tmp_path, "-k", "fails_both_ways")

    assert done.returncode == 2
    assert "do not fit what is installed" in done.stderr


def test_a_folder_without_checkouts_is_said(tmp_path):
    """Nothing was compared, which is no success."""
    done = compare(tmp_path)

    assert done.returncode == 2
    assert "No checkout of MLflow or DSPy" in done.stderr
