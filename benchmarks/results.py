"""The results of a run: read, validated, checked, and turned into medians, spreads and ratios."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from benchmarks import machine
from benchmarks.cells import ENOUGH_CALLS, ENOUGH_SECONDS
from benchmarks.contestants import FLOOR, OPENINFERENCE

SCHEMA_VERSION = 2
SCHEMA = json.loads((Path(__file__).parent / "schema.json").read_text())

# Of a background's CPU, the share that must fall into the window for its figures to mean something.
ENOUGH_INSIDE = 0.5
# Seconds after which ours writes, at the latest, what has come: it lingers for half a second.
WRITER_BEGINS = 1.0
_THOUSAND = 1000
_NEXT_TO_NOTHING = 0.05  # of the callers' CPU; a background below that is noise

Value = Callable[[dict[str, Any]], "float | None"]


def validate(data: Any) -> None:
    """Hold results against the schema.

    Raises:
        ValueError: If they do not fit, with the place.
    """
    try:
        jsonschema.validate(data, SCHEMA)
    except jsonschema.ValidationError as error:
        where = "/".join(map(str, error.absolute_path)) or "the top"
        raise ValueError(f"not the results of a benchmark run: {error.message} (at {where})") from error


def load(path: Path) -> Results:
    """Read a results file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no results file of this version.
    """
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    validate(data)
    return Results(data)


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of the rounds, with the least and the greatest."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None of no values."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values), len(values)) if values else None


class CellResult:
    """The samples of one cell."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.id: str = data["id"]
        self.axis: str = data["axis"]
        self.name = self.id.partition("/")[2]
        self.spans: int = data["spans"]
        self.parameters: dict[str, Any] = data["parameters"]
        self.samples = [sample for sample in data["samples"] if "error" not in sample]
        self.failures = [sample for sample in data["samples"] if "error" in sample]

    @property
    def contestants(self) -> list[str]:
        """Those that were measured, in their order."""
        return list(dict.fromkeys(sample["contestant"] for sample in self.samples))

    def of(self, contestant: str) -> list[dict[str, Any]]:
        """Its samples, round after round."""
        return [sample for sample in self.samples if sample["contestant"] == contestant]

    def spread(self, contestant: str, value: Value | str) -> Spread | None:
        """Of a figure, or of what a function makes of a sample."""
        values = (_value(sample, value) for sample in self.of(contestant))
        return Spread.of(each for each in values if each is not None)

    def ratio(self, value: Value | str, above: str, below: str, floor: str | None = None) -> Spread | None:
        """One contestant's figure over another's, within each round.

        Args:
            value: A figure, or a function of a sample.
            above: The contestant whose figure is divided.
            below: The one whose figure it is divided by.
            floor: Whose figure of the same round is taken off both first.
        """
        rounds: list[float] = []
        for sample in self.of(above):
            others = {
                other["contestant"]: _value(other, value) for other in self.samples if other["round"] == sample["round"]
            }
            base = 0.0 if floor is None else others.get(floor)
            one, two = others.get(above), others.get(below)
            if one is not None and two is not None and base is not None and two - base > 0:
                rounds.append((one - base) / (two - base))
        return Spread.of(rounds)

    def above_floor(self, contestant: str, value: Value | str) -> Spread | None:
        """A figure less the empty callback's of the same round."""
        floors = {sample["round"]: _value(sample, value) for sample in self.of(FLOOR)}
        pairs = ((_value(sample, value), floors.get(sample["round"])) for sample in self.of(contestant))
        return Spread.of(one - floor for one, floor in pairs if one is not None and floor is not None)

    def total(self, contestant: str, figure: str) -> int:
        """The sum of a count over all rounds."""
        return sum(sample[figure] for sample in self.of(contestant))

    def inside(self, sample: dict[str, Any]) -> float | None:
        """Share of the background's CPU that falls into the hot window.

        The background is what the process and its children use, less the threads that call, and less what is left of
        the empty callback's process in the same round: a pool of DSPy's has work of its own.

        Returns:
            None where nothing is stored or that was not waited for, or the background cannot be told from the callers,
            or is next to nothing.
        """
        if not sample["expected"] or sample["caller_cpu_us"] is None or sample["cpu_stored_us"] is None:
            return None
        floors = [
            other["cpu_calls_us"] - other["caller_cpu_us"]
            for other in self.of(FLOOR)
            if other["round"] == sample["round"] and other["caller_cpu_us"] is not None
        ]
        others = sample["caller_cpu_us"] + max(0.0, *floors, 0.0)
        total = sample["cpu_stored_us"] + sample["cpu_children_us"] - others
        if total < _NEXT_TO_NOTHING * sample["caller_cpu_us"]:
            return None
        return min(1.0, max(0.0, (sample["cpu_calls_us"] + sample["cpu_children_calls_us"] - others) / total))

    def invalid(self, sample: dict[str, Any]) -> str | None:
        """Return why the figures of a sample mean nothing, or None where they mean something or are not asked to.

        A writer that has hardly begun when the window is over has taken nothing from the callers, whatever it takes in
        a program that goes on.
        """
        if not self.parameters["is_timed"]:
            return None
        seconds = sample["wall_us"] * sample["calls"] / 1e6
        if sample["calls"] < ENOUGH_CALLS and seconds < ENOUGH_SECONDS:
            return f"the window had {sample['calls']} calls and {seconds:.1f} s"
        if sample["contestant"] == OPENINFERENCE and sample["report"].get("lm_spans", 0) < sample["calls"]:
            return f"{sample['report'].get('lm_spans', 0)} LM spans of {sample['calls']} calls"
        inside = self.inside(sample)
        if inside is not None and inside < ENOUGH_INSIDE:
            return f"{inside:.0%} of the background's CPU fell into the window"
        return None


