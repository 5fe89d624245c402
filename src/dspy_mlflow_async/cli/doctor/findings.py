"""Findings of the doctor, in words."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dspy_mlflow_async.printable import mask_uris


class Level(enum.Enum):
    """Severity of a finding."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "PROBLEM"


@dataclass(frozen=True, slots=True)
class Finding:
    """Finding of one check.

    Attributes:
        level: How much it matters.
        topic: What was looked at, in a word or two.
        text: One sentence; for a problem, with what to do next.
        details: Further lines, for those who want to know.
    """

    level: Level
    topic: str
    text: str
    details: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Mask what stands in URIs: a finding is made to be shown, and to be pasted into a bug report."""
        object.__setattr__(self, "text", mask_uris(self.text))
        object.__setattr__(self, "details", tuple(map(mask_uris, self.details)))

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.level.value:<8}{self.topic}: {self.text}"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Findings of all checks."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Findings that must be mended."""
        return tuple(finding for finding in self.findings if finding.level is Level.PROBLEM)

    @property
    def is_well(self) -> bool:
        """True if nothing must be mended."""
        return not self.problems

    def __str__(self) -> str:
        """Return a line for each finding."""
        return "\n".join(map(str, self.findings))
