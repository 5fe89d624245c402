"""``dspy_mlflow_async.run``: a run for a block of sync or async code."""

import asyncio
import contextlib
import threading

import dspy
import mlflow
import pytest
from mlflow.tracking import fluent
from runtools import TIMEOUT, Program, Turns, evaluate, in_to_thread, markers

import dspy_mlflow_async
from dspy_mlflow_async import export
from dspy_mlflow_async.runs import active_runs
from dspy_mlflow_async.runs.handle import RunHandle


def test_a_block_is_a_run(runs):
    """``with run(name, tags=..., description=...)`` yields MLflow's run, active inside and ended after."""
    with dspy_mlflow_async.run("mine", tags={"team": 1}, description="why") as mine:
        assert isinstance(mine, mlflow.ActiveRun)
        assert mine.info.run_id == mlflow.active_run().info.run_id
        mlflow.log_metric("x", 1)
        Program()(question="@inside")

    assert mlflow.active_run() is None
    assert mine.info.run_id == mlflow.last_active_run().info.run_id
    assert [("mine", "FINISHED", [])] == runs.tree()
    run = runs.run("mine")
    assert ({"x": 1.0}, "1", "why") == (run.data.metrics, run.data.tags["team"], run.data.tags["mlflow.note.content"])
    # A thread that another test has left behind may have its calls there, too: it has no run of its own.
    assert ["mine"] == [name for name, markers in runs.traces_by_run().items() if "@inside" in markers]


def test_without_a_name_mlflow_makes_one_up(runs):
    """``run()``: as ``mlflow.start_run()``."""
    with dspy_mlflow_async.run() as mine:
        pass

    assert [(mine.info.run_name, "FINISHED", [])] == runs.tree()
    assert mine.info.run_name


async def test_an_async_block_is_a_run(runs):
    """``async with run(...)``: the same."""
    async with dspy_mlflow_async.run("mine") as mine:
        assert mine.info.run_id == mlflow.active_run().info.run_id
        await Program().acall(question="@inside")

    assert mlflow.active_run() is None
    assert [("mine", "FINISHED", [])] == runs.tree()
    assert {"mine": ["@inside"]} == runs.traces_by_run()


async def test_blocks_nest(runs):
    """A block inside a block, or inside ``mlflow.start_run()``, is a child; and MLflow's runs nest in ours."""
    with mlflow.start_run(run_name="a"):
        async with dspy_mlflow_async.run("b"):
            with dspy_mlflow_async.run("c"), mlflow.start_run(run_name="d", nested=True):
                pass
            mlflow.log_param("where", "b")

    assert [("a", "FINISHED", [("b", "FINISHED", [("c", "FINISHED", [("d", "FINISHED", [])])])])] == runs.tree()
    assert {"where": "b"} == runs.run("b").data.params


def test_a_parent_by_id(runs):
    """``parent_run_id`` puts it under any run."""
    with mlflow.start_run(run_name="a") as a:
        pass
    with dspy_mlflow_async.run("b", parent_run_id=a.info.run_id):
        pass

    assert [("a", "FINISHED", [("b", "FINISHED", [])])] == runs.tree()


async def test_tasks_side_by_side_do_not_see_each_other(runs):
    """Blocks in tasks that take turns: each its own run, traces and evaluations."""
    turns = Turns(3)

    async def task(name):
        async with dspy_mlflow_async.run(name) as mine:
            await turns.wait()
            await Program().acall(question=f"@{name}")
            await asyncio.to_thread(evaluate, name, metric_key=f"{name}-eval")
            evaluate(f"{name}x", disable_logging=True)
            await turns.wait()
            return mine.info.run_id == mlflow.active_run().info.run_id

    assert [True] * 3 == await asyncio.wait_for(asyncio.gather(*map(task, "abc")), TIMEOUT)

    assert [(name, "FINISHED", [(f"{name}-eval", "FINISHED", [])]) for name in "abc"] == runs.tree()
    expected = {name: sorted([f"@{name}", *markers(f"{name}x", 2)]) for name in "abc"}
    assert expected | {f"{name}-eval": markers(name, 2) for name in "abc"} == runs.traces_by_run()


def test_an_evaluation_in_the_block_logs_into_it(runs):
    """It is the user's run: an evaluation in the same task logs into it, one at the same time gets a child."""
    with dspy_mlflow_async.run("mine"):
        evaluate("a")
        in_to_thread(lambda: evaluate("b", metric_key="there"))

    assert [("mine", "FINISHED", [("there", "FINISHED", [])])] == runs.tree()
    assert 50.0 == runs.run("mine").data.metrics["eval"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (asyncio.CancelledError, "KILLED"), (SystemExit, "FAILED")],
)
def test_what_ends_the_block_is_the_status(runs, error, status):
    """FAILED after an exception, KILLED after a cancellation; it passes on."""
    with pytest.raises(error), dspy_mlflow_async.run("mine"):
        raise error

    assert [("mine", status, [])] == runs.tree()
    assert mlflow.active_run() is None


async def test_a_cancelled_task_kills_its_run(runs):
    """``task.cancel()`` inside the block: KILLED, before the task is over."""
    inside = asyncio.Event()

    async def task():
        async with dspy_mlflow_async.run("mine"):
            inside.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(task())
    await asyncio.wait_for(inside.wait(), TIMEOUT)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert [("mine", "KILLED", [])] == runs.tree()


