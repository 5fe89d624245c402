"""Lineage of a compile: the programs that its optimizer has tried, each with its parents and its scores."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy

from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.runs.artifacts import fields_of
from dspy_mlflow_async.seams.dspy import index_in_search
from dspy_mlflow_async.spans.describe import demo_hash, hash_of_whole, program_hash
from dspy_mlflow_async.spans.door import Door
from dspy_mlflow_async.spans.safe_inspection import contain
from dspy_mlflow_async.spans.serialize import dump

VERSION = 1  # of the document
MAX_CANDIDATES = 2000
MAX_SCORES = 200  # of one candidate
MAX_INSTRUCTIONS = 20_000  # characters of one predictor's
MAX_DEMO_BYTES = 2000
MAX_TEXTS_BYTES = 4 * 1024 * 1024  # of all instructions and demos
_MAX_NAME = 250  # characters of a predictor's path or a metric's name
_BATCHES = 256  # evaluations of which it is remembered what they ran on
# Where all candidates are made of the program as it came, and none of another.
_FROM_START = frozenset({
    "BootstrapFewShot", "BootstrapFewShotWithOptuna", "BootstrapFewShotWithRandomSearch", "InferRules", "KNNFewShot",
    "LabeledFewShot", "MIPROv2",
})  # fmt: skip
# How a parent was found: the optimizer says it; it made all of the first program; it had just evaluated the parent on
# the same examples; it put predictors of several together; or most of it is alike.
BY_OPTIMIZER, BY_START, BY_BATCH, BY_MERGE, BY_LIKENESS = "optimizer", "start", "batch", "merge", "likeness"


@dataclass(frozen=True, slots=True)
class PredictorState:
    """Instructions and demos of a predictor, which optimizers change, as they were when they were tried."""

    hash: str
    instructions: str
    demos: tuple[Any, ...]


def predictors_of(program: Any) -> dict[str, PredictorState]:
    """Return the predictors of a program by their paths; empty for what is no program, or does not tell."""
    if not isinstance(program, dspy.Module):
        return {}
    try:
        return {
            name: PredictorState(
                program_hash(each), str(each.signature.instructions), tuple(getattr(each, "demos", None) or ())
            )
            for name, each in program.named_predictors()
        }
    except BaseException as error:  # noqa: BLE001 - a module's walk may be the user's
        contain(error)
        return {}


def hash_of(program: Any) -> str | None:
    """Return what names a live program, or None for one without predictors."""
    return _whole(predictors_of(program))


def _whole(predictors: Mapping[str, PredictorState]) -> str | None:
    return hash_of_whole(each.hash for each in predictors.values())


@dataclass(frozen=True, slots=True)
class Score:
    """Score that an evaluation has given a candidate.

    Attributes:
        key: The series of the compile that it belongs to.
        step: Its step there; None where the optimizer asked for no record of it.
        value: In percent.
        examples: How many there were.
        metric: The name of the metric, or None.
        run_id: Returns MLflow's id of the evaluation's run, or None where it has none.
    """

    key: str
    step: int | None
    value: float
    examples: int
    metric: str | None
    run_id: Callable[[], str | None]


@dataclass(slots=True)
class Candidate:
    """One program that an optimizer has tried.

    Attributes:
        predictors: By path.
        generation: How often the optimizer had asked an LM for proposals before.
        parents: The hashes of the candidates that it was made of; none for the first.
        found_by: How the parents were found, or None.
        seconds: When it was first seen, from the beginning of the compile.
        scores: In the order in which they came.
    """

    predictors: Mapping[str, PredictorState]
    generation: int
    parents: tuple[str, ...]
    found_by: str | None
    seconds: float
    scores: list[Score] = field(default_factory=list)

    @property
    def hashes(self) -> set[tuple[str, str]]:
        """Its predictors' hashes, with their paths."""
        return {(path, each.hash) for path, each in self.predictors.items()}

    @property
    def rank(self) -> float:
        """Its score on as many examples as it was ever tried on."""
        return max(((each.examples, each.value) for each in self.scores), default=(0, -1.0))[1]


class Trial:
    """One evaluation of a candidate, until its score is known."""

    def __init__(self, lineage: Lineage, hash_: str, key: str, metric: str | None, examples: int) -> None:
        self._note = functools.partial(lineage.score, hash_)
        self._key, self._metric, self._examples = key, metric, examples

    def end(self, value: float, step: int | None, run_id: Callable[[], str | None]) -> None:
        """Note the score; ``step`` and ``run_id`` are those of the evaluation's record, if it has one."""
        self._note(Score(self._key, step, value, self._examples, self._metric, run_id))


