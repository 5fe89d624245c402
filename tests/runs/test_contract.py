"""Which run an evaluation or a compile logs into: every row of the table in docs/design.md."""

import asyncio
import contextlib

import dspy
import mlflow
import pytest
from runtools import (
    AT_ONCE,
    Candidates,
    Meeting,
    Program,
    copying_pool,
    devset,
    evaluate,
    exact,
    in_threads,
    in_to_thread,
    markers,
)

import dspy_mlflow_async

STUDENT = {"trainset": devset("train", 1, 2)}


# --- alone ------------------------------------------------------------------------------------------------------


def test_an_evaluation_without_a_run_gets_its_own(runs):
    """No run open: a run named ``eval``, with the score, ended, and no longer active."""
    result = evaluate("a", 1, 2)

    assert 50.0 == result.score
    assert [("eval", "FINISHED", [])] == runs.tree()
    assert 50.0 == runs.run("eval").data.metrics["eval"]
    assert {"eval": markers("a", 2)} == runs.traces_by_run()
    assert mlflow.active_run() is None
    assert runs.run("eval").info.run_id == mlflow.last_active_run().info.run_id


def test_its_own_run_is_named_by_the_metric_key(runs):
    """``callback_metadata={"metric_key": ...}`` names the run; the metric in it is always ``eval``."""
    evaluate("a", metric_key="nightly")

    assert [("nightly", "FINISHED", [])] == runs.tree()
    assert 50.0 == runs.run("nightly").data.metrics["eval"]


def test_disabled_logging_gives_no_run(runs):
    """``callback_metadata={"disable_logging": True}``: no run, traces in no run, the same score."""
    result = evaluate("a", disable_logging=True)

    assert 50.0 == result.score
    assert [] == runs.tree()
    assert {None: markers("a", 2)} == runs.traces_by_run()


def test_log_evals_is_off_by_default(store, caplog):
    """``autolog()`` alone logs no run, and says nothing about it."""
    dspy_mlflow_async.autolog(silent=True)

    evaluate("a")

    assert [] == store.tree()
    assert [] == [record for record in caplog.records if record.name == "dspy_mlflow_async"]


def test_an_evaluation_in_the_users_run_logs_into_it(runs):
    """A run opened in the same thread and task, with nobody in it: that one, as MLflow does. It stays open."""
    with mlflow.start_run(run_name="mine") as mine:
        evaluate("a")
        assert mine.info.run_id == mlflow.active_run().info.run_id
        mlflow.log_metric("after", 1)

    assert [("mine", "FINISHED", [])] == runs.tree()
    assert {"after": 1.0, "eval": 50.0} == {
        key: value for key, value in runs.run("mine").data.metrics.items() if key in {"after", "eval"}
    }
    assert {"mine": markers("a", 2)} == runs.traces_by_run()


def test_evaluations_one_after_the_other_share_the_users_run(runs):
    """As with MLflow: the second evaluation's score is the metric's last value, both tables stand below each other."""
    with mlflow.start_run(run_name="mine"):
        evaluate("a", 1, 2)
        evaluate("b", 2, 2)

    assert [("mine", "FINISHED", [])] == runs.tree()
    mine = runs.run("mine")
    assert 100.0 == mine.data.metrics["eval"]
    assert markers("a", 2) + markers("b", 2) == [row["example_question"] for row in runs.table(mine)]


def test_a_run_begun_without_with_is_the_users_too(runs):
    """``mlflow.start_run()`` in a notebook: the evaluation logs into it, and leaves it open."""
    mine = mlflow.start_run(run_name="mine")
    evaluate("a")
    still = mlflow.active_run()
    mlflow.end_run()

    assert mine.info.run_id == still.info.run_id
    assert [("mine", "FINISHED", [])] == runs.tree()
    assert {"mine": markers("a", 2)} == runs.traces_by_run()


def test_a_failing_evaluation_ends_its_run_failed(runs):
    """What ``Evaluate`` raises ends the run FAILED, without a score."""

    def metric(example, prediction):
        raise ValueError(example.question)

    evaluation = dspy.Evaluate(devset=devset("a", 1, 2), metric=metric, num_threads=1, max_errors=1)
    with pytest.raises(Exception, match="cancelled"):
        evaluation(Program())

    assert [("eval", "FAILED", [])] == runs.tree()
    assert "eval" not in runs.run("eval").data.metrics
    assert mlflow.active_run() is None


