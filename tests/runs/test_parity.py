"""One after the other, our runs are MLflow's, run by run and artifact by artifact; at the same time, MLflow's fail."""

import asyncio
import functools
import json
import threading

import dspy
import mlflow
import pytest
from dspy.teleprompt import BootstrapFewShotWithRandomSearch
from mlflow.tracking import fluent
from runtools import (
    PARENT,
    TIMEOUT,
    Candidates,
    Meeting,
    Program,
    Store,
    Turns,
    copying_pool,
    devset,
    evaluate,
    exact,
    in_threads,
    markers,
)

import dspy_mlflow_async
from dspy_mlflow_async.seams.mlflow_autolog import turn_own_autolog_off
from echo import feedback_on

# What we log beyond MLflow; everything else must be the same.
MORE_METRICS = {
    "examples", "errors", "latency_p50_seconds", "latency_p95_seconds", "input_tokens", "output_tokens", "cost_usd",
    "lm_calls",
}  # fmt: skip
MORE_COLUMNS = {"trace_id", "error", "duration_seconds"}
MORE_ARTIFACTS = {"candidates.json", "program.mmd", "program.svg", "scores.png"}
# MLflow gathers the optimizer's own params and then logs the arguments of compile alone, less those in **kwargs.
MORE_PARAMS = {
    "max_rounds", "min_num_samples", "max_num_samples", "num_candidate_sets", "max_labeled_demos", "num_threads",
    "max_errors", "stop_at_score", "metric_threshold", "budget",
}  # fmt: skip


def tracer_of(name, **settings):
    """Switch on MLflow's own callback, or ours."""
    settings = {"log_evals": True, "log_compiles": True, "silent": True} | settings
    if name == "mlflow":
        mlflow.dspy.autolog(**settings)
    else:
        dspy_mlflow_async.autolog(**settings)


def switch_off():
    """Both tracers, and what MLflow's has changed in DSPy's settings."""
    dspy_mlflow_async.autolog(disable=True)
    turn_own_autolog_off()
    dspy.configure(callbacks=[], track_usage=False)


# --- one after the other ------------------------------------------------------------------------------------------


def own():
    evaluate("a", 3, 4)


def own_by_key():
    evaluate("a", 3, 4, num_threads=2, metric_key="nightly")
    evaluate("b", disable_logging=True)


def in_the_users():
    with mlflow.start_run(run_name="mine"):
        evaluate("a", 1, 2)
        mlflow.log_metric("mine", 1)


def twice_in_the_users():
    with mlflow.start_run(run_name="mine"):
        evaluate("a", 1, 2)
        evaluate("b", 2, 2)


def nested_runs():
    with mlflow.start_run(run_name="outer"):
        for name in "ab":
            with mlflow.start_run(run_name=name, nested=True):
                evaluate(name)


def without_with():
    mlflow.start_run(run_name="mine")
    evaluate("a")
    mlflow.end_run()


def failing():
    def during(question):
        raise ValueError(question)  # a metric that raises is among MLflow's defects

    with pytest.raises(Exception, match="cancelled"):
        dspy.Evaluate(devset=devset("a", 1, 2), metric=exact, num_threads=1, max_errors=1)(Program(during))
    evaluate("b")


def failed_examples():
    def during(question):
        if question == "@a-1":
            raise ValueError("no")

    evaluate("a", 3, 3, program=Program(during))


def uneven():
    examples = [dspy.Example(question=f"@{i}", **{f"k{i % 2}": i}).with_inputs("question") for i in range(4)]

    class Uneven(dspy.Module):
        def forward(self, question):
            return dspy.Prediction(**{f"p{question[1:]}": 1, "both": question})

    dspy.Evaluate(devset=examples, metric=lambda e, p: 1.0, num_threads=1)(Uneven())


def compiling():
    optimizer = Candidates([("a", 1), ("b", 3), ("c", 2)])
    optimizer.compile(Program(), trainset=devset("t", 1, 3), valset=devset("v", 1, 2), budget=20)


def compiling_in_the_users():
    with mlflow.start_run(run_name="mine"):
        Candidates([("a", 1), ("b", 3)], metadata={"metric_key": "eval_full"}).compile(
            Program(), trainset=devset("t", 1, 3)
        )


