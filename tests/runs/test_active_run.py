"""MLflow's active run follows the context: tasks, threads that DSPy starts, and MLflow's own documented examples."""

import asyncio
import contextvars
import logging
import multiprocessing
import subprocess
import sys
import textwrap
import threading

import dspy
import mlflow
import pytest
from mlflow.tracking import fluent
from runtools import (
    TIMEOUT,
    Candidates,
    Program,
    Turns,
    devset,
    evaluate,
    exact,
    in_asyncify,
    in_threads,
    in_to_thread,
    markers,
)

import dspy_mlflow_async
from dspy_mlflow_async.runs import active_runs


def active_name():
    """The name of MLflow's active run."""
    run = mlflow.active_run()
    return None if run is None else run.info.run_name


# --- tasks and threads --------------------------------------------------------------------------------------------


async def test_each_task_has_its_own_run(runs):
    """``with mlflow.start_run()`` in tasks that take turns on one thread: no mixing, each ends its own."""
    turns = Turns(3)

    async def task(name):
        with mlflow.start_run(run_name=name):
            await turns.wait()
            mlflow.log_metric("before", ord(name))
            await dspy.Predict("question -> answer").acall(question=f"@{name}")
            await turns.wait()
            mlflow.log_param("after", name)
            await turns.wait()
        return active_name()

    names = await asyncio.wait_for(asyncio.gather(*map(task, "abc")), TIMEOUT)

    assert [None] * 3 == names
    assert [(name, "FINISHED", []) for name in "abc"] == runs.tree()
    for name in "abc":
        run = runs.run(name)
        assert ({"before": float(ord(name))}, {"after": name}) == (run.data.metrics, run.data.params)
    assert {name: [f"@{name}"] for name in "abc"} == runs.traces_by_run()


async def test_tasks_inherit_the_run_they_were_started_in(runs):
    """A task sees the run of its parent, and a run of its own does not show outside."""
    seen = []

    async def child():
        seen.append(active_name())
        with mlflow.start_run(run_name="child", nested=True):
            await asyncio.sleep(0)
            seen.append(active_name())
        seen.append(active_name())

    with mlflow.start_run(run_name="parent"):
        task = asyncio.create_task(child())
        await asyncio.sleep(0)
        seen.append(active_name())
        await task
        seen.append(active_name())

    assert ["parent", "parent", "child", "parent", "parent"] == seen
    assert [("parent", "FINISHED", [("child", "FINISHED", [])])] == runs.tree()


@pytest.mark.parametrize("elsewhere", [in_to_thread, in_asyncify])
def test_bridged_threads_have_the_run_they_came_from(runs, elsewhere):
    """``asyncio.to_thread`` and ``dspy.asyncify`` take the active run along; a fluent call there lands in it."""
    with mlflow.start_run(run_name="mine"):
        elsewhere(lambda: mlflow.log_metric("there", 1), lambda: mlflow.log_param("too", active_name()))

    assert [("mine", "FINISHED", [])] == runs.tree()
    assert ({"there": 1.0}, {"too": "mine"}) == (runs.run("mine").data.metrics, runs.run("mine").data.params)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_workers_of_dspy_have_the_run_they_came_from(runs, num_threads):
    """``dspy.Parallel`` in a run: fluent calls in programs and tools land in it, and make no stray run."""

    def tool(query: str) -> str:
        mlflow.log_metric(f"tool{query[-1]}", 1)
        return query

    class Logs(dspy.Module):
        def forward(self, question):
            mlflow.log_metric(f"program{question[-1]}", 1)
            return dspy.Prediction(answer=dspy.Tool(tool)(query=question))

    with mlflow.start_run(run_name="mine"):
        dspy.Parallel(num_threads=num_threads, disable_progress_bar=True)(
            [(Logs(), example) for example in devset("a", 0, 3)]
        )

    assert [("mine", "FINISHED", [])] == runs.tree()
    expected = {f"{kind}{index}": 1.0 for kind in ("tool", "program") for index in range(3)}
    assert expected == runs.run("mine").data.metrics
    assert {"mine": markers("a", 3)} == runs.traces_by_run()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_fluent_calls_inside_an_evaluation_land_in_its_run(runs, num_threads):
    """``mlflow.log_metric`` in the program and in the metric of two evaluations at once: each in its own run."""

    def metric(example, prediction):
        mlflow.log_metric(f"metric{example.question[-1]}", 1)
        return exact(example, prediction)

    def during(question):
        mlflow.log_metric(f"program{question[-1]}", 1)

    in_threads(
        *(
            lambda name=name: evaluate(
                name, program=Program(during), metric=metric, num_threads=num_threads, metric_key=name
            )
            for name in "ab"
        )
    )

    assert [("a", "FINISHED", []), ("b", "FINISHED", [])] == runs.tree()
    for name in "ab":
        logged = runs.run(name).data.metrics
        assert {"metric0", "metric1", "program0", "program1"} == {key for key in logged if key[-1] in "01"}


