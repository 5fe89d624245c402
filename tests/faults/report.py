"""The table of the cases: for a terminal, as JSON, and for the docs."""

import dataclasses
import platform
import time
from importlib.metadata import version
from pathlib import Path

from rich.markup import escape
from rich.table import Table

COUNTS = ("made", "stored", "spooled", "dead", "dropped", "sampled_out", "doubled", "lost")
_BEGIN, _END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def table(rows):
    """The rows for a terminal; what is not balanced is red, and says why."""
    shown = Table("case", *COUNTS, "", "s", title_justify="left")
    for column in (*shown.columns[1 : len(COUNTS) + 1], shown.columns[-1]):
        column.justify = "right"
    for row in rows:
        counts = [f"{getattr(row, count):,}" for count in COUNTS]
        if row.skipped is not None:
            shown.add_row(escape(row.case), *["-"] * len(COUNTS), f"[yellow]skipped:[/] {escape(row.skipped)}", "")
            continue
        note = escape(row.note)
        if not row.is_balanced:
            counts = [f"[red]{count}[/]" for count in counts]
            note = f"[red]NOT BALANCED:[/] {escape('; '.join(row.problems[:3]))}. {note}"
        shown.add_row(escape(row.case), *counts, note, f"{row.seconds:.0f}")
    return shown


def code_of(rows):
    """The exit code: 0 if all rows balance, and there are any that were not skipped."""
    tried = [row for row in rows if row.skipped is None]
    return 0 if tried and all(row.is_balanced for row in tried) else 1


def as_json(rows, command):
    """All there is to know of a run of the harness."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("dspy", "mlflow", "dspy-mlflow-async")},
        "rows": [dataclasses.asdict(row) | {"problems": row.problems} for row in rows],
    }


def write_docs(path, measured):
    """Put the table into a page, between its marks."""
    path = Path(path)
    before, _, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
    _, mark, after = rest.partition(_END)
    assert mark, f"{path} has no marks for the table"
    versions = ", ".join(f"{name} {number}" for name, number in measured["versions"].items())
    lines = [f"| case | {' | '.join(COUNTS)} | |", f"|---|{'--:|' * len(COUNTS)}---|"]
    for row in measured["rows"]:
        counts = ["-" if row["skipped"] else f"{row[count]:,}" for count in COUNTS]
        note = (
            f"skipped: {row['skipped']}" if row["skipped"] else "; ".join([*row["problems"], row["note"]]).strip("; ")
        )
        lines.append(f"| {row['case']} | {' | '.join(counts)} | {note} |")
    said = f"`{measured['command']}`, {measured['time'][:10]}, Python {measured['python']}, {versions}.\n\n"
    path.write_text(f"{before}{_BEGIN}{said}" + "\n".join(lines) + f"\n{_END}{after}", encoding="utf-8")
