"""Results of an audit as a text, as JSON, and as a page of HTML that needs nothing else."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, Any

from dspy_mlflow_async.cli.audit.findings import MEANINGS, NOTES, Audit, Finding
from dspy_mlflow_async.printable import counted, mask_uris

if TYPE_CHECKING:
    from rich.console import Console

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222; }
h2 { font-size: 1.1em; margin-top: 1.6em; } h2.fault { color: #b3261e; } h2.note { color: #55606b; }
li { overflow-wrap: anywhere; } p { margin: .3em 0; } .good { color: #177a2b; }
"""


def summary(audit: Audit) -> str:
    """Say in one sentence what was looked at, and what came of it."""
    seen = f"{counted(audit.traces, 'trace')} and {counted(audit.runs, 'run')} looked at"
    faults = sum(count for kind, count in audit.counts.items() if kind not in NOTES)
    young = f"; {audit.young} still at work" if audit.young else ""
    return f"{seen}{young}: {counted(faults, 'fault') if faults else 'nothing is wrong'}."


def print_text(console: Console, audit: Audit, base: str) -> None:
    """Print what was found, faults first, each kind with its cause, its cure and some examples."""
    for kind in audit.kinds:
        meaning, count = MEANINGS[kind], audit.counts[kind]
        console.print(f"{'note' if kind in NOTES else 'FAULT'}  {meaning.title}: {count:,}", markup=False)
        console.print(f"       {meaning.cause}", markup=False)
        console.print(f"       {meaning.cure}", markup=False)
        for finding in audit.examples[kind]:
            console.print(f"       - {_line(finding, base)}", markup=False, soft_wrap=True)
        if count > len(audit.examples[kind]):
            console.print(f"       … and {count - len(audit.examples[kind]):,} more; see --examples", markup=False)
    console.print(summary(audit), markup=False)


def _line(finding: Finding, base: str) -> str:
    return f"{finding.trace_id or finding.run_id}: {finding.detail}\n         {finding.link(base)}"


def as_json(audit: Audit, uri: str, base: str) -> str:
    """Return what was found as JSON: counts, meanings and examples by kind."""
    content: dict[str, Any] = {
        "store": mask_uris(uri),
        "traces": audit.traces,
        "runs": audit.runs,
        "still_at_work": audit.young,
        "has_faults": audit.has_faults,
        "findings": {
            str(kind): {
                "count": audit.counts[kind],
                "is_fault": kind not in NOTES,
                "title": MEANINGS[kind].title,
                "cause": MEANINGS[kind].cause,
                "cure": MEANINGS[kind].cure,
                "examples": [_as_dict(finding, base) for finding in audit.examples[kind]],
            }
            for kind in audit.kinds
        },
    }
    return json.dumps(content, indent=2)


def _as_dict(finding: Finding, base: str) -> dict[str, str]:
    named = {
        "experiment_id": finding.experiment_id,
        "trace_id": finding.trace_id,
        "run_id": finding.run_id,
        "detail": finding.detail,
        "link": finding.link(base),
    }
    return {key: value for key, value in named.items() if value is not None}


def as_html(audit: Audit, uri: str, base: str) -> str:
    """Return what was found as a page."""
    parts = [f"<h1>Audit of {escape(mask_uris(uri))}</h1>"]
    parts.append(f'<p class="{"" if audit.has_faults else "good"}">{escape(summary(audit))}</p>')
    for kind in audit.kinds:
        meaning, shown = MEANINGS[kind], audit.examples[kind]
        items = "".join(
            f'<li><a href="{escape(each.link(base))}">{escape(str(each.trace_id or each.run_id))}</a>: '
            f"{escape(each.detail)}</li>"
            for each in shown
        )
        more = (
            f"<p>… and {audit.counts[kind] - len(shown):,} more; see --examples</p>"
            if audit.counts[kind] > len(shown)
            else ""
        )
        parts.append(
            f'<h2 class="{"note" if kind in NOTES else "fault"}">{escape(meaning.title)}: {audit.counts[kind]:,}</h2>'
            f"<p>{escape(meaning.cause)}</p><p>{escape(meaning.cure)}</p><ul>{items}</ul>{more}"
        )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Audit</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
