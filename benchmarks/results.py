"""The results of a run: read, validated, checked, and turned into medians, spreads and ratios."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from benchmarks.contestants import FLOOR

SCHEMA_VERSION = 1
SCHEMA = json.loads((Path(__file__).parent / "schema.json").read_text())

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


def _value(sample: dict[str, Any], value: Value | str) -> float | None:
    return sample[value] if isinstance(value, str) else value(sample)


def cpu_per_stored_trace(sample: dict[str, Any]) -> float | None:
    """CPU milliseconds of the process and its children until everything was stored, for each trace that was."""
    if not sample["found"]:
        return None
    return (sample["cpu_stored_us"] + sample["cpu_children_us"]) * sample["calls"] / sample["found"] / 1000


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

    def problems(self) -> list[str]:
        """What fails the run: cells that did not run, and traces of ours that are not whole in the store.

        No time is judged, and what others lose is a finding.
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
        return found


def _incomplete(cell: CellResult, sample: dict[str, Any]) -> list[str]:
    place = f"{cell.id}, {sample['contestant']}, round {sample['round']}"
    if sample["found"] != sample["expected"]:
        return [f"{place}: {sample['found']} traces in the store, {sample['expected']} expected"]
    if sample["whole"] != sample["expected"]:
        return [f"{place}: {sample['expected'] - sample['whole']} of {sample['expected']} traces are not whole"]
    errors = sample["report"].get("internal_errors", 0)
    return [f"{place}: {errors} internal errors of the tracer"] if errors else []
