"""Statistics of scores: standard errors, and paired differences between cases with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RESAMPLES = 2000
CONFIDENCE = 0.95
_BLOCK = 1_000_000  # numbers drawn at once: memory stays flat with 10,000 examples


@dataclass(frozen=True, slots=True)
class Difference:
    """Paired difference of a case from the baseline, on the examples that both have.

    Attributes:
        mean: The mean difference of the scores, in percentage points.
        low: The lower end of its bootstrap confidence interval; None for one pair, which says nothing of the others.
        high: The upper end.
        pairs: How many examples both have.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def is_clear(self) -> bool:
        """True if the interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def standard_error(scores: Sequence[float]) -> float | None:
    """Return the standard error of the mean, in percentage points; None for fewer than two scores."""
    if len(scores) < 2:  # noqa: PLR2004 - the variance of one is unknown
        return None
    mean = math.fsum(scores) / len(scores)
    variance = math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    return 100 * math.sqrt(variance / len(scores))


def paired_difference(
    scores: Mapping[int, float], baseline: Mapping[int, float], *, seed: int, resamples: int = RESAMPLES
) -> Difference | None:
    """Return the paired difference of two cases over one devset.

    The interval is the percentile bootstrap's: the same seed gives the same one, whatever other cases there are.

    Args:
        scores: The scores of the case by place in the devset.
        baseline: Those of the baseline.
        seed: Of NumPy's generator.
        resamples: How often the pairs are drawn anew.

    Returns:
        The difference, or None where the two have no example in common.
    """
    import numpy as np

    places = sorted(scores.keys() & baseline.keys())
    if not places:
        return None
    differences = np.array([scores[place] - baseline[place] for place in places], dtype=float)
    if len(places) == 1:
        return Difference(100 * float(differences[0]), None, None, 1)
    size, generator = len(places), np.random.default_rng(seed)
    means, block = [], max(1, _BLOCK // size)
    for start in range(0, resamples, block):
        drawn = generator.integers(0, size, (min(block, resamples - start), size))
        means.append(differences[drawn].mean(axis=1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Difference(100 * float(differences.mean()), 100 * float(low), 100 * float(high), size)
