"""What a compile's run holds, and what DSPy's own optimizers make of it, one and two at a time."""

import functools
import json
import re
import threading
from pathlib import Path

import dspy
import mlflow
import pytest
from dspy.teleprompt import (
    GEPA,
    BootstrapFewShot,
    BootstrapFewShotWithRandomSearch,
    LabeledFewShot,
    MIPROv2,
    Teleprompter,
)
from runtools import AT_ONCE, PARENT, TIMEOUT, Candidates, Program, devset, evaluate, exact, in_threads, markers

import dspy_mlflow_async
from echo import EchoLM

PNG = b"\x89PNG\r\n\x1a\n"


def roots(store):
    """The runs that have no parent."""
    return [run for run in store.runs() if PARENT not in run.data.tags]


def tagged(run, prefix):
    """The tags that begin so, without the prefix."""
    return {key[len(prefix) :]: value for key, value in run.data.tags.items() if key.startswith(prefix)}


def by_role(run, name):
    """The metrics of this name by role."""
    return {key.partition("/")[2]: value for key, value in run.data.metrics.items() if key.startswith(f"{name}/")}


def judge(example, prediction, trace=None, pred_name=None, pred_trace=None):
    """A metric that any optimizer can call."""
    return exact(example, prediction)


# --- a hand-written optimizer -------------------------------------------------------------------------------------


def test_params_data_sets_program_and_plot(runs):
    """Optimizer params, arguments of ``compile``, both data sets as tables, the program and the LM."""

    class Tuned(Candidates):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.depth, self.kind, self.is_quick, self.metric = 3, "greedy", True, exact

        def compile(self, student, *, trainset, teacher=None, valset=None, budget=10, **kwargs):
            best = super().compile(student, trainset=trainset, valset=valset)
            best.answer.demos = [dspy.Example(question="@demo", answer="@demo")]
            return best

    Tuned([("a", 1), ("b", 3), ("c", 2)]).compile(
        Program(), trainset=devset("t", 1, 3), valset=devset("v", 1, 2), budget=20, style="fast"
    )

    (run,) = roots(runs)
    params = run.data.params
    expected = {"depth": "3", "kind": "greedy", "is_quick": "True", "budget": "20", "style": "fast"}
    assert expected == {key: params.get(key) for key in expected}
    assert "echo/one" == json.loads(params["lm_params"])["model"]
    expected = ["best_model.json", "candidates.json", "program.mmd", "program.svg", "scores.png"]
    assert [*expected, "trainset.json", "valset.json"] == runs.artifacts(run)
    assert markers("t", 3) == [row["question"] for row in runs.table(run, "trainset.json")]
    assert markers("v", 2) == [row["question"] for row in runs.table(run, "valset.json")]
    assert "@demo" == runs.json(run, "best_model.json")["answer"]["demos"][0]["question"]
    path = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/scores.png")
    assert PNG == Path(path).read_bytes()[: len(PNG)]
    assert [(0, 25.0), (1, 75.0), (2, 50.0)] == runs.series(run, "eval")
    assert {"eval": "75.0"} == tagged(run, "dspy.best_score.")
    assert {"eval": "1"} == tagged(run, "dspy.best_step.")
    assert ("Tuned", "dspy") == (run.data.tags["dspy.optimizer"], run.data.tags["mlflow.autologging"])
    assert 2 == len(mlflow.load_table("valset.json", run_ids=[run.info.run_id]))


def test_the_first_of_equal_scores_is_best(runs):
    """The best step is the first that reached the best score."""
    Candidates([("a", 1), ("b", 3), ("c", 3)]).compile(Program(), trainset=devset("t", 1, 1))

    assert {"eval": "1"} == tagged(roots(runs)[0], "dspy.best_step.")


def test_secrets_are_masked_in_optimizer_params(runs):
    """GEPA keeps a ``wandb_api_key`` among its attributes: it is no param of ours to show."""

    class Keyed(Candidates):
        def __init__(self):
            super().__init__([])
            self.wandb_api_key = "sk-secret"
            self.max_tokens = 7

    Keyed().compile(Program(), trainset=devset("t", 1, 1), api_key="sk-other")

    params = roots(runs)[0].data.params
    assert "sk-" not in str(params)
    assert "7" == params["max_tokens"]


