"""A pytest plugin that appends a line of JSON for each event of a test, so that a process that is ended leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

_TAIL = 4000  # characters of a failure's text


class _Lines:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report.nodeid, "no result", _reason(report), report.longreprtext)
        elif report.skipped:
            self._write(report.nodeid, "skipped", _reason(report))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self._write(item.nodeid, "waiting")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid, "running")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._write(
                report.nodeid, "failure" if report.when == "call" else "error", _reason(report), report.longreprtext
            )
        elif report.skipped:
            self._write(report.nodeid, "skipped", _reason(report))
        elif report.when == "teardown":
            self._write(report.nodeid, "passed")

    def _write(self, test: str, status: str, message: str = "", text: str = "") -> None:
        line = {"test": test, "status": status, "message": message, "text": text[-_TAIL:]}
        with self._path.open("ab", buffering=0) as file:  # whole or not at all, whenever the process ends
            file.write(json.dumps(line).encode() + b"\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the file for the lines."""
    parser.addoption("--lines", type=Path, required=True, help="the file to append to")


def pytest_configure(config: pytest.Config) -> None:
    """Listen to the events of this process."""
    config.pluginmanager.register(_Lines(config.getoption("--lines")))


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # where a test was skipped: file, line and reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = report.longreprtext.strip().splitlines()
    return str(crash.message) if crash is not None else next(reversed(lines), "").removeprefix("E").strip()
