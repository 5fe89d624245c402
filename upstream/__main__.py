"""The command: ``python -m upstream FOLDER [--select TEXT] [--only PATH]``. It fetches nothing."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
WANTED = HERE.parent / "docs" / "upstream.md"
SUITES = {
    "mlflow": ("tests/tracing", "tests/tracking/fluent", "tests/genai/evaluate", "tests/dspy"),
    "dspy": ("tests",),
}
PASSED, NO_RESULT, TIMED_OUT, CRASHED = "passed", "no result", "timed out", "crashed"
_NOTHING_SELECTED = 5  # an exit code of pytest
_ROW = re.compile(r"^\| `((?:mlflow|dspy): [^`]+)` \| ([a-z ]+) → ([a-z ]+) \|", re.MULTILINE)
_TAIL = 4000  # characters of a test's text, or of a process's output, in the report


@dataclass(frozen=True, slots=True)
class Result:
    """The status of one test, and why it is that."""

    status: str
    message: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """One test that ends otherwise with us on than with us off."""

    test: str
    off: Result
    on: Result
    is_listed: bool


Results = dict[str, Result]
_MISSING = Result(NO_RESULT)


def main(arguments: list[str]) -> int:
    """Print the table of differences; 0 without an unlisted one, 1 with one, 2 where nothing could be compared."""
    options = _options(arguments)
    checkouts = find_checkouts(options.folder)
    if not checkouts:
        print(f"No checkout of MLflow or DSPy with its tests in {options.folder}.", file=sys.stderr)
        return 2
    results: dict[str, Results] = {"off": {}, "on": {}}
    for name, checkout in checkouts.items():
        with tempfile.TemporaryDirectory() as scratch:
            root = _tests_alone(checkout, Path(scratch))
            files = _files(root, SUITES[name], options.only)
            work = [(mode, group) for group in _groups(files, options.together) for mode in results]
            with ThreadPoolExecutor(options.jobs) as pool:
                found = pool.map(lambda each, root=root: _run(root, *each, options), work)
                for (mode, group), cases in zip(work, found, strict=True):
                    results[mode].update({f"{name}: {case}": result for case, result in cases.items()})
                    print(f"{mode:>3} {name}: {_label(group)}: {_sums(cases)}", file=sys.stderr, flush=True)
    differences = compare(results["off"], results["on"], wanted_differences(options.wanted))
    if options.report is not None:
        both = fails_both_ways(results["off"], results["on"])
        told = json.dumps([asdict(each) for each in (*differences, *both)], indent=1)
        options.report.write_text(told, encoding="utf-8")
    return report(results["off"], results["on"], differences)


def find_checkouts(folder: Path) -> dict[str, Path]:
    """The checkouts in ``folder``, or ``folder`` itself, by the package that each has in it."""
    found: dict[str, Path] = {}
    for each in (folder, *sorted(folder.iterdir())):
        for name, paths in SUITES.items():
            if (each / name / "__init__.py").is_file() and (each / paths[-1]).is_dir():
                found.setdefault(name, each)
    return found


def wanted_differences(page: Path) -> dict[str, tuple[str, str]]:
    """The status off and on of each test that the page lists, in rows that begin ``| `name: test` | off → on |``."""
    return {test: (off, on) for test, off, on in _ROW.findall(page.read_text(encoding="utf-8"))}


def compare(off: Results, on: Results, wanted: dict[str, tuple[str, str]]) -> list[Difference]:
    """The tests whose status differs; one that differs in another direction than the listed one is not listed."""
    pairs = ((test, off.get(test, _MISSING), on.get(test, _MISSING)) for test in sorted(off.keys() | on.keys()))
    return [
        Difference(test, before, after, wanted.get(test) == (before.status, after.status))
        for test, before, after in pairs
        if before.status != after.status
    ]


def fails_both_ways(off: Results, on: Results) -> list[Difference]:
    """The tests with the same failure or error on both sides, whose reasons may yet be others."""
    return [
        Difference(test, off[test], on[test], is_listed=False)
        for test in sorted(off.keys() & on.keys())
        if off[test].status == on[test].status and off[test].status in ("failure", "error")
    ]


def report(off: Results, on: Results, differences: list[Difference]) -> int:
    """Print one table, the messages of what is not listed or not compared and the sums; return the exit code."""
    print(f"dspy {version('dspy')}, mlflow {version('mlflow')}, Python {sys.version.split()[0]}\n")
    print("| test | off → on | |\n|---|---|---|")
    for each in differences:
        mark = "wanted" if each.is_listed else "DIFFERS"
        print(f"| `{each.test}` | {each.off.status} → {each.on.status} | {mark} |")
    unlisted = [each for each in differences if not each.is_listed]
    for each in unlisted:
        print(f"\n{each.test}")
        for mode, result in (("off", each.off), ("on", each.on)):
            if result.message:
                print(f"  {mode}: {result.message}")
    for each in fails_both_ways(off, on):
        if _kind(each.off) != _kind(each.on):
            print(f"\n{each.test} fails both ways, for reasons of two kinds")
            print(f"  off: {each.off.message}\n  on: {each.on.message}")
    passed = sum(result.status == PASSED for result in off.values())
    print(
        f"\n{len(off.keys() | on.keys())} compared, {passed} of them pass without us; "
        f"{len(differences)} different, {len(unlisted)} of them not listed."
    )
    for test in sorted(off.keys() & on.keys()):
        if {off[test].status, on[test].status} <= {NO_RESULT, TIMED_OUT, CRASHED}:
            print(f"Not compared, no result either way: {test} ({off[test].message})")
    if not passed:
        why = next((f" ({result.message})" for result in off.values() if result.message), "")
        print(f"No test passes even without us: these tests do not fit what is installed{why}.", file=sys.stderr)
        return 2
    return 1 if unlisted else 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="upstream", description=__doc__)
    parser.add_argument("folder", type=Path, help="holds the checkouts of MLflow and DSPy, or is one of them")
    parser.add_argument("-k", "--select", default="", help="passed to pytest as -k")
    parser.add_argument("--only", default="", help="only files whose path contains this")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--together", action="store_true", help="a process for each folder of tests, not each file")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one process of tests")
    parser.add_argument("--test-timeout", type=float, default=60.0, help="seconds for one test")
    parser.add_argument("--on-synchronous", action="store_true", help="no asynchronous writing with us on, either")
    parser.add_argument("--report", type=Path, help="a file for the differences and their failures, as JSON")
    parser.add_argument("--wanted", type=Path, default=WANTED, help="the page that lists the wanted differences")
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


def _groups(files: list[str], together: bool) -> list[list[str]]:
    """The files of each process: one, or all of a folder."""
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(str(Path(file).parent) if together else file, []).append(file)
    return list(groups.values())


def _label(group: list[str]) -> str:
    return group[0] if len(group) == 1 else str(Path(group[0]).parent)


def _run(root: Path, mode: str, group: list[str], options: argparse.Namespace) -> Results:
    """The result of each test of some files, from a process of its own with a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        lines, output = Path(folder) / "lines.json", Path(folder) / "output.txt"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={root}"]
        command += ["-p", "no:dspy_mlflow_async", "-p", f"autolog_{mode}", "-p", "line_per_test", f"--lines={lines}"]
        command += ["--continue-on-collection-errors", f"--timeout={options.test_timeout:g}", *group]
        command += ["-k", options.select] if options.select else []
        with output.open("wb") as written:
            process = subprocess.Popen(
                command, cwd=root, env=_environment(mode, folder, options), stdout=written, stderr=written,
                start_new_session=True,
            )  # fmt: skip
        try:
            code = process.wait(options.timeout)
            status, why = CRASHED, f"pytest ended with exit code {code}"
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            status, why = TIMED_OUT, f"no end within {options.timeout:g} s"
        results = _read(lines, Result(status, why, _tail(output)))
        if not results and code != _NOTHING_SELECTED:
            results = {_label(group): Result(status if status == TIMED_OUT else NO_RESULT, why, _tail(output))}
        return results