class Lineage:
    """Candidates of one compile. ``lock`` guards them; nothing of the user's runs while it is held.

    Args:
        optimizer: The ``dspy.teleprompt.Teleprompter``.
        student: The program as it came.

    Attributes:
        candidates: By hash, in the order in which they were first tried.
        start: The hash of the program as it came, or None.
    """

    def __init__(self, optimizer: Any, student: Any) -> None:
        names = {each.__name__ for each in type(optimizer).__mro__}
        self._is_from_start = bool(names & _FROM_START)
        self._is_reflective = "GEPA" in names
        self._begun = time.monotonic()
        self._lock = threading.Lock()
        self.candidates: dict[str, Candidate] = {}
        self._batches: deque[tuple[int, str]] = deque(maxlen=_BATCHES)
        self._by_index: list[str] = []
        self._is_proposing = False
        self._generation = 0
        self._left_out = 0
        self.start = self._add(predictors_of(student))
        if self.start is not None:
            self._by_index.append(self.start)

    def proposing(self) -> None:
        """Note that the optimizer asks an LM for something: what is tried next is of another generation."""
        self._is_proposing = True

    def begin(
        self, program: Any, key: str, metric: str | None, devset: Sequence[Any] | None, size: int
    ) -> Trial | None:
        """Note that an evaluation of a program begins.

        Args:
            program: The program.
            key: The metric key of the evaluation.
            metric: The name of the metric.
            devset: The examples, where they are at hand.
            size: How many there are.
        """
        batch = hash(tuple(map(id, devset))) if devset is not None else None
        hash_ = self._add(predictors_of(program), batch=batch)
        return None if hash_ is None else Trial(self, hash_, key, metric, size)

    def sampled(
        self, trials: Iterable[tuple[Any, Sequence[float]]], key: str, metric: str | None, step: Callable[[int], int]
    ) -> None:
        """Note what SIMBA has scored in a pool of its own.

        Args:
            trials: Each program with its scores, from 0 to 1, in SIMBA's order.
            key: The series.
            metric: The name of the metric.
            step: Returns the step of the n-th program.
        """
        together: dict[str, list[float]] = {}
        for number, (program, scores) in enumerate(trials):
            hash_ = self._add(predictors_of(program), index=index_in_search(program))
            if hash_ is None:
                continue
            if key == "eval_sampling":
                together.setdefault(hash_, []).extend(scores)
                continue
            self._by_index.append(hash_)
            self.score(hash_, _percent(key, step(number), metric, scores))
        for hash_, scores in together.items():
            self.score(hash_, _percent(key, step(0), metric, scores))

    def score(self, hash_: str, score: Score) -> None:
        """Note a score of a candidate."""
        with self._lock:
            found = self.candidates.get(hash_)
            if found is not None and len(found.scores) < MAX_SCORES:
                found.scores.append(score)

    def _add(
        self, predictors: Mapping[str, PredictorState], *, batch: int | None = None, index: int | None = None
    ) -> str | None:
        hash_ = _whole(predictors)
        if hash_ is None:
            return None
        with self._lock:
            if self._is_proposing:
                self._is_proposing = False
                self._generation += 1
            if hash_ not in self.candidates:
                if len(self.candidates) >= MAX_CANDIDATES:
                    self._left_out += 1
                    return None
                candidate = Candidate(predictors, self._generation, (), None, time.monotonic() - self._begun)
                if self.candidates:
                    candidate.parents, candidate.found_by = self._parents(candidate, batch, index)
                self.candidates[hash_] = candidate
            if batch is not None:
                self._batches.append((batch, hash_))
        return hash_

    def _parents(self, new: Candidate, batch: int | None, index: int | None) -> tuple[tuple[str, ...], str]:
        first = next(iter(self.candidates))
        if index is not None and index < len(self._by_index):
            return (self._by_index[index],), BY_OPTIMIZER
        if self._is_from_start:
            return (first,), BY_START
        if self._is_reflective:
            if len(new.predictors) > 1 and (merged := self._merged(new)):
                return merged, BY_MERGE
            same = next((known for examples, known in reversed(self._batches) if examples == batch), None)
            if same is not None:
                return (same,), BY_BATCH
        earlier = [(key, each) for key, each in self.candidates.items() if each.generation < new.generation]
        if not earlier:
            return (first,), BY_LIKENESS
        most = max(len(each.hashes & new.hashes) for _, each in earlier)
        alike = [(each.rank, key) for key, each in earlier if len(each.hashes & new.hashes) == most]
        best = max(rank for rank, _ in alike)
        return (next(key for rank, key in alike if rank == best),), BY_LIKENESS

    def _merged(self, new: Candidate) -> tuple[str, ...]:
        """Return the fewest candidates whose predictors make up all of a new one; none where they do not."""
        missing, parents = set(new.hashes), list[str]()
        while missing:
            key, found = max(self.candidates.items(), key=lambda item: (len(item[1].hashes & missing), item[1].rank))
            if not found.hashes & missing:
                return ()
            parents.append(key)
            missing -= found.hashes
        return tuple(parents)

    def follow(self, program: Any) -> None:
        """Take over which candidate came of which, where GEPA's result says it (``track_stats``)."""
        results = getattr(program, "detailed_results", None)
        candidates, parents = (getattr(results, name, None) for name in ("candidates", "parents"))
        if not isinstance(candidates, list) or not isinstance(parents, list):
            return
        hashes = [hash_of(each) for each in candidates]
        for hash_, places in zip(hashes, parents, strict=False):
            known = self.candidates.get(hash_ or "")
            said = tuple(dict.fromkeys(key for place in places if place is not None and (key := hashes[place])))
            if known is not None and said and hash_ not in said:
                known.parents, known.found_by = said, BY_OPTIMIZER

    def document(self, optimizer: str, program: Any, door: Door) -> bytes | None:
        """Return all of it as JSON, bounded, and masked by the door; None where there is nothing to say.

        Args:
            optimizer: The name of the optimizer's class.
            program: What the compile has returned, or None.
            door: What is shown of instructions and demos passes it.
        """
        result = self._add(predictors_of(program))
        guarded(self.follow)(program)
        with self._lock:
            candidates = dict(self.candidates)
        if not candidates:
            return None
        texts = _Texts(door)
        return dump(
            {
                "version": VERSION,
                "optimizer": optimizer,
                "start": self.start,
                "result": result,
                "candidates": [_shown(hash_, each, texts, door) for hash_, each in candidates.items()],
                "left_out": self._left_out,
                "instructions": texts.instructions,
                "demos": texts.demos,
            }
        ).encode()


