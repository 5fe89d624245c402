"""A sync program's thread that goes on after its example's time is over: it is heeded by the limit and the budget."""

import asyncio
import threading

import dspy
import pytest
from small import examples, is_right

from dspy_mlflow_async import AsyncEvaluate, aevaluate_all
from dspy_mlflow_async.evaluate import examples as module


class Blocks(dspy.Module):
    """Blocks its thread on the first question until the test lets it go on, then asks the LM."""

    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict("question -> answer")
        self.begun, self.go_on = [], threading.Event()
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def forward(self, question):
        with self.lock:
            self.begun.append(question)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            if question == "@e-0":
                assert self.go_on.wait(30)
            return self.predict(question=question)
        finally:
            with self.lock:
                self.now -= 1


@pytest.fixture
def timed_out(monkeypatch):
    """Set when an example is failed."""
    event = asyncio.Event()
    monkeypatch.setattr(module.dspy_evaluate.PARALLELIZER_LOGGER, "error", lambda _: event.set())
    return event


async def turns(number=30):
    for _ in range(number):
        await asyncio.sleep(0)


async def test_limit(traces, timed_out):
    """Nothing takes the place of a thread that is still at work; its example is failed at its time all the same."""
    program = Blocks()
    evaluator = AsyncEvaluate(devset=examples(size=3), metric=is_right, max_concurrency=1, timeout=1, max_errors=9)
    task = asyncio.ensure_future(evaluator.acall(program))
    await asyncio.wait_for(timed_out.wait(), 30)
    await turns()
    begun = list(program.begun)
    program.go_on.set()
    result = await asyncio.wait_for(task, 30)

    assert ["@e-0"] == begun
    assert [0.0, True, True] == [score for *_, score in result.results]
    assert 1 == program.most
    assert 3 == len(traces)


async def test_end(timed_out):
    """An evaluation does not wait for such a thread at its end."""
    program = Blocks()
    evaluator = AsyncEvaluate(devset=examples(size=2), metric=is_right, max_concurrency=2, timeout=1)
    result = await asyncio.wait_for(evaluator.acall(program), 30)
    is_at_work = program.now
    program.go_on.set()

    assert 50.0 == result.score
    assert 1 == is_at_work


async def test_budget(traces, timed_out, experiment):
    """What such a thread uses after its example's time counts, in the budget and in the result."""
    program = Blocks()
    task = asyncio.ensure_future(
        aevaluate_all(
            {"slow": program},
            devset=examples(size=3),
            metric=is_right,
            max_concurrency=1,
            timeout=1,
            max_tokens=10,
            display_progress=False,
        )
    )
    await asyncio.wait_for(timed_out.wait(), 30)
    await turns()
    program.go_on.set()
    comparison = await asyncio.wait_for(task, 30)

    assert "max_tokens" in comparison.stopped_by
    assert (1, 1, (1, 2)) == (comparison["slow"].examples, comparison["slow"].errors, comparison["slow"].not_run)
    assert comparison["slow"].input_tokens > 0


async def test_thread_that_never_begins():
    """A call that is cancelled before a thread has taken it up is not made, and holds nothing."""
    import anyio

    from dspy_mlflow_async.workers import Threads

    called, threads, limiter = [], Threads(), anyio.CapacityLimiter(1)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await threads.run(lambda: called.append(1), limiter)

    assert [] == called
    assert not threads.are_running
    assert 1 == limiter.available_tokens


def test_under_trio():
    """The same under trio."""
    import anyio

    from dspy_mlflow_async.workers import Threads

    async def main():
        threads, limiter, go_on, over = Threads(), anyio.CapacityLimiter(1), threading.Event(), anyio.Event()
        begun = threading.Event()

        def work():
            begun.set()
            assert go_on.wait(30)

        async with anyio.create_task_group() as group:
            group.start_soon(threads.run, work, limiter)
            await anyio.to_thread.run_sync(begun.wait, 30)
            group.cancel_scope.cancel()
        threads.when_over(over.set)
        held = limiter.available_tokens
        go_on.set()
        with anyio.fail_after(30):
            await over.wait()
        return held, limiter.available_tokens

    assert (0, 1) == anyio.run(main, backend="trio")
