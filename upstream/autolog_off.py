"""A pytest plugin that holds the side without us to what it says: none of ours is loaded there."""

from __future__ import annotations

import sys

import pytest


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Fail a test in whose process this package was loaded, whoever did it."""
    assert "dspy_mlflow_async" not in sys.modules, "dspy_mlflow_async is loaded on the side that is without it"
