"""Sampling of traces: by a ratio when a trace begins, or by its outcome when it has ended."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry.trace import StatusCode

from dspy_mlflow_async.spans import outcome as outcomes

Sample = float | Mapping[str, Any]

_ALL = 2**64
_RATIOS = ("ok", "error", "cancelled")
_SLOW = "slow"


@dataclass(frozen=True, slots=True)
class ByRatio:
    """Keep this share of the traces; a trace is in or out from its first span on.

    Attributes:
        ratio: From 0 to 1.
    """

    ratio: float


@dataclass(frozen=True, slots=True)
class ByOutcome:
    """Keep this share of the traces that ended so. Each is recorded as a whole, and decided on when it is over.

    Attributes:
        ok: Share of those whose root ended well, from 0 to 1.
        error: Of those whose root failed.
        cancelled: Of those that were cancelled or abandoned.
        slow_seconds: Keep every trace that took longer than so many seconds, however it ended.
    """

    ok: float = 1.0
    error: float = 1.0
    cancelled: float = 1.0
    slow_seconds: float = math.inf

    def keeps(self, root: Any) -> bool:
        """Return whether to keep the trace with this root, an ended OpenTelemetry span."""
        if (root.end_time - root.start_time) / 1e9 > self.slow_seconds:
            return True
        ratio: float = getattr(self, _outcome_of(root))
        return is_kept(root.context.trace_id, ratio)


def parse(sample: Sample) -> ByRatio | ByOutcome | None:
    """Parse the ``sample`` argument of ``wrap`` and ``request``.

    Returns:
        None for 1.0, the default: then whatever is in force around decides.

    Raises:
        TypeError: For anything but a number or a mapping of numbers.
        ValueError: For an unknown key, or a ratio outside 0 to 1.
    """
    if isinstance(sample, Mapping):
        unknown = [key for key in sample if key not in {*_RATIOS, _SLOW}]
        if unknown:
            known = ", ".join((*_RATIOS, _SLOW))
            raise ValueError(f"sample knows {known}, not {', '.join(map(repr, unknown))}")
        ratios = {key: _ratio(f"sample[{key!r}]", sample[key]) for key in _RATIOS if key in sample}
        slow = _seconds(sample[_SLOW]) if _SLOW in sample else math.inf
        return ByOutcome(**ratios, slow_seconds=slow)
    ratio = _ratio("sample", sample)
    return None if ratio == 1 else ByRatio(ratio)


def is_kept(trace_id: int, ratio: float) -> bool:
    """Return whether a trace is among the kept ones, by its id alone.

    Source: OpenTelemetry's ``TraceIdRatioBased``, so that services that ask for one ratio keep the same traces.
    """
    return (trace_id & (_ALL - 1)) < round(ratio * _ALL)


def _ratio(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number from 0 to 1, not {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, not {value}")
    return float(value)


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"sample['{_SLOW}'] must be a number of seconds, not {value!r}")
    if not value >= 0:
        raise ValueError(f"sample['{_SLOW}'] must be 0 or more seconds, not {value}")
    return float(value)


def _outcome_of(root: Any) -> str:
    """Return the key of ``sample`` that a trace falls under, by its root."""
    said = json.loads((root.attributes or {}).get("outcome") or "null")
    if said in {outcomes.CANCELLED, outcomes.ABANDONED}:
        return "cancelled"
    return "error" if root.status.status_code is StatusCode.ERROR else "ok"