def test_odd_optimizers_and_data_sets(runs):
    """``get_params`` that raises, a trainset without examples, a program that cannot be saved: no error."""

    class Unsaved(Program):
        def save(self, *args, **kwargs):
            raise ValueError("not mine")

    class Broken(Teleprompter):
        def get_params(self):
            raise ValueError("not mine")

        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            evaluate("a", 1, 2)
            return Unsaved()

    Broken().compile(Program(), trainset=[1, "two", {"three": 3}], valset=())

    (run,) = roots(runs)
    assert "FINISHED" == run.info.status
    assert [(1, None), ("two", None), (None, 3)] == [
        (row.get("value"), row.get("three")) for row in runs.table(run, "trainset.json")
    ]
    expected = ["candidates.json", "program.mmd", "program.svg", "scores.png", "trainset.json"]
    assert expected == runs.artifacts(run)
    assert {"eval": "50.0"} == tagged(run, "dspy.best_score.")


def test_optimizers_from_before_and_after_autolog(store):
    """Classes made before and after ``autolog()``, and subclasses of them; ``compile`` is not replaced anywhere."""

    class Before(Candidates):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            evaluate("a")
            return student

    functions = [Teleprompter.compile, Before.compile, BootstrapFewShot.compile]
    dspy_mlflow_async.autolog(log_evals=True, log_compiles=True, silent=True)

    class After(Candidates):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            evaluate("a")
            return student

    class Below(Before):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            return super().compile(student, trainset=trainset)

    for optimizer in (Before, After, Below):
        optimizer([]).compile(Program(), trainset=devset("t", 1, 1))

    assert functions == [Teleprompter.compile, Before.compile, BootstrapFewShot.compile]
    assert ["After", "Before", "Below"] == sorted(run.data.tags["dspy.optimizer"] for run in roots(store))
    assert [["eval_0"]] * 3 == [sorted(store.children(run)) for run in roots(store)]


@pytest.mark.parametrize("at_once", AT_ONCE)
def test_shared_objects_stay_apart(runs, at_once):
    """One optimizer object, one student and one trainset in three compiles at once: three runs, each its own steps."""
    meeting = threading.Barrier(3, timeout=TIMEOUT)

    class Shared(Candidates):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            for step in range(3):
                meeting.wait()
                evaluate("a", step, 4)
            return student

    optimizer, student, trainset = Shared([]), Program(), devset("t", 1, 2)
    at_once(*(lambda: optimizer.compile(student, trainset=trainset) for _ in range(3)))

    assert 3 == len(roots(runs))
    for run in roots(runs):
        assert ["eval_0", "eval_1", "eval_2"] == sorted(runs.children(run))
        assert [(0, 0.0), (1, 25.0), (2, 50.0)] == runs.series(run, "eval")
        assert markers("t", 2) == [row["question"] for row in runs.table(run, "trainset.json")]


def test_lm_calls_by_role(runs):
    """The optimizer's LM for proposals, its LM for reflection, the task's and the metric's, each with its tokens."""
    proposing, reflecting = EchoLM(model="echo/p"), EchoLM(model="echo/r")

    class Roles(Candidates):
        def __init__(self):
            super().__init__([])
            self.prompt_model, self.reflection_lm = proposing, reflecting

        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            def metric(example, prediction):
                dspy.Predict("x -> y")(x="@judged")
                return 1.0

            for lm in (proposing, reflecting, reflecting):
                with dspy.context(lm=lm):
                    dspy.Predict("x -> y")(x="@idea")
            evaluate("a", 1, 3, metric=metric, num_threads=2)
            student(question="@task")
            return student

    Roles().compile(Program(), trainset=devset("t", 1, 1))

    (run,) = roots(runs)
    assert {"task": 4, "metric": 3, "proposal": 1, "reflection": 2} == by_role(run, "lm_calls")
    assert {"task": 40, "metric": 30, "proposal": 10, "reflection": 20} == by_role(run, "input_tokens")
    assert 3 * len("@judged") == by_role(run, "output_tokens")["metric"]
    assert (10, 100) == (run.data.metrics["lm_calls"], run.data.metrics["input_tokens"])