def compiling_twice():
    for name in "ab":
        Candidates([(name, 1), (name, 2)]).compile(Program(), trainset=devset(name, 1, 2))


def failing_compile():
    class Fails(Candidates):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            super().compile(student, trainset=trainset)
            raise ValueError("compile")

    with pytest.raises(ValueError, match="compile"):
        Fails([("a", 1)]).compile(Program(), trainset=devset("t", 1, 1))


def searching():
    optimizer = BootstrapFewShotWithRandomSearch(
        metric=exact, max_bootstrapped_demos=1, max_labeled_demos=1, num_candidate_programs=1, num_threads=1
    )
    trainset = [dspy.Example(**each, answer=each.gold).with_inputs("question") for each in devset("t", 3, 3)]
    optimizer.compile(Program(), trainset=trainset)


def described(store):
    """All runs, oldest first, as literals; made-up names as ``*``."""
    found = []
    for run in store.runs():
        name = run.info.run_name
        if not (name.startswith("eval") or name in {"a", "b", "mine", "outer", "nightly"}):
            name = "*"
        artifacts = {path: store.json(run, path) for path in store.artifacts(run) if path.endswith(".json")}
        for path, content in artifacts.items():
            if "columns" in content:
                artifacts[path] = store.table(run, path)
            content.pop("metadata", None) if isinstance(content, dict) else None
        found.append(
            {
                "name": name,
                "parent": run.data.tags.get(PARENT),
                "run_id": run.info.run_id,
                "status": run.info.status,
                "params": dict(run.data.params),
                "series": {key: store.series(run, key) for key in run.data.metrics},
                "artifacts": artifacts,
                "other artifacts": {path for path in store.artifacts(run) if not path.endswith(".json")},
                "tags": {
                    key: run.data.tags.get(key)
                    for key in ("mlflow.autologging", "mlflow.loggedArtifacts", "mlflow.source.type", "mlflow.user")
                },
                "models": len(run.outputs.model_outputs),
            }
        )
    names = {run["run_id"]: run["name"] for run in found}
    for run in found:
        run["parent"] = names.get(run.pop("parent"))
        del run["run_id"]
        table = run["tags"]["mlflow.loggedArtifacts"]
        run["tags"]["mlflow.loggedArtifacts"] = table and sorted(each["path"] for each in json.loads(table))
    return sorted(found, key=lambda run: json.dumps(run, sort_keys=True, default=str))


def less_our_additions(run):
    """What is left of one of our runs without what MLflow does not log."""
    series = {key: value for key, value in run["series"].items() if key.partition("/")[0] not in MORE_METRICS}
    kept = {**run, "series": series}
    kept["other artifacts"] = run["other artifacts"] - MORE_ARTIFACTS
    kept["artifacts"] = {
        path: [{key: value for key, value in row.items() if key not in MORE_COLUMNS} for row in content]
        if isinstance(content, list)
        else content
        for path, content in run["artifacts"].items()
        if path not in MORE_ARTIFACTS
    }
    kept["params"] = {key: value for key, value in run["params"].items() if key not in MORE_PARAMS}
    return kept


