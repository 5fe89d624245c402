"""Terminal output of the demo: progress, one trace as a tree, the counts, and where to look at it all."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from mlflow.entities import Span, Trace
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from dspy_mlflow_async.cli.demo.check import Verdict
from dspy_mlflow_async.cli.demo.script import markers_in

_SHOWN_PROBLEMS = 20


def show_tree(console: Console, trace: Trace) -> None:
    """Show one trace, a line for each span: name, duration in milliseconds, tokens, and what it was asked."""
    spans = sorted(trace.data.spans, key=lambda span: span.start_time_ns)

    def add(span: Span, above: Tree) -> None:
        node = above.add(_line(span))
        for child in spans:
            if child.parent_id == span.span_id:
                add(child, node)

    tree = Tree(f"trace {trace.info.trace_id}")
    for root in spans:
        if root.parent_id is None:
            add(root, tree)
    console.print(tree)


def _line(span: Span) -> str:
    words = [f"[bold]{escape(span.name)}[/]"]
    if span.end_time_ns is not None:
        words.append(f"[dim]{(span.end_time_ns - span.start_time_ns) / 1e6:.0f} ms[/]")
    usage = span.get_attribute("mlflow.chat.tokenUsage")
    if usage:
        words.append(f"[cyan]{usage['total_tokens']} tokens[/]")
    if span.name.endswith(".forward") and isinstance(span.inputs, dict):
        markers = sorted(markers_in(str(span.inputs.get("ticket"))))
        source = span.inputs.get("source")
        words += [f"[green]#{marker}{f', {source}' if source else ''}[/]" for marker in markers]
    return "  ".join(words)


def show_counts(console: Console, verdict: Verdict) -> None:
    """Show a row for each act: traces, spans and tokens, found of planned."""
    console.print("Read back from MLflow, found of planned:")
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None)
    table.add_column("calls of")
    for heading in ("traces", "spans", "tokens"):
        table.add_column(heading, justify="right")
    for name, row in verdict.rows.items():
        billed = f" of {row.billed_tokens}" if row.billed_tokens is not None else ""
        table.add_row(
            name,
            f"{row.found_traces} of {row.planned_traces}",
            f"{row.found_spans} of {row.planned_spans}",
            f"{row.found_tokens}{billed}",
        )
    console.print(table)


def show_verdict(console: Console, verdict: Verdict) -> None:
    """Say whether every span is where it belongs, in one sentence or in one for each that is not."""
    spans = sum(row.found_spans for row in verdict.rows.values())
    traces = sum(row.found_traces for row in verdict.rows.values())
    if not verdict.problems:
        console.print(f"[bold green]Every one of {spans} spans in {traces} traces is where it belongs.[/]")
        return
    console.print(f"[bold red]Not everything is where it belongs ({len(verdict.problems)} findings):[/]")
    for problem in verdict.problems[:_SHOWN_PROBLEMS]:
        console.print(f"  - {escape(problem)}")
    if len(verdict.problems) > _SHOWN_PROBLEMS:
        console.print(f"  … and {len(verdict.problems) - _SHOWN_PROBLEMS} more")


def ui_command(store: str) -> str:
    """Return the command that opens MLflow's UI on a store, with the path of ``mlflow`` where the PATH lacks it."""
    beside = Path(sys.executable).with_name("mlflow")
    # tox puts its environment on the PATH of what it runs, and of nothing else.
    is_on_path = (shutil.which("mlflow") == str(beside) and "TOX_ENV_NAME" not in os.environ) or not beside.exists()
    mlflow = "mlflow" if is_on_path else _quoted(str(beside))
    # MLflow's server imports LiteLLM, which asks the net for prices; where there is no net, it never starts.
    offline = "" if os.name == "nt" else "LITELLM_LOCAL_MODEL_COST_MAP=True "
    return f"{offline}{mlflow} ui --backend-store-uri {_quoted(store)}"


def _quoted(text: str) -> str:
    return f'"{text}"' if " " in text else text
