"""What the run of each optimizer that DSPy exports holds: the table in ``docs/evaluate.md``, row by row."""

import contextlib
import inspect
from pathlib import Path

import dspy
import mlflow
import numpy as np
import pytest
from dspy.clients.provider import Provider, TrainingJob
from dspy.teleprompt import Teleprompter
from runtools import Program, devset
from test_compile_content import OPTIMIZERS, examples, judge, roots, scripted, tagged

import dspy_mlflow_async
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
from echo import find_marker

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"
EXPORTED = {
    name
    for name in dspy.teleprompt.__all__
    if inspect.isclass(getattr(dspy.teleprompt, name)) and issubclass(getattr(dspy.teleprompt, name), Teleprompter)
}


def optuna():
    optimizer = dspy.BootstrapFewShotWithOptuna(metric=judge, max_bootstrapped_demos=1, num_candidate_programs=2)
    return optimizer.compile(Program(), max_demos=1, trainset=examples("a", 4), valset=examples("a", 4))


def copro():
    optimizer = dspy.COPRO(metric=judge, breadth=2, depth=1)
    return optimizer.compile(Program(), trainset=examples("a", 4), eval_kwargs={"num_threads": 2})


def simba():
    optimizer = dspy.SIMBA(metric=judge, bsize=2, num_candidates=2, max_steps=2, max_demos=1, num_threads=2)
    return optimizer.compile(Program(), trainset=examples("a", 4))


def infer_rules():
    optimizer = dspy.InferRules(metric=judge, num_candidates=2, num_rules=2, num_threads=2)
    return optimizer.compile(Program(), trainset=examples("a", 4), valset=examples("a", 4))


def knn():
    vectorizer = dspy.Embedder(lambda texts: np.ones((len(texts), 3), dtype=np.float32))
    return dspy.KNNFewShot(k=1, trainset=examples("a", 4), vectorizer=vectorizer).compile(Program())


def ensemble():
    return dspy.Ensemble(size=1).compile([Program(), Program()])


def labeled():
    return dspy.LabeledFewShot(k=1).compile(Program(), trainset=examples("a", 4))


class Trainer(Provider):
    """A provider whose training gives back the same model, as the answers of language models are faked."""

    def __init__(self):
        super().__init__()
        self.finetunable, self.TrainingJob = True, TrainingJob

    @staticmethod
    def finetune(job, model, train_data, train_data_format, train_kwargs=None):
        return model


@contextlib.contextmanager
def with_a_served_lm():
    """A program whose predictors have a ``dspy.LM`` of their own, as some optimizers want it."""

    def respond(body):
        marker = find_marker(body)
        answer = marker if marker.endswith(("0", "2")) else f"{marker}?"
        return {"content": f"[[ ## answer ## ]]\n{answer}\n\n[[ ## completed ## ]]"}

    with LocalEndpoint(respond) as endpoint:
        program = Program()
        api = {"api_base": endpoint.api_base, "api_key": "none"}
        program.set_lm(dspy.LM("openai/gpt-4o-mini", cache=False, provider=Trainer(), **api))
        yield program


def finetune():
    with with_a_served_lm() as program:
        return dspy.BootstrapFinetune(metric=judge, num_threads=2).compile(program, trainset=examples("a", 4))


def better_together():
    inner = dspy.BootstrapFewShotWithRandomSearch(metric=judge, num_candidate_programs=1, num_threads=2)
    optimizer = dspy.BetterTogether(metric=judge, p=inner)
    with with_a_served_lm() as program:
        return optimizer.compile(program, trainset=examples("a", 4), valset=examples("a", 4), strategy="p")


