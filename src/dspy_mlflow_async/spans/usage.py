"""Counts the tokens of exactly one LM call, and of all calls of one trace, without changing what DSPy counts.

``lm.history[-1]`` belongs to whichever call ended last, and ``track_usage=True`` changes the program's results.
DSPy adds each call's usage to ``dspy.settings.usage_tracker``, a context-local setting, so a tracker placed there
for the time of one call sees that call alone. It passes everything on to the tracker that the user has.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dspy

from dspy_mlflow_async.seams.dspy import (
    UsageTracker,
    flattened,
    is_tracking_usage,
    override_usage_tracker,
    overrides,
    restore_overrides,
    usage_tracker,
)
from dspy_mlflow_async.seams.mlflow_live import usage_spans_below
from dspy_mlflow_async.seams.mlflow_spans import OpenSpan, SpanAttributeKey, TokenUsageKey
from dspy_mlflow_async.spans.observer import LmCall, RequestObserver
from dspy_mlflow_async.spans.outcome import OK, outcome_of

Usage = Mapping[str, Any]
_NOTHING: Usage = {}


def token_usage(entries: Iterable[Usage]) -> dict[str, int]:
    """Sum DSPy's usage entries under MLflow's keys.

    Args:
        entries: Usage as providers report it: ``prompt_tokens`` or ``input_tokens``, ``completion_tokens`` or
            ``output_tokens``, ``total_tokens``, and what was read from and written to a prompt cache.

    Returns:
        ``input_tokens``, ``output_tokens``, ``total_tokens`` and, where reported, the cached ones; empty where
        nothing was reported.
    """
    total: dict[str, int] = {}
    for usage in entries:
        inputs = _first_count(usage, "prompt_tokens", "input_tokens")  # OpenAI's two APIs; LiteLLM may give both
        outputs = _first_count(usage, "completion_tokens", "output_tokens")
        both = _count(usage.get("total_tokens"))
        if inputs is None and outputs is None and both is None:
            continue
        total[_INPUT] = total.get(_INPUT, 0) + (inputs or 0)
        total[_OUTPUT] = total.get(_OUTPUT, 0) + (outputs or 0)
        total[_TOTAL] = total.get(_TOTAL, 0) + (both or (inputs or 0) + (outputs or 0))
        details = _mapping(usage.get("prompt_tokens_details")) or _mapping(usage.get("input_tokens_details"))
        cached = _first_count(details, "cached_tokens") or _first_count(usage, "cache_read_input_tokens")
        if cached:
            total[_READ] = total.get(_READ, 0) + cached
        written = _first_count(details, "cache_creation_tokens") or _first_count(usage, "cache_creation_input_tokens")
        if written:
            total[_WRITTEN] = total.get(_WRITTEN, 0) + written
    return total


_INPUT, _OUTPUT, _TOTAL = TokenUsageKey.INPUT_TOKENS, TokenUsageKey.OUTPUT_TOKENS, TokenUsageKey.TOTAL_TOKENS
_READ, _WRITTEN = TokenUsageKey.CACHE_READ_INPUT_TOKENS, TokenUsageKey.CACHE_CREATION_INPUT_TOKENS


def _first_count(usage: Usage, *names: str) -> int | None:
    """The first of these that is a count."""
    for name in names:
        value = usage.get(name)
        if value is not None and (count := value if type(value) is int else _count(value)) is not None:
            return count
    return None


def _count(value: Any) -> int | None:
    """A provider's count, if it is a number: some report flags, texts or NaN beside their counts."""
    if type(value) is int:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return int(value)
    return None


def _mapping(value: Any) -> Usage:
    if value is None:
        return _NOTHING
    if isinstance(value, Mapping):
        return value
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) else {}


class Ledger:
    """The usage of some LM calls, by model: those below one module call, of one example, of one role in a compile.

    Only appends: ``list.append`` is atomic with and without a GIL, so callers share no lock.
    """

    __slots__ = ("_begun", "_ended", "entries", "span_ids")

    def __init__(self) -> None:
        self.entries: list[tuple[str, Usage]] = []
        self.span_ids: list[int] = []  # of the spans of ours that bear some of it
        self._begun: list[None] = []
        self._ended: list[None] = []

    def begin(self) -> None:
        """Count an LM call that begins."""
        self._begun.append(None)

    def end(self) -> None:
        """Count an LM call that has ended."""
        self._ended.append(None)

    def leave_unsettled(self) -> None:
        """Note that other processes make LM calls which are not counted here: no sum of these is that of all."""
        self._begun.append(None)

    @property
    def calls(self) -> int:
        """Number of LM calls that have begun."""
        return len(self._begun)

    @property
    def is_settled(self) -> bool:
        """Return whether no LM call is under way."""
        return len(self._begun) == len(self._ended)


