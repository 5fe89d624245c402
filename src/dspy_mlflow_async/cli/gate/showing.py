"""Verdicts of a gate as a table for a terminal, as Markdown, and as JUnit's XML for CI servers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dspy_mlflow_async.cli.gate.checks import FAILED, HELD, UNKNOWN, Check
from dspy_mlflow_async.printable import printable
from dspy_mlflow_async.runs.description import table as markdown_table

SUITE = "dspy-mlflow-async gate"
_COLUMNS = ("run", "check", "wanted", "found", "verdict")
_STYLES = {HELD: "green", FAILED: "red", UNKNOWN: "red"}
_KINDS = {FAILED: "failure", UNKNOWN: "error"}


def unknown(subject: str, wanted: str, reason: str) -> Check:
    """Return the check of something that could not be looked at."""
    return Check(subject, "score", wanted, "-", UNKNOWN, reason)


def _cells(check: Check) -> tuple[str, ...]:
    return check.subject, check.name, check.wanted, check.found, check.verdict


def table(checks: Sequence[Check]) -> Table:
    """Return a table of the checks, a line each."""
    shown = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in _COLUMNS:
        shown.add_column(name, no_wrap=name == "verdict")
    for check in checks:
        *cells, verdict = map(Text, _cells(check))
        verdict.stylize(_STYLES[check.verdict])
        shown.add_row(*cells, verdict)
    return shown


def markdown(checks: Sequence[Check]) -> str:
    """Return the same in Markdown, the reasons below."""
    cells = [[printable(cell, one_line=True) for cell in _cells(check)] for check in checks]
    return "\n\n".join([markdown_table(_COLUMNS, cells), *(f"- {each}" for each in reasons(checks))])


def reasons(checks: Sequence[Check]) -> list[str]:
    """Say of each check that does not hold why, in a sentence."""
    return [printable(f"{check.verdict}: {check.reason}.", one_line=True) for check in checks if check.verdict != HELD]


def junit(checks: Sequence[Check], seconds: float) -> ElementTree:
    """Return the checks as a test suite of JUnit's, a test case each."""
    counted = {verdict: str(sum(check.verdict == verdict for check in checks)) for verdict in _KINDS}
    numbers = {"tests": str(len(checks)), "failures": counted[FAILED], "errors": counted[UNKNOWN]}
    begun = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - seconds))
    root = Element("testsuites")
    suite = SubElement(root, "testsuite", {"name": SUITE, "timestamp": begun, "time": f"{seconds:.3f}", **numbers})
    for check in checks:
        name = _for_xml(f"{check.name} {check.wanted}")
        case = SubElement(suite, "testcase", classname=_for_xml(check.subject), name=name, time="0")
        if check.verdict in _KINDS:
            failure = SubElement(case, _KINDS[check.verdict], message=_for_xml(check.reason))
            failure.text = _for_xml(f"found {check.found}, wanted {check.wanted}")
    indent(root)
    return ElementTree(root)


def _for_xml(text: str) -> str:
    """Return a text without what XML has no words for: control characters, half surrogates, and two more."""
    shown = printable(text, one_line=True).encode("utf-8", "replace").decode("utf-8")
    return shown.replace("\ufffe", "?").replace("\uffff", "?")
