"""Concurrency tests read their traces back from MLflow's sqlite store."""

import os

import pytest


@pytest.fixture
def recorded(request):
    """A function that gives the test's traces, read back from its store, with ``autolog()`` on.

    With ``TESTS_IN_MEMORY=1`` they stay in memory, for running a test hundreds of times.
    """
    if os.environ.get("TESTS_IN_MEMORY") == "1":
        captured = request.getfixturevalue("traces")
        return lambda: list(captured)
    return request.getfixturevalue("stored")
