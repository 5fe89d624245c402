"""Switched off in the middle of traces: what began under our exporter stays ours until it is stored."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import dspy
import mlflow
import pytest
from mlflow.utils import rest_utils
from stores import span_processor, wait_until

from dspy_mlflow_async import TracingCallback, export
from dspy_mlflow_async.export.assemble.span_processor import WholeTraceProcessor
from dspy_mlflow_async.export.write.writer import Writer
from echo import EchoLM

TIMEOUT = 60


class InFlight:
    """Traces that are open in threads of their own, with a child that ends later, until they are let go."""

    def __init__(self, size):
        self.ids = []
        self._may_end = [threading.Event() for _ in range(size)]
        self._pool = ThreadPoolExecutor(size)
        ready = threading.Barrier(size + 1, timeout=TIMEOUT)
        self._calls = [self._pool.submit(self._call, event, ready) for event in self._may_end]
        ready.wait()

    def _call(self, may_end, ready):
        with mlflow.start_span("root") as root:
            self.ids.append(root.trace_id)
            ready.wait()
            with mlflow.start_span("child"):
                assert may_end.wait(TIMEOUT)
        return root.trace_id

    def end(self, first, last):
        """Let some of them end, and wait until they have; gives their ids."""
        for event in self._may_end[first:last]:
            event.set()
        return [call.result(TIMEOUT) for call in self._calls[first:last]]

    def close(self):
        self.end(0, len(self._calls))
        self._pool.shutdown()


@pytest.fixture
def in_flight():
    made = []

    def make(size):
        made.append(InFlight(size))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def off():
    """A function that waits until nothing of ours is in MLflow's provider any more."""
    return lambda: wait_until(lambda: not isinstance(span_processor(), WholeTraceProcessor), TIMEOUT)


def test_off_and_on_in_the_middle_of_calls(make, in_flight):
    """Half end while it is off, half when it is on again: flush waits for all, and the books know each."""
    installed = make()
    calls = in_flight(20)
    installed.undo()
    calls.end(0, 10)
    undo = export.install(export.ExportOptions())
    try:
        calls.end(10, 20)

        assert export.flush(TIMEOUT)
        assert dict.fromkeys(calls.ids, 2) == {k: len(t.data.spans) for k, t in installed.read().items()}
        assert export.ExportStats(started=20, ended=20, stored=20) == export.stats()
    finally:
        undo()


def test_off_for_good_in_the_middle_of_calls(make, in_flight, off):
    """While it is off, flush and MLflow's own wait for what began before; then MLflow's exporter is alone again."""
    installed = make()
    calls = in_flight(6)
    installed.undo()
    first = calls.end(0, 3)
    assert export.flush(TIMEOUT)
    assert set(first) == set(installed.read())
    second = calls.end(3, 6)
    mlflow.flush_trace_async_logging()

    assert dict.fromkeys([*first, *second], 2) == {
        key: len(trace.data.spans) for key, trace in installed.read().items()
    }
    assert export.ExportStats(started=6, ended=6, stored=6) == export.stats()
    off()
    assert type(span_processor()).__module__.startswith("mlflow.")


def test_what_is_written_afterwards_imports_nothing(make, monkeypatch):
    """The last traces are priced as all others: a writer that imports LiteLLM waits for whoever imports meanwhile."""
    installed = make()
    writes, may_write, write, imported = threading.Event(), threading.Event(), Writer.write, []
    monkeypatch.delitem(sys.modules, "litellm", raising=False)

    def write_when_told(self, operations):
        writes.set()
        assert may_write.wait(TIMEOUT)
        outcomes = write(self, operations)
        imported.append("litellm" in sys.modules)
        return outcomes

    monkeypatch.setattr(Writer, "write", write_when_told)
    with dspy.context(lm=EchoLM(model="openai/gpt-4o-mini"), callbacks=[TracingCallback()]):
        dspy.Predict("question -> answer")(question="@a")
    assert writes.wait(TIMEOUT)
    installed.undo()
    may_write.set()
    assert export.flush(TIMEOUT)

    assert {False} == {*imported}
    (trace,) = installed.read().values()
    assert trace.info.cost["total_cost"] > 0


def test_what_begins_meanwhile_is_mlflows(make, in_flight, off):
    """A trace that begins while others of ours are open goes by MLflow's exporter, and is in nobody's books of ours."""
    installed = make()
    calls = in_flight(2)
    installed.undo()
    with mlflow.start_span("theirs") as theirs, mlflow.start_span("child"):
        pass
    calls.end(0, 2)
    mlflow.flush_trace_async_logging()

    assert {*calls.ids, theirs.trace_id} == set(installed.read())
    assert 2 == export.stats().started
    off()


def test_switched_off_and_on_many_times(make, in_flight):
    """Each switch hands on what is open; nothing is lost or doubled, and MLflow's requests are bounded once."""
    installed = make()
    calls = in_flight(12)
    undo = installed.undo
    for number in range(6):
        undo()
        calls.end(2 * number, 2 * number + 1)
        undo = export.install(export.ExportOptions())
        calls.end(2 * number + 1, 2 * number + 2)
    try:
        assert export.flush(TIMEOUT)
        assert set(calls.ids) == set(installed.read())
        assert export.ExportStats(started=12, ended=12, stored=12) == export.stats()
    finally:
        undo()
    wait_until(lambda: rest_utils._get_http_response_with_retries.__module__ == "mlflow.utils.request_utils", TIMEOUT)
