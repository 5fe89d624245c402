"""Lineage as text for a terminal, and as a picture with its differences for a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rich.text import Text
from rich.tree import Tree

from dspy_mlflow_async.cli.lineage.reading import Candidate, Lineage, Score
from dspy_mlflow_async.printable import counted
from dspy_mlflow_async.runs.drawing import Row, svg

if TYPE_CHECKING:
    from dspy_mlflow_async.cli.lineage.origins import Origin

_MAX_CHANGE = 90  # characters of what has changed, in a line
_MAX_SCORES = 3  # of a candidate, in a line
_MAX_PARTS = 500  # candidates of which a page shows the differences
_LOW, _HIGH = (255, 235, 233), (201, 240, 211)  # colours of the lowest and the highest score


def tree(lineage: Lineage) -> Tree:
    """Return the candidates as a tree for a terminal, each with its best score and how it differs."""
    root = Tree(Text(_title(lineage)), guide_style="dim")
    above = [root]
    for depth, candidate in lineage.walk():
        del above[depth + 1 :]
        style = "bold green" if candidate.hash == lineage.result else ""
        text = Text(candidate.hash, style=style)
        text.append(f"  {_note(lineage, candidate)}")
        if changes := "; ".join(lineage.changes(candidate)):
            text.append(f"\n{_cut(changes)}", style="dim")
        above.append(above[-1].add(text))
    return root


def picture(lineage: Lineage) -> str:
    """Return the same as SVG, with colours by score and a frame around the result."""
    best = [each.best.value for each in lineage.candidates.values() if each.best is not None]
    rows = [
        Row(
            depth,
            candidate.hash,
            _note(lineage, candidate),
            _cut("; ".join(lineage.changes(candidate))),
            fill=_colour(candidate, best),
            is_marked=candidate.hash == lineage.result,
        )
        for depth, candidate in lineage.walk()
    ]
    return svg(rows, _title(lineage))


def section(lineage: Lineage) -> str:
    """Return the part of a page: the picture, and for each candidate its scores and differences, folded."""
    parts = [f"<h3>{escape(_title(lineage))}</h3>", picture(lineage)]
    for _, candidate in list(lineage.walk())[:_MAX_PARTS]:
        inside = "".join(f"<li>{escape(str(score))}</li>" for score in candidate.scores)
        for path, predictor in candidate.predictors.items():
            lines = "\n".join(lineage.difference(candidate, path))
            shown = f"<pre>{escape(lines)}</pre>" if lines else "<p>instructions unchanged</p>"
            demos = "".join(f"<li>{escape(_demo(lineage.demos.get(key)))}</li>" for key in predictor.demos)
            inside += f"</ul><h4>{escape(path)}</h4>{shown}<ul>{demos}"
        parts.append(f"<details><summary>{escape(candidate.hash)}</summary><ul>{inside}</ul></details>")
    return "".join(parts)


def lines_of(origin: Origin) -> list[str]:
    """Return what is known of a program, a line each."""
    lines = [f"program {origin.hash or '(none)'}: {', '.join(sorted(origin.hashes)) or 'no predictors'}"]
    for found in origin.candidates:
        lineage, candidate = found.lineage, found.candidate
        role = {lineage.result: "what it returned", lineage.start: "the program that it was given"}
        place = [*lineage.candidates].index(candidate.hash) + 1
        said = role.get(candidate.hash, f"candidate {place} of {len(lineage.candidates)}")
        lines.append(f"{lineage.optimizer}, run {found.run_id} ({found.run_name}): {said}")
        if candidate.parents:
            lines.append(f"  made of {', '.join(candidate.parents)} (by {candidate.parents_by})")
        lines += [f"  {_cut(change)}" for change in lineage.changes(candidate)]
        lines += [f"  {each}" for each in _scores(candidate)]
    for run in origin.evaluations:
        score = "no score" if run.score is None else f"{run.score:g}"
        lines.append(f"evaluated in run {run.run_id} ({run.run_name}): {score}")
    if not origin.candidates and not origin.evaluations:
        lines.append("no compile and no evaluation in this store has it")
    traces = origin.traces
    if not traces:
        return [*lines, "no traces"]
    first, last = traces[0], traces[-1]
    lines.append(f"{len(traces)} traces, from {first.begun} ({first.trace_id}) to {last.begun} ({last.trace_id})")
    lines += _links("models", origin.models) + _links("prompts", origin.prompts)
    return lines


def _scores(candidate: Candidate) -> list[str]:
    """Return its scores, a line each; those on batches, which have no run and may be hundreds, in one for each kind."""
    lines = [f"{score}, run {score.run_id}" for score in candidate.scores if score.run_id]
    kinds: dict[tuple[str, int, str | None], list[Score]] = {}
    for score in candidate.scores:
        if not score.run_id:
            kinds.setdefault((score.key, score.examples, score.metric), []).append(score)
    for (key, examples, metric), scores in kinds.items():
        if len(scores) == 1:
            lines.append(str(scores[0]))
            continue
        low, high = (choose(each.value for each in scores) for choose in (min, max))
        by = f" by {metric}" if metric else ""
        lines.append(f"{low:g} to {high:g} at {key} on {examples}{by}, {len(scores)} times")
    return lines


def _links(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what} of its last traces: {', '.join(names)}"] if names else []


def _title(lineage: Lineage) -> str:
    more = f", and {lineage.left_out} more" if lineage.left_out else ""
    return f"{lineage.optimizer}: {counted(len(lineage.candidates), 'candidate')}{more}"


def _note(lineage: Lineage, candidate: Candidate) -> str:
    """Return the scores, those on most examples first, and what part a candidate has."""
    scores = sorted(candidate.scores, key=lambda score: (-score.examples, -score.value))
    steps = ["" if score.step is None else f" {score.step}" for score in scores]
    shown = [f"{score.value:g} {score.key}{step}" for score, step in zip(scores, steps, strict=True)][:_MAX_SCORES]
    if len(scores) > _MAX_SCORES:
        shown.append(f"and {len(scores) - _MAX_SCORES} more")
    parts = (("start", candidate.hash == lineage.start), ("result", candidate.hash == lineage.result))
    roles = [role for role, is_one in parts if is_one]
    also = f"also of {', '.join(candidate.parents[1:])}" if len(candidate.parents) > 1 else ""
    return " · ".join(filter(None, (", ".join(shown), ", ".join(roles), also)))


def _colour(candidate: Candidate, scores: Sequence[float]) -> str:
    if candidate.best is None:
        return "#f6f8fa"
    low, high = min(scores), max(scores)
    share = (candidate.best.value - low) / (high - low) if high > low else 1.0
    mixed = (round(a + (b - a) * share) for a, b in zip(_LOW, _HIGH, strict=True))
    return "#" + "".join(f"{each:02x}" for each in mixed)


def _demo(demo: Any) -> str:
    text = ", ".join(f"{key}={value}" for key, value in demo.items()) if isinstance(demo, dict) else str(demo)
    return text if len(text) <= 400 else f"{text[:399]}…"  # noqa: PLR2004 - some lines


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_CHANGE else f"{text[: _MAX_CHANGE - 1]}…"
