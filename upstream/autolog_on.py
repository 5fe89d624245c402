"""A pytest plugin that puts our autolog on before each test of somebody else's suite."""

from __future__ import annotations

import pytest

import dspy_mlflow_async


def pytest_sessionstart() -> None:
    """Import what the first use imports: a test may forbid that files are read."""
    dspy_mlflow_async.autolog(silent=True)
    pytest_runtest_teardown()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """After the fixtures, which may reset DSPy's settings, and before the test itself."""
    dspy_mlflow_async.autolog(silent=True)


def pytest_runtest_teardown() -> None:
    """Leave no write under way when the test's store goes."""
    dspy_mlflow_async.flush(timeout=10)
    dspy_mlflow_async.autolog(disable=True)
