"""``mlflow.start_run`` raises where MLflow alone would, and nowhere else: an inherited run is a parent unasked."""

import asyncio
import contextvars
import inspect
import threading

import mlflow
import pytest
from mlflow.tracking import fluent
from runtools import AT_ONCE, TIMEOUT, Candidates, Program, devset, evaluate, in_threads, in_to_thread

import dspy_mlflow_async
from dspy_mlflow_async import propagate


def opens_a_run(question):
    with mlflow.start_run(run_name=f"inner{question[-1]}"):
        mlflow.log_metric("inside", 1)


INNER = [("inner0", "FINISHED", []), ("inner1", "FINISHED", [])]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_program_with_a_run_of_its_own(runs, num_threads):
    """Evaluated, it works as it does untraced; its runs are below the evaluation's."""
    result = evaluate("a", 2, 2, program=Program(opens_a_run), num_threads=num_threads)

    assert 100.0 == result.score
    assert [("eval", "FINISHED", INNER)] == runs.tree()
    assert {"inside": 1.0} == runs.run("inner1").data.metrics


def test_a_program_with_a_run_of_its_own_in_the_users(runs):
    """In workers, an evaluation that logs into the user's run: below that."""
    with mlflow.start_run(run_name="mine"):
        result = evaluate("a", 2, 2, program=Program(opens_a_run), num_threads=2)

    assert 100.0 == result.score
    assert [("mine", "FINISHED", INNER)] == runs.tree()


def test_an_optimizer_with_a_run_of_its_own(runs):
    """``mlflow.start_run()`` in ``compile``, where no other run is open: below the compile's."""

    class Opens(Candidates):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            opens_a_run("0")
            return student

    Opens([]).compile(Program(), trainset=devset("t", 1, 1))

    ((_, status, children),) = runs.tree()
    assert ("FINISHED", INNER[:1]) == (status, children)


def test_the_users_own_run_is_refused_as_ever(runs):
    """A run that was opened in the same thread, below a compile's: "already active", as untraced."""

    class Opens(Candidates):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            opens_a_run("0")

    with mlflow.start_run(run_name="mine"), pytest.raises(Exception, match="already active"):
        Opens([]).compile(Program(), trainset=devset("t", 1, 1))
    with mlflow.start_run(run_name="mine"):
        evaluate("a", program=Program(lambda question: None))
        with pytest.raises(Exception, match="already active"):
            mlflow.start_run()


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("nested", [{}, {"nested": True}])
@pytest.mark.parametrize("named", [True, False])
def test_children_side_by_side(runs, at_once, nested, named):
    """MLflow's tutorial in threads that inherit the parent: by ``parent_run_id`` or without, nested or not."""
    meeting = threading.Barrier(2, timeout=TIMEOUT)
    with mlflow.start_run(run_name="parent") as parent:

        def child(name):
            parent_id = parent.info.run_id if named else None
            with mlflow.start_run(run_name=name, parent_run_id=parent_id, **nested):
                meeting.wait()
                mlflow.log_param("name", name)

        at_once(*(propagate(lambda name=name: child(name)) for name in "ab"))

    assert [("parent", "FINISHED", [("a", "FINISHED", []), ("b", "FINISHED", [])])] == runs.tree()
    assert ["a", "b"] == [runs.run(name).data.params["name"] for name in "ab"]


async def test_a_task_with_a_run_of_its_own(runs):
    """A task started inside a run opens its own without ``nested``; a second one in it is refused."""

    async def task():
        with mlflow.start_run(run_name="child"):
            await asyncio.sleep(0)
            with pytest.raises(Exception, match="already active"):
                mlflow.start_run(run_name="second")

    with mlflow.start_run(run_name="parent"):
        await asyncio.create_task(task())

    assert [("parent", "FINISHED", [("child", "FINISHED", [])])] == runs.tree()


