"""Tests of the services: wrapped programs, requests, and real servers."""

import shutil

import pytest

import dspy_mlflow_async
from dspy_mlflow_async import export
from dspy_mlflow_async.seams import mlflow_trace_settings


@pytest.fixture(autouse=True)
def _leaves_no_scope():
    """After each test no destination, ratio or rule is left in the test's own context."""
    yield
    assert mlflow_trace_settings.DESTINATION.get() is None
    assert mlflow_trace_settings.RATIO.get() is None
    assert export.KEEPS.get() is None


@pytest.fixture
def sampled():
    """How many traces have been left out since the test began."""
    before = dspy_mlflow_async.stats().sampled_out
    return lambda: dspy_mlflow_async.stats().sampled_out - before


@pytest.fixture
def store(store_uri, tmp_path, request):
    """A sqlite store of this test alone."""
    path = tmp_path / "mlflow.db"
    shutil.copyfile(request.getfixturevalue("_empty_store"), path)
    return f"sqlite:///{path}"