def test_fluent_calls_inside_a_compile_land_in_its_run(runs):
    """What an optimizer logs itself goes to the compile's run; its candidates' programs log into theirs."""

    class Logs(Candidates):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            mlflow.log_metric("optimizer", 1)
            evaluate("a", 1, 1, program=Program(lambda question: mlflow.log_metric("candidate", 1)))
            return student

    Logs([]).compile(Program(), trainset=devset("t", 1, 1))

    ((name, _, [(child, _, _)]),) = runs.tree()
    assert "optimizer" in runs.run(name).data.metrics
    assert "candidate" in runs.run(child).data.metrics
    assert "candidate" not in runs.run(name).data.metrics


def test_a_thread_of_the_users_has_none_unless_propagated(runs):
    """Python gives a plain thread nothing: there MLflow behaves as documented; ``propagate`` takes the run along."""
    seen = []
    with mlflow.start_run(run_name="mine"):
        for function in (
            lambda: seen.append(active_name()),
            dspy_mlflow_async.propagate(lambda: seen.append(active_name())),
        ):
            thread = threading.Thread(target=function)
            thread.start()
            thread.join(TIMEOUT)

    assert [None, "mine"] == seen


def test_a_call_in_a_thread_without_a_context_gets_the_newest_run(runs):
    """While another thread is inside ``with mlflow.start_run()``, a plain thread's call belongs to it, as in MLflow."""
    with mlflow.start_run(run_name="mine"):
        in_threads(lambda: Program()(question="@elsewhere"))
        Program()(question="@here")

    assert {"mine": ["@elsewhere", "@here"]} == runs.traces_by_run()


def test_a_copied_context_keeps_its_run(runs):
    """Ending a run in the context that opened it does not change what a copy of it has."""
    with mlflow.start_run(run_name="mine"):
        copied = contextvars.copy_context()

    assert (None, "mine") == (active_name(), copied.run(active_name))


def test_streams_and_syncify_stay_in_their_run(runs):
    """``dspy.streamify`` and ``dspy.syncify`` inside a run: their traces belong to it."""

    async def main():
        with mlflow.start_run(run_name="stream"):
            async for _ in dspy.streamify(Program())(question="@streamed"):
                pass

    asyncio.run(main())
    with mlflow.start_run(run_name="sync"):
        dspy.syncify(Program())(question="@synced")

    assert {"stream": ["@streamed"], "sync": ["@synced"]} == runs.traces_by_run()


# --- installed and not --------------------------------------------------------------------------------------------


def test_disable_gives_mlflow_its_own_stack_back(store):
    """Before, during and after ``autolog()``."""
    stack, enter, leave = fluent._active_run_stack, mlflow.ActiveRun.__enter__, mlflow.ActiveRun.__exit__
    dspy_mlflow_async.autolog(silent=True)
    assert active_runs.is_installed()
    dspy_mlflow_async.autolog(disable=True)

    assert (stack, enter, leave) == (fluent._active_run_stack, mlflow.ActiveRun.__enter__, mlflow.ActiveRun.__exit__)


def test_disable_inside_a_run_loses_it_not(runs):
    """``autolog(disable=True)`` between ``start_run()`` and its end, here and in another thread: both runs end."""
    stack = fluent._active_run_stack.original
    is_open, may_end = threading.Event(), threading.Event()

    def other():
        with mlflow.start_run(run_name="other"):
            is_open.set()
            may_end.wait(TIMEOUT)
            mlflow.log_metric("late", 1)

    thread = threading.Thread(target=other)
    thread.start()
    is_open.wait(TIMEOUT)
    with mlflow.start_run(run_name="mine"):
        dspy_mlflow_async.autolog(disable=True)
        mlflow.log_metric("late", 1)
    may_end.set()
    thread.join(TIMEOUT)

    assert [("mine", "FINISHED", []), ("other", "FINISHED", [])] == runs.tree()
    assert [{"late": 1.0}] * 2 == [run.data.metrics for run in runs.runs()]
    assert stack is fluent._active_run_stack


