"""The command: ``python -m upstream FOLDER [--select TEXT] [--only PATH]``. It fetches nothing."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree as ET

HERE = Path(__file__).resolve().parent
WANTED = HERE.parent / "docs" / "upstream.md"
SUITES = {
    "mlflow": ("tests/tracing", "tests/tracking/fluent", "tests/genai/evaluate", "tests/dspy"),
    "dspy": ("tests",),
}
NO_RESULT, PASSED = "no result", "passed"
_NOTHING_SELECTED = 5  # an exit code of pytest


def main(arguments: list[str]) -> int:
    """Print the table of differences; 0 without an unlisted one, 1 with one, 2 where nothing could be compared."""
    options = _options(arguments)
    checkouts = find_checkouts(options.folder)
    if not checkouts:
        print(f"No checkout of MLflow or DSPy with its tests in {options.folder}.", file=sys.stderr)
        return 2
    results: dict[str, dict[str, dict[str, str]]] = {"off": {}, "on": {}}
    for name, checkout in checkouts.items():
        with tempfile.TemporaryDirectory() as scratch:
            root = _tests_alone(checkout, Path(scratch))
            work = [(mode, file) for file in _files(root, SUITES[name], options.only) for mode in results]
            with ThreadPoolExecutor(options.jobs) as pool:
                found = pool.map(lambda each, root=root: _run(root, *each, options.select, options.timeout), work)
                for (mode, _), cases in zip(work, found, strict=True):
                    results[mode].update({f"{name}: {case}": status for case, status in cases.items()})
    if not any(status == PASSED for status in results["off"].values()):
        print("No test passes even without us: these tests do not fit what is installed.", file=sys.stderr)
        return 2
    return report(results["off"], results["on"], wanted_differences())


def find_checkouts(folder: Path) -> dict[str, Path]:
    """The checkouts in ``folder``, or ``folder`` itself, by the package that each has in it."""
    found = {}
    for each in (folder, *sorted(folder.iterdir())):
        for name, paths in SUITES.items():
            if (each / name / "__init__.py").is_file() and (each / paths[-1]).is_dir():
                found.setdefault(name, each)
    return found


def wanted_differences() -> set[str]:
    """The tests that docs/upstream.md lists, each as ``name: file::test`` at the beginning of a table's row."""
    return set(re.findall(r"^\| `((?:mlflow|dspy): [^`]+)` \|", WANTED.read_text(encoding="utf-8"), re.MULTILINE))


def report(off: dict[str, str], on: dict[str, str], wanted: set[str]) -> int:
    """Print one table and the sums, and return the exit code."""
    different = sorted(case for case in off.keys() | on.keys() if off.get(case) != on.get(case))
    print(f"dspy {version('dspy')}, mlflow {version('mlflow')}, Python {sys.version.split()[0]}\n")
    print("| test | off | on | |\n|---|---|---|---|")
    for case in different:
        mark = "wanted" if case in wanted else "DIFFERS"
        print(f"| {case} | {off.get(case, NO_RESULT)} | {on.get(case, NO_RESULT)} | {mark} |")
    unlisted = [case for case in different if case not in wanted]
    silent = sorted(case for case in off if off[case] == on.get(case) == NO_RESULT)
    passed = sum(status == PASSED for status in off.values())
    print(
        f"\n{len(off.keys() | on.keys())} compared, {passed} of them pass without us; "
        f"{len(different)} different, {len(unlisted)} of them not listed."
    )
    for case in silent:
        print(f"Not compared, no result either way: {case}")
    return 1 if unlisted else 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="upstream", description=__doc__)
    parser.add_argument("folder", type=Path, help="holds the checkouts of MLflow and DSPy, or is one of them")
    parser.add_argument("-k", "--select", default="", help="passed to pytest as -k")
    parser.add_argument("--only", default="", help="only files whose path contains this")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one file of tests")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder")
    return options


def _tests_alone(checkout: Path, scratch: Path) -> Path:
    """A copy of the tests without the sources beside them, which would hide what is installed."""
    shutil.copytree(checkout / "tests", scratch / "tests")
    for name in ("conftest.py", "pytest.ini", "pyproject.toml"):
        if (checkout / name).is_file():
            shutil.copy(checkout / name, scratch / name)
    return scratch


def _files(root: Path, paths: tuple[str, ...], only: str) -> list[str]:
    found = {str(file.relative_to(root)) for path in paths for file in (root / path).rglob("test_*.py")}
    return sorted(file for file in found if only in file)


def _run(root: Path, mode: str, file: str, select: str, timeout: float) -> dict[str, str]:
    """The status of each test of one file, from a process of its own with a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={result}", file]
        command += ["-k", select] if select else []
        command += ["-p", "autolog_on"] if mode == "on" else []
        environment = os.environ | {
            "PYTHONPATH": str(HERE),
            "DSPY_CACHEDIR": f"{folder}/cache",
            "DSPY_MLFLOW_ASYNC_SPOOL": f"{folder}/spool",
        }
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {file: NO_RESULT}
        if code == _NOTHING_SELECTED:
            return {}
        if not result.is_file():
            return {file: NO_RESULT}
        cases = ET.parse(result).iter("testcase")
        return {f"{file}::{case.get('classname')}::{case.get('name')}": _status(case) for case in cases}


def _status(case: ET.Element) -> str:
    tags = {child.tag for child in case}
    return next((name for name in ("error", "failure", "skipped") if name in tags), PASSED)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
