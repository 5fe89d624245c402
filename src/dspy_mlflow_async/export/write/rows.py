"""Rows of complete new traces, as MLflow's `start_trace` and `log_spans` leave them in a SQL store."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow.tracing.constant import SpanAttributeKey, SpansLocation, TokenUsageKey, TraceMetadataKey, TraceTagKey

from dspy_mlflow_async.export.operations import TraceOperation
from dspy_mlflow_async.seams.mlflow_span_text import SpanRecord, read, record_of, still, text_of
from dspy_mlflow_async.seams.mlflow_trace_tables import (
    TraceTables,
    Translation,
    analytics_columns,
    assessment_columns,
    cost_of,
    model_dimension,
    sanitized,
    total_cost,
    translated,
    translation_of,
    unquoted,
)

_FINALIZED = getattr(TraceMetadataKey, "TRACE_INFO_FINALIZED", "")
ARTIFACT_LOCATION = "mlflow.artifactLocation"  # the store adds it by itself
_TRACE_ID = re.compile("tr-[0-9a-f]{32}")
_SIMPLE_KEY = re.compile(r"[\w.-]{1,250}", re.ASCII)
_LONGEST_NAME = 250
_COSTS = ("input_cost", "output_cost", "total_cost")
_NO_COSTS = dict.fromkeys(_COSTS)
_INPUTS, _OUTPUTS = SpanAttributeKey.INPUTS, SpanAttributeKey.OUTPUTS
_IN_COLUMNS = frozenset({TraceMetadataKey.TRACE_SESSION, TraceMetadataKey.TOKEN_USAGE, TraceMetadataKey.COST})
# Of what a tracer says of itself: what every one does, and what MLflow keeps for itself.
_NO_TAGS = ("telemetry.sdk.", "mlflow.")


class UnfitError(Exception):
    """A trace, or something in it, is for MLflow to write."""


@dataclass(slots=True)
class TraceRows:
    """Rows of one trace, but for the tag that says where its artifacts go.

    Attributes:
        operation: The trace.
        kinds: What there is to it: which of the ways that MLflow has for traces were gone. A store's way must have been
            compared with MLflow's before it is used.
        tables: The rows, by `mlflow_trace_tables`' names of the tables.
    """

    operation: TraceOperation
    kinds: set[str] = field(default_factory=lambda: {"trace"})
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def rows_of(known: TraceTables, operation: TraceOperation, records: Sequence[SpanRecord] | None = None) -> TraceRows:
    """Return the rows of a trace that is not there yet.

    Args:
        known: The tables.
        operation: The trace, prepared.
        records: The facts of its spans, where they are there already.

    Raises:
        UnfitError: Where it is for MLflow to write.
    """
    info = operation.info
    if operation.stage != "whole" or operation.workspace or info.state.value not in ("OK", "ERROR"):
        raise UnfitError("it is not complete")
    if not _TRACE_ID.fullmatch(info.trace_id) or operation.experiment_id != info.experiment_id:
        raise UnfitError("its ids are odd")
    rows = TraceRows(operation)
    spans = [_Span(record, rows.kinds) for record in records or map(record_of, operation.spans)]
    roots = [span for span in spans if span.record.parent_id is None]
    if len(roots) != 1:
        raise UnfitError("it has not one root")
    root = roots[0].attributes
    if (info.request_preview is None and root.get(_INPUTS)) or (info.response_preview is None and root.get(_OUTPUTS)):
        raise UnfitError("its previews are for MLflow to make")
    totals = _Totals(known, info.trace_metadata, spans, rows.kinds)
    began, took = (info.request_time, info.execution_duration)
    if not totals.are_final:
        rows.kinds.add("times of spans")
        began, took = _times(began, took, spans)
    trace_id, experiment_id = info.trace_id, int(info.experiment_id)
    rows.tables = {
        "info": [_info_row(known, info, began, took, totals.columns)],
        "tags": [
            {"request_id": trace_id, "key": key, "value": value}
            for key, value in _tags(known, info, spans, rows.kinds).items()
        ],
        "metadata": [
            {"request_id": trace_id, "key": key, "value": value} for key, value in sorted(totals.metadata.items())
        ],
        "metrics": [{"request_id": trace_id, "key": key, "value": value} for key, value in totals.metrics.items()],
        "spans": [span.row(known, trace_id, experiment_id) for span in spans],
        "assessments": [
            _assessment_row(known, assessment, trace_id, experiment_id, began, rows.kinds)
            for assessment in info.assessments
        ],
    }
    if not known.has_columns:
        rows.tables["span_metrics"] = [
            {"trace_id": info.trace_id, "span_id": span.record.span_id, "key": key, "value": float(value)}
            for span in spans
            for key, value in (span.cost or {}).items()
        ]
    return rows


class _Span:
    """Span with what MLflow makes of it.

    Attributes:
        record: Its facts.
        attributes: Its attributes as they are stored.
        text: The text that is stored.
        cost: Its cost by kind, where it has any.
    """

    __slots__ = ("attributes", "cost", "record", "text")

    def __init__(self, record: SpanRecord, kinds: set[str]) -> None:
        self.record, self.text, self.cost = record, record.text, None
        attributes = sanitized(record.attributes)
        if attributes is not record.attributes:
            kinds.add("JSON in JSON")
        if record.has_more:
            kinds.add("events or links")
            stored = translated(still(record.span))
            if {**stored, **attributes} != stored or not stored.keys() - attributes.keys() <= {
                SpanAttributeKey.LLM_COST
            }:
                raise UnfitError("MLflow translates it")
            attributes = stored
        elif (price := _price(attributes)) is not None:
            attributes = {**attributes, SpanAttributeKey.LLM_COST: price}
        if attributes is not record.attributes:
            self.text = text_of(record.span, attributes)
        if not self.text.isascii():
            kinds.add("letters beyond ASCII")
        self.attributes = attributes
        if cost := attributes.get(SpanAttributeKey.LLM_COST):
            kinds.add("cost")
            self.cost = json.loads(cost)
            if not self.cost or type(self.cost) is not dict:
                raise UnfitError("its cost is odd")
        if record.status == "ERROR":
            kinds.add("error")

    def row(self, known: TraceTables, trace_id: str, experiment_id: int) -> dict[str, Any]:
        record, attributes = self.record, self.attributes
        model, provider = attributes.get(SpanAttributeKey.MODEL), attributes.get(SpanAttributeKey.MODEL_PROVIDER)
        row: dict[str, Any] = {
            "trace_id": trace_id,
            "experiment_id": experiment_id,
            "span_id": record.span_id,
            "parent_span_id": record.parent_id,
            "name": record.name,
            "type": record.type,
            "status": record.status,
            "start_time_unix_nano": record.start_ns,
            "end_time_unix_nano": record.end_ns,
            "content": self.text,
        }
        if not known.has_columns:
            named = {SpanAttributeKey.MODEL: model, SpanAttributeKey.MODEL_PROVIDER: provider}
            row["content"] = _escaped(self.text)
            row["dimension_attributes"] = {key: unquoted(value) for key, value in named.items() if value} or None
            return row
        row |= _NO_COSTS if self.cost is None else _costs(self.cost)
        row["model_name"], row["model_provider"] = model_dimension(model), model_dimension(provider)
        return row


def _price(attributes: Mapping[str, Any]) -> str | None:
    """Return the cost that MLflow adds to a span with these attributes; None where it adds none.

    Raises:
        UnfitError: Where MLflow's translation would do anything else.
    """
    outcome = translation_of(tuple(attributes), attributes.get(SpanAttributeKey.SPAN_TYPE))
    if outcome is Translation.PRICED:
        return cost_of(attributes)
    if outcome is Translation.OTHER or (
        outcome is Translation.UNLESS_MODEL
        and ('"model"' in str(attributes.get(_INPUTS)) or '"model"' in str(attributes.get(_OUTPUTS)))
    ):
        raise UnfitError("MLflow translates it")
    return None


def _costs(cost: Mapping[str, Any]) -> dict[str, float | None]:
    return {key: _number(cost.get(key)) for key in _COSTS}


class _Totals:
    """Totals of a trace: what it says itself, and what its spans say where it says nothing.

    Attributes:
        columns: The columns that are made of them.
        metadata: The metadata that are stored.
        metrics: The metrics that are stored.
        are_final: Whether MLflow, on its way to the totals, learns that what the trace says of its time is final.
    """

    __slots__ = ("are_final", "columns", "metadata", "metrics")

    def __init__(
        self, known: TraceTables, metadata: Mapping[str, str], spans: Sequence[_Span], kinds: set[str]
    ) -> None:
        self.columns: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.metadata = {**metadata, _FINALIZED: "true"}
        usages = [usage for span in spans if (usage := span.attributes.get(SpanAttributeKey.CHAT_USAGE)) is not None]
        has_usage = sum(map(_counts, usages)) > 0  # any of them may be odd
        own_usage, own_cost = metadata.get(TraceMetadataKey.TOKEN_USAGE), metadata.get(TraceMetadataKey.COST)
        if has_usage and not own_usage:
            raise UnfitError("its usage is for MLflow to add up")
        if has_usage:
            kinds.add("usage")
        elif own_usage:
            kinds.add("usage of its own")
        if own_cost:
            kinds.add("cost of its own")
        if TraceMetadataKey.TRACE_SESSION in metadata:
            kinds.add("session")
        cost: Mapping[str, Any] = {}
        if any(span.cost for span in spans):
            cost = total_cost([(span.record.span_id, span.record.parent_id, span.cost) for span in spans])
        self.are_final = bool(has_usage or cost)
        if known.has_columns:
            self._in_columns(cost, has_usage)
            return
        if own_usage:
            usage = json.loads(own_usage)
            self.metrics = {key: float(usage[key]) for key in TokenUsageKey.all_keys() if usage.get(key) is not None}
        if cost and own_cost is None:
            self.metadata[TraceMetadataKey.COST] = json.dumps(cost)

    def _in_columns(self, cost: Mapping[str, Any], has_usage: bool) -> None:
        metadata = self.metadata
        columns = self.columns = analytics_columns(metadata)
        if has_usage and all(columns[key] is None for key in TokenUsageKey.all_keys()):
            raise UnfitError("its usage is for MLflow to add up")
        if cost and TraceMetadataKey.COST not in metadata:
            columns |= _costs(cost)
        elif cost and all(columns[key] is None for key in _COSTS):
            raise UnfitError("its cost is for MLflow to add up")
        for key in _IN_COLUMNS:
            metadata.pop(key, None)


def _counts(text: Any) -> bool:
    """Return whether the usage of a span counts for its trace."""
    usage = read(text)
    if usage is not None and not (isinstance(usage, dict) and TokenUsageKey.INPUT_TOKENS in usage):
        raise UnfitError("its usage is odd")
    return usage is not None


def _times(began: int, took: int | None, spans: Sequence[_Span]) -> tuple[int, int | None]:
    """Return when a trace began and how long it took, in milliseconds, widened to its spans."""
    first = min(began, min(span.record.start_ns for span in spans) // 1_000_000)
    ends = [span.record.end_ns for span in spans if span.record.end_ns is not None]
    if not ends:
        return first, took
    last = max(ends) // 1_000_000
    return first, (last if took is None else max(last, began + took)) - first


def _info_row(
    known: TraceTables, info: Any, began: int, took: int | None, columns: Mapping[str, Any]
) -> dict[str, Any]:
    row = {
        "request_id": info.trace_id,
        "experiment_id": int(info.experiment_id),
        "timestamp_ms": began,
        "execution_time_ms": took,
        "status": info.state.value,
        "client_request_id": info.client_request_id,
        "request_preview": info.request_preview,
        "response_preview": info.response_preview,
        **columns,
    }
    if known.has_columns:
        row["trace_name"] = name = info.tags.get(TraceTagKey.TRACE_NAME)
        if name is not None and len(name) > _LONGEST_NAME:
            raise UnfitError("its name is long")
    if known.counts_payloads:
        row["db_payload_generation"] = 1
    return row


def _tags(known: TraceTables, info: Any, spans: Sequence[_Span], kinds: set[str]) -> dict[str, str]:
    tags = dict(info.tags)
    if ARTIFACT_LOCATION in tags:
        raise UnfitError("it says where its artifacts are")
    if known.has_columns:
        tags.pop(TraceTagKey.TRACE_NAME, None)
    tags[TraceTagKey.SPANS_LOCATION] = SpansLocation.TRACKING_STORE.value
    for key, value in _resource_of(spans).items():
        if not key.startswith(_NO_TAGS):
            kinds.add("resource")
            text = value if isinstance(value, str) else json.dumps(value)
            if not _SIMPLE_KEY.fullmatch(key) or len(text) > _LONGEST_NAME:
                raise UnfitError("its resource is odd")
            tags[key] = text
    return tags


def _resource_of(spans: Sequence[_Span]) -> Mapping[str, Any]:
    makers = (span.record.resource for span in spans)
    return next((maker.attributes for maker in makers if maker is not None and maker.attributes), {})


def _assessment_row(
    known: TraceTables, assessment: Any, trace_id: str, experiment_id: int, began: int, kinds: set[str]
) -> dict[str, Any]:
    if assessment.trace_id not in (None, trace_id) or not (
        assessment.assessment_id and assessment.create_time_ms and assessment.last_update_time_ms
    ):
        raise UnfitError("an assessment is for MLflow to complete")
    row = assessment_columns(assessment)
    row["trace_id"] = trace_id
    if known.has_columns:
        row["experiment_id"], row["trace_timestamp_ms"] = experiment_id, began
    kinds.add(f"assessment: {row['assessment_type']}")
    return row


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UnfitError("its cost is odd")
    return float(value)


def _escaped(text: str) -> str:
    """Return JSON with all beyond ASCII escaped, as MLflow stored it before 3.17."""
    return text if text.isascii() and "\x7f" not in text else json.dumps(json.loads(text))
