"""The shared limit: never exceeded, fair between evaluations, closed for good."""

import anyio
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_mlflow_async.evaluate.limits import Entrance, Slots


async def _work(slots, name, size, steps, log):
    """An evaluation of ``size`` examples, each of which takes ``steps`` turns of the loop."""
    entrance = Entrance()

    async def one():
        for _ in range(steps):
            await anyio.lowlevel.checkpoint()
        log.append((name, -1))
        slots.leave(entrance)

    async with anyio.create_task_group() as group:
        for _ in range(size):
            if not await slots.enter(entrance):
                return
            log.append((name, 1))
            group.start_soon(one)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=5),
)
def test_limit_and_completeness(limit, evaluations):
    """However many evaluations of whatever speed share the slots: all examples run, never more than the limit."""
    log = []

    async def main():
        slots = Slots(limit)
        async with anyio.create_task_group() as group:
            for name, (size, steps) in enumerate(evaluations):
                group.start_soon(_work, slots, name, size, steps, log)

    anyio.run(main)
    in_flight = peak = 0
    for _, change in log:
        in_flight += change
        peak = max(peak, in_flight)

    assert sum(size for size, _ in evaluations) == sum(change for _, change in log if change > 0)
    assert peak <= limit
    assert 0 == in_flight


def test_fair_to_the_fast_and_the_slow():
    """One with slow examples does not take all slots from one with fast ones."""
    log = []

    async def main():
        slots = Slots(4)
        async with anyio.create_task_group() as group:
            group.start_soon(_work, slots, "slow", 40, 100, log)
            group.start_soon(_work, slots, "fast", 40, 1, log)

    anyio.run(main)
    begun = [name for name, change in log if change > 0]
    until_fast_is_done = begun[: len(begun) - begun[::-1].index("fast")]
    slow_in_flight, most = 0, 0
    for name, change in log[: log.index(("fast", 1)) + 60]:
        if name == "slow":
            slow_in_flight += change
            most = max(most, slow_in_flight)

    assert until_fast_is_done.count("slow") <= 8
    assert most <= 3


def test_closing():
    """Whoever waits is sent away, and who asks later too; who is in may stay."""

    async def main():
        slots, first, second = Slots(1), Entrance(), Entrance()
        assert await slots.enter(first)
        answers = []

        async def wait():
            answers.append(await slots.enter(second))

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            slots.close()
        answers.append(await slots.enter(second))
        slots.leave(first)
        return answers

    assert [False, False] == anyio.run(main)


def test_cancelled_while_waiting():
    """A slot that was granted to somebody who is being cancelled goes to the next."""

    async def main():
        slots, first, second, third = Slots(1), Entrance(), Entrance(), Entrance()
        assert await slots.enter(first)
        async with anyio.create_task_group() as group:

            async def impatient(scope):
                with scope:
                    if await slots.enter(second):  # too late to be cancelled: the slot is its own to give back
                        slots.leave(second)

            scope = anyio.CancelScope()
            group.start_soon(impatient, scope)
            await anyio.wait_all_tasks_blocked()
            slots.leave(first)  # granted to the second, which does not run before it is cancelled
            scope.cancel()
            with anyio.fail_after(10):
                assert await slots.enter(third)
        return first.in_flight, second.in_flight, third.in_flight

    assert (0, 0, 1) == anyio.run(main)
