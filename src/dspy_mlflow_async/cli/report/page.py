"""Report as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from dspy_mlflow_async.cli.lineage import reading, showing
from dspy_mlflow_async.cli.report.comparing import Changes
from dspy_mlflow_async.cli.report.reading import COMPILE, EVALUATION, Node
from dspy_mlflow_async.cli.report.text import failures_of, run_cells, score_text, shortened, summary_of
from dspy_mlflow_async.evaluate import stored_runs
from dspy_mlflow_async.evaluate.statistics import standard_error

_Z = 1.96  # standard errors on each side of a 95% interval
_MAX_ROWS = 1000
_MAX_NAMES = 4  # of runs, in a page's title
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border-bottom: 1px solid #ddd; padding: .25em .8em; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td:first-child { white-space: pre-wrap; }
.FINISHED { color: #177a2b; } .FAILED { color: #b3261e; } .KILLED { color: #a06a00; }
img, svg { max-width: 100%; height: auto; }
pre { white-space: pre-wrap; background: #f6f8fa; padding: .5em; }
"""
_NUMBERS = {"score", "difference", "traces", "errors", "tokens", "cost $", "seconds"}


def page(nodes: Sequence[Node], changes: Changes | None) -> str:
    """Return the page: each run with the runs below it, the plots, and what differs if that was asked for."""
    parts = []
    for node in nodes:
        parts += [f"<h2>{escape(node.name)}</h2>", f"<p>Run {escape(node.run.info.run_id)}</p>", _runs(node)]
        parts += [f"<p>{escape(said)}</p>" for said in failures_of(node)]
        parts += [f'<img alt="{escape(title)}" src="{_as_uri(png)}">' for title, png in _plots(node)]
        parts += _lineages(node)
    if changes is not None:
        parts += [f"<h2>{escape(summary_of(changes))}</h2>", _changes(changes)]
    more = f" and {len(nodes) - _MAX_NAMES} more" if len(nodes) > _MAX_NAMES else ""
    title = escape(", ".join(node.name for node in nodes[:_MAX_NAMES]) + more)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )


def _runs(node: Node) -> str:
    nodes = [each for _, each in node.walk()]
    rows = [run_cells(each, depth) for depth, each in node.walk()]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = []
    for each, row in zip(nodes, rows, strict=True):
        cells = [
            f'<td class="{"number" if name in _NUMBERS else escape(row[name]) if name == "status" else ""}">'
            f"{_linked(each, name, row[name])}</td>"
            for name in columns
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _linked(node: Node, column: str, text: str) -> str:
    """Return a cell, with a link to MLflow's page of the run, or of its traces, where the store is a server."""
    page_ = stored_runs.page_of_run(node.run)
    if not page_ or not text or column not in {"run", "traces"}:
        return escape(text)
    address = page_ if column == "run" else f"{page_}/traces"
    return f'<a href="{escape(address, quote=True)}">{escape(text)}</a>'


def _changes(changes: Changes) -> str:
    head = "<th>example</th>" + "".join(f"<th>{escape(node.name)}</th>" for node in changes.evaluations)
    lines = []
    for row in changes.changed[:_MAX_ROWS]:
        cells = ""
        for score, error, said in zip(row.scores, row.errors, row.predictions, strict=True):
            detail = escape(error or shortened(said))
            cells += f'<td class="number">{escape(score_text(score, error))}<br><small>{detail}</small></td>'
        lines.append(f"<tr><td>{escape(shortened(row.example, 300))}</td>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _lineages(node: Node) -> list[str]:
    """Draw the candidates of each compile, with their differences."""
    found = [reading.read(each.run) for _, each in node.walk() if each.kind == COMPILE]
    return [showing.section(each) for each in found if each is not None]


def _plots(node: Node) -> list[tuple[str, bytes]]:
    """Plot the scores of the evaluations, and those of each compile by step."""
    nodes = [each for _, each in node.walk()]
    evaluations = [each for each in nodes if each.kind == EVALUATION and each.score is not None]
    plots = [("Scores of the evaluations", _scores(evaluations))] if evaluations else []
    plots += [(f"Scores of {each.name}", _steps(each)) for each in nodes if each.kind == COMPILE and each.series]
    return plots


def _scores(evaluations: Sequence[Node]) -> bytes:
    figure, axes = _figure(1.2 + 0.35 * min(len(evaluations), 100))
    for place, node in enumerate(reversed(evaluations)):
        error = standard_error(node.series) or 0.0
        axes.errorbar(node.score, place, xerr=_Z * error, fmt="o", color="tab:blue", capsize=3)
    names = [node.name.replace("$", r"\$") for node in reversed(evaluations)]
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("score (percent) with 95% interval")
    return _png(figure)


def _steps(node: Node) -> bytes:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(3.5)
    best = [max(node.series[: place + 1]) for place in range(len(node.series))]
    axes.plot(node.series, marker="o", label="score")
    axes.plot(best, linestyle="--", color="tab:gray", label="best so far")
    axes.set_xlabel("evaluation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylabel("score (percent)")
    axes.set_title(node.name.replace("$", r"\$"))
    axes.legend()
    return _png(figure)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: its state is global

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _as_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
