"""The one boundary between our faults and the program; and the settings, checked when they are made."""

import logging

import pytest

from dspy_mlflow_async import guard
from dspy_mlflow_async.settings import Settings


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Nothing has failed yet, and errors are swallowed."""
    guard.start_afresh()
    monkeypatch.delenv("DSPY_MLFLOW_ASYNC_STRICT")
    yield
    guard.start_afresh()


def place(error=None):
    """A guarded function that fails."""
    error = error or ValueError("a fault")

    @guard.guarded
    def failing():
        raise error

    return failing


def test_errors_are_swallowed_and_counted():
    """The caller gets None, and the count grows."""
    failing = place()

    assert failing() is None
    failing()
    assert 2 == guard.internal_errors()


def test_one_log_line_for_a_place(caplog):
    """With a traceback, once, however often it fails; another place has its own."""
    failing = place()
    with caplog.at_level(logging.ERROR, logger="dspy_mlflow_async"):
        for _ in range(3):
            failing()
        guard.report("elsewhere", ValueError("another"))

    assert 2 == len(caplog.records)
    assert caplog.records[0].exc_info
    assert "test_guard" in caplog.records[0].getMessage()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), GeneratorExit()])
def test_what_is_no_fault_passes(error):
    """What is not an ``Exception`` is the user's."""
    with pytest.raises(type(error)):
        place(error)()
    assert 0 == guard.internal_errors()


def test_strict_mode_raises(monkeypatch):
    """The test suite sees every fault."""
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_STRICT", "1")
    with pytest.raises(ValueError, match="a fault"):
        place()()


def test_results_pass():
    """A guarded function that works is as it was, with its name and docstring."""

    @guard.guarded
    def working(value, *, key):
        """Said."""
        return value, key

    assert (1, 2) == working(1, key=2)
    assert ("working", "Said.") == (working.__name__, working.__doc__)


def test_settings_are_frozen():
    """A change is a new record."""
    with pytest.raises(AttributeError):
        Settings().log_traces = False


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("log_traces", 1, TypeError),
        ("max_value_bytes", 0, ValueError),
        ("max_value_bytes", "1", TypeError),
        ("redact", 1, TypeError),
    ],
)
def test_settings_are_checked(name, value, error):
    """An invalid value is refused with its name."""
    with pytest.raises(error, match=name):
        Settings(**{name: value})
