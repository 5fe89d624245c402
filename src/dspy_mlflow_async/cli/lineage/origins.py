"""Origin of a program: the compile, step and scores that it came from, and the traces that it has made since."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
from mlflow.exceptions import MlflowException

from dspy_mlflow_async.cli.audit.store import RunFacts, Store
from dspy_mlflow_async.cli.lineage.reading import PATH, Candidate, Lineage
from dspy_mlflow_async.runs.lineage import predictors_of
from dspy_mlflow_async.seams.mlflow_bulk_reads import TraceRow
from dspy_mlflow_async.seams.mlflow_store import resolve_tracking_uri
from dspy_mlflow_async.spans.describe import hash_of_whole, program_hash

_HASH = re.compile(r"[0-9a-f]{12}")
_IN_SPAN = re.compile(r'"program_hash": ?"\\"([0-9a-f]{12})\\""')
_MODEL = re.compile(r"(?:models:/)?(m-[0-9a-f]{32})")
_RESULT, _EVALUATED = "best_model.json", "model.json"
_MODEL_ID, _PROMPTS = "mlflow.modelId", "mlflow.linkedPrompts"
_LAST = 100  # traces of which models and prompts are looked up


@dataclass(frozen=True, slots=True)
class Found:
    """A candidate of a compile that a program is.

    Attributes:
        run_id: The run of the compile.
        run_name: Its name.
        lineage: All candidates of it.
        candidate: The one.
    """

    run_id: str
    run_name: str
    lineage: Lineage
    candidate: Candidate


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation of a program outside of any compile: the run, its name, and its score in percent, or None."""

    run_id: str
    run_name: str
    score: float | None