# By optimizer: how to run it, the keys of its series, and whether its program has demos that were made.
EXPECTED = {
    "BootstrapFewShot": (lambda: OPTIMIZERS["bootstrap"]("a"), set(), True),
    "BootstrapFewShotWithRandomSearch": (lambda: OPTIMIZERS["random search"]("a"), {"eval"}, None),
    "BootstrapFewShotWithOptuna": (optuna, {"eval"}, None),
    "COPRO": (copro, {"eval"}, False),
    "MIPROv2": (lambda: OPTIMIZERS["MIPROv2"]("a"), {"eval_full", "eval_minibatch"}, None),
    "SIMBA": (simba, {"eval_sampling", "eval_minibatch", "eval_full"}, None),
    "GEPA": (lambda: OPTIMIZERS["GEPA"]("a"), {"eval"}, False),
    "InferRules": (infer_rules, {"eval"}, None),
    "BetterTogether": (better_together, {"eval", "eval_full"}, None),
    "KNNFewShot": (knn, set(), False),
    "LabeledFewShot": (labeled, set(), False),
    "Ensemble": (ensemble, set(), False),
    "BootstrapFinetune": (finetune, {"eval"}, False),
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("builtins.print", lambda *args, **kwargs: None)


def assert_lineage(runs, run, keys):
    """Each candidate's parents came before it, and its scores are those of the series and of the child runs."""
    lineage = runs.json(run, "candidates.json")
    candidates = {each["hash"]: each for each in lineage["candidates"]}
    order = [*candidates]
    assert run.data.tags["dspy.program_hash"] == lineage["result"]
    assert {lineage["start"], lineage["result"]} <= {*order}
    for each in lineage["candidates"]:
        assert (each["hash"] == lineage["start"]) == (each["parents"] == [])
        assert all(order.index(parent) < order.index(each["hash"]) for parent in each["parents"])
    scores = [score for each in lineage["candidates"] for score in each["scores"]]
    children = {child.info.run_id: child for child in runs.children(run).values()}
    for key in keys - {"eval_sampling"}:
        mine = [score for score in scores if score["key"] == key and score["step"] is not None]
        assert runs.series(run, key) == sorted((score["step"], score["score"]) for score in mine)
        for score in mine:
            child = children.get(score["run_id"])
            assert child is None or f"{key}_{score['step']}" == child.info.run_name
            assert child is None or child.data.tags["dspy.program_hash"] in candidates


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", EXPECTED)
def test_what_the_run_of_an_optimizer_holds(runs, name):
    """Its series, the child run of each evaluation with the same score, its best score and program, its plot."""
    compile_program, keys, is_augmented = EXPECTED[name]
    with dspy.context(lm=scripted("a")):
        compile_program()

    (run,) = roots(runs)
    assert ("FINISHED", name) == (run.info.status, run.data.tags["dspy.optimizer"])
    assert keys == {key for key in run.data.metrics if key.startswith("eval")} == set(tagged(run, "dspy.best_score."))
    assert {"best_model.json"} <= set(runs.artifacts(run))
    assert bool(keys) == ("scores.png" in runs.artifacts(run))
    if name != "Ensemble":
        assert_lineage(runs, run, keys)
    if is_augmented is not None:
        assert is_augmented == ("dspy.augmented_demos" in run.data.tags)
    children = runs.children(run)
    for key in keys:
        series = runs.series(run, key)
        assert list(range(len(series))) == [step for step, _ in series]
        if name != "SIMBA":
            assert series == [(step, children[f"{key}_{step}"].data.metrics["eval"]) for step, _ in series]
    assert name != "SIMBA" or {} == children


def test_scores_of_simba(runs):
    """What it samples and what it says itself of each candidate, in percent as ``dspy.Evaluate``, in its order."""
    with dspy.context(lm=scripted("a")):
        program = simba()

    (run,) = roots(runs)
    assert 2 == len(runs.series(run, "eval_sampling"))
    full = [score for _, score in runs.series(run, "eval_full")]
    winners = [log["train_score"] for log in program.trial_logs.values()]
    assert [50.0, *(100 * score for score in winners)] == full
    assert max(full) == float(run.data.tags["dspy.best_score.eval_full"])
    minibatch = [score for _, score in runs.series(run, "eval_minibatch")]
    assert {0.0, 50.0, 100.0} >= set(minibatch)
    assert minibatch


def test_scores_of_simba_need_a_run_of_its_own(store):
    """Where compiles are not logged, a run of the user's around one gets none of its scores."""
    dspy_mlflow_async.autolog(log_evals=True, silent=True)
    with dspy.context(lm=scripted("a")), mlflow.start_run(run_name="mine"):
        simba()

    assert {} == store.run("mine").data.metrics


def test_a_pool_of_the_programs_is_no_score(runs):
    """Pools that a program runs inside a compile, and those of somebody else's optimizer, score nothing."""

    class Pools(dspy.Module):
        def forward(self, question):
            inner = Program()
            dspy.Parallel(num_threads=2, disable_progress_bar=True)([(inner, {"question": question})] * 2)
            return inner(question=question)

    class Mine(Teleprompter):
        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            dspy.Parallel(num_threads=2, disable_progress_bar=True)([(student, each) for each in trainset])
            return student

    Mine().compile(Pools(), trainset=devset("a", 1, 2))

    (run,) = runs.runs()
    assert {"lm_calls", "input_tokens", "output_tokens"} == {name.partition("/")[0] for name in run.data.metrics}


def test_knn_compiles_when_it_is_called(runs):
    """``KNNFewShot``'s program bootstraps for each call: a run of ``BootstrapFewShot``'s each time."""
    with dspy.context(lm=scripted("a")):
        knn()(question="@a-0")

    assert ["KNNFewShot", "BootstrapFewShot"] == [run.data.tags["dspy.optimizer"] for run in runs.runs()]


def test_avatar_cannot_be_made():
    """``AvatarOptimizer`` asks for ``dspy.TypedPredictor``, which this DSPy has not: the table says so."""
    if hasattr(dspy, "TypedPredictor"):
        pytest.fail("this DSPy has it again: add AvatarOptimizer to EXPECTED")
    with pytest.raises(AttributeError, match="TypedPredictor"):
        dspy.AvatarOptimizer(metric=judge)


def test_the_table_has_a_row_for_each():
    """A new optimizer of DSPy's needs a row, and a test here."""
    text = PAGE.read_text(encoding="utf-8").split("## Optimizers")[1].split("\n## ")[0]
    rows = {row.split("|")[1].strip().strip("`"): row for row in text.splitlines() if row.startswith("| `")}

    assert EXPORTED == set(rows) == {*EXPECTED, "AvatarOptimizer"}
    for name, (_, keys, _) in EXPECTED.items():
        assert keys == {word.strip("`") for word in rows[name].split("|")[2].split() if word.startswith("`eval")}