@pytest.mark.parametrize(
    ("where", "expected"), [("alone", "Candidates"), ("in the user's run", "mine"), ("in a child", "Candidates")]
)
def test_a_run_is_named_by_its_optimizer_or_by_the_user(runs, where, expected):
    """A compile's own run has the optimizer's name; in a run that the user has opened it has the user's."""
    optimizer = Candidates([])
    if where == "alone":
        optimizer.compile(Program(), trainset=devset("t", 1, 1))
    elif where == "in the user's run":
        with mlflow.start_run(run_name="mine"):
            optimizer.compile(Program(), trainset=devset("t", 1, 1))
    else:
        with mlflow.start_run(run_name="mine"):
            carried = dspy_mlflow_async.propagate(optimizer.compile)
            in_threads(lambda: carried(Program(), trainset=devset("t", 1, 1)))

    assert [expected] == [run.info.run_name for run in runs.runs() if "dspy.optimizer" in run.data.tags]


def test_what_a_compile_costs(runs):
    """Cost is a metric, in all and by role, where MLflow has the price of each model."""
    dspy.configure(lm=EchoLM(model="openai/gpt-4o-mini"))

    Candidates([("a", 1)]).compile(Program(), trainset=devset("t", 1, 1))

    metrics = roots(runs)[0].data.metrics
    assert 0 < metrics["cost_usd"] == metrics["cost_usd/task"]


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}])
def test_an_lm_that_reports_no_usage_has_no_token_metrics(runs, usage):
    """Nothing reported, or zeros filled in for it, are no tokens and no cost; the calls are counted all the same."""
    dspy.configure(lm=EchoLM(usage=lambda marker: usage, model="openai/gpt-4o-mini"))

    Candidates([("a", 2)]).compile(Program(), trainset=devset("t", 1, 1))

    (run,) = roots(runs)
    assert set() == {"input_tokens", "output_tokens", "cost_usd"} & set(runs.run("eval_0").data.metrics)
    assert {"lm_calls": 4, "lm_calls/task": 4} == {key: n for key, n in run.data.metrics.items() if key != "eval"}


def test_an_lm_that_does_both_counts_as_the_tasks(runs):
    """MIPROv2 without a ``prompt_model`` proposes with the task's LM: nobody can tell, so all is called task."""

    class Both(Candidates):
        def __init__(self):
            super().__init__([])
            self.prompt_model = self.task_model = dspy.settings.lm

        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            evaluate("a", 1, 2)
            return student

    Both().compile(Program(), trainset=devset("t", 1, 1))

    assert {"task": 2} == by_role(roots(runs)[0], "lm_calls")


@pytest.mark.parametrize("shape", ["module", "function", "method", "partial"])
def test_a_judge_with_an_lm_of_its_own_is_the_metrics(runs, shape):
    """BootstrapFewShot calls its metric itself: what the judge's LM is asked there counts as the metric's."""
    judging = EchoLM(model="echo/judge")

    class Judge(dspy.Module):
        def __init__(self):
            super().__init__()
            self.rate = dspy.Predict("answer -> rating")

        def forward(self, example, prediction, trace=None):
            self.rate(answer=prediction.answer)
            return True

        def method(self, example, prediction, trace=None):
            return self(example, prediction)

    module = Judge()
    module.set_lm(judging)

    def function(example, prediction, trace=None):
        return module(example, prediction)

    metric = {
        "module": module,
        "function": function,
        "method": module.method,
        "partial": functools.partial(function),
    }[shape]
    BootstrapFewShot(metric=metric, max_bootstrapped_demos=2).compile(Program(), trainset=devset("t", 2, 2))

    assert {"task": 2, "metric": 2} == by_role(roots(runs)[0], "lm_calls")