@pytest.mark.parametrize("nested", [{}, {"nested": True}])
def test_another_parent_than_the_inherited_one(runs, nested):
    """``parent_run_id`` says which: not the run that is active, and that stays active afterwards."""
    with mlflow.start_run(run_name="first") as first:
        pass

    def child():
        with mlflow.start_run(run_name="child", parent_run_id=first.info.run_id, **nested):
            mlflow.log_metric("x", 1)
        mlflow.log_metric("after", 1)

    with mlflow.start_run(run_name="second"):
        in_to_thread(child)

    assert [("first", "FINISHED", [("child", "FINISHED", [])]), ("second", "FINISHED", [])] == runs.tree()
    assert {"after": 1.0} == runs.run("second").data.metrics


def test_another_parent_than_the_users_own_is_refused(runs):
    """In the thread that opened the run MLflow's rule holds: ``parent_run_id`` must be the active run's."""
    with mlflow.start_run(run_name="first") as first:
        pass
    with mlflow.start_run(run_name="second"), pytest.raises(mlflow.MlflowException, match="does not match"):
        mlflow.start_run(parent_run_id=first.info.run_id, nested=True)

    assert [("first", "FINISHED", []), ("second", "FINISHED", [])] == runs.tree()


def test_a_start_that_fails_leaves_what_was_active(runs):
    """Where MLflow raises, below an inherited run, that one is still active."""

    def child():
        with pytest.raises(mlflow.MlflowException):
            mlflow.start_run(parent_run_id="0" * 32)
        with pytest.raises(TypeError, match="no_such_argument"):
            mlflow.start_run(no_such_argument=1)
        return mlflow.active_run().info.run_name

    with mlflow.start_run(run_name="mine"):
        seen = in_to_thread(child)

    assert ["mine"] == seen


def test_a_run_is_resumed_below_an_inherited_one(runs):
    """``run_id`` in a thread that inherits a run: that run, as it was, and no child of anything."""
    with mlflow.start_run(run_name="a") as a:
        pass

    def resume():
        with mlflow.start_run(a.info.run_id):
            mlflow.log_metric("again", 1)

    with mlflow.start_run(run_name="b"):
        in_to_thread(resume)

    assert [("a", "FINISHED", []), ("b", "FINISHED", [])] == runs.tree()
    assert {"again": 1.0} == runs.run("a").data.metrics


def test_start_run_is_given_back(store):
    """Before, during and after ``autolog()``: the same object in both places, with name, text and signature."""
    start = mlflow.start_run
    dspy_mlflow_async.autolog(silent=True)
    during = mlflow.start_run
    same = during is fluent.start_run
    dspy_mlflow_async.autolog(disable=True)

    assert (start, start) == (mlflow.start_run, fluent.start_run)
    assert same
    assert during is not start
    assert (start.__name__, start.__doc__, start.__module__) == (during.__name__, during.__doc__, during.__module__)
    assert inspect.signature(start) == inspect.signature(during)


async def test_a_run_without_with_belongs_to_its_task(runs):
    """``mlflow.start_run()`` in one task, an evaluation in another on the same thread: a child."""
    began, done = asyncio.Event(), asyncio.Event()

    async def begins():
        mlflow.start_run(run_name="mine")
        began.set()
        await done.wait()
        evaluate("b", 2, 2)
        mlflow.end_run()

    async def evaluates():
        await began.wait()
        evaluate("a", metric_key="other")
        done.set()

    await asyncio.wait_for(asyncio.gather(begins(), evaluates()), TIMEOUT)

    assert [("mine", "FINISHED", [("other", "FINISHED", [])])] == runs.tree()
    assert 100.0 == runs.run("mine").data.metrics["eval"]


def test_many_threads_at_once(runs):
    """Eight threads below one run each open their own at the same moment: eight children, and nothing else."""
    meeting = threading.Barrier(8, timeout=TIMEOUT)

    def child(index):
        meeting.wait()
        with mlflow.start_run(run_name=f"child{index}"):
            mlflow.log_metric("index", index)

    with mlflow.start_run(run_name="parent"):
        contexts = [contextvars.copy_context() for _ in range(8)]
        in_threads(*(lambda c=context, i=index: c.run(child, i) for index, context in enumerate(contexts)))

    assert [("parent", "FINISHED", [(f"child{index}", "FINISHED", []) for index in range(8)])] == runs.tree()
    assert [float(index) for index in range(8)] == [runs.run(f"child{i}").data.metrics["index"] for i in range(8)]
