"""MLflow's GenAI evaluation, prompt optimization and judge alignment with our autolog on: nothing loses its run."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import dspy
import mlflow
import pytest
from mlflow.genai.judges import make_judge
from mlflow.genai.judges.optimizers.dspy import DSPyAlignmentOptimizer
from mlflow.genai.optimize.optimizers.base import BasePromptOptimizer
from mlflow.genai.optimize.types import PromptOptimizerOutput
from mlflow.genai.scorers import scorer
from mlflow.models.evaluation.utils import trace as evaluation_config
from mlflow.utils.autologging_utils import AUTOLOGGING_INTEGRATIONS
from packaging.version import Version
from runtools import SOURCE_RUN, TIMEOUT

import dspy_mlflow_async
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
from dspy_mlflow_async.composition import current_settings
from dspy_mlflow_async.testing import tree
from echo import Chain, chain_tree, find_marker

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:Starting with pandas version 4"),  # mlflow.genai's own calls
    pytest.mark.filterwarnings("ignore:The specified dataset source can be interpreted in multiple ways"),
]
QUESTIONS = ["@a", "@b", "@c"]
DATA = [{"inputs": {"question": question}} for question in QUESTIONS]
program, judge_program = Chain(), dspy.Predict("question, answer -> verdict")


def predict(question):
    return program(question=question).answer


@scorer
def judged(inputs, outputs):
    return judge_program(question=inputs["question"], answer=outputs).verdict


def source_runs(traces):
    return [trace.info.trace_metadata.get(SOURCE_RUN) for trace in traces]


def evaluate_inside(question):
    """A predict_fn that evaluates a program."""
    devset = [dspy.Example(question=f"{question}-{n}").with_inputs("question") for n in range(3)]
    metric = lambda example, prediction, trace=None: 1.0  # noqa: E731
    dspy.Evaluate(devset=devset, metric=metric, num_threads=2, display_progress=False)(Chain())
    return question


@pytest.mark.parametrize("scorer_tracing", [False, True])
def test_every_trace_bears_the_evaluations_run(runs, scorer_tracing, monkeypatch):
    """Predictions and judges, in MLflow's plain threads; each prediction is whole and has its judge's feedback."""
    monkeypatch.setenv("MLFLOW_GENAI_EVAL_ENABLE_SCORER_TRACING", str(scorer_tracing))
    result = mlflow.genai.evaluate(data=DATA, predict_fn=predict, scorers=[judged])
    traces = runs.traces()

    assert {result.run_id} == set(source_runs(traces))
    predictions = [trace for trace in traces if [a.name for a in trace.info.assessments] == ["judged"]]
    assert [chain_tree()] * 3 == [tree(trace) for trace in predictions]
    judges = [tree(trace)[0] for trace in traces if trace not in predictions]
    # Without, MLflow deletes at the end whatever else bears the run.
    assert judges == (["judged"] * 3 if scorer_tracing else [])


def test_an_evaluation_inside_a_prediction_is_logged(runs):
    """What MLflow's harness tells autolog is for itself: evaluations in its threads have their runs and traces."""
    before = current_settings()
    result = mlflow.genai.evaluate(data=DATA, predict_fn=evaluate_inside, scorers=[judged])
    by_run = {run.info.run_id: 0 for run in runs.runs()}
    for run_id in source_runs(runs.traces()):
        by_run[run_id] += 1
    predictions = by_run.pop(result.run_id)

    assert before == current_settings()
    assert [3, 3, 3] == list(by_run.values())
    assert 3 == predictions


def test_others_go_on_as_they_are_set_while_the_harness_runs(runs):
    """An evaluation in another thread at the same time has its run, and all of its traces."""
    begun, may_end = threading.Event(), threading.Event()

    def predict_slowly(question):
        begun.set()
        assert may_end.wait(TIMEOUT)
        return question

    with ThreadPoolExecutor(1) as pool:
        evaluating = pool.submit(mlflow.genai.evaluate, data=DATA, predict_fn=predict_slowly, scorers=[judged])
        assert begun.wait(TIMEOUT)
        try:
            evaluate_inside("@elsewhere")
        finally:
            may_end.set()
        run_id = evaluating.result(TIMEOUT).run_id
    (other,) = [run for run in runs.runs() if run.info.run_id != run_id]
    elsewhere = [trace for trace in runs.traces() if trace.info.trace_metadata.get(SOURCE_RUN) == other.info.run_id]

    assert {"eval": 100.0}.items() <= other.data.metrics.items()
    assert [chain_tree()] * 3 == [tree(trace) for trace in elsewhere]


