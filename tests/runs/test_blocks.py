"""Blocks of runs that do not end where, or in the order in which, they began: generators, exit stacks, ended early."""

import asyncio
import contextlib
import contextvars
import threading

import dspy
import mlflow
import pytest
from runtools import TIMEOUT, Candidates, Program, Turns, devset, evaluate, in_threads

import dspy_mlflow_async
from dspy_mlflow_async.runs import active_runs
from dspy_mlflow_async.seams import mlflow_spans as seam


def active_name():
    """The name of MLflow's active run."""
    run = mlflow.active_run()
    return None if run is None else run.info.run_name


def ours(name):
    return dspy_mlflow_async.run(name)


def mlflows(name):
    return mlflow.start_run(run_name=name, nested=True)


BLOCKS = pytest.mark.parametrize("block", [ours, mlflows])


async def held(block, name):
    """An async generator that is inside a run between its first and its last step."""
    with block(name):
        yield name


async def advance(generator):
    """A step of it, in a task of its own where this is run as one."""
    return await anext(generator, None)


def statuses(store):
    """The status of each run by its name."""
    return {run.info.run_name: run.info.status for run in store.runs()}


# --- not last in, first out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [ours, mlflows])
@pytest.mark.parametrize("other", [ours, mlflows])
async def test_the_first_ends_first(runs, one, other):
    """Two generators in one task, closed in the order in which they began: what is active is what is open."""
    first, second = held(one, "first"), held(other, "second")
    seen = []
    for step in (first.__anext__, second.__anext__, first.aclose, second.aclose):
        await step()
        seen.append(active_name())

    assert ["first", "second", "second", None] == seen
    assert active_runs.VARIABLE.get() is None
    assert {"first", "second"} == set(statuses(runs))
    assert "RUNNING" not in statuses(runs).values()


@BLOCKS
async def test_one_that_ends_in_another_tasks_block_leaves_that_alone(runs, block):
    """A generator begun in a task that is over, closed inside another run: that one stays active."""
    generator = held(block, "elsewhere")
    await asyncio.create_task(advance(generator))
    with block("here"):
        await advance(generator)
        inside = active_name()
        mlflow.log_metric("x", 1)

    assert ("here", None) == (inside, active_name())
    assert {"elsewhere": "FINISHED", "here": "FINISHED"} == statuses(runs)
    assert {"x": 1.0} == runs.run("here").data.metrics


def test_one_that_ends_inside_an_evaluation_leaves_that_alone(runs):
    """The program closes a generator that is inside a run: the evaluation's own run goes on."""
    seen = []

    def during(question):
        if question == "@a-0":
            exits.close()
        seen.append(active_name())

    class Opens(Candidates):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            evaluate("a", program=Program(during), metric_key="key")
            return student

    exits = contextlib.ExitStack()
    exits.enter_context(mlflow.start_run(run_name="mine"))
    Opens([]).compile(Program(), trainset=devset("t", 1, 1))

    assert ["key_0", "key_0"] == seen
    assert active_name() is None
    assert [("mine", "FINISHED", [("key_0", "FINISHED", [])])] == runs.tree()


@BLOCKS
async def test_one_that_ends_elsewhere_is_not_active_where_it_began(runs, block):
    """The task that began it goes on: it sees no run that has ended, and its next one is no child of that."""
    began, ended = asyncio.Event(), asyncio.Event()
    generator = held(block, "elsewhere")
    seen = []

    async def begins():
        await advance(generator)
        began.set()
        await ended.wait()
        seen.append(active_name())
        evaluate("a", metric_key="next")

    async def ends():
        await began.wait()
        await advance(generator)
        ended.set()

    await asyncio.wait_for(asyncio.gather(begins(), ends()), TIMEOUT)

    assert [None] == seen
    assert [("elsewhere", "FINISHED", []), ("next", "FINISHED", [])] == runs.tree()


@BLOCKS
def test_an_exit_stack_over_two_event_loops(runs, block):
    """Entered in one ``asyncio.run`` and left in another."""
    exits = contextlib.ExitStack()

    async def enter():
        exits.enter_context(block("mine"))

    async def leave():
        exits.close()

    asyncio.run(enter())
    asyncio.run(leave())

    assert [("mine", "FINISHED", [])] == runs.tree()
    assert active_name() is None


