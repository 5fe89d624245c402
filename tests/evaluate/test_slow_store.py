"""A real server that takes its time for each request: the event loop does not wait for it, and nothing is left open."""

import asyncio
import threading
import time

import mlflow
import pytest
from small import examples, is_right

import dspy_mlflow_async
from dspy_mlflow_async import AsyncEvaluate, aevaluate_all, reachability
from echo import Chain
from mlflow_server import mlflow_server
from slow_store import slow_store

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("mlflow server")]
PATIENCE = 2.0  # seconds in which the loop must get three turns, on the busiest machine


@pytest.fixture(scope="module")
def server(tmp_path_factory, _empty_store):
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.db").write_bytes(_empty_store.read_bytes())
    with mlflow_server(folder, f"sqlite:///{folder / 'server.db'}") as server:
        yield server


@pytest.fixture
def slow(server, store_uri, monkeypatch):
    """The server behind a proxy, with our tracer on; it is slow once ``delay`` is set."""
    with slow_store(server.uri) as slow:
        mlflow.set_tracking_uri(slow.uri)
        mlflow.tracing.reset()
        mlflow.set_experiment(f"e{time.time_ns()}")
        dspy_mlflow_async.autolog(log_evals=True, silent=True)
        yield slow
        slow.delay = 0.0
        dspy_mlflow_async.flush()
        dspy_mlflow_async.autolog(disable=True)
        mlflow.set_tracking_uri(store_uri)
        mlflow.tracing.reset()


@pytest.mark.long
def test_a_real_server_is_known(server):
    """Before anything is spent a server is asked who it is."""
    assert reachability.Reached(version=mlflow.__version__) == reachability.look(server.uri)


class Turns:
    """The turns of an event loop, while a block lasts; a request is answered when there have been three meanwhile.

    Attributes:
        missed: How many requests waited in vain.
    """

    def __init__(self):
        self.missed = 0
        self._taken = 0
        self._changed = threading.Condition()

    async def __aenter__(self):
        self._ticking = asyncio.ensure_future(self._tick())
        return self

    async def __aexit__(self, *error):
        self._ticking.cancel()

    async def _tick(self):
        while True:
            await asyncio.sleep(0.01)
            with self._changed:
                self._taken += 1
                self._changed.notify_all()

    def wait(self):
        with self._changed:
            wanted = self._taken + 3
            self.missed += not self._changed.wait_for(lambda: self._taken >= wanted, PATIENCE)


def found():
    """The status of all runs by name."""
    return {run.info.run_name: run.info.status for run in mlflow.search_runs(output_format="list")}


async def alone():
    return await AsyncEvaluate(devset=examples(), metric=is_right).acall(Chain())


async def in_a_run():
    async with dspy_mlflow_async.run("mine"):
        return await alone()


async def all_at_once():
    return await aevaluate_all({"a": Chain(), "b": Chain()}, devset=examples(), metric=is_right, display_progress=False)


@pytest.mark.long
@pytest.mark.parametrize(
    ("evaluate", "runs"),
    [
        (alone, {"eval": "FINISHED"}),
        (in_a_run, {"mine": "FINISHED"}),
        (all_at_once, {"evaluate_all": "FINISHED", "a": "FINISHED", "b": "FINISHED"}),
    ],
)
async def test_the_loop_goes_on(slow, evaluate, runs):
    """While runs are opened, filled and closed, other tasks have their turns: before each of the store's answers."""
    await evaluate()  # imports what it needs
    mlflow.set_experiment(f"e{time.time_ns()}")
    slow.requests.clear()
    before = slow.wait
    async with Turns() as turns:
        slow.wait = turns.wait
        await evaluate()
        slow.wait = before

    assert runs == found()
    assert len(slow.of_runs()) >= len(runs)
    assert 0 == turns.missed


@pytest.mark.long
@pytest.mark.parametrize(("evaluate", "requests"), [(alone, 1), (all_at_once, 1), (all_at_once, 2)])
async def test_cancelled_while_it_is_opened(slow, evaluate, requests):
    """The store is about to create the run: it ends KILLED, and nothing has run in it."""
    slow.delay = 0.3
    slow.requests.clear()
    call = asyncio.ensure_future(evaluate())
    while len(slow.of_runs()) < requests:  # noqa: ASYNC110 - the proxy's threads tell no task
        await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call, 60)
    slow.delay = 0.0
    deadline = time.monotonic() + 60
    while set(found().values()) != {"KILLED"} and time.monotonic() < deadline:  # noqa: ASYNC110 - nor does the store
        await asyncio.sleep(0.05)  # it may just be created
    dspy_mlflow_async.flush()

    assert {"KILLED"} == set(found().values())
    assert not mlflow.search_traces(return_type="list")
