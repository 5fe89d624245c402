"""Standard errors and bootstrap intervals."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_mlflow_async.evaluate.comparison import cost_text
from dspy_mlflow_async.evaluate.statistics import paired_difference, standard_error

SCORES = st.lists(st.floats(0, 1, allow_nan=False), min_size=2, max_size=60)


def test_standard_error():
    """Of the mean, in percentage points."""
    assert standard_error([1.0]) is None
    assert 0.0 == standard_error([0.5, 0.5, 0.5])
    assert 100 * math.sqrt(1 / 3 / 4) == pytest.approx(standard_error([0, 0, 1, 1]))


@given(SCORES, st.integers(0, 99))
def test_interval_holds_the_mean_and_is_seeded(scores, seed):
    """The interval is around the mean, and the same seed gives the same one."""
    baseline = dict.fromkeys(range(len(scores)), 0.5)
    found = paired_difference(dict(enumerate(scores)), baseline, seed=seed, resamples=300)
    again = paired_difference(dict(enumerate(scores)), baseline, seed=seed, resamples=300)

    assert found == again
    assert found.low - 1e-9 <= 100 * (sum(scores) / len(scores) - 0.5) + 1e-6
    assert len(scores) == found.pairs
    assert found.low <= found.high


def test_interval_covers_the_truth():
    """About 95 of 100 intervals hold the true difference."""
    import numpy as np

    generator, hits = np.random.default_rng(7), 0
    for number in range(200):
        scores = dict(enumerate((generator.random(80) < 0.7).astype(float)))
        baseline = dict(enumerate((generator.random(80) < 0.6).astype(float)))
        found = paired_difference(scores, baseline, seed=number, resamples=400)
        hits += found.low <= 10 <= found.high

    assert 180 <= hits <= 199


def test_only_pairs_count():
    """Examples that one of the two lacks are left out; without any in common there is no difference."""
    found = paired_difference({0: 1.0, 1: 1.0, 5: 0.0}, {1: 0.0, 5: 0.0, 9: 1.0}, seed=0)

    assert (50.0, 2) == (found.mean, found.pairs)
    assert paired_difference({0: 1.0}, {1: 1.0}, seed=0) is None


def test_one_pair():
    """One pair has a difference, and says nothing of how sure that is."""
    found = paired_difference({3: 1.0}, {3: 0.0}, seed=0)

    assert (100.0, None, None, 1) == (found.mean, found.low, found.high, found.pairs)
    assert not found.is_clear


@pytest.mark.parametrize(
    ("cost", "text"),
    [(None, ""), (0.0, "0.0000"), (0.0103, "0.0103"), (1.5, "1.5000"), (0.00012, "0.00012"), (0.0000305, "0.000030")],
)
def test_cost(cost, text):
    """A small cost keeps two digits that say something."""
    assert text == cost_text(cost)


def test_many_examples_in_bounded_memory():
    """10,000 examples are drawn in blocks."""
    found = paired_difference({n: n % 2 for n in range(10_000)}, dict.fromkeys(range(10000), 0), seed=0)

    assert 50.0 == found.mean
    assert found.is_clear
