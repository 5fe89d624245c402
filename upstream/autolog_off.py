"""A pytest plugin that holds the side without us to what it says: none of ours is loaded there."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import pytest

_entry_points = importlib.metadata.entry_points


def _others(**selected: Any) -> Any:
    """Entry points of all packages but this one: MLflow loads its plugins with its stores, whoever's they are."""
    found = _entry_points(**selected)
    if not selected:  # in Python 3.10 and 3.11 these are groups, not entry points
        return found
    return importlib.metadata.EntryPoints(each for each in found if not each.value.startswith("dspy_mlflow_async"))


importlib.metadata.entry_points = _others


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Fail a test in whose process this package was loaded, whoever did it."""
    assert "dspy_mlflow_async" not in sys.modules, "dspy_mlflow_async is loaded on the side that is without it"