def test_its_wishes_hold_where_it_was_called(runs):
    """In the context of MLflow's block its arguments hold, in DSPy's threads as well; afterwards nothing is left."""
    before = dict(AUTOLOGGING_INTEGRATIONS["dspy"])
    with evaluation_config.configure_autologging_for_evaluation(enable_tracing=True):
        evaluate_inside("@inside")
    assert [] == runs.runs()
    with evaluation_config.configure_autologging_for_evaluation(enable_tracing=False):
        program(question="@silent")
    evaluate_inside("@after")

    assert 1 == len(runs.runs())
    assert ["@after"] * 3 == [find_marker(trace.data.spans[0].inputs).rpartition("-")[0] for trace in runs.traces()]
    assert before == AUTOLOGGING_INTEGRATIONS["dspy"]


def test_plain_threads_have_the_newest_run_of_any_thread(runs):
    """As MLflow alone has it: the innermost open run, then the outer one, then none."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # its thread has no context of ours

        def ask(marker):
            pool.submit(program, question=marker).result(TIMEOUT)

        with mlflow.start_run() as outer:
            ask("@outer")
            with mlflow.start_run(nested=True) as inner:
                ask("@inner")
            ask("@outer-again")
        ask("@after")
        with dspy_mlflow_async.run("scoped") as scoped:
            ask("@scoped")
    found = source_runs(runs.traces())

    assert [outer.info.run_id, inner.info.run_id, outer.info.run_id, None, scoped.info.run_id] == found


def test_threads_with_a_run_of_their_own_keep_it(runs):
    """Two open blocks at once: each gives its run to what it calls in DSPy's threads, whichever is newer."""
    both, asked = threading.Barrier(2, timeout=TIMEOUT), threading.Barrier(2, timeout=TIMEOUT)

    def work(name):
        if name == "b":
            both.wait()
        with mlflow.start_run(run_name=name):
            if name == "a":
                both.wait()
            asked.wait()
            calls = [(program, {"question": f"@{name}-{n}"}) for n in range(3)]
            dspy.Parallel(num_threads=2, disable_progress_bar=True)(calls)
            asked.wait()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work, name) for name in "ab"]:
            future.result(TIMEOUT)

    assert {name: [f"@{name}-{n}" for n in range(3)] for name in "ab"} == runs.traces_by_run()


def test_a_run_that_is_open_nowhere_any_more_is_nobodys(runs):
    """A block whose run was ended from within leaves nothing behind for others."""
    with mlflow.start_run():
        mlflow.end_run()

        with ThreadPoolExecutor(1) as pool:
            pool.submit(program, question="@a").result(TIMEOUT)

    assert [None] == source_runs(runs.traces())


class Once(BasePromptOptimizer):
    """Scores the prompts as they are."""

    def optimize(self, eval_fn, train_data, target_prompts, enable_tracking=True):
        scores = [record.score for record in eval_fn(target_prompts, train_data)]
        score = sum(scores) / len(scores)
        return PromptOptimizerOutput(optimized_prompts=target_prompts, initial_eval_score=score, final_eval_score=score)


def test_prompt_optimization_keeps_its_traces(runs):
    """Each call that ``optimize_prompts`` makes in its threads bears its run, and our settings are as they were."""
    prompt = mlflow.genai.register_prompt(name="ask", template="Ask {{question}}")
    before = current_settings()

    def predict_fn(question):
        loaded = mlflow.genai.load_prompt(prompt.uri)
        return program(question=loaded.format(question=question)).answer

    @scorer
    def exact(outputs):
        return bool(judge_program(question="q", answer=outputs).verdict)

    mlflow.genai.optimize_prompts(
        predict_fn=predict_fn,
        train_data=[{"inputs": {"question": q}, "outputs": q} for q in QUESTIONS],
        prompt_uris=[prompt.uri],
        optimizer=Once(),
        scorers=[exact],
    )
    (run,) = runs.runs()
    traces = runs.traces()

    assert {run.info.run_id} == set(source_runs(traces))
    assert 3 == sum(
        trace.info.tags["mlflow.traceName"] == "predict_fn" or "Chain" in str(tree(trace)) for trace in traces
    )
    assert before == current_settings()


class FewShot(DSPyAlignmentOptimizer):
    """Aligns by DSPy's random search over demos."""

    def _dspy_optimize(self, program, examples, metric_fn):
        optimizer = dspy.BootstrapFewShotWithRandomSearch(
            metric=metric_fn, num_candidate_programs=1, max_labeled_demos=1, max_bootstrapped_demos=1, num_threads=2
        )
        return optimizer.compile(program, trainset=list(examples))