def test_a_judge_with_the_students_lm_cannot_be_told(runs):
    """Outside of ``Evaluate`` nothing else shows that it judges: its calls count as the task's."""
    student, judge = Program(), dspy.Predict("answer -> rating")
    student.set_lm(EchoLM(model="echo/both"))
    judge.set_lm(student.answer.lm)

    def metric(example, prediction, trace=None):
        judge(answer=prediction.answer)
        return True

    BootstrapFewShot(metric=metric, max_bootstrapped_demos=1).compile(student, trainset=devset("t", 1, 1))

    assert {"task": 2} == by_role(roots(runs)[0], "lm_calls")


def test_roles_are_counted_without_traces_and_cached_calls_too(runs):
    """No trace of a compile is recorded by default; its calls are counted all the same."""
    Candidates([("a", 1)]).compile(Program(), trainset=devset("t", 1, 1))

    assert [] == runs.traces()
    assert {"task": 4} == by_role(roots(runs)[0], "lm_calls")


@pytest.mark.parametrize(
    ("from_compile", "from_eval", "expected"), [(True, True, 4), (True, False, 0), (False, True, 0)]
)
def test_traces_of_a_compile(store, from_compile, from_eval, expected):
    """``log_traces_from_compile``: the traces of its evaluations belong to the run of the evaluation."""
    dspy_mlflow_async.autolog(
        log_evals=True,
        log_compiles=True,
        log_traces_from_compile=from_compile,
        log_traces_from_eval=from_eval,
        silent=True,
    )
    Candidates([("a", 1)]).compile(Program(), trainset=devset("t", 1, 1))

    assert ({"eval_0": markers("a", 4)} if expected else {}) == store.traces_by_run()


# --- DSPy's optimizers on a scripted LM ---------------------------------------------------------------------------


def scripted(name):
    """An LM for any optimizer: proposes what names the compile, answers ``@name-i`` questions right for even ``i``."""
    counter = iter(range(10_000))
    lock = threading.Lock()

    def answer(field, marker):
        if field in {"proposed_instruction", "new_instruction", "improved_instruction", "basic_instruction"}:
            with lock:
                return f"Instruction {name} {next(counter)}."
        if field is None:
            with lock:
                return f"```\nInstruction {name} {next(counter)}.\n```"
        number = re.search(r"-(\d+)$", marker)
        return marker if number and int(number[1]) % 2 == 0 else f"{marker}?"

    return EchoLM(answer=answer, model=f"echo/{name}")


def examples(name, count):
    """Examples of which the scripted LM gets every second right."""
    made = devset(name, count, count)
    return [
        dspy.Example(question=each.question, gold=each.gold, answer=each.gold).with_inputs("question") for each in made
    ]


def bootstrap(name):
    optimizer = BootstrapFewShot(metric=judge, max_bootstrapped_demos=2, max_labeled_demos=2)
    return optimizer.compile(Program(), trainset=examples(name, 4)), 0


def random_search(name):
    optimizer = BootstrapFewShotWithRandomSearch(
        metric=judge, max_bootstrapped_demos=1, max_labeled_demos=1, num_candidate_programs=2, num_threads=2
    )
    return optimizer.compile(Program(), trainset=examples(name, 4), valset=examples(name, 6)), 5


def mipro(name):
    optimizer = MIPROv2(
        metric=judge, auto=None, num_candidates=2, max_bootstrapped_demos=1, max_labeled_demos=1, num_threads=2, seed=1
    )
    student = optimizer.compile(
        Program(),
        trainset=examples(name, 4),
        valset=examples(name, 6),
        num_trials=2,
        minibatch=True,
        minibatch_size=3,
        minibatch_full_eval_steps=1,
    )
    return student, None


