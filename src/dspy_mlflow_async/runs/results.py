"""Result table and statistics of an evaluation, with each row matched to the example that was noted for it."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dspy_mlflow_async.runs import artifacts
from dspy_mlflow_async.runs.example import Example
from dspy_mlflow_async.runs.usage import add_up
from dspy_mlflow_async.spans.safe_inspection import contain


class Results:
    """Results of an evaluation, together with what was noted of each example.

    Args:
        outputs: What ``Evaluate`` returned: ``results`` holds (example, prediction, score); ``places`` says where in
            the devset they stand, if not all do.
        ended: The examples whose work has ended, in that order. One may have been worked on twice: a straggler.
    """

    def __init__(self, outputs: Any, ended: Sequence[Example]) -> None:
        self._rows = list(getattr(outputs, "results", None) or ())
        places = getattr(outputs, "places", None)
        self._noted = _matched(list(zip(places or itertools.count(), self._rows, strict=False)), ended)

    def table(self) -> dict[str, list[Any]]:
        """A row per example in devset order. Source: ``MlflowCallback._generate_result_table``."""
        rows = [
            {"score": score}
            | artifacts.fields_of(example, prefix="example_")
            | artifacts.fields_of(prediction, prefix="pred_")
            | {
                "trace_id": noted.trace_id if noted else None,
                "error": noted.error if noted else None,
                "duration_seconds": noted.duration if noted else None,
            }
            for (example, prediction, score), noted in zip(self._rows, self._noted, strict=True)
        ]
        return artifacts.columns_of(rows)

    def statistics(self) -> dict[str, float | None]:
        """Count the errors, and take the latency of the program, median and 95th percentile."""
        durations = sorted(noted.duration for noted in self._noted if noted and noted.duration is not None)
        return {
            "errors": sum(noted is not None and noted.error is not None for noted in self._noted),
            "latency_p50_seconds": quantile(durations, 0.5),
            "latency_p95_seconds": quantile(durations, 0.95),
        }


def usage_of(examples: Iterable[Example]) -> dict[str, float | None]:
    """Tokens and cost of all that was worked on, by program and metric."""
    usage = add_up(ledger for example in examples for ledger in (example.program_usage, example.metric_usage))
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cost_usd": usage.cost_usd,
    }


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The quantile of an ordered sample, interpolated; None for an empty one."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    below = ordered[math.floor(place)]
    return below + (ordered[math.ceil(place)] - below) * (place - math.floor(place))


def _matched(rows: Sequence[tuple[int, Any]], ended: Sequence[Example]) -> list[Example | None]:
    """Match each row to its noted example: by its place where that is known, else by the prediction, else by the
    object, else by what is in it.

    DSPy does not tell at which place of the devset a worker is, and one object may stand at several.
    """
    by_place: dict[int, Example] = {}
    by_both: dict[tuple[int, int], deque[Example]] = defaultdict(deque)
    by_prediction: dict[int, Example] = {}
    for example in ended:
        if example.index is not None:
            by_place[example.index] = example
        elif example.prediction is not None:
            by_both[id(example.prediction), id(example.item)].append(example)
            by_prediction[id(example.prediction)] = example
    found: list[Example | None] = []
    for place, (item, prediction, _) in rows:
        same = by_both.get((id(prediction), id(item)))
        # A devset may make its items anew whenever it is read: then the prediction alone counts.
        found.append(same.popleft() if same else by_place.get(place) or by_prediction.get(id(prediction)))
    # What is left has failed, so that its row holds no prediction of the program's.
    identities: tuple[Callable[[Any], Any], ...] = (id, _content)
    for identity in identities:
        taken = {id(example) for example in found}
        by_item: dict[Any, deque[Example]] = defaultdict(deque)
        for example in ended:
            if example.index is None and id(example) not in taken:
                by_item[identity(example.item)].append(example)
        for row, (_, (item, _, _)) in enumerate(rows):
            if found[row] is None and by_item and by_item.get(identity(item)):
                found[row] = by_item[identity(item)].popleft()
    return found


def _content(item: Any) -> Any:
    """Content of a devset's item as text, to find it again in a devset that makes its items anew."""
    try:
        return repr(artifacts.fields_of(item))
    except BaseException as error:  # noqa: BLE001 - a repr is the user's code
        contain(error)
        return id(item)
