"""An optimizer that evaluates its candidates in threads of its own: children, series and silence are the compile's."""

import threading
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest
from runtools import TIMEOUT, Candidates, Program, devset

import dspy_mlflow_async

PLAN = [("a", 1), ("b", 2), ("c", 3)]


def in_pool(function, items):
    """A pool as Python has it."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(function, items))


def in_plain_threads(function, items):
    """Threads as Python has them."""
    threads = [threading.Thread(target=function, args=(item,)) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    return items


@pytest.mark.parametrize("pool", [in_pool, in_plain_threads])
def test_candidates_in_threads_of_the_optimizers_own(store, pool):
    """Each evaluation is a child of the compile's run, with steps of its own, and the parent has the series."""
    dspy_mlflow_async.autolog(log_evals=True, log_compiles=True, silent=True)
    meet = threading.Barrier(len(PLAN), timeout=TIMEOUT)

    def all_at_once(function, items):
        return pool(lambda item: (meet.wait(), function(item)), items)

    Candidates(PLAN, pool=all_at_once).compile(Program(), trainset=devset("t", 1, 1))

    ((name, status, children),) = store.tree()
    steps, scores = zip(*store.series(store.run(name), "eval"), strict=True)
    assert ("FINISHED", [(f"eval_{step}", "FINISHED", []) for step in range(3)]) == (status, children)
    assert ((0, 1, 2), [25.0, 50.0, 75.0]) == (steps, sorted(scores))
    assert {} == store.traces_by_run()  # log_traces_from_compile=False holds for what the compile starts


def test_threads_outside_a_compile_are_left_alone(store):
    """While one compiles elsewhere, a thread that somebody starts takes nothing along; after it, no patch is left."""
    dspy_mlflow_async.autolog(log_compiles=True, silent=True)
    start = threading.Thread.start
    inside, outside = threading.Event(), threading.Event()
    runs = []

    def wait(question):
        inside.set()
        assert outside.wait(TIMEOUT)

    def compile_one():
        Candidates(PLAN[:1], program=lambda: Program(wait)).compile(Program(), trainset=devset("t", 1, 1))

    def in_thread_of_a_run():
        with mlflow.start_run():
            in_plain_threads(lambda _: runs.append(mlflow.active_run()), [None])

    compiling = threading.Thread(target=compile_one)
    compiling.start()
    assert inside.wait(TIMEOUT)
    assert start is not threading.Thread.start
    in_thread_of_a_run()
    outside.set()
    compiling.join(TIMEOUT)

    assert [None] == runs
    assert start is threading.Thread.start
