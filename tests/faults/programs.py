"""What the programs of the cases do. Each function is one program, whose arguments come as JSON."""

import asyncio
import gc
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dspy
import mlflow
import psutil

import dspy_mlflow_async
from faults.child import CALL_TOKENS

FLUSH_SECONDS = 120


def forever(program):
    """Calls in two threads and four tasks, until somebody kills it."""

    def work():
        while True:
            program.call()

    for _ in range(2):
        threading.Thread(target=work, daemon=True).start()

    async def main():
        while True:
            await asyncio.gather(*(program.acall() for _ in range(4)))

    asyncio.run(main())


def until_told(program):
    """Calls at an easy pace until the case says that it is over."""
    over = threading.Event()

    def work():
        while not over.wait(0.005):
            program.call()

    thread = threading.Thread(target=work)
    thread.start()
    program.meet("working")
    over.set()
    thread.join(60)
    return dspy_mlflow_async.flush(FLUSH_SECONDS)


def rest(marker):
    """Take as long as an LM that is quick."""
    time.sleep(0.3)


class NotesRight:
    """A metric that leaves a byte for each example that it has judged."""

    def __init__(self, path):
        self.path = path

    def __call__(self, example, prediction, trace=None):
        with Path(self.path).open("ab") as file:
            file.write(b".")
        return example.answer == prediction.answer


def on_workers(program, size, notes, resume=None):
    """Evaluates on two worker processes, of which any may be killed. Gives what became of it, and its traces' ids."""
    from echo import EchoLM

    mlflow.set_experiment(experiment_id=program.experiment_id)
    devset = [dspy.Example(question=f"@e-{n}", answer=f"@e-{n}").with_inputs("question") for n in range(size)]
    with dspy.context(lm=EchoLM(during=rest)):
        comparison = dspy_mlflow_async.evaluate_all(
            {"one": dspy.Predict("question -> answer")},
            devset=devset,
            metric=NotesRight(notes),
            workers=2,
            max_concurrency=8,
            resume=resume,
            display_progress=False,
        )
    case = comparison["one"]
    assert dspy_mlflow_async.flush(FLUSH_SECONDS)
    table = mlflow.artifacts.load_dict(f"runs:/{case.run_id}/result_table.json")
    ids = [row[table["columns"].index("trace_id")] for row in table["data"]]
    return {"status": case.status, "score": case.score, "examples": case.examples, "errors": case.errors, "ids": ids}


def in_turns(program, turns, text="@x", feedback=None):
    """One turn after the other: meet the case, call, flush. Gives what each `flush()` returned.

    Args:
        program: The program.
        turns: Of each the word, the number of calls, and the seconds that its flush may take; 0 for no flush.
        text: The question.
        feedback: The name of feedback that each call is given.
    """
    flushed = []
    for word, calls, seconds in turns:
        program.meet(word)
        for _ in range(calls):
            program.call(text, feedback)
        flushed.append(dspy_mlflow_async.flush(seconds) if seconds else None)
    return flushed


def at_all_times(program, calls):
    """Calls while the clock goes back and forth: between calls, inside of them, and while traces wait."""
    for offset in (0, -86_400, 86_400, -20 * 365 * 86_400, 20 * 365 * 86_400, -3, 3, 0):
        program.clock.offset = offset
        for _ in range(calls):
            program.call()
        span = mlflow.start_span_no_context("open while the clock jumps")
        program.ledger.begin(span.trace_id, program.whole(1, 0))
        program.clock.offset = -offset
        span.end()
        program.ledger.end(span.trace_id)
        program.call()
    return dspy_mlflow_async.flush(FLUSH_SECONDS)


# --- load ---


class Watch:
    """Looks at the memory of this process, and at where its traces are, from a thread of its own."""

    def __init__(self):
        self.spooled = self.grown = 0
        self._process = psutil.Process()
        self._over = threading.Event()
        self._first = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self):
        while not self._over.wait(0.05):
            self.spooled = max(self.spooled, dspy_mlflow_async.stats().spooled)
            self.grown = max(self.grown, self._process.memory_info().rss - self._first)

    def end(self):
        self._over.set()
        self._thread.join(10)
        return {"spooled": self.spooled, "grown": self.grown}


def with_tasks(program, calls, tasks, text, timeout):
    """Calls in so many tasks at a time."""
    dspy.configure(disable_history=True)
    for _ in range(50):  # warm
        program.call(text)
    numbers = iter(range(calls))
    watch = Watch()

    async def work():
        for _ in numbers:
            await program.acall(text)
            await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*(work() for _ in range(tasks)))

    asyncio.run(main())
    seen = watch.end()
    return seen | {"flushed": dspy_mlflow_async.flush(timeout)}


