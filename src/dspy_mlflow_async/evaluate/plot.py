"""Plot of the cases' scores with their intervals."""

from __future__ import annotations

import io
from collections.abc import Sequence

from dspy_mlflow_async.evaluate.comparison import CaseResult
from dspy_mlflow_async.evaluate.statistics import CONFIDENCE

_MAX_LABEL = 40  # characters; with longer ones there is no room for the scores
_Z = 1.96  # standard errors on each side of a 95% interval


def plot_of_cases(cases: Sequence[CaseResult], baseline: str) -> bytes:
    """Return a PNG with a row per case: its score in percent, and the interval of 1.96 standard errors around it."""
    from matplotlib.figure import Figure  # no pyplot: its state is global

    scored = [(case, case.score) for case in reversed(cases) if case.score is not None]
    figure = Figure(figsize=(7, 1.2 + 0.4 * max(1, min(len(scored), 60))), layout="constrained")
    axes = figure.subplots()
    for place, (case, score) in enumerate(scored):
        color = "tab:gray" if case.name == baseline else "tab:blue"
        axes.errorbar(score, place, xerr=_Z * (case.standard_error or 0.0), fmt="o", color=color, capsize=3)
    axes.set_yticks(range(len(scored)), [_label(case.name) for case, _ in scored])
    axes.set_ylim(-0.6, len(scored) - 0.4)
    label = f"score (percent) with {CONFIDENCE:.0%} interval; baseline '{_label(baseline)}' in gray"
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _label(name: str) -> str:
    shown = name if len(name) <= _MAX_LABEL else f"{name[: _MAX_LABEL - 1]}…"
    return shown.replace("$", r"\$")  # not the beginning of a formula