class CallUsage(UsageTracker):
    """Stands in DSPy's ``usage_tracker`` setting while one LM call runs, or one outermost module call.

    Args:
        ledgers: Where the usage is added up besides.
        inner: The tracker that the user has, which gets everything first.
    """

    def __init__(self, ledgers: Sequence[Ledger], inner: UsageTracker | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.entries: list[Usage] = []
        self.was_reported = False
        self._ledgers = ledgers
        if inner is not None:
            # dspy.track_usage() rolls a nested tracker up into its parent's usage_data.
            self.usage_data = inner.usage_data

    def add_usage(self, lm: str, usage_entry: dict[str, Any]) -> None:
        """Add the usage of one provider response that did not come from DSPy's cache; DSPy calls it."""
        self.was_reported = True
        if self.inner is not None:
            self.inner.add_usage(lm, usage_entry)
        if usage_entry:
            usage = flattened(self, usage_entry)
            self.entries.append(usage)
            for ledger in self._ledgers:
                ledger.entries.append((lm, usage))

    def __deepcopy__(self, memo: dict[int, Any]) -> CallUsage:
        """Copy the user's tracker, share ours: ``ParallelExecutor`` deep-copies the tracker for each example."""
        if self.inner is None:
            return self
        copied = CallUsage(self._ledgers, copy.deepcopy(self.inner, memo))
        copied.entries = self.entries
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the user's tracker in our place: ``dspy.settings.save`` inside a call stores what it would store."""
        return operator.getitem, ((self.inner,), 0)


class LmUsage:
    """The usage of one LM call, in place from when it begins until ``close``.

    Args:
        lm: The LM that is called.
        ledgers: Where the call is counted besides.
        request: The request around the call, which is told how it went, or None.
    """

    __slots__ = ("_before", "_began", "_knows_cache_hits", "_ledgers", "_model", "_request", "_tracker")

    def __init__(self, lm: Any, ledgers: Sequence[Ledger], request: RequestObserver | None = None) -> None:
        self._knows_cache_hits = reports_each_response(lm.__class__)
        self._request = request
        if request is not None:
            self._model = getattr(lm, "model", None) or type(lm).__name__
            self._began = time.perf_counter()
        self._ledgers = ledgers
        self._before = overrides()
        for ledger in ledgers:
            ledger.begin()
        present = usage_tracker()
        self._tracker = CallUsage(ledgers, present.inner if isinstance(present, CallUsage) else present)
        override_usage_tracker(self._tracker)

    def close(self, outputs: Any = None, exception: BaseException | None = None) -> None:
        """Put DSPy's setting back, and report the call to its ledgers and its request."""
        restore_overrides(self._before)
        for ledger in self._ledgers:
            ledger.end()
        if self._request is not None:
            self._request.lm_call_ended(
                LmCall(
                    model=self._model,
                    began=self._began,
                    latency=time.perf_counter() - self._began,
                    tokens=token_usage(self._tracker.entries),
                    cache_hit=self._cache_hit(outputs),
                    outcome=OK if exception is None else outcome_of(exception),
                )
            )

    def attributes(self, outputs: Any) -> dict[str, Any]:
        """Return the attributes of the span: tokens, and whether the answer came from DSPy's cache."""
        found: dict[str, Any] = {}
        if tokens := token_usage(self._tracker.entries):
            found[SpanAttributeKey.CHAT_USAGE] = tokens
        cache_hit = self._cache_hit(outputs)
        if cache_hit is not None:
            found["cache_hit"] = cache_hit
        return found

    def _cache_hit(self, outputs: Any) -> bool | None:
        if not self._knows_cache_hits or outputs is None:
            return None
        return not self._tracker.was_reported


class ModuleUsage:
    """The usage of all LM calls below one outermost module call; MLflow shows it on that call's span.

    It stands in DSPy's setting too, for usage that is reported outside of any LM call that DSPy tells us of.
    Where the user has a tracker, or has switched on DSPy's own tracking, there is none of ours.

    Args:
        span: The call's span.
        ledgers: Where those are counted besides: what LM calls of DSPy's are told of already.
        request: The request around the call, which is told of them, or None.
    """

    __slots__ = ("_before", "_ledgers", "_request", "_span", "_tracker", "ledger")

    def __init__(self, span: OpenSpan, ledgers: Sequence[Ledger], request: RequestObserver | None) -> None:
        self._span, self._ledgers, self._request = span, ledgers, request
        self.ledger = Ledger()
        self._before = overrides()
        self._tracker: CallUsage | None = None
        if usage_tracker() is None and not is_tracking_usage():
            self._tracker = CallUsage([self.ledger])
            override_usage_tracker(self._tracker)

    def close(self, outputs: Any = None, exception: BaseException | None = None) -> None:  # noqa: ARG002 - the interface of its kind
        """Put DSPy's setting back."""
        restore_overrides(self._before)

    def attributes(self, outputs: Any) -> dict[str, Any]:
        """Return the sum, unless a call is still under way, or elsewhere: then MLflow adds up the LM spans itself."""
        others = self._count_others()
        if not self.ledger.is_settled:
            return {}
        entries = [usage for _, usage in self.ledger.entries]
        tokens = token_usage(entries)
        if not tokens:
            entries += _tracked_by_dspy(outputs)
        if others or not tokens:
            tokens = token_usage([*entries, *others])
        return {SpanAttributeKey.CHAT_USAGE: tokens} if tokens else {}

    def _count_others(self) -> list[Usage]:
        """Usage of the LM calls that other integrations have recorded below, each counted once."""
        spans = usage_spans_below(self._span.otel, self._span.trace_id, frozenset(self.ledger.span_ids))
        if not spans:
            return []
        # An LM that DSPy tells nothing of may have reported to DSPy what another integration has recorded, too.
        heard = [] if self._tracker is None else [token_usage([usage]) for usage in self._tracker.entries]
        counted: list[Usage] = []
        for each in spans:
            tokens = token_usage([each.tokens])
            if tokens in heard:
                heard.remove(tokens)
                continue
            counted.append(each.tokens)
            for ledger in self._ledgers:
                ledger.begin()
                ledger.entries.append((each.model, each.tokens))
                ledger.end()
            if self._request is not None:
                latency = (each.end_ns - each.start_ns) / 1e9
                began = time.perf_counter() - (time.time_ns() - each.start_ns) / 1e9
                self._request.lm_call_ended(LmCall(each.model, began, latency, tokens, None, OK))
        return counted


class UserTracks:
    """Removal of our tracker for a module call below which the user has switched on DSPy's own tracking."""

    __slots__ = ("_before",)

    def __init__(self) -> None:
        self._before = overrides()
        override_usage_tracker(None)

    def close(self, outputs: Any = None, exception: BaseException | None = None) -> None:  # noqa: ARG002 - the interface of its kind
        """Put DSPy's setting back."""
        restore_overrides(self._before)

    def attributes(self, outputs: Any) -> dict[str, Any]:  # noqa: ARG002 - the interface of its kind
        """Return none: the LM calls below have their own."""
        return {}


def module_usage(
    ledger: Ledger | None, span: OpenSpan, ledgers: Sequence[Ledger] = (), request: RequestObserver | None = None
) -> tuple[ModuleUsage | UserTracks | None, Ledger]:
    """Begin the usage of a module call, given the ledger of the module calls around it, and what ``ModuleUsage`` takes.

    Returns:
        What counts until its end, if anything, and the ledger for the calls below.
    """
    if ledger is None:
        usage = ModuleUsage(span, ledgers, request)
        return usage, usage.ledger
    if is_tracking_usage():
        present = usage_tracker()
        if isinstance(present, CallUsage) and present.inner is None:
            return UserTracks(), ledger
    return None, ledger


@functools.lru_cache(maxsize=256)
def reports_each_response(lm_class: Any) -> bool:
    """Return whether DSPy's own code finalises the calls of this class, which reports all responses but cached ones.

    A class that brings a ``__call__`` or ``acall`` with callbacks of its own may report nothing.
    """
    return all(
        getattr(lm_class, name, None) is getattr(dspy.BaseLM, name)
        or not hasattr(getattr(lm_class, name), "__wrapped__")
        for name in ("__call__", "acall")
    )


def _tracked_by_dspy(outputs: Any) -> Iterable[Usage]:
    get_lm_usage = getattr(outputs, "get_lm_usage", None) if isinstance(outputs, dspy.Prediction) else None
    return (get_lm_usage() or {}).values() if get_lm_usage is not None else ()
