"""Pytest plugin: the fixture ``evaluation`` and the mark ``evaluate``.

Pytest imports it wherever the package is installed, so it imports neither DSPy nor MLflow until a test evaluates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dspy_mlflow_async.pytest_plugin.evaluations import Evaluations

MARK = "evaluate"
_ARGUMENTS = ("min", "max", "not_worse_than", "tolerance", "certain")
_USAGE = (
    "evaluate(min={'score': 0.8}, max={'cost': 2}, not_worse_than=RUN, tolerance=0, certain=False): "
    "what the evaluations of the fixture `evaluation` must keep (dspy-mlflow-async)."
)
_found = pytest.StashKey[Any]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line("markers", _USAGE)


@pytest.fixture
def evaluation(request: pytest.FixtureRequest) -> Evaluations:
    """Evaluate programs in a test: ``evaluation(program, devset=..., metric=...)``; ``evaluation.acall`` in async ones.

    The comparison is shown where the test fails, and ``@pytest.mark.evaluate`` says what must hold.
    """
    from dspy_mlflow_async.pytest_plugin.evaluations import Evaluations, rules_of

    mark = request.node.get_closest_marker(MARK)
    try:
        rules, baseline = (None, None) if mark is None else rules_of(mark.args, mark.kwargs)
    except (TypeError, ValueError) as error:  # before anything is spent
        pytest.fail(f"@pytest.mark.{MARK}: {error}", pytrace=False)
    found = request.node.stash[_found] = Evaluations(request.node, rules, baseline)
    return found


@pytest.hookimpl(trylast=True)  # once the test has run, and only if it has passed
def pytest_runtest_call(item: pytest.Item) -> None:
    """Judge what a marked test has evaluated."""
    mark = item.get_closest_marker(MARK)
    if mark is None:
        return
    found: Evaluations | None = item.stash.get(_found, None)
    if found is not None:
        said = found.judge()
    elif mark.args or any(name in mark.kwargs for name in _ARGUMENTS):
        said = "nothing was judged: the test does not use the fixture `evaluation`"
    else:
        return  # a mark of somebody else's
    if said:
        pytest.fail(f"@pytest.mark.{MARK}: {said}", pytrace=False)
