"""Lineage of a compile as its run holds it: candidates, parents, scores, instructions and demos."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dspy_mlflow_async.seams import mlflow_artifact_reads

PATH = "candidates.json"
_MAX_LINES = 400  # of instructions, in a comparison


@dataclass(frozen=True, slots=True)
class Score:
    """One score of a candidate.

    Attributes:
        key: The series of the compile that it belongs to.
        step: Its step there, or None for one that the optimizer asked to keep no record of.
        value: In percent.
        examples: How many there were.
        metric: The name of the metric, or None.
        run_id: The run of the evaluation, or None.
    """

    key: str
    step: int | None
    value: float
    examples: int
    metric: str | None
    run_id: str | None

    def __str__(self) -> str:
        """Return it in a few words."""
        step = "" if self.step is None else f" {self.step}"
        by = f" by {self.metric}" if self.metric else ""
        return f"{self.value:g} at {self.key}{step} on {self.examples}{by}"


@dataclass(frozen=True, slots=True)
class Predictor:
    """Share of a candidate in one predictor: keys of the lineage's texts."""

    hash: str
    instructions: str
    demos: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One program that an optimizer has tried.

    Attributes:
        hash: What names it.
        parents: The candidates that it was made of.
        parents_by: How these were found: the ``optimizer`` says it; all are made of the one at the ``start``; the
            parent was evaluated on the same ``batch`` before; it is a ``merge``; or by ``likeness``. Else None.
        predictors: By path.
        scores: In the order in which they came.
    """

    hash: str
    parents: tuple[str, ...]
    parents_by: str | None
    predictors: Mapping[str, Predictor]
    scores: tuple[Score, ...]

    @property
    def hashes(self) -> set[str]:
        """The hashes of its predictors."""
        return {each.hash for each in self.predictors.values()}

    @property
    def best(self) -> Score | None:
        """Its best score on as many examples as it was ever tried on."""
        return max(self.scores, key=lambda each: (each.examples, each.value), default=None)


@dataclass(frozen=True, slots=True)
class Lineage:
    """All candidates of one compile.

    Attributes:
        optimizer: Its class.
        start: The hash of the program as it came, or None.
        result: That of what it returned, or None.
        candidates: By hash, parents first.
        left_out: How many more there were.
        instructions: Texts by key.
        demos: Fields by key.
    """

    optimizer: str
    start: str | None
    result: str | None
    candidates: Mapping[str, Candidate]
    left_out: int
    instructions: Mapping[str, str]
    demos: Mapping[str, Any]

    @classmethod
    def of(cls, content: bytes) -> Lineage | None:
        """Return the lineage that an artifact says, or None where it says none."""
        try:
            said = json.loads(content)
            candidates = {str(each["hash"]): _candidate(each) for each in said["candidates"]}
            return cls(
                str(said["optimizer"]),
                said["start"],
                said["result"],
                candidates,
                int(said["left_out"]),
                said["instructions"],
                said["demos"],
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def walk(self) -> Iterator[tuple[int, Candidate]]:
        """Yield each candidate with its depth, parents before children, in the order in which they were tried."""
        children: dict[str | None, list[Candidate]] = {}
        for each in self.candidates.values():
            known = next((parent for parent in each.parents if parent in self.candidates), None)
            children.setdefault(known, []).append(each)
        waiting = [(0, each) for each in reversed(children.get(None, []))]
        seen = set[str]()
        while waiting:
            depth, candidate = waiting.pop()
            if candidate.hash not in seen:
                seen.add(candidate.hash)
                yield depth, candidate
                waiting += [(depth + 1, each) for each in reversed(children.get(candidate.hash, []))]

    def changes(self, candidate: Candidate) -> list[str]:
        """Say how a candidate differs from its parents, a short sentence for each predictor that does."""
        parents = [self.candidates[each] for each in candidate.parents if each in self.candidates]
        found = []
        for path, own in candidate.predictors.items():
            theirs = [each.predictors[path] for each in parents if path in each.predictors]
            same = next((p for p in parents if path in p.predictors and p.predictors[path].hash == own.hash), None)
            if same is not None and len(parents) > 1:
                found.append(f"{path} of {same.hash}")
            elif theirs and same is None:
                found.append(f"{path}: {self._change(theirs[0], own)}")
        return found

    def _change(self, before: Predictor, after: Predictor) -> str:
        parts = []
        if before.instructions != after.instructions:
            parts.append(f"“{' '.join(self.instructions.get(after.instructions, '…').split())}”")
        added, removed = (len(set(a) - set(b)) for a, b in ((after.demos, before.demos), (before.demos, after.demos)))
        if added or removed:
            parts.append("demos " + ", ".join(f"{sign}{n}" for sign, n in (("+", added), ("-", removed)) if n))
        return "; ".join(parts) or "the order of its demos"

    def difference(self, candidate: Candidate, path: str) -> list[str]:
        """Return the lines of a predictor's instructions, marked as in a diff against the first parent."""
        first = next((self.candidates[each] for each in candidate.parents if each in self.candidates), None)
        known = first is not None and path in first.predictors
        before = self._lines(first.predictors[path]) if first is not None and known else []
        after = self._lines(candidate.predictors[path])
        if before == after:
            return []
        _, _, _, *lines = difflib.unified_diff(before, after, n=_MAX_LINES, lineterm="")
        return lines

    def _lines(self, predictor: Predictor) -> list[str]:
        return self.instructions.get(predictor.instructions, "").splitlines()[:_MAX_LINES]


def read(run: Any) -> Lineage | None:
    """Return the lineage that a run of MLflow's holds, or None."""
    content = mlflow_artifact_reads.read(run, PATH)
    return None if content is None else Lineage.of(content)


def _candidate(said: Mapping[str, Any]) -> Candidate:
    scores = tuple(
        Score(each["key"], each["step"], float(each["score"]), each["examples"], each["metric"], each["run_id"])
        for each in said["scores"]
    )
    predictors = {
        path: Predictor(each["hash"], each["instructions"], tuple(each["demos"]))
        for path, each in said["predictors"].items()
    }
    return Candidate(said["hash"], tuple(said["parents"]), said["parents_by"], predictors, scores)
