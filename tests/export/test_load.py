"""Under load nothing is lost, nothing is doubled, and nobody waits who need not."""

import asyncio
import os

import mlflow
import pytest
from stores import check_sum

from dspy_mlflow_async import export

TASKS = 128
# Writing one takes about 6 ms of CPU, most of them SQLAlchemy's: all 20,000 take minutes.
CALLS = int(os.environ.get("DSPY_MLFLOW_ASYNC_TEST_CALLS") or 1_000)


@pytest.mark.timeout(120 + CALLS // 20)
def test_many_tasks_lose_nothing(make):
    """Each call is there once, as itself, those that the memory could not hold too; the books are always right."""
    installed = make(max_waiting_bytes=1_000 * CALLS)
    names, seen = {}, []

    async def work(task, all_begun):
        for number in range(task, CALLS, TASKS):
            with mlflow.start_span(f"call {number}") as span:
                if number < TASKS:  # so that all of them are open at once
                    if number == min(TASKS, CALLS) - 1:
                        seen.append(export.stats())
                        all_begun.set()
                    await asyncio.wait_for(all_begun.wait(), 20)
                await asyncio.sleep(0)  # others go on in the middle of it
            names[span.trace_id] = [span.name]
        seen.append(export.stats())

    async def main():
        all_begun = asyncio.Event()
        await asyncio.gather(*(work(task, all_begun) for task in range(TASKS)))

    asyncio.run(main())
    assert export.flush(100 + CALLS // 20)

    assert min(TASKS, CALLS) == seen[0].open
    assert 0 < max(stats.spooled for stats in seen)
    for stats in seen:
        check_sum(stats)
    assert export.ExportStats(started=CALLS, ended=CALLS, stored=CALLS) == export.stats()
    assert CALLS == len(names)
    assert names == {key: [span.name for span in trace.data.spans] for key, trace in installed.read().items()}
    assert 0 == sum(info.records for info in export.spools())