def test_context_runs_false_leaves_mlflow_alone(store):
    """``autolog(context_runs=False)``: MLflow's stack is its own; evaluations and their traces are right."""
    stack = fluent._active_run_stack
    dspy_mlflow_async.autolog(log_evals=True, context_runs=False, silent=True)
    in_threads(*(lambda name=name: evaluate(name, num_threads=2, metric_key=name) for name in "ab"))

    assert stack is fluent._active_run_stack
    assert [("a", "FINISHED", []), ("b", "FINISHED", [])] == store.tree()
    assert {name: markers(name, 2) for name in "ab"} == store.traces_by_run()


def test_a_later_mlflow_without_the_seam_costs_one_warning(store, monkeypatch, caplog):
    """Where MLflow keeps its runs elsewhere: one warning, and evaluations, compiles and their traces are right."""
    monkeypatch.setattr(active_runs.mlflow_runs, "has_run_stack", lambda: False)
    with caplog.at_level(logging.WARNING, "dspy_mlflow_async"):
        for _ in range(2):
            dspy_mlflow_async.autolog(log_evals=True, log_compiles=True, silent=True)
    evaluate("a", num_threads=2)
    Candidates([("b", 1)]).compile(Program(), trainset=devset("t", 1, 1))

    assert 1 == sum("active runs elsewhere" in record.getMessage() for record in caplog.records)
    assert ["eval", "eval_0"] == sorted(run.info.run_name for run in store.runs() if "eval" in run.info.run_name)
    assert {"FINISHED"} == {run.info.status for run in store.runs()}
    assert {"eval": markers("a", 2)} == store.traces_by_run()


def test_without_the_seam_the_users_run_is_seen(store, monkeypatch):
    """There ``mlflow.active_run()`` tells of it: an evaluation logs into it, a run of ours is its child."""
    monkeypatch.setattr(active_runs.mlflow_runs, "has_run_stack", lambda: False)
    dspy_mlflow_async.autolog(log_evals=True, silent=True)
    with mlflow.start_run(run_name="mine"):
        evaluate("a", num_threads=2)
        with dspy_mlflow_async.run("ours"):
            evaluate("b")
        between = active_runs.VARIABLE.get()

    assert between is None
    assert [("mine", "FINISHED", [("ours", "FINISHED", [])])] == store.tree()
    assert {"mine": markers("a", 2), "ours": markers("b", 2)} == store.traces_by_run()


# --- MLflow's own examples ----------------------------------------------------------------------------------------


@pytest.fixture(params=["mlflow", "ours"])
def either(request, store):
    """A store, without and with our tracer: MLflow's documented behaviour is the same."""
    if request.param == "ours":
        dspy_mlflow_async.autolog(silent=True)
    return store


def test_nested_runs_as_documented(either):
    """The example of ``mlflow.start_run``: nested runs, tags, description, and a child by ``parent_run_id``."""
    with mlflow.start_run(run_name="PARENT_RUN", tags={"version": "v1"}, description="parent") as parent_run:
        mlflow.log_param("parent", "yes")
        with mlflow.start_run(run_name="CHILD_RUN", description="child", nested=True):
            mlflow.log_param("child", "yes")
    with mlflow.start_run(run_name="NEW_CHILD_RUN", parent_run_id=parent_run.info.run_id):
        mlflow.log_param("new-child", "yes")
    with mlflow.start_run(run_name="THIRD", parent_run_id=parent_run.info.run_id, nested=True):
        pass

    children = [(name, "FINISHED", []) for name in ("CHILD_RUN", "NEW_CHILD_RUN", "THIRD")]
    assert [("PARENT_RUN", "FINISHED", children)] == either.tree()
    parent = either.run("PARENT_RUN")
    assert ({"parent": "yes"}, "v1", "parent") == (
        parent.data.params,
        parent.data.tags["version"],
        parent.data.tags["mlflow.note.content"],
    )
    assert {"new-child": "yes"} == either.run("NEW_CHILD_RUN").data.params