def test_a_failing_evaluation_leaves_the_users_run_open(runs):
    """The user's run ends when the user ends it."""

    def metric(example, prediction):
        raise KeyboardInterrupt

    with mlflow.start_run(run_name="mine"):
        with pytest.raises(KeyboardInterrupt):
            evaluate("a", metric=metric)
        status = mlflow.get_run(mlflow.active_run().info.run_id).info.status

    assert "RUNNING" == status
    assert [("mine", "FINISHED", [])] == runs.tree()


def test_an_interrupted_evaluation_is_killed(runs):
    """A cancellation ends the run KILLED."""

    def metric(example, prediction):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate("a", metric=metric)

    assert [("eval", "KILLED", [])] == runs.tree()


@pytest.mark.parametrize("fails", [False, True])
def test_the_run_of_an_mlflow_project_is_the_first_ones(runs, monkeypatch, fails):
    """``MLFLOW_RUN_ID``, as ``mlflow run`` sets it: that run, with what it holds, which ends with it."""
    project = mlflow.MlflowClient().create_run(runs.experiment_id, run_name="project")
    mlflow.MlflowClient().log_param(project.info.run_id, "lm_params", "the project's")
    monkeypatch.setenv("MLFLOW_RUN_ID", project.info.run_id)
    seen = []

    def during(question):
        seen.append(mlflow.active_run().info.run_id)
        if fails:
            raise ValueError(question)

    evaluation = dspy.Evaluate(devset=devset("a", 1, 1), metric=exact, num_threads=1, max_errors=1)
    with pytest.raises(Exception, match="cancelled") if fails else contextlib.nullcontext():
        evaluation(Program(during), callback_metadata={"metric_key": "first"})
    evaluate("b", metric_key="second")

    assert [project.info.run_id] == seen
    assert [("first", "FAILED" if fails else "FINISHED", []), ("second", "FINISHED", [])] == runs.tree()
    assert "the project's" == runs.run("first").data.params["lm_params"]


def test_a_compile_takes_the_run_of_an_mlflow_project(runs, monkeypatch):
    """Its evaluations are below that run."""
    project = mlflow.MlflowClient().create_run(runs.experiment_id, run_name="project")
    monkeypatch.setenv("MLFLOW_RUN_ID", project.info.run_id)
    Candidates([("a", 1)]).compile(Program(), **STUDENT)

    assert [("project", "FINISHED", [("eval_0", "FINISHED", [])])] == runs.tree()
    assert "best_model.json" in runs.artifacts(runs.run("project"))


def test_of_evaluations_at_once_one_takes_the_run_of_a_project(runs, monkeypatch):
    """The others get their own."""
    project = mlflow.MlflowClient().create_run(runs.experiment_id, run_name="project")
    monkeypatch.setenv("MLFLOW_RUN_ID", project.info.run_id)
    meeting = Meeting(3)
    in_threads(*(lambda n=name: evaluate(n, program=Program(meeting), metric_key=n) for name in "abc"))

    assert [(name, "FINISHED", []) for name in "abc"] == runs.tree()
    assert project.info.run_id in {run.info.run_id for run in runs.runs()}