def with_threads(program, calls, threads, text, timeout):
    """Calls in so many threads at a time."""
    dspy.configure(disable_history=True)
    for _ in range(50):
        program.call(text)
    watch = Watch()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda _: program.call(text), range(calls)):
            pass
    seen = watch.end()
    return seen | {"flushed": dspy_mlflow_async.flush(timeout)}


class Nest(dspy.Module):
    """Modules in one another."""

    def __init__(self, depth):
        super().__init__()
        self.inner = Nest(depth - 1) if depth > 1 else dspy.Predict("question -> answer")

    def forward(self, question):
        return self.inner(question=question)

    async def aforward(self, question):
        return await self.inner.acall(question=question)


def deep(program, depth):
    """One call through so many modules in one another, in a thread and in a task."""
    sys.setrecursionlimit(50_000)
    threading.stack_size(256 * 2**20)
    nest = Nest(depth)
    whole = program.whole(1 + depth + 4, CALL_TOKENS)

    def sync():
        with mlflow.start_span("call") as span:
            program.ledger.begin(span.trace_id, whole)
            nest(question="@x")
        program.ledger.end(span.trace_id)

    async def main():
        with mlflow.start_span("call") as span:
            program.ledger.begin(span.trace_id, whole)
            await nest.acall(question="@x")
        program.ledger.end(span.trace_id)

    for work in (sync, lambda: asyncio.run(main())):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(100)
    return dspy_mlflow_async.flush(FLUSH_SECONDS)


def wide(program, calls):
    """One trace with so many calls in it, each of four spans."""
    step = dspy.Predict("question -> answer")
    with mlflow.start_span("call") as span:
        program.ledger.begin(span.trace_id, program.whole(1 + 4 * calls, CALL_TOKENS * calls))
        for _ in range(calls):
            step(question="@x")
    program.ledger.end(span.trace_id)
    return dspy_mlflow_async.flush(FLUSH_SECONDS)


def soak(program, seconds, pace, temporary):
    """Calls at a pace, in a task and in a thread, and looks at what the process has.

    Gives:
        Samples after a warm-up of a quarter of the time: calls, bytes, threads, descriptors, temporary files.
    """
    dspy.configure(disable_history=True)
    process, samples, calls = psutil.Process(), [], 0
    end = time.monotonic() + seconds
    warm = time.monotonic() + seconds / 4
    next_sample = 0.0
    with ThreadPoolExecutor(1) as pool:
        loop = asyncio.new_event_loop()
        while (now := time.monotonic()) < end:
            pool.submit(program.call).result(60)
            loop.run_until_complete(program.acall())
            program.lm.calls.clear()
            calls += 2
            if now > max(warm, next_sample):
                next_sample = now + seconds / 200
                if calls % 20 == 0:
                    gc.collect()
                files = sum(1 for path in Path(temporary).rglob("*") if path.is_file())
                samples.append([calls, process.memory_info().rss, process.num_threads(), process.num_fds(), files])
            time.sleep(max(0.0, 2 / pace - (time.monotonic() - now)))
        loop.close()
    return {
        "samples": samples,
        "flushed": dspy_mlflow_async.flush(FLUSH_SECONDS),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


# --- loops of others ---


def on_uvloop(program, calls, tasks):
    """Tasks and threads under uvloop."""
    import uvloop

    async def work():
        assert type(asyncio.get_running_loop()).__module__.startswith("uvloop")
        for _ in range(calls):
            await program.acall()
            await asyncio.to_thread(program.call)

    async def main():
        await asyncio.gather(*(work() for _ in range(tasks)))

    uvloop.run(main())
    return dspy_mlflow_async.flush(FLUSH_SECONDS)


def on_trio(program, calls, tasks):
    """Sync calls in trio's threads, async ones in its tasks by trio-asyncio: DSPy's LMs ask asyncio for a thread."""
    import trio
    import trio_asyncio

    async def work():
        for _ in range(calls):
            await trio_asyncio.aio_as_trio(program.acall)()
            await trio.to_thread.run_sync(program.call)

    async def main():
        async with trio_asyncio.open_loop(), trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(work)

    trio.run(main)
    return dspy_mlflow_async.flush(FLUSH_SECONDS)


def on_nested_loops(program, calls, tasks):
    """Loops that run inside a running loop, as notebooks let people do."""
    import nest_asyncio

    nest_asyncio.apply()

    async def work():
        for _ in range(calls):
            asyncio.run(program.acall())
            await program.acall()
            program.call()

    async def main():
        await asyncio.gather(*(work() for _ in range(tasks)))

    asyncio.run(main())
    return dspy_mlflow_async.flush(FLUSH_SECONDS)