def test_a_second_run_without_nested_is_refused(either):
    """``start_run`` inside of a run, without ``nested``, raises; the run goes on."""
    with mlflow.start_run(run_name="a"):
        with pytest.raises(Exception, match="already active"):
            mlflow.start_run(run_name="b")
        mlflow.log_metric("after", 1)
    with mlflow.start_run(run_name="c"):
        pass

    assert [("a", "FINISHED", []), ("c", "FINISHED", [])] == either.tree()


def test_end_run_as_documented(either):
    """``start_run``, ``active_run``, ``end_run`` and ``last_active_run`` without ``with``."""
    started = mlflow.start_run(run_name="a")
    assert started.info.run_id == mlflow.active_run().info.run_id == mlflow.last_active_run().info.run_id
    mlflow.end_run(status="FAILED")
    last = mlflow.last_active_run()
    mlflow.end_run()  # none is active: nothing happens

    assert mlflow.active_run() is None
    assert ("a", "FAILED") == (last.info.run_name, last.info.status)


def test_end_run_inside_with_ends_it_once(either):
    """``mlflow.end_run("KILLED")`` inside the block: that status stays, and the next run is not touched."""
    with mlflow.start_run(run_name="a"):
        mlflow.end_run("KILLED")
        assert mlflow.active_run() is None
        b = mlflow.start_run(run_name="b")
    assert b.info.run_id == mlflow.active_run().info.run_id
    mlflow.end_run()

    assert [("a", "KILLED", []), ("b", "FINISHED", [])] == either.tree()


def test_an_exception_fails_the_run_and_passes(either):
    """``ActiveRun.__exit__``: FAILED, and the exception goes on."""

    def fail():
        with mlflow.start_run(run_name="a"):
            with mlflow.start_run(run_name="b", nested=True):
                pass
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()

    assert [("a", "FAILED", [("b", "FINISHED", [])])] == either.tree()


def test_a_run_is_resumed_by_its_id(either):
    """``with mlflow.start_run(run_id=...)`` opens an ended run again."""
    with mlflow.start_run(run_name="a") as a:
        pass
    with mlflow.start_run(run_id=a.info.run_id):
        mlflow.log_metric("again", 2)
        assert "RUNNING" == mlflow.get_run(a.info.run_id).info.status

    assert [("a", "FINISHED", [])] == either.tree()
    assert {"again": 2.0} == either.run("a").data.metrics


def test_a_started_run_is_entered_later(either):
    """``run = mlflow.start_run()`` and then ``with run``, as notebooks do; a child without ``with`` inside it."""
    run = mlflow.start_run(run_name="a")
    with run:
        mlflow.start_run(run_name="b", nested=True)
        mlflow.log_param("where", "b")
        mlflow.end_run()
        mlflow.log_param("where", "a")

    assert [("a", "FINISHED", [("b", "FINISHED", [])])] == either.tree()
    assert ["a", "b"] == [either.run(name).data.params["where"] for name in "ab"]
    assert mlflow.active_run() is None


def test_a_fluent_call_without_a_run_starts_one(either):
    """``mlflow.log_metric`` outside of any run makes one, which stays active until ``end_run``."""
    mlflow.log_metric("x", 1)
    assert mlflow.active_run() is not None
    mlflow.end_run()

    assert [("FINISHED", {"x": 1.0})] == [(run.info.status, run.data.metrics) for run in either.runs()]


def test_threads_have_their_own_fluent_runs(either):
    """``mlflow.start_run()`` in a thread is that thread's alone, as documented."""
    with mlflow.start_run(run_name="main"):

        def other():
            with mlflow.start_run(run_name="other"):
                mlflow.log_metric("x", 2)

        in_threads(other)
        mlflow.log_metric("x", 1)

    assert [("main", "FINISHED", []), ("other", "FINISHED", [])] == either.tree()
    assert [1.0, 2.0] == [either.run(name).data.metrics["x"] for name in ("main", "other")]


def test_child_runs_in_a_pool_as_documented(either):
    """MLflow's tutorial on parallel child runs: ``parent_run_id`` in threads."""
    with mlflow.start_run(run_name="parent") as parent:

        def child(index):
            with mlflow.start_run(run_name=f"child{index}", parent_run_id=parent.info.run_id, nested=True):
                mlflow.log_metric("index", index)

        in_threads(*(lambda index=index: child(index) for index in range(3)))

    assert [("parent", "FINISHED", [(f"child{i}", "FINISHED", []) for i in range(3)])] == either.tree()
    assert [0.0, 1.0, 2.0] == [either.run(f"child{i}").data.metrics["index"] for i in range(3)]