def test_an_exception_elsewhere_fails_the_run(runs):
    """``with mlflow.start_run()`` left by an exception in another thread: FAILED, as MLflow has it."""
    block = mlflow.start_run(run_name="mine")
    block.__enter__()
    in_threads(lambda: block.__exit__(ValueError, ValueError("no"), None))

    assert active_name() is None
    assert [("mine", "FAILED", [])] == runs.tree()


def test_mlflows_block_gives_its_place_back(store):
    """A block that ends elsewhere counts as ended: ``autolog(disable=True)`` then leaves nothing of ours."""
    stack = mlflow.tracking.fluent._active_run_stack
    dspy_mlflow_async.autolog(silent=True)
    block = mlflow.start_run(run_name="mine")
    block.__enter__()
    contextvars.Context().run(block.__exit__, None, None, None)
    seen = active_name()
    dspy_mlflow_async.autolog(disable=True)

    assert seen is None
    assert stack is mlflow.tracking.fluent._active_run_stack
    assert [("mine", "FINISHED", [])] == store.tree()


async def test_generators_in_many_tasks(runs):
    """Tasks that take turns begin and end each other's blocks: none mixed up, none left running."""
    turns = Turns(4)
    generators = {name: held(ours if name in "ab" else mlflows, name) for name in "abcd"}
    seen = []

    async def task(own, other):
        await advance(generators[own])
        seen.append((own, active_name()))
        await turns.wait()
        await advance(generators[other])
        await turns.wait()
        seen.append((own, active_name()))

    tasks = [task(own, other) for own, other in zip("abcd", "bcda", strict=True)]
    await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT)

    expected = [(name, active) for name in "abcd" for active in (name, None)]
    assert sorted(expected, key=str) == sorted(seen, key=str)
    assert dict.fromkeys("abcd", "FINISHED") == statuses(runs)


def test_traces_follow_without_mlflows_stack(store):
    """``context_runs=False``: a block that ends in another context puts nothing back there."""
    dspy_mlflow_async.autolog(context_runs=False, silent=True)
    block = active_runs.Block(mlflow.ActiveRun(mlflow.MlflowClient().create_run(store.experiment_id)))
    inside = seam.TRACE_CONTEXT.get()

    def elsewhere():
        mine = object()
        seam.TRACE_CONTEXT.set(mine)
        block.leave()
        return seam.TRACE_CONTEXT.get() is mine

    assert contextvars.Context().run(elsewhere)
    assert inside is seam.TRACE_CONTEXT.get()
    seam.TRACE_CONTEXT.set(None)
    active_runs.VARIABLE.set(None)


# --- ended by the program -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_run_that_the_program_has_ended_is_not_active_again(runs, num_threads):
    """``mlflow.end_run()`` in a program, in this thread or a worker: after the evaluation there is no active run."""
    mine = mlflow.start_run(run_name="mine")

    def during(question):
        if question == "@a-0" and mlflow.active_run() is not None:
            mlflow.end_run("KILLED")

    evaluate("a", program=Program(during), num_threads=num_threads)
    after = mlflow.active_run()

    assert after is None
    assert "KILLED" == mlflow.get_run(mine.info.run_id).info.status


def test_a_run_that_the_program_opens_in_its_place_stays(runs):
    """The program ends the user's run and begins another without ``with``: that one is active afterwards."""
    mlflow.start_run(run_name="first")

    def during(question):
        if question == "@a-0":
            mlflow.end_run()
            mlflow.start_run(run_name="second")

    evaluate("a", program=Program(during))
    after = active_name()
    mlflow.end_run()

    assert "second" == after
    assert [("first", "FINISHED", []), ("second", "FINISHED", [])] == runs.tree()


def test_a_straggler_keeps_the_run_that_its_evaluation_had(runs):
    """A thread that outlives the evaluation logs into its run, ended as it is, and makes no stray one."""
    ended, done = threading.Event(), threading.Event()

    class Leaves(dspy.Module):
        def forward(self, question):
            def late():
                ended.wait(TIMEOUT)
                mlflow.log_metric("late", 1)
                done.set()

            threading.Thread(target=dspy_mlflow_async.propagate(late)).start()
            return dspy.Prediction(answer=question)

    evaluate("a", 1, 1, program=Leaves())
    ended.set()

    assert done.wait(TIMEOUT)
    assert [("eval", "FINISHED", [])] == runs.tree()
    assert 1.0 == runs.run("eval").data.metrics["late"]