async def test_cancelled_twice_is_killed_all_the_same(runs, monkeypatch):
    """A second ``cancel()`` while the block is ending."""
    inside = asyncio.Event()
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    end = RunHandle.end

    def slow_end(handle, status):
        loop.call_soon_threadsafe(ending.set)
        end(handle, status)

    monkeypatch.setattr(RunHandle, "end", slow_end)

    async def task():
        async with dspy_mlflow_async.run("mine"):
            inside.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(task())
    await asyncio.wait_for(inside.wait(), TIMEOUT)
    running.cancel()
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.wait_for(ending.wait(), TIMEOUT)

    assert [("mine", "KILLED", [])] == runs.tree()


async def test_cancelled_while_it_is_created_leaves_no_run_behind(runs, monkeypatch):
    """``task.cancel()`` while the store still creates the run: KILLED as soon as it is there, never active."""
    may_create = threading.Event()
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    create = export.create_run

    def slow(*args):
        loop.call_soon_threadsafe(asked.set)
        may_create.wait(TIMEOUT)
        return create(*args)

    monkeypatch.setattr(export, "create_run", slow)
    entered = []

    async def task():
        async with dspy_mlflow_async.run("mine"):
            entered.append(True)

    running = asyncio.create_task(task())
    await asyncio.wait_for(asked.wait(), TIMEOUT)
    running.cancel()
    may_create.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    for _ in range(200):
        if ("mine", "KILLED", []) in runs.tree():
            break
        await asyncio.sleep(0.02)

    assert ([], [("mine", "KILLED", [])]) == (entered, runs.tree())


async def test_a_cancelled_group_kills_all_its_runs(runs):
    """One of three tasks fails: its run FAILED, the others KILLED, and what they belong to FAILED."""
    turns = Turns(3)

    async def task(name):
        async with dspy_mlflow_async.run(name):
            await turns.wait()
            if name == "a":
                raise ValueError(name)
            await asyncio.Event().wait()

    async def group():
        async with dspy_mlflow_async.run("group"):
            tasks = [asyncio.create_task(task(name)) for name in "abc"]
            try:
                await asyncio.gather(*tasks)
            finally:
                for each in tasks:
                    each.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    with pytest.raises(ValueError, match="a"):
        await asyncio.wait_for(group(), TIMEOUT)

    assert [("group", "FAILED", [("a", "FAILED", []), ("b", "KILLED", []), ("c", "KILLED", [])])] == runs.tree()


def test_under_trio(runs):
    """The same under trio: tasks side by side, a cancellation is KILLED."""
    trio = pytest.importorskip("trio")

    async def task(name, ended):
        with contextlib.suppress(ValueError):
            async with dspy_mlflow_async.run(name):
                mlflow.log_param("name", name)
                if name == "b":
                    ended.set()
                    await trio.sleep_forever()
        ended.set()

    async def main():
        ended, first = trio.Event(), trio.Event()
        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(task, "a", first)
                nursery.start_soon(task, "b", ended)
                await ended.wait()
                await first.wait()
                nursery.cancel_scope.cancel()

    trio.run(main)

    assert [("a", "FINISHED", []), ("b", "KILLED", [])] == runs.tree()
    assert ["a", "b"] == [runs.run(name).data.params["name"] for name in "ab"]


def test_it_works_without_autolog_and_takes_everything_along_again(store):
    """``run`` needs no ``autolog()``; after the block MLflow's stack is its own."""
    stack = fluent._active_run_stack
    with dspy_mlflow_async.run("mine"):
        in_to_thread(lambda: mlflow.log_metric("x", 1))
        assert active_runs.is_installed()

    assert stack is fluent._active_run_stack
    assert [("mine", "FINISHED", [])] == store.tree()
    assert {"x": 1.0} == store.run("mine").data.metrics


def test_a_store_that_refuses_is_the_users_to_know(runs):
    """``run`` raises what MLflow raises where the run cannot be created; nothing is active then."""
    with pytest.raises(mlflow.MlflowException), dspy_mlflow_async.run("mine", experiment_id="987654321"):
        pass

    assert mlflow.active_run() is None
    assert [] == runs.tree()


async def test_it_is_entered_once(runs):
    """A second block of the same object is refused, while the first is open and after it."""
    mine = dspy_mlflow_async.run("mine")
    with mine, pytest.raises(RuntimeError, match="entered before"):
        mine.__enter__()
    with pytest.raises(RuntimeError, match="entered before"):
        async with mine:
            pass

    assert mlflow.active_run() is None
    assert [("mine", "FINISHED", [])] == runs.tree()


def test_it_survives_a_worker_of_dspy(runs):
    """A block inside a program in DSPy's workers: each its own child of the evaluation's run."""

    class Scoped(dspy.Module):
        def forward(self, question):
            with dspy_mlflow_async.run(question[1:]):
                mlflow.log_param("question", question)
            return dspy.Prediction(answer=question)

    evaluate("a", 2, 2, program=Scoped(), num_threads=2)

    assert [("eval", "FINISHED", [("a-0", "FINISHED", []), ("a-1", "FINISHED", [])])] == runs.tree()
    assert ["@a-0", "@a-1"] == [runs.run(name).data.params["question"] for name in ("a-0", "a-1")]