def test_a_project_run_that_is_deleted_is_none(runs, monkeypatch, caplog):
    """The evaluation goes on and says so."""
    project = mlflow.MlflowClient().create_run(runs.experiment_id, run_name="project")
    mlflow.delete_run(project.info.run_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", project.info.run_id)

    assert 50.0 == evaluate("a").score
    assert [] == runs.tree()
    assert "is deleted" in caplog.text


# --- inherited and taken runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", AT_ONCE[1:])
def test_an_inherited_run_gets_a_child(runs, at_once):
    """A run that came from another thread or task is not ours to log into: a child of it."""
    with mlflow.start_run(run_name="mine"):
        at_once(lambda: evaluate("a"))

    assert [("mine", "FINISHED", [("eval", "FINISHED", [])])] == runs.tree()
    assert {"eval": markers("a", 2)} == runs.traces_by_run()


async def test_a_run_inherited_by_a_task_gets_a_child(runs):
    """The same in a task on the same thread."""

    async def task():
        evaluate("a")

    with mlflow.start_run(run_name="mine"):
        await asyncio.create_task(task())

    assert [("mine", "FINISHED", [("eval", "FINISHED", [])])] == runs.tree()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_run_that_holds_an_evaluation_gets_a_child(runs, num_threads):
    """An evaluation that a program starts while the run holds another one."""

    class Inner(dspy.Module):
        def forward(self, question):
            evaluate(question.strip("@"), metric_key="inner")
            return dspy.Prediction(answer=question)

    with mlflow.start_run(run_name="mine"):
        evaluate("a", 1, 1, program=Inner(), num_threads=num_threads)

    assert [("mine", "FINISHED", [("inner", "FINISHED", [])])] == runs.tree()
    assert {"mine": ["@a-0"], "inner": markers("a-0", 2)} == runs.traces_by_run() | {"inner": markers("a-0", 2)}


@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_evaluation_inside_another_ones_own_run_is_its_child(runs, num_threads):
    """The run that an evaluation has made for itself is taken, in whichever thread the program runs."""

    class Inner(dspy.Module):
        def forward(self, question):
            evaluate(question.strip("@"), metric_key="inner")
            return dspy.Prediction(answer=question)

    evaluate("a", 1, 1, program=Inner(), num_threads=num_threads)

    assert [("eval", "FINISHED", [("inner", "FINISHED", [])])] == runs.tree()


# --- at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", AT_ONCE)
def test_evaluations_at_once_have_runs_of_their_own(runs, at_once):
    """Three evaluations, open at the same time: each its own run, score, table and traces."""
    meeting = Meeting(3)
    results = at_once(
        *(
            lambda name=name, right=right: evaluate(
                name, right, 4, program=Program(meeting), num_threads=2, metric_key=name
            )
            for name, right in (("a", 1), ("b", 2), ("c", 3))
        )
    )

    assert [25.0, 50.0, 75.0] == [result.score for result in results]
    assert [(name, "FINISHED", []) for name in "abc"] == runs.tree()
    assert {"a": 25.0, "b": 50.0, "c": 75.0} == {run.info.run_name: run.data.metrics["eval"] for run in runs.runs()}
    assert {name: markers(name, 4) for name in "abc"} == runs.traces_by_run()
    for name in "abc":
        assert markers(name, 4) == [row["pred_answer"] for row in runs.table(runs.run(name))]
    assert mlflow.active_run() is None


@pytest.mark.parametrize("at_once", AT_ONCE)
def test_each_status_is_its_own(runs, at_once):
    """Of evaluations at once, one ends well, one fails and one is interrupted."""
    meeting = Meeting(3)

    def metric(example, prediction):
        if "fails" in example.question:
            raise ValueError(example.question)
        if "stops" in example.question:
            raise KeyboardInterrupt
        return 1.0

    def job(name):
        evaluation = dspy.Evaluate(devset=devset(name, 1, 1), metric=metric, num_threads=1, max_errors=1)
        try:
            return evaluation(Program(meeting), callback_metadata={"metric_key": name}).score
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - told, not hidden
            return type(error)

    results = at_once(*(lambda name=name: job(name) for name in ("ends", "fails", "stops")))

    assert [100.0, Exception, KeyboardInterrupt] == results
    assert [("ends", "FINISHED", []), ("fails", "FAILED", []), ("stops", "KILLED", [])] == runs.tree()


@pytest.mark.parametrize("at_once", AT_ONCE)
def test_evaluations_at_once_in_one_run_are_its_children(runs, at_once):
    """Evaluations started side by side below the user's run: a child each; in plain threads, which inherit nothing,
    ``propagate`` takes it along.
    """
    meeting = Meeting(2)
    with mlflow.start_run(run_name="mine"):
        at_once(
            *(
                dspy_mlflow_async.propagate(lambda name=name: evaluate(name, program=Program(meeting), metric_key=name))
                for name in "ab"
            )
        )

    assert [("mine", "FINISHED", [("a", "FINISHED", []), ("b", "FINISHED", [])])] == runs.tree()
    assert {name: markers(name, 2) for name in "ab"} == runs.traces_by_run()


# --- compiles -----------------------------------------------------------------------------------------------------


def test_a_compile_gets_a_run_with_its_evaluations_below(runs):
    """``{metric_key}_{step}`` for each evaluation, and the series on the compile's run."""
    Candidates([("a", 1), ("b", 3), ("c", 2)]).compile(Program(), **STUDENT)

    ((name, status, children),) = runs.tree()
    assert "FINISHED" == status
    assert [("eval_0", "FINISHED", []), ("eval_1", "FINISHED", []), ("eval_2", "FINISHED", [])] == children
    parent = runs.run(name)
    assert [(0, 25.0), (1, 75.0), (2, 50.0)] == runs.series(parent, "eval")
    assert {"eval_0": 25.0, "eval_1": 75.0, "eval_2": 50.0} == {
        key: run.data.metrics["eval"] for key, run in runs.children(parent).items()
    }
    assert mlflow.active_run() is None


def test_steps_are_counted_per_key(runs):
    """Each metric key of a compile counts its own steps from 0."""

    class Mixed(Candidates):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            for index, key in enumerate(["full", "mini", "mini", "full", "mini"]):
                evaluate("a", index % 3, 2, metric_key=key)
            evaluate("b", disable_logging=True)
            return student

    Mixed([]).compile(Program(), **STUDENT)

    ((name, _, children),) = runs.tree()
    assert ["full_0", "full_1", "mini_0", "mini_1", "mini_2"] == [child for child, _, _ in children]
    assert [(0, 0.0), (1, 0.0)] == runs.series(runs.run(name), "full")
    assert [(0, 50.0), (1, 100.0), (2, 50.0)] == runs.series(runs.run(name), "mini")


def test_a_compile_in_the_users_run_logs_into_it(runs):
    """The user's run is the parent of the evaluations, as with MLflow."""
    with mlflow.start_run(run_name="mine"):
        Candidates([("a", 1), ("b", 2)]).compile(Program(), **STUDENT)

    assert [("mine", "FINISHED", [("eval_0", "FINISHED", []), ("eval_1", "FINISHED", [])])] == runs.tree()
    assert [(0, 25.0), (1, 50.0)] == runs.series(runs.run("mine"), "eval")


def test_a_compile_in_an_inherited_run_is_its_child(runs):
    """A child of the run that came from elsewhere, named by the optimizer."""
    with mlflow.start_run(run_name="mine"):
        in_to_thread(lambda: Candidates([("a", 1)]).compile(Program(), **STUDENT))

    assert [("mine", "FINISHED", [("Candidates", "FINISHED", [("eval_0", "FINISHED", [])])])] == runs.tree()


def test_evaluations_are_logged_without_compile_runs(store):
    """``log_evals`` without ``log_compiles``: numbered runs, below the user's run if there is one."""
    dspy_mlflow_async.autolog(log_evals=True, silent=True)
    Candidates([("a", 1), ("b", 2)]).compile(Program(), **STUDENT)
    with mlflow.start_run(run_name="mine"):
        Candidates([("a", 1)]).compile(Program(), **STUDENT)

    assert [
        ("eval_0", "FINISHED", []),
        ("eval_1", "FINISHED", []),
        ("mine", "FINISHED", [("eval_0", "FINISHED", [])]),
    ] == store.tree()
    assert [(0, 25.0)] == store.series(store.run("mine"), "eval")


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_compile_that_raises_ends_its_run_so(runs, error, status):
    """FAILED after an exception, KILLED after a cancellation; what was evaluated before is there."""

    class Raises(Candidates):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            evaluate("a", 1, 4)
            raise error("@stop")

    with pytest.raises(error):
        Raises([]).compile(Program(), **STUDENT)

    ((name, found, children),) = runs.tree()
    assert (status, [("eval_0", "FINISHED", [])]) == (found, children)
    assert [(0, 25.0)] == runs.series(runs.run(name), "eval")
    assert "best_model.json" not in runs.artifacts(runs.run(name))


def test_an_evaluation_that_raises_in_a_compile_takes_its_step_along(runs):
    """Its run is FAILED, the optimizer goes on, and the series has a gap there."""

    class Survives(Candidates):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            def metric(example, prediction):
                raise ValueError(example.question)

            evaluate("a", 1, 4)
            with pytest.raises(Exception, match="cancelled"):
                dspy.Evaluate(devset=trainset, metric=metric, num_threads=1, max_errors=1)(student)
            evaluate("c", 2, 4)
            return student

    Survives([]).compile(Program(), **STUDENT)

    ((name, _, children),) = runs.tree()
    assert [("eval_0", "FINISHED"), ("eval_1", "FAILED"), ("eval_2", "FINISHED")] == [each[:2] for each in children]
    assert [(0, 25.0), (2, 50.0)] == runs.series(runs.run(name), "eval")


@pytest.mark.parametrize("at_once", AT_ONCE)
def test_compiles_at_once_count_their_own_steps(runs, at_once):
    """Two optimizers whose evaluations interleave: each its own children, names, steps and artifacts."""
    meetings = [Meeting(2) for _ in range(3)]

    def job(name):
        plan = [(f"{name}{index}", index + 1) for index in range(3)]
        programs = iter(meetings)
        optimizer = Candidates(plan, program=lambda: Program(next(programs)), metadata={"metric_key": name})
        return optimizer.compile(Program(), trainset=devset(name, 1, 3))

    at_once(*(lambda name=name: job(name) for name in "ab"))

    roots = [run for run in runs.runs() if "mlflow.parentRunId" not in run.data.tags]
    assert 2 == len(roots)
    for root in roots:
        (name,) = {key[0] for key in runs.children(root)}
        assert [f"{name}_{step}" for step in range(3)] == sorted(runs.children(root))
        assert [(0, 25.0), (1, 50.0), (2, 75.0)] == runs.series(root, name)
        assert markers(name, 3) == [row["question"] for row in runs.table(root, "trainset.json")]
        for step in range(3):
            table = runs.table(runs.children(root)[f"{name}_{step}"])
            assert markers(f"{name}{step}", 4) == [row["example_question"] for row in table]
    assert {"FINISHED"} == {run.info.status for run in runs.runs()}
    assert 8 == len(runs.runs())


@pytest.mark.parametrize(
    "pool",
    [
        pytest.param(copying_pool, id="copied contexts, as GEPA does"),
        pytest.param(
            lambda function, items: in_to_thread(*(lambda item=item: function(item) for item in items)), id="to_thread"
        ),
        pytest.param(
            lambda function, items: in_threads(
                *(dspy_mlflow_async.propagate(lambda item=item: function(item)) for item in items)
            ),
            id="threads of the user's",
        ),
    ],
)
def test_candidates_evaluated_at_once_inside_one_compile(runs, pool):
    """A pool inside ``compile``: steps 0, 1, 2 in some order, each with its own score on the parent and the child."""
    meeting = Meeting(3)
    plan = [("a", 1), ("b", 2), ("c", 3)]
    Candidates(plan, pool=pool, program=lambda: Program(meeting)).compile(Program(), **STUDENT)

    ((name, _, children),) = runs.tree()
    assert [(f"eval_{step}", "FINISHED", []) for step in range(3)] == children
    root = runs.run(name)
    series = dict(runs.series(root, "eval"))
    assert {0, 1, 2} == set(series)
    assert [25.0, 50.0, 75.0] == sorted(series.values())
    for key, child in runs.children(root).items():
        assert series[int(key[-1])] == child.data.metrics["eval"]


def test_an_evaluation_beside_a_compile_is_not_its_child(runs):
    """An Evaluate outside of the optimizer, while that compiles elsewhere, is an evaluation of its own."""
    meeting = Meeting(2)

    def compiles():
        Candidates([("a", 1)], program=lambda: Program(meeting)).compile(Program(), **STUDENT)

    in_threads(compiles, lambda: evaluate("b", 2, 4, program=Program(meeting), metric_key="alone"))

    (compiled,) = [node for node in runs.tree() if node[0] != "alone"]
    assert [("eval_0", "FINISHED", [])] == compiled[2]
    assert ("alone", "FINISHED", []) in runs.tree()
    assert {"alone": markers("b", 4)} == runs.traces_by_run()


def test_nested_compiles_belong_to_the_outermost(runs):
    """An optimizer that calls others: one run, and the steps go on counting."""

    class Outer(Candidates):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            evaluate("a", 1, 4)
            student = Candidates([("b", 2), ("c", 3)]).compile(student, trainset=trainset)
            evaluate("d", 4, 4)
            return student

    Outer([]).compile(Program(), **STUDENT)

    ((name, _, children),) = runs.tree()
    assert [(f"eval_{step}", "FINISHED", []) for step in range(4)] == children
    assert [(0, 25.0), (1, 50.0), (2, 75.0), (3, 100.0)] == runs.series(runs.run(name), "eval")


def test_two_callbacks_of_ours_make_one_run(runs):
    """``autolog()`` and a ``TracingCallback`` in a ``dspy.context`` see the same evaluation: one run."""
    callback = dspy_mlflow_async.TracingCallback(log_evals=True, log_compiles=True)
    with dspy.context(callbacks=[*dspy.settings.callbacks, callback]):
        evaluate("a")
        Candidates([("b", 1)]).compile(Program(), **STUDENT)

    assert ["eval", "eval_0"] == sorted(run.info.run_name for run in runs.runs() if "eval" in run.info.run_name)
    assert 3 == len(runs.runs())
    assert {"FINISHED"} == {run.info.status for run in runs.runs()}