def _percent(key: str, step: int, metric: str | None, scores: Sequence[float]) -> Score:
    return Score(key, step, round(100 * sum(scores) / len(scores), 2), len(scores), metric, lambda: None)


class _Texts:
    """Instructions and demos of all candidates, each once, as far as there is room for them."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._room = MAX_TEXTS_BYTES
        self._known: dict[str, str] = {}
        self.instructions: dict[str, str] = {}
        self.demos: dict[str, Any] = {}

    def instruction(self, text: str) -> str:
        """Return the key of instructions."""
        key = self._known.get(text)
        if key is None:
            key = self._known[text] = f"i{len(self._known)}"
            shown = self._door.text(text, MAX_INSTRUCTIONS)
            if self._take(len(shown.encode("utf-8", "surrogatepass"))):
                self.instructions[key] = shown
        return key

    def demo(self, demo: Any) -> str:
        """Return the key of a demo."""
        key = demo_hash(demo)
        if key not in self.demos and self._take(MAX_DEMO_BYTES):
            self.demos[key] = self._door.plain(MAX_DEMO_BYTES)(fields_of(demo))
        return key

    def _take(self, size: int) -> bool:
        self._room -= size
        return self._room >= 0


def _shown(hash_: str, candidate: Candidate, texts: _Texts, door: Door) -> dict[str, Any]:
    return {
        "hash": hash_,
        "parents": list(candidate.parents),
        "parents_by": candidate.found_by,
        "seconds": round(candidate.seconds, 3),
        "predictors": {
            door.text(path, _MAX_NAME): {
                "hash": each.hash,
                "instructions": texts.instruction(each.instructions),
                "demos": [texts.demo(demo) for demo in each.demos],
            }
            for path, each in candidate.predictors.items()
        },
        "scores": [
            {
                "key": each.key,
                "step": each.step,
                "score": each.value,
                "examples": each.examples,
                "metric": None if each.metric is None else door.text(each.metric, _MAX_NAME),
                "run_id": each.run_id(),
            }
            for each in candidate.scores
        ],
    }