def gepa(name):
    def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):
        return dspy.Prediction(score=judge(gold, pred), feedback=f"feedback {name}")

    optimizer = GEPA(
        metric=metric,
        max_metric_calls=40,
        reflection_minibatch_size=3,
        reflection_lm=scripted(f"{name}-reflection"),
        num_threads=3,
        seed=len(name),
    )
    return optimizer.compile(Program(), trainset=examples(name, 4), valset=examples(name, 6)), None


OPTIMIZERS = {"bootstrap": bootstrap, "random search": random_search, "MIPROv2": mipro, "GEPA": gepa}
NAMES = {
    "BootstrapFewShot": "bootstrap",
    "BootstrapFewShotWithRandomSearch": "random search",
    "MIPROv2": "MIPROv2",
    "GEPA": "GEPA",
}


@pytest.fixture(autouse=True)
def _no_logs_of_gepa(monkeypatch):
    monkeypatch.setattr("builtins.print", lambda *args, **kwargs: None)


def assert_is_one_compile(store, run, name):
    """Its children are numbered per key without a gap, its series hold their scores, its artifacts are its own."""
    assert "FINISHED" == run.info.status
    children = store.children(run)
    assert {"FINISHED"} >= {child.info.status for child in children.values()}
    keys = {each.rpartition("_")[0] for each in children}
    for key in keys:
        steps = sorted(int(each.rpartition("_")[2]) for each in children if each.rpartition("_")[0] == key)
        assert list(range(len(steps))) == steps
        assert [(step, children[f"{key}_{step}"].data.metrics["eval"]) for step in steps] == store.series(run, key)
    for child in children.values():
        questions = {row["example_question"] for row in store.table(child)}
        assert questions <= set(markers(name, 6))
    assert f"@{name}-0" in {row["question"] for row in store.table(run, "trainset.json")}
    assert f"echo/{name}" == json.loads(run.data.params["lm_params"])["model"]
    text = json.dumps(store.json(run, "best_model.json"))
    assert {name} >= {found.split("-")[0][1:] for found in re.findall(r"@\w+-\d", text)}
    assert set(re.findall(r"Instruction (\w+)", text)) <= {name}
    assert keys == set(tagged(run, "dspy.best_score."))
    return children


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_of_dspy(runs, kind):
    """BootstrapFewShot, random search, MIPROv2 and GEPA on a scripted LM, alone."""
    with dspy.context(lm=scripted("a")):
        _, expected = OPTIMIZERS[kind]("a")

    (run,) = roots(runs)
    assert kind == NAMES[run.data.tags["dspy.optimizer"]]
    children = assert_is_one_compile(runs, run, "a")
    assert expected in {None, len(children)}
    assert 1 + len(children) == len(runs.runs())
    if kind == "GEPA":
        assert {"task", "reflection"} == set(by_role(run, "lm_calls"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("second", OPTIMIZERS)
def test_optimizers_of_dspy_at_once(runs, second):
    """Two at a time, one of them GEPA with its pool: each its own run, steps, scores, artifacts; no stray run."""
    gate = threading.Barrier(2, timeout=TIMEOUT)

    def job(kind, name):
        with dspy.context(lm=scripted(name)):
            gate.wait()
            OPTIMIZERS[kind](name)

    in_threads(lambda: job("GEPA", "a"), lambda: job(second, "b"))

    assert 2 == len(roots(runs))
    found = {json.loads(run.data.params["lm_params"])["model"].rpartition("/")[2]: run for run in roots(runs)}
    assert ("GEPA", second) == tuple(NAMES[found[name].data.tags["dspy.optimizer"]] for name in "ab")
    total = sum(1 + len(assert_is_one_compile(runs, found[name], name)) for name in "ab")
    assert total == len(runs.runs())
    assert mlflow.active_run() is None


def test_labelled_few_shot_is_a_compile_too(runs):
    """An optimizer that evaluates nothing: a run with its data set and program, and no plot."""
    LabeledFewShot(k=1).compile(Program(), trainset=examples("a", 2))

    (run,) = runs.runs()
    expected = ["best_model.json", "candidates.json", "program.mmd", "program.svg", "trainset.json"]
    assert (expected, "1") == (runs.artifacts(run), run.data.params["k"])