SCENARIOS = [
    own, own_by_key, in_the_users, twice_in_the_users, nested_runs, without_with, failing, failed_examples, uneven,
    compiling, compiling_in_the_users, compiling_twice,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # as errors they make mlflow.log_table fail, which MLflow swallows
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@pytest.mark.long
def test_one_after_the_other_our_runs_are_mlflows(store_uri, tmp_path, monkeypatch, scenario):
    """The same runs, parents, params, metrics by step, tags, tables and artifacts as ``mlflow.dspy.autolog``'s."""
    monkeypatch.setattr("builtins.print", lambda *args, **kwargs: None)
    found = {}
    for tracer in ("mlflow", "ours"):
        with Store.new_experiment(f"{scenario.__name__}-{tracer}", tmp_path / tracer, monkeypatch) as store:
            tracer_of(tracer)
            scenario()
            switch_off()
            found[tracer] = described(store), store.traces_by_run() if tracer == "ours" else None
            if tracer == "mlflow":
                theirs_by_run = store.traces_by_run()
    ours, ours_by_run = found["ours"]

    assert found["mlflow"][0] == sorted(
        map(less_our_additions, ours), key=lambda run: json.dumps(run, sort_keys=True, default=str)
    )
    assert theirs_by_run == ours_by_run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.long
def test_the_evaluations_of_random_search_are_mlflows(store_uri, tmp_path, monkeypatch):
    """It calls other optimizers, whose arguments, data sets and programs MLflow logs over its own: not so here."""
    monkeypatch.setattr("builtins.print", lambda *args, **kwargs: None)
    found = {}
    for tracer in ("mlflow", "ours"):
        with Store.new_experiment(f"searching-{tracer}", tmp_path / tracer, monkeypatch) as store:
            tracer_of(tracer)
            searching()
            switch_off()
            found[tracer] = sorted(map(less_our_additions, described(store)), key=lambda run: run["name"])
    roots = {tracer: next(run for run in found[tracer] if run["name"] == "*") for tracer in found}

    theirs, ours = ([run for run in found[tracer] if run["name"] != "*"] for tracer in ("mlflow", "ours"))
    assert theirs == ours
    for key in ("status", "parent", "series"):
        assert roots["mlflow"][key] == roots["ours"][key]
    assert roots["mlflow"]["artifacts"]["best_model.json"] == roots["ours"]["artifacts"]["best_model.json"]
    assert markers("t", 3) == [row["question"] for row in roots["ours"]["artifacts"]["trainset.json"]]


def test_a_failing_compile_has_its_evaluations_too(store_uri, tmp_path, monkeypatch):
    """As with MLflow, whose own run of it is FINISHED all the same: its patch swallows what would tell."""
    found = {}
    for tracer in ("mlflow", "ours"):
        with Store.new_experiment(f"failing-{tracer}", tmp_path / tracer, monkeypatch) as store:
            tracer_of(tracer)
            failing_compile()
            switch_off()
            found[tracer] = {
                run["name"]: (run["status"], run["parent"], run["series"]["eval"]) for run in described(store)
            }

    assert ("FINISHED", "*", [(0, 25.0)]) == found["mlflow"]["eval_0"] == found["ours"]["eval_0"]
    assert [(None, [(0, 25.0)])] * 2 == [found[tracer]["*"][1:] for tracer in ("mlflow", "ours")]
    assert "FAILED" == found["ours"]["*"][0]


# --- at the same time ---------------------------------------------------------------------------------------------


def fails_with_mlflow(function):
    """The test holds with our tracer; MLflow's own callback fails it, which documents why this library exists."""
    mlflows = pytest.param(
        "mlflow", marks=pytest.mark.xfail(reason="MLflow keeps it in one place for all", strict=True)
    )

    @pytest.mark.parametrize("tracer", ["ours", mlflows])
    @functools.wraps(function)
    def test(store, tracer):
        # MLflow's way to switch traces off in a compile stops the whole process: not what is tested here.
        tracer_of(tracer, log_traces_from_compile=True)
        try:
            function(store)
        finally:
            switch_off()
            if tracer == "mlflow":
                fluent._active_run_stack.reset()  # runs of threads that have ended, by which later traces would go

    del test.__wrapped__
    return test


@fails_with_mlflow
def test_traces_of_evaluations_at_once_are_their_runs(store):
    """MLflow gives them to the newest active run of any thread."""
    meeting = Meeting(3)
    in_threads(
        *(lambda name=name: evaluate(name, program=Program(meeting), num_threads=2, metric_key=name) for name in "abc")
    )

    assert {name: markers(name, 2) for name in "abc"} == store.traces_by_run()


@fails_with_mlflow
@pytest.mark.long
def test_compiles_at_once_have_steps_of_their_own(store):
    """MLflow's step counters are on its one callback object."""
    meetings = [Meeting(2) for _ in range(3)]

    def job(name):
        programs = iter(meetings)
        Candidates([(name, 1)] * 3, program=lambda: Program(next(programs))).compile(
            Program(), trainset=devset(name, 1, 1)
        )

    in_threads(lambda: job("a"), lambda: job("b"))

    roots = [run for run in store.runs() if PARENT not in run.data.tags]
    assert [["eval_0", "eval_1", "eval_2"]] * 2 == [sorted(store.children(run)) for run in roots]
    assert [[(0, 25.0), (1, 25.0), (2, 25.0)]] * 2 == [store.series(run, "eval") for run in roots]


@fails_with_mlflow
def test_candidates_in_threads_are_children_of_their_compile(store):
    """With MLflow they are orphans, and the parent gets no metric."""
    Candidates([("a", 1), ("b", 2)], pool=copying_pool).compile(Program(), trainset=devset("t", 1, 1))

    (root,) = [run for run in store.runs() if PARENT not in run.data.tags]
    assert ["eval_0", "eval_1"] == sorted(store.children(root))
    assert [25.0, 50.0] == sorted(score for _, score in store.series(root, "eval"))


@fails_with_mlflow
def test_an_evaluation_beside_a_compile_is_no_child_of_it(store):
    """MLflow takes it for one: its callback only knows that somebody compiles."""
    compiles, has_evaluated = threading.Event(), threading.Event()

    def during(question):
        compiles.set()
        has_evaluated.wait(TIMEOUT)

    def beside():
        compiles.wait(TIMEOUT)
        try:
            evaluate("b", metric_key="alone")
        finally:
            has_evaluated.set()

    in_threads(
        lambda: Candidates([("a", 1)], program=lambda: Program(during)).compile(Program(), trainset=devset("t", 1, 1)),
        beside,
    )

    assert ("alone", "FINISHED", []) in store.tree()


@fails_with_mlflow
def test_a_compile_that_ends_leaves_other_evaluations_alone(store):
    """MLflow's ``reset()`` forgets the evaluations that go on elsewhere: their runs stay RUNNING."""
    evaluates, has_compiled = threading.Event(), threading.Event()

    def during(question):
        evaluates.set()
        has_compiled.wait(TIMEOUT)

    def compiles():
        evaluates.wait(TIMEOUT)
        try:
            Candidates([]).compile(Program(), trainset=devset("t", 1, 1))
        finally:
            has_compiled.set()

    in_threads(lambda: evaluate("a", program=Program(during), metric_key="long"), compiles)

    assert ("long", "FINISHED", []) in store.tree()


@fails_with_mlflow
def test_runs_in_tasks_do_not_mix(store):
    """``mlflow.start_run()`` in two tasks of one thread: MLflow's stack is the thread's."""

    async def task(name, turns):
        with mlflow.start_run(run_name=name):
            await turns.wait()
            mlflow.log_param("name", name)
            await turns.wait()

    async def main():
        turns = Turns(2)
        await asyncio.wait_for(asyncio.gather(*(task(name, turns) for name in "ab")), 20)

    asyncio.run(main())

    assert [("a", "FINISHED", []), ("b", "FINISHED", [])] == store.tree()
    assert ["a", "b"] == [store.run(name).data.params["name"] for name in "ab"]


@fails_with_mlflow
def test_a_metric_call_in_a_worker_makes_no_stray_run(store):
    """``mlflow.log_metric`` in DSPy's worker threads starts runs of their own with MLflow."""
    with mlflow.start_run(run_name="mine"):
        evaluate("a", program=Program(lambda question: mlflow.log_metric("x", 1)), num_threads=2)

    assert [("mine", "FINISHED", [])] == store.tree()
    assert 1.0 == store.run("mine").data.metrics["x"]


@fails_with_mlflow
def test_feedback_is_stored(store):
    """MLflow logs it before the trace is there, and swallows the error; a partial has no ``__name__``."""

    def weighted(example, prediction, weight):
        return weight

    evaluate("a", 1, 3, metric=functools.partial(weighted, weight=0.5))

    assert [[0.5]] * 3 == [[each.feedback.value for each in feedback_on(trace)] for trace in store.traces()]


@fails_with_mlflow
def test_a_raising_metric_changes_no_result(store):
    """With MLflow, ``Evaluate`` itself raises ``TypeError``."""

    def metric(example, prediction):
        if example.question == "@a-1":
            raise ValueError("no")
        return 1.0

    assert 75.0 == evaluate("a", 4, 4, metric=metric, num_threads=2).score
