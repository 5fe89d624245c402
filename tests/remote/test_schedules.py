"""Whatever workers do, each example counts once: schedules of deaths, delays and late replies against a plain model."""

import concurrent.futures
import itertools
import threading
from concurrent.futures.process import BrokenProcessPool

import anyio
import dspy
import pytest
from elsewhere_examples import Where, is_right
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_mlflow_async import AsyncEvaluate, evaluate_all
from dspy_mlflow_async.remote import Executor, plan
from dspy_mlflow_async.remote.workers import ATTEMPTS, WorkerLostError, Workers

LIVES, DIES, DIES_LATE = "lives", "dies", "replies, and is lost all the same"


class Engine(Workers):
    """Workers in this process that do as a schedule says: ``fates[item]`` is what becomes of its attempts, in order.

    Nothing happens by itself: a call rests until ``step`` is asked for, in the order that ``choose`` gives.
    """

    def __init__(self, count, fates, choose, in_flight=float("inf")):
        super().__init__(count, in_flight=in_flight)
        self.fates, self.choose = fates, choose
        self.resting, self.done, self.most = [], [], 0
        self.alone = []

    def start(self):
        pass

    def submit(self, worker, plan, item):
        future = concurrent.futures.Future()
        self.resting.append((worker, item, future))
        return future

    def cancel(self, worker, future):
        future.cancel()

    def settle(self, plan, timeout):
        return []

    def step(self):
        """One call ends: of a worker that dies, all calls are lost that it has in hand."""
        at = self.choose(len(self.resting))
        worker, (name, attempt), future = self.resting.pop(at)
        fate = self.fates[name][attempt - 1]
        if attempt == ATTEMPTS:
            self.alone.append((name, [each for w, each, _ in self.resting if w == worker]))
        if fate == LIVES:
            self.done.append(name)
            future.set_result(name)
            return
        if fate == DIES_LATE:
            self.done.append(name)
        lost = [future, *(each for w, _, each in self.resting if w == worker)]
        self.resting = [each for each in self.resting if each[0] != worker]
        self.roster.note_down(worker)
        for each in lost:
            each.set_exception(WorkerLostError("gone"))
        self.roster.note_up(worker)


FATES = st.lists(st.tuples(*[st.sampled_from([LIVES, DIES, DIES_LATE])] * ATTEMPTS), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(fates=FATES, workers=st.integers(1, 3), order=st.lists(st.integers(0, 50), min_size=1))
@pytest.mark.long
def test_each_call_ends_once_whatever_dies(fates, workers, order):
    """Each call gets one reply, or is lost by its third attempt, which had its worker for itself: so it is to blame."""
    numbers = itertools.cycle(order)
    engine = Engine(workers, fates, lambda size: next(numbers) % size)
    replies, losses = {}, {name: [] for name in range(len(fates))}

    async def call(name):
        try:
            replies[name] = await engine.call(None, lambda attempt: (name, attempt), losses[name].append)
        except WorkerLostError:
            replies[name] = None

    async def main():
        async with anyio.create_task_group() as group:
            for name in range(len(fates)):
                group.start_soon(call, name)
            while len(replies) < len(fates):
                await anyio.wait_all_tasks_blocked()
                if engine.resting:
                    engine.step()

    anyio.run(main)

    assert set(range(len(fates))) == set(replies)
    for name, reply in replies.items():
        attempts = [loss.attempt for loss in losses[name]]
        assert list(range(1, len(attempts) + 1)) == attempts
        assert (reply is None) == (len(attempts) == ATTEMPTS)
        if reply is None:  # nobody else's death has failed it
            assert fates[name][ATTEMPTS - 1] != LIVES
        else:
            assert reply == name
    assert all(others == [] for _, others in engine.alone)
    assert all(load == 0 for load in engine.roster.load.values())


async def test_whoever_is_cancelled_gives_its_worker_back():
    """A call that is cancelled while it waits, or while it runs, leaves the worker to the next one."""
    engine = Engine(1, {}, lambda size: 0, in_flight=1)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.call, None, lambda _: ("first", 1))
        await anyio.wait_all_tasks_blocked()
        group.start_soon(engine.call, None, lambda _: ("second", 1))
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()

    assert [True] == [future.cancelled() for *_, future in engine.resting]
    assert {0: 0} == dict(engine.roster.load)


@pytest.fixture
def threads():
    """An executor in this process: what it is given is pickled all the same."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        yield pool


def examples(size):
    return [dspy.Example(question=f"@e-{n}", answer=f"@e-{n}").with_inputs("question") for n in range(size)]


def test_any_executor_evaluates(threads):
    """`Executor` over an executor: the plan goes to a process once it says that it does not know it."""
    comparison = evaluate_all(
        {"one": Where()}, devset=examples(5), metric=is_right, workers=Executor(threads), display_progress=False
    )

    assert ("finished", 100.0, 5) == (comparison["one"].status, comparison["one"].score, comparison["one"].examples)
    assert [plan.process_name()] == [report.process for report in comparison.workers]


class Breaking(concurrent.futures.ThreadPoolExecutor):
    """An executor that breaks at its third call, as a ``ProcessPoolExecutor`` does when it loses a process."""

    def __init__(self):
        super().__init__(2)
        self.calls = itertools.count(1)

    def submit(self, function, *args):
        if next(self.calls) >= 3:
            raise BrokenProcessPool("a process is gone")
        return super().submit(function, *args)


def test_an_executor_that_breaks_is_made_anew_or_said_to_be_broken():
    """A function that makes executors replaces one that has broken; an executor itself cannot be replaced."""
    made = []

    def make():
        made.append(Breaking() if not made else concurrent.futures.ThreadPoolExecutor(2))
        return made[-1]

    async def main(workers):
        evaluator = AsyncEvaluate(devset=examples(6), metric=is_right, workers=workers, max_concurrency=2)
        return (await evaluator.acall(Where())).score

    assert 100.0 == anyio.run(main, Executor(make))
    assert 2 == len(made)
    with pytest.raises(RuntimeError, match="Give Executor a function that makes one"):
        anyio.run(main, Executor(Breaking()))
    for each in made:
        each.shutdown()


def test_workers_that_do_not_start_say_so():
    """Roster that has failed lets nobody wait: not those who do, and not those who come."""
    engine = Engine(1, {}, lambda size: 0)
    engine.roster.note_down(0)

    async def main():
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(refused)
            await anyio.wait_all_tasks_blocked()
            threading.Thread(target=engine.roster.fail, args=(RuntimeError("no Python here"),)).start()
        await refused()

    async def refused():
        with pytest.raises(RuntimeError, match="no Python here"):
            await engine.call(None, lambda _: ("one", 1))

    anyio.run(main)
