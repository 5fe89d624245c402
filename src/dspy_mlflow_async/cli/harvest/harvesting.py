"""Turns stored traces into examples: what a program or a predictor was asked and answered, and what was said of it."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dspy
import pydantic

from dspy_mlflow_async.cli.audit.store import Store
from dspy_mlflow_async.cli.audit.traces import INPUTS, OUTPUTS, Span, Trace
from dspy_mlflow_async.cli.harvest import values
from dspy_mlflow_async.seams.mlflow_bulk_reads import AssessmentRow, TraceRow
from dspy_mlflow_async.seams.mlflow_store import resolve_tracking_uri

logger = logging.getLogger("dspy_mlflow_async")

_JUDGE_TAG = "mlflow.trace.sourceScorer"
_WORDS = {"yes": 1.0, "true": 1.0, "pass": 1.0, "no": 0.0, "false": 0.0, "fail": 0.0}
_BY_PEOPLE_FIRST = {"HUMAN": 1}


@dataclass(frozen=True, slots=True)
class Harvested:
    """One example, and where it comes from.

    Attributes:
        example: With ``with_inputs`` set.
        trace_id: MLflow's id of the trace.
        span_id: That of the span whose inputs and outputs it has.
        inputs: The inputs as JSON.
        labels: The labels as JSON.
        weight: Its weight by feedback, or None.
        has_expectation: Whether somebody has said what the answer should have been.
    """

    example: dspy.Example
    trace_id: str
    span_id: str
    inputs: dict[str, Any]
    labels: dict[str, Any]
    weight: float | None
    has_expectation: bool


def examples_from_traces(
    signature: Any = None,
    *,
    program: str | None = None,
    experiment: str | Sequence[str] | None = None,
    run: str | None = None,
    since_ms: int = 0,
    program_hash: str | None = None,
    where: Callable[[TraceRow], bool] | None = None,
    weight_by: str | None = None,
    min_weight: float | None = None,
    include_cut: bool = False,
    include_masked: bool = False,
    deduplicate: bool = True,
    limit: int | None = None,
    tracking_uri: str | None = None,
) -> list[dspy.Example]:
    """Return what stored traces were asked and answered, as examples to compile or to evaluate with.

    Without a signature and a program, an example for each trace, of its outermost call. Calls that failed, traces of
    judges, and what was cut or masked are left out.

    Args:
        signature: A ``dspy.Signature``, its text, or a predictor that has it: the calls of all predictors with these
            fields, inner ones too. Its types are those of the examples.
        program: The class name of a module: all of its calls, the inner ones too.
        experiment: Name or id of one or several experiments; by default all.
        run: Only the traces of this run and those below it.
        since_ms: Only what began since then, in milliseconds since the epoch.
        program_hash: Only calls of, or with, a predictor of this hash, as ``program_hash`` on its span.
        where: Says for each stored trace whether it counts, by its metadata, tags and assessments.
        weight_by: The name of a feedback: its value becomes the field ``weight`` of the example, truth as 1 and 0.
        min_weight: Leave out what has no such feedback, or a lower one.
        include_cut: Keep values of which a part was not stored.
        include_masked: Keep values with a masked part.
        deduplicate: Of calls with equal inputs, keep the one with an expectation, else with the highest weight, else
            the newest.
        limit: How many at most.
        tracking_uri: The store; by default the one that MLflow takes here.

    Returns:
        Examples in the order of the calls, with their inputs set. An expectation takes the place of the output of
        its name; one of another name is a further label.

    Raises:
        ValueError: Where there is no such experiment or run.
    """
    options = {key: value for key, value in locals().items() if key != "limit"}
    return [each.example for each in harvest(**options)][:limit]


async def aexamples_from_traces(*args: Any, **kwargs: Any) -> list[dspy.Example]:
    """Do what ``examples_from_traces`` does, in a thread, while the event loop goes on."""
    return await asyncio.to_thread(examples_from_traces, *args, **kwargs)


def harvest(
    signature: Any,
    *,
    program: str | None,
    experiment: str | Sequence[str] | None,
    run: str | None,
    since_ms: int,
    program_hash: str | None,
    where: Callable[[TraceRow], bool] | None,
    weight_by: str | None,
    min_weight: float | None,
    include_cut: bool,
    include_masked: bool,
    deduplicate: bool,
    tracking_uri: str | None,
) -> list[Harvested]:
    """Return the same as ``examples_from_traces``, each with where it comes from."""
    uri = resolve_tracking_uri(tracking_uri)
    experiments = [experiment] if isinstance(experiment, str) else list(experiment or ())
    wanted = _signature_of(signature)
    select = functools.partial(_selected, signature=wanted, program=program, program_hash=program_hash)
    convert = values.converters(wanted)
    found: list[Harvested] = []
    unfit = 0
    for row in Store(uri, experiments, since_ms, run).traces():
        if _JUDGE_TAG in row.tags or not (where is None or where(row)):
            continue
        for span, trace in select(Trace(row)):
            shown = _exactly(span.text(INPUTS)), _exactly(span.text(OUTPUTS))
            if not all(isinstance(each, dict) and each for each in shown):
                continue
            seen = list(shown)
            if (not include_cut and values.is_cut(seen)) or (not include_masked and values.is_masked(seen)):
                continue
            try:
                one = _harvested(span, trace, shown, wanted, convert, weight_by, uri)
            except (pydantic.ValidationError, ValueError, LookupError, OSError):
                unfit += 1
                continue
            if min_weight is None or (one.weight is not None and one.weight >= min_weight):
                found.append(one)
    if unfit:
        logger.warning("%d calls were left out of the examples: their values are not of the signature's types.", unfit)
    return _distinct(found) if deduplicate else found


def _exactly(text: str) -> Any:
    """Return what a JSON text says; orjson would make floats of integers beyond 64 bits."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _signature_of(given: Any) -> type[dspy.Signature] | None:
    if given is None or (isinstance(given, type) and issubclass(given, dspy.Signature)):
        return given
    if isinstance(given, str):
        return dspy.Signature(given)
    found = getattr(given, "signature", None)
    if found is None:
        raise TypeError(f"a signature is a dspy.Signature, its text, or a predictor, not {type(given).__name__}")
    return _signature_of(found)