def test_autologging_manages_its_run_in_ours(either):
    """``mlflow.log_dict``, ``log_text`` and ``get_artifact_uri`` find the active run as ever."""
    with mlflow.start_run(run_name="a") as a:
        mlflow.log_dict({"x": 1}, "x.json")
        mlflow.set_tag("t", "1")
        uri = mlflow.get_artifact_uri("x.json")

    assert a.info.run_id in uri
    assert ["x.json"] == either.artifacts(either.run("a"))


# --- processes ----------------------------------------------------------------------------------------------------


def _in_a_child_process(queue):
    queue.put((active_name(), active_runs.VARIABLE.get(), fluent._active_run_stack.get() or None))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_no_active_run(either):
    """As with MLflow's own stack: the runs are the parent's, which ends them."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with mlflow.start_run(run_name="a"):
        child = context.Process(target=_in_a_child_process, args=(queue,))
        child.start()
        found = queue.get(timeout=TIMEOUT)
        child.join(TIMEOUT)

    assert ((None, None, None), 0) == (found, child.exitcode)
    assert [("a", "FINISHED", [])] == either.tree()


def script(store, body):
    """Run a Python program in a process of its own, with our tracer on and runs in this store."""
    start = f"""
        import os, sys, threading
        import dspy, mlflow, tqdm
        sys.path[:0] = {sys.path!r}
        mlflow.set_tracking_uri({mlflow.get_tracking_uri()!r})
        mlflow.set_experiment(experiment_id={store.experiment_id!r})
        import dspy_mlflow_async
        from echo import EchoLM
        from runtools import NoBar, Program, Candidates, devset, evaluate
        tqdm.tqdm = NoBar
        dspy.configure(lm=EchoLM())
        dspy_mlflow_async.autolog(log_evals=True, log_compiles=True, silent=True)
    """
    code = textwrap.dedent(start) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], check=False, timeout=200, capture_output=True, text=True)


@pytest.mark.timeout(300)
def test_a_process_that_exits_in_the_middle_leaves_nothing_running(store):
    """``sys.exit`` while an evaluation and a compile go on in daemon threads: all their runs are KILLED."""
    done = script(
        store,
        """
        reached = threading.Barrier(3)
        def during(question):
            reached.wait(20)
            threading.Event().wait()
        def compiles():
            Candidates([("a", 1)], program=lambda: Program(during)).compile(Program(), trainset=devset("t", 1, 1))
        def evaluates():
            evaluate("b", program=Program(during), metric_key="b")
        for job in (compiles, evaluates):
            threading.Thread(target=job, daemon=True).start()
        scope = dspy_mlflow_async.run("scope")
        scope.__enter__()
        reached.wait(20)
        sys.exit(3)
        """,
    )

    assert 3 == done.returncode, done.stderr
    ((name, status, children),) = [node for node in store.tree() if node[0] not in {"b", "scope"}]
    assert ("KILLED", [("eval_0", "KILLED", [])]) == (status, children), name
    assert [("b", "KILLED", []), ("scope", "KILLED", [])] == [n for n in store.tree() if n[0] in {"b", "scope"}]


@pytest.mark.timeout(300)
def test_sigterm_leaves_nothing_running(store):
    """The same when SIGTERM ends the process."""
    done = script(
        store,
        """
        import signal
        def during(question):
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(20)
        evaluate("a", program=Program(during))
        """,
    )

    assert -15 == done.returncode, done.stderr
    assert [("eval", "KILLED", [])] == store.tree()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.timeout(300)
def test_a_forked_child_that_exits_leaves_the_parents_runs_alone(store):
    """A child that ends inside the parent's evaluation does not end the parent's run."""
    done = script(
        store,
        """
        def during(question):
            if question.endswith("-0"):
                child = os.fork()
                if child == 0:
                    sys.exit(0)  # runs the exit handlers
                os.waitpid(child, 0)
                status = mlflow.get_run(mlflow.active_run().info.run_id).info.status
                mlflow.log_param("status", status)
        evaluate("a", program=Program(during))
        """,
    )

    assert 0 == done.returncode, done.stderr
    assert [("eval", "FINISHED", [])] == store.tree()
    assert "RUNNING" == store.run("eval").data.params["status"]