@pytest.mark.skipif(
    Version(mlflow.__version__).release < (3, 14), reason="before MLflow 3.14 a judge's model is asked at OpenAI's only"
)
@pytest.mark.long
def test_alignment_of_a_judge_is_a_compile(runs, monkeypatch):
    """The optimizer behind ``judge.align`` has its run with scores by step; no trace is a stray."""
    answer = json.dumps({"result": "yes", "rationale": "because"})
    with LocalEndpoint(lambda body: answer) as endpoint:
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        monkeypatch.setenv("OPENAI_API_BASE", endpoint.api_base)
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.api_base)
        judge = make_judge(
            name="right",
            instructions="Is {{ outputs }} right for {{ inputs }}?",
            model="openai:/m",
            feedback_value_type=str,
        )
        labelled = []
        for question in QUESTIONS * 4:  # 10 are needed
            predict(question)
            trace_id = mlflow.get_last_active_trace_id()
            source = mlflow.entities.AssessmentSource(source_type="HUMAN", source_id="ada")
            mlflow.log_feedback(trace_id=trace_id, name="right", value="yes", source=source)
            labelled.append(mlflow.get_trace(trace_id))
        aligned = judge.align(labelled, FewShot(model="openai:/m"))
    compiles = [run for run in runs.runs() if "mlflow.parentRunId" not in run.data.tags]
    strays = [trace for trace in runs.traces() if trace.info.trace_id not in {t.info.trace_id for t in labelled}]

    assert "right" == aligned.name
    assert 1 == len(compiles)
    assert {0, 1} <= {step for step, _ in runs.series(compiles[0], "eval")}
    assert [] == [tree(trace) for trace in strays if not trace.info.trace_metadata.get(SOURCE_RUN)]


class Asking(dspy.Module):
    """Asks a program; can be saved."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        self.ask = dspy.Predict("question -> answer")

    def __getstate__(self):
        return {**self.__dict__, "gate": None}

    def forward(self, question):
        if self.gate is not None:
            self.gate(question=question)
        return self.ask(question=question)


class Gate(dspy.Module):
    """Waits inside of its call."""

    def __init__(self):
        super().__init__()
        self.entered, self.may_leave = threading.Event(), threading.Event()

    def forward(self, question):
        self.entered.set()
        assert self.may_leave.wait(TIMEOUT)
        return dspy.Prediction(answer=question)


def test_mlflows_check_of_a_prediction_silences_nobody_else(runs):
    """While MLflow tries a predict_fn with tracing off, others are traced; the try itself leaves no trace."""
    gate, seen = Gate(), []

    def predict_fn(question):
        seen.append(len(seen))
        if len(seen) == 1:
            return gate(question=question).answer
        return judge_program(question=question, answer=question).verdict  # before MLflow 3.15 each needs a trace

    with ThreadPoolExecutor(1) as pool:
        evaluating = pool.submit(mlflow.genai.evaluate, data=DATA, predict_fn=predict_fn, scorers=[judged])
        assert gate.entered.wait(TIMEOUT)
        try:
            program(question="@elsewhere")
            with mlflow.start_span("own"):
                pass
        finally:
            gate.may_leave.set()
        evaluating.result(TIMEOUT)
    names = [tree(trace)[0] for trace in runs.traces()]

    assert {"Chain.forward", "own"} <= set(names)
    assert "Gate.forward" not in names


@pytest.mark.long
def test_logging_a_model_silences_nobody_else(runs, tmp_path):
    """While ``log_model`` runs with an input example, another thread's calls are traced, and its own are not."""
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(mlflow.dspy.save_model, Asking(gate), str(tmp_path / "model"), input_example="@own")
        assert gate.entered.wait(TIMEOUT)
        try:
            program(question="@elsewhere")
        finally:
            gate.may_leave.set()
        saving.result(TIMEOUT)
    calls, is_loaded = [0], threading.Event()

    def go_on():
        while not is_loaded.is_set():
            program(question="@elsewhere")
            calls.append(len(calls))

    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(go_on)
        mlflow.dspy.load_model(str(tmp_path / "model"))  # DSPy's settings are the main thread's to change
        is_loaded.set()
        others.result(TIMEOUT)

    assert ["Chain.forward"] * len(calls) == [tree(trace)[0] for trace in runs.traces()]