def _selected(
    trace: Trace, *, signature: type[dspy.Signature] | None, program: str | None, program_hash: str | None
) -> Iterator[tuple[Span, Trace]]:
    """Yield the spans that make examples: ended well, and what was asked for."""
    root = trace.root
    for span in trace.spans:
        if not span.is_ok or not span.end_ns or (signature is None and program is None and span is not root):
            continue
        if program is not None and span.name != f"{program}.forward":
            continue
        if signature is not None and not _has_fields(span, signature, is_named=program is not None):
            continue
        if program_hash is not None and not any(each.value("program_hash") == program_hash for each in span.walk()):
            continue
        yield span, trace


def _has_fields(span: Span, signature: type[dspy.Signature], *, is_named: bool) -> bool:
    """Return whether a call is one of a predictor with these fields; of a named program, whether it has their names."""
    inputs, outputs = set(signature.input_fields), set(signature.output_fields)
    if is_named:
        shown = span.value(INPUTS)
        return isinstance(shown, dict) and inputs >= shown.keys()
    if not span.is_predict:
        return False
    before, arrow, after = str(span.value("signature")).partition(" -> ")
    # dspy.ChainOfThought puts its reasoning before the outputs.
    return (
        bool(arrow)
        and set(before.split(", ")) == inputs
        and set(after.split(", ")) - {"reasoning"} == outputs - {"reasoning"}
    )


def _harvested(
    span: Span,
    trace: Trace,
    shown: tuple[dict[str, Any], dict[str, Any]],
    signature: type[dspy.Signature] | None,
    convert: dict[str, Callable[[Any], Any]],
    weight_by: str | None,
    uri: str,
) -> Harvested:
    inputs, outputs = (dict(each) for each in shown)
    if signature is not None:
        outputs = {key: value for key, value in outputs.items() if key in signature.output_fields}
    said = [each for each in trace.row.assessments if each.span_id in (None, span.span_id)]
    is_about_it = span is trace.root or any(each.span_id for each in said)
    expected = {each.name: each.value for each in said if each.kind == "expectation" and is_about_it}
    labels = outputs | {key: value for key, value in expected.items() if key not in inputs}
    weight = _weight(said, weight_by)
    made = {key: convert.get(key, _same)(values.with_pictures(value, uri)) for key, value in (inputs | labels).items()}
    if weight is not None:
        made["weight"] = weight
    example = dspy.Example(**made).with_inputs(*inputs)
    return Harvested(example, trace.row.trace_id, span.span_id, inputs, labels, weight, bool(expected))


def _same(value: Any) -> Any:
    return value


def _weight(said: Sequence[AssessmentRow], name: str | None) -> float | None:
    """Return what feedback of this name says as a number: people's before programs', and the last of several."""
    of_name = [each for each in said if each.kind == "feedback" and each.name == name and not each.error]
    for each in sorted(of_name, key=lambda each: -_BY_PEOPLE_FIRST.get(each.source_type, 0)):
        value = _WORDS.get(each.value.strip().lower(), each.value) if isinstance(each.value, str) else each.value
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number):
            return number
    return None


def _distinct(found: Sequence[Harvested]) -> list[Harvested]:
    best: dict[str, Harvested] = {}
    for each in found:
        key = json.dumps(each.inputs, sort_keys=True)
        before = best.get(key)
        if before is None or _rank(each) >= _rank(before):
            best[key] = each
    kept = set(map(id, best.values()))
    return [each for each in found if id(each) in kept]


def _rank(each: Harvested) -> tuple[bool, float]:
    return each.has_expectation, -math.inf if each.weight is None else each.weight