def _value(sample: dict[str, Any], value: Value | str) -> float | None:
    return sample[value] if isinstance(value, str) else value(sample)


def wall(sample: dict[str, Any]) -> float | None:
    """Wall microseconds a call, where the hypervisor has let them be told."""
    return None if machine.is_disturbed(sample) else float(sample["wall_us"])


def p50_ms(sample: dict[str, Any]) -> float | None:
    """Median milliseconds of a call, where the hypervisor has let them be told."""
    return None if machine.is_disturbed(sample) else float(sample["latency_p50_us"] or 0) / 1000


def p99_ms(sample: dict[str, Any]) -> float | None:
    """Milliseconds that one call in a hundred takes at least, where the hypervisor has let them be told."""
    return None if machine.is_disturbed(sample) else float(sample["latency_p99_us"] or 0) / 1000


def last_wall_over_first(sample: dict[str, Any]) -> float | None:
    """Wall time of the last 1,000 calls of a series, over the first 1,000 after the writer began, where told."""
    return None if machine.is_disturbed(sample) else last_over_first(2)(sample)


def cpu_per_stored_trace(sample: dict[str, Any]) -> float | None:
    """CPU milliseconds of the process and its children until everything was stored, for each trace that was."""
    if not sample["found"] or sample["cpu_stored_us"] is None:
        return None
    return (sample["cpu_stored_us"] + sample["cpu_children_us"]) * sample["calls"] / sample["found"] / 1000


def cpu_of_all(sample: dict[str, Any]) -> float | None:
    """CPU microseconds a call of the process and its children until everything was stored."""
    return None if sample["cpu_stored_us"] is None else sample["cpu_stored_us"] + sample["cpu_children_us"]


def cpu_of_the_rest(sample: dict[str, Any]) -> float | None:
    """CPU microseconds a call of this process, less those of its callers, until everything was stored."""
    if sample["cpu_stored_us"] is None or sample["caller_cpu_us"] is None:
        return None
    return sample["cpu_stored_us"] - sample["caller_cpu_us"]