def _read(lines: Path, unfinished: Result) -> Results:
    """The result of each test that ended; that of the one under way is ``unfinished``, and none came to the rest."""
    results: Results = {}
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else ():
        told = json.loads(line)
        before = results.get(told["test"])
        if before is None or before.status in ("waiting", "running"):  # the first end counts: a failure before an error
            results[told["test"]] = Result(told["status"], _first_line(told["message"]), told["text"])
    rest = {"running": unfinished, "waiting": Result(NO_RESULT, f"not reached: {unfinished.message}")}
    return {test: rest.get(result.status, result) for test, result in results.items()}


def _environment(mode: str, folder: str, options: argparse.Namespace) -> dict[str, str]:
    # MLflow's own exporter, once asynchronous, lets tests fail that read a trace right after the call.
    is_asynchronous = mode == "on" and not options.on_synchronous
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
        "DSPY_CACHEDIR": f"{folder}/cache",
        "DSPY_MLFLOW_ASYNC_SPOOL": f"{folder}/spool",
        "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": str(is_asynchronous).lower(),
    }


def _kind(result: Result) -> str:
    """The name of the exception."""
    return result.message.partition(":")[0]


def _first_line(message: str) -> str:
    return next(iter(message.strip().splitlines()), "")[:300]


def _tail(output: Path) -> str:
    return output.read_text(encoding="utf-8", errors="replace")[-_TAIL:]


def _sums(cases: Results) -> str:
    statuses = [result.status for result in cases.values()]
    return ", ".join(f"{statuses.count(each)} {each}" for each in sorted(set(statuses))) or "nothing selected"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