@dataclass(frozen=True, slots=True)
class Made:
    """A trace that a program has made.

    Attributes:
        trace_id: MLflow's id.
        start_ms: When it began, in milliseconds since the epoch.
    """

    trace_id: str
    start_ms: int

    @property
    def begun(self) -> str:
        """Local time at which it began."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.start_ms / 1000))


@dataclass(frozen=True, slots=True)
class Origin:
    """All that a store knows of a program.

    Attributes:
        hash: What names it as a whole, or None where only a part of it is known.
        hashes: Those of its predictors, as ``program_hash`` on their spans.
        candidates: It as a candidate of compiles, the oldest first.
        evaluations: Evaluations of it that belong to no compile, the oldest first.
        traces: What it has made, the oldest first.
        models: MLflow's logged models that its last 100 traces are linked to.
        prompts: The prompts, with their versions, that these are linked to.
    """

    hash: str | None
    hashes: frozenset[str]
    candidates: tuple[Found, ...]
    evaluations: tuple[Evaluated, ...]
    traces: tuple[Made, ...]
    models: tuple[str, ...]
    prompts: tuple[str, ...]


def origin_of(
    program: Any,
    *,
    experiment: str | Sequence[str] | None = None,
    since_ms: int = 0,
    tracking_uri: str | None = None,
) -> Origin:
    """Return which compile, step and scores a program came from, and which traces it has made.

    Args:
        program: A live ``dspy.Module``, or a text: a ``program_hash``, the path of a file that ``program.save`` has
            written as JSON, the id of a trace, or that of a logged model (``models:/m-…``).
        experiment: Name or id of one or several experiments; by default all.
        since_ms: Only runs and traces that began since then, in milliseconds since the epoch.
        tracking_uri: The store; by default the one that MLflow takes here.

    Raises:
        ValueError: Where it is none of these, or where there is no such experiment or trace.
    """
    experiments = [experiment] if isinstance(experiment, str) else list(experiment or ())
    return find(program, Store(resolve_tracking_uri(tracking_uri), experiments, since_ms))


async def aorigin_of(*args: Any, **kwargs: Any) -> Origin:
    """Do what ``origin_of`` does, in a thread, while the event loop goes on."""
    return await asyncio.to_thread(origin_of, *args, **kwargs)


def find(program: Any, store: Store) -> Origin:
    """Return what a store knows of a program; the arguments are those of ``origin_of``, and its store."""
    hashes, is_whole = _hashes(program, store)
    whole = hash_of_whole(hashes) if is_whole else None
    compiles = list(_lineages(store))
    found = list(_matching(compiles, hashes, whole)) or list(_by_state(program, compiles, store))
    if found:
        wanted = found[0].candidate.hashes
        whole = found[0].candidate.hash if len({each.candidate.hash for each in found}) == 1 else whole
        hashes = wanted if whole is not None else hashes
    names = {whole, hash_of_whole(hashes), *(each.candidate.hash for each in found)}
    traces = _made(store, hashes, compiles)
    models, prompts = _links(store, traces[-_LAST:])
    return Origin(whole, frozenset(hashes), tuple(found), tuple(_evaluated(store, names)), traces, models, prompts)


def _hashes(program: Any, store: Store) -> tuple[set[str], bool]:
    """Return the hashes that a target stands for, and whether they are those of a whole program.

    Raises:
        ValueError: Where it stands for none.
    """
    if isinstance(program, dspy.Module):
        found = {each.hash for each in predictors_of(program).values()}
        if not found:
            raise ValueError("the program has no predictors, so that nothing names it")
        return found, True
    target = str(program)
    if _HASH.fullmatch(target):
        return {target}, False
    if target.startswith("tr-"):
        rows = list(store.traces_by_id([target]))
        if not rows:
            raise ValueError(f"there is no trace {target!r}")
        return _hashes_of_trace(rows[0]), False
    if model := _MODEL.fullmatch(target):
        return _hashes_of_model(model[1], store), False
    return {*_hashes_of_file(target).values()}, True


def _hashes_of_file(target: str) -> dict[str, str]:
    path = Path(target)
    if not path.is_file():
        raise ValueError(f"{target!r} is no hash of twelve digits, no trace, no logged model and no file")
    try:
        found = hashes_of_state(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        found = {}
    if not found:
        raise ValueError(
            f"{target} is no program that program.save has written as JSON; a pickle runs code when it is read: "
            "load it yourself, and give the program to dspy_mlflow_async.cli.lineage.origin_of"
        )
    return found


def hashes_of_state(state: Any, path: str = "") -> dict[str, str]:
    """Return the hashes of the predictors in what ``program.save`` has written, by their paths.

    They are those of the live program where its demos are of JSON's types, as the fields of most are.
    """
    if not isinstance(state, dict):
        return {}
    signature = state.get("signature")
    if isinstance(signature, dict) and "instructions" in signature:
        shape = SimpleNamespace(instructions=signature["instructions"])
        return {path or "self": program_hash(SimpleNamespace(signature=shape, demos=state.get("demos") or []))}
    found: dict[str, str] = {}
    for key, below in state.items():
        if key != "metadata":
            found |= hashes_of_state(below, f"{path}.{key}" if path else key)
    return found


def _hashes_of_trace(row: TraceRow) -> set[str]:
    found = {found for span in row.spans or () for found in _IN_SPAN.findall(span.content)}
    if not found:
        raise ValueError(f"no predictor of the trace {row.trace_id} shows its program_hash: ours writes it")
    return found


def _hashes_of_model(model_id: str, store: Store) -> set[str]:
    """Return the hashes of the traces that a logged model has made: what it holds is a pickle."""
    for experiment_id in store.experiment_ids:
        query = f"metadata.`{_MODEL_ID}` = '{model_id}'"
        page = store.client.search_traces(locations=[experiment_id], filter_string=query, max_results=1)
        for trace in page:
            return _hashes_of_trace(next(iter(store.traces_by_id([trace.info.trace_id]))))
    raise ValueError(
        f"the model {model_id} has made no trace here; load it, and give its program to "
        "dspy_mlflow_async.cli.lineage.origin_of"
    )


def _lineages(store: Store) -> Iterator[tuple[RunFacts, Lineage]]:
    """Yield the compiles of a store that hold their candidates, oldest first."""
    for facts in sorted(store.runs.values(), key=lambda facts: facts.start_ms):
        content = store.document(facts, PATH) if facts.optimizer else None
        lineage = None if content is None else Lineage.of(content)
        if lineage is not None:
            yield facts, lineage


def _matching(compiles: Iterable[tuple[RunFacts, Lineage]], hashes: set[str], whole: str | None) -> Iterator[Found]:
    """Yield the candidates that are the program; of a part of one, those that have most of it."""
    name = whole or hash_of_whole(hashes)
    parts: list[Found] = []
    is_there = False
    for facts, lineage in compiles:
        for candidate in lineage.candidates.values():
            found = Found(facts.run_id, facts.name, lineage, candidate)
            if candidate.hash == name:
                is_there = True
                yield found
            elif whole is None and candidate.hashes & hashes:
                parts.append(found)
    if not is_there and parts:
        most = max(len(each.candidate.hashes & hashes) for each in parts)
        yield from (each for each in parts if len(each.candidate.hashes & hashes) == most)


def _by_state(program: Any, compiles: Iterable[tuple[RunFacts, Lineage]], store: Store) -> Iterator[Found]:
    """Yield the results of compiles whose stored state a file has, where its demos are no longer what they were."""
    if isinstance(program, dspy.Module) or not Path(str(program)).is_file():
        return
    wanted = _hashes_of_file(str(program))
    for facts, lineage in compiles:
        content, result = store.document(facts, _RESULT), lineage.candidates.get(lineage.result or "")
        if content is not None and result is not None and hashes_of_state(json.loads(content)) == wanted:
            yield Found(facts.run_id, facts.name, lineage, result)


def _evaluated(store: Store, names: set[str | None]) -> Iterator[Evaluated]:
    known = names - {None}
    tagged = set[str]().union(*(store.runs_of_program(str(each)) for each in known))
    for facts in sorted(store.runs.values(), key=lambda facts: facts.start_ms):
        parent = store.runs.get(facts.parent_id or "")
        if facts.optimizer or not facts.is_evaluation or (parent is not None and parent.optimizer):
            continue
        if facts.run_id in tagged or (facts.metric is None and _state_hash(store, facts) in known):
            score = store.client.get_run(facts.run_id).data.metrics.get("eval")
            yield Evaluated(facts.run_id, facts.name, score)


def _state_hash(store: Store, facts: RunFacts) -> str | None:
    """Return what names the program that another tracer has evaluated."""
    content = store.document(facts, _EVALUATED)
    try:
        return None if content is None else hash_of_whole(hashes_of_state(json.loads(content)).values())
    except ValueError:
        return None


def _made(store: Store, hashes: set[str], compiles: Sequence[tuple[RunFacts, Lineage]]) -> tuple[Made, ...]:
    """Return the traces of a program: all of its predictors were called, or one that no other candidate has."""
    others: set[str] = set()
    for _, lineage in compiles:
        for each in lineage.candidates.values():
            if each.hashes != hashes:
                others |= each.hashes
    called = {each: _traces_with(store, each) for each in hashes}
    if not called:
        return ()
    whole = set.intersection(*map(set, called.values()))
    telling = set[str]().union(*(called[each] for each in hashes - others))
    began = {trace_id: start for traces in called.values() for trace_id, start in traces.items()}
    chosen = sorted((began[each], each) for each in whole | telling)
    return tuple(Made(trace_id, start) for start, trace_id in chosen)


def _traces_with(store: Store, hash_: str) -> Mapping[str, int]:
    try:
        return {trace_id: start for start, trace_id in store.traces_with_program(hash_)}
    except MlflowException:  # an older server cannot look into spans
        return {row.trace_id: row.start_ms for row in store.traces() if _shows(row, hash_)}


def _shows(row: TraceRow, hash_: str) -> bool:
    return any(hash_ in _IN_SPAN.findall(span.content) for span in row.spans or ())


def _links(store: Store, traces: Sequence[Made]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    models, prompts = dict[str, None](), dict[str, None]()
    for row in store.traces_by_id([each.trace_id for each in traces]):
        if model := row.metadata.get(_MODEL_ID):
            models[model] = None
        try:
            for each in json.loads(row.tags.get(_PROMPTS) or row.metadata.get(_PROMPTS) or "[]"):
                prompts[f"{each['name']}/{each['version']}"] = None
        except (ValueError, TypeError, KeyError):
            continue
    return tuple(models), tuple(prompts)