def until_stored(sample: dict[str, Any]) -> float | None:
    """Time until everything was stored, over that of the window."""
    if sample["stored_wall_s"] is None:
        return None
    return sample["stored_wall_s"] / (sample["wall_us"] * sample["calls"] / 1e6)


def waiting_per_thousand(sample: dict[str, Any]) -> float | None:
    """MiB that 1,000 calls leave in memory while the store takes nothing."""
    return None if sample["memory_waiting_mib"] is None else sample["memory_waiting_mib"] * 1000 / sample["calls"]


def last_over_first(place: int) -> Callable[[dict[str, Any]], float | None]:
    """What the last 1,000 calls of a series cost, over the first 1,000 after the writer began.

    Args:
        place: Where in a mark the figure stands: 2 is wall time, 3 the process's CPU, 4 the callers'.
    """

    def value(sample: dict[str, Any]) -> float | None:
        marks = sample["marks"]
        since = [mark for mark in marks if mark[1] > WRITER_BEGINS]
        if len(marks) < 2:  # noqa: PLR2004 - there is no step
            return None
        share = max(1, _THOUSAND // (marks[1][0] - marks[0][0]))
        if len(since) < 2 * share:
            return None
        return sum(mark[place] for mark in since[-share:]) / sum(mark[place] for mark in since[:share])

    return value


class Results:
    """One run."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.cells = [CellResult(cell) for cell in data["cells"]]
        self.titles = {each["id"]: each["title"] for each in data["contestants"]}
        self.order = list(self.titles)
        self._stores = {each["id"] for each in data["contestants"] if each["stores"]}
        self._ours = {each["id"] for each in data["contestants"] if each["is_ours"]}
        self.unavailable = {each["id"]: each["unavailable"] for each in data["contestants"] if each["unavailable"]}

    def axis(self, *names: str) -> list[CellResult]:
        """The cells of some axes."""
        return [cell for cell in self.cells if cell.axis in names]

    def cell(self, cell_id: str) -> CellResult | None:
        """The cell with this id, if it was run."""
        return next((cell for cell in self.cells if cell.id == cell_id), None)

    def sorted(self, contestants: Iterable[str]) -> list[str]:
        """Contestants in the order of reports."""
        return sorted(set(contestants), key=self.order.index)

    def stores(self, contestant: str) -> bool:
        """Whether its traces go to the store."""
        return contestant in self._stores

    def is_ours(self, contestant: str) -> bool:
        """Whether it is this library."""
        return contestant in self._ours

    def problems(self) -> list[str]:
        """What fails the run: cells that did not run, traces of ours that are not whole in the store, invalid figures.

        No time is judged. What others lose is a finding, and a window in which theirs did too little flatters them.
        """
        found = []
        for cell in self.cells:
            for failure in cell.failures:
                last = failure["error"].strip().splitlines()
                line = next((each for each in last if "Error" in each and not each.startswith(" ")), last[-1])
                found.append(f"{cell.id}, {failure['contestant']}: did not run: {line}")
            if not cell.samples and not cell.failures and not cell.data["skipped"]:
                found.append(f"{cell.id}: nobody took part")
            for sample in cell.samples:
                if sample["contestant"] in self._ours:
                    found += _incomplete(cell, sample)
                    if reason := cell.invalid(sample):
                        found.append(f"{cell.id}, {sample['contestant']}, round {sample['round']}: invalid: {reason}")
        return found


def _incomplete(cell: CellResult, sample: dict[str, Any]) -> list[str]:
    place = f"{cell.id}, {sample['contestant']}, round {sample['round']}"
    if sample["found"] != sample["expected"]:
        return [f"{place}: {sample['found']} traces in the store, {sample['expected']} expected"]
    if sample["whole"] != sample["expected"]:
        return [f"{place}: {sample['expected'] - sample['whole']} of {sample['expected']} traces are not whole"]
    errors = sample["report"].get("internal_errors", 0)
    return [f"{place}: {errors} internal errors of the tracer"] if errors else []
