"""``AsyncEvaluate`` against ``dspy.Evaluate``: the same program, devset and metric give the same of everything."""

import csv
import json
import logging
from collections import Counter

import dspy
import mlflow
import pytest
from dspy.utils.callback import BaseCallback
from small import examples as devset
from small import is_right

import dspy_mlflow_async
from dspy_mlflow_async import AsyncEvaluate
from dspy_mlflow_async.testing import tree
from echo import Chain, EchoLM, feedback_on, marker


def graded(example, prediction, trace=None):
    """A metric that says more than a number."""
    return dspy.Prediction(score=len(prediction.answer) / 10, feedback=f"read {prediction.answer}")


def fails_once(example, prediction, trace=None):
    if example.question.endswith("-2"):
        raise ValueError("this one is unfair")
    return example.answer == prediction.answer


class SyncOnly(dspy.Module):
    """Two predictors, without an ``aforward``."""

    def __init__(self):
        super().__init__()
        self.chain = Chain()

    def forward(self, question):
        return self.chain(question=question)


class Overridden(Chain):
    """Its ``aforward`` is the parent's, and says something else."""

    def forward(self, question):
        return super().forward(question=f"{question}/over")


class Sometimes(dspy.Module):
    """Fails on one of the questions."""

    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict("question -> answer")

    def forward(self, question):
        if question.endswith("-1"):
            raise RuntimeError(f"not {question}")
        return self.predict(question=question)

    async def aforward(self, question):
        if question.endswith("-1"):
            raise RuntimeError(f"not {question}")
        return await self.predict.acall(question=question)


async def in_tasks(**kwargs):
    program = kwargs.pop("program")
    return await AsyncEvaluate(**kwargs).acall(program)


async def in_threads(**kwargs):
    program = kwargs.pop("program")
    return dspy.Evaluate(num_threads=2, **kwargs)(program)


def shown(result):
    """A result as plain values."""
    return (
        result.score,
        [
            (example.toDict(), prediction.toDict(), score.toDict() if isinstance(score, dspy.Prediction) else score)
            for example, prediction, score in result.results
        ],
    )


def feedback(trace):
    return [(a.name, a.value, a.rationale, a.error is None, a.source.source_id) for a in feedback_on(trace)]


@pytest.mark.parametrize("metric", [is_right, graded, fails_once])
@pytest.mark.parametrize("program", [Chain, SyncOnly, Overridden, Sometimes])
async def test_results_and_traces(traces, program, metric):
    """Scores, rows in devset order, and trace trees with their markers and outcomes."""
    seen = []
    for evaluate in (in_threads, in_tasks):
        traces.clear()
        result = await evaluate(program=program(), devset=devset(), metric=metric)
        seen.append((shown(result), sorted(tree(trace, marker, "outcome") for trace in traces)))

    assert 4 == len(seen[0][1])
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("program", "metric"), [(Chain, fails_once), (SyncOnly, graded)])
async def test_feedback(stored, program, metric):
    """What the metric said, or that it raised, stands on the trace of the prediction that it judged."""
    said, known = [], set()
    for evaluate in (in_threads, in_tasks):
        await evaluate(program=program(), devset=devset(), metric=metric)
        new = [trace for trace in stored() if trace.info.trace_id not in known]
        known |= {trace.info.trace_id for trace in new}
        said.append(sorted((marker(trace.data.spans[0]), feedback(trace)) for trace in new))

    assert 4 == len([one for _, (one,) in said[0]])
    assert said[0] == said[1]


@pytest.mark.parametrize("provide_traceback", [True, False])
async def test_log_of_failures(provide_traceback, caplog):
    """A failed example is logged in the same words, by the same logger."""
    texts = []
    for evaluate in (in_threads, in_tasks):
        caplog.clear()
        with _heard("dspy", caplog):
            await evaluate(program=Sometimes(), devset=devset(), metric=is_right, provide_traceback=provide_traceback)
        errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
        texts.append([(record.name, record.getMessage().partition("\n")[0]) for record in errors])

    assert 1 == len(texts[0])
    assert texts[0] == texts[1]


async def test_too_many_errors(caplog):
    """The failed example that is one too many ends both with the same exception."""
    endings = []
    for evaluate in (in_threads, in_tasks):
        with pytest.raises(Exception, match="cancelled") as raised:
            await evaluate(program=Sometimes(), devset=devset(), metric=is_right, max_errors=1)
        endings.append((type(raised.value), str(raised.value)))

    assert [(Exception, "Execution cancelled due to errors or interruption.")] * 2 == endings


async def test_failure_score_and_files(tmp_path):
    """A failed example scores ``failure_score``; files and their columns are the same."""
    written = []
    for name, evaluate in (("threads", in_threads), ("tasks", in_tasks)):
        folder = tmp_path / name
        folder.mkdir()
        result = await evaluate(
            program=Chain(),
            devset=devset(),
            metric=fails_once,
            failure_score=0.5,
            save_as_json=str(folder / "r.json"),
        )
        rows = json.loads((folder / "r.json").read_text())
        written.append((result.score, rows))

    assert 87.5 == written[0][0]
    assert written[0] == written[1]


async def test_csv(tmp_path):
    """The same columns and rows; and unlike ``dspy.Evaluate``, a failed example does not lose the file."""
    written = []
    for name, evaluate in (("threads", in_threads), ("tasks", in_tasks)):
        path = tmp_path / f"{name}.csv"
        await evaluate(program=Chain(), devset=devset(), metric=is_right, save_as_csv=str(path))
        written.append(path.read_text())
    path = tmp_path / "failed.csv"
    failing = [devset()[1], *devset()]
    await in_tasks(program=Sometimes(), devset=failing, metric=is_right, save_as_csv=str(path))
    with path.open() as file:
        rows = list(csv.DictReader(file))

    assert written[0] == written[1]
    assert ["", "@e-0", "", "@e-2", "@e-3"] == [row["pred_answer"] for row in rows]


async def test_table(capsys):
    """``display_table`` prints the same."""
    printed = []
    for evaluate in (in_threads, in_tasks):
        capsys.readouterr()
        await evaluate(program=Chain(), devset=devset(), metric=is_right, display_table=2)
        printed.append(capsys.readouterr().out)

    assert "@e-1" in printed[0]
    assert printed[0] == printed[1]


async def test_runs(stored):
    """Both log the same metrics, tags and result table, each into a run of its own."""
    dspy_mlflow_async.autolog(silent=True, log_evals=True)
    logged = []
    for evaluate in (in_threads, in_tasks):
        await evaluate(program=Sometimes(), devset=devset(), metric=is_right)
        run = mlflow.last_active_run()
        table = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/result_table.json"))
        at = {name: table["columns"].index(name) for name in ("trace_id", "duration_seconds")}
        ids = [row[at["trace_id"]] for row in table["data"]]
        for row in table["data"]:
            row[at["trace_id"]] = row[at["duration_seconds"]] = None
        metrics = {key: value for key, value in run.data.metrics.items() if "latency" not in key}
        logged.append((run.info.status, run.info.run_name, metrics, run.data.params, table))
        assert set(ids) == {
            trace.info.trace_id
            for trace in stored()
            if trace.info.request_metadata.get("mlflow.sourceRun") == run.info.run_id
        }

    assert "FINISHED" == logged[0][0]
    assert logged[0] == logged[1]


async def test_usage_tracking():
    """With DSPy's usage tracking on, each prediction knows its own usage, as in threads."""
    dspy.configure(lm=EchoLM(), track_usage=True)
    usages = []
    for evaluate in (in_threads, in_tasks):
        result = await evaluate(program=Chain(), devset=devset(), metric=is_right)
        usages.append([prediction.get_lm_usage() for _, prediction, _ in result.results])

    assert usages[0] == usages[1]


class _heard:  # noqa: N801 - a with block
    """DSPy's loggers do not propagate: listen to them directly."""

    def __init__(self, name, caplog):
        self.logger, self.handler = logging.getLogger(name), caplog.handler

    def __enter__(self):
        self.logger.addHandler(self.handler)

    def __exit__(self, *error):
        self.logger.removeHandler(self.handler)


class Sayless(Exception):  # noqa: N818 - what it says is the point
    """An exception that cannot be shown."""

    def __str__(self):
        raise RuntimeError("no text")


def fails_without_words(example, prediction, trace=None):
    if example.question.endswith("-2"):
        raise Sayless
    return True


async def test_an_exception_that_cannot_be_shown():
    """It fails its example, as it does in ``dspy.Evaluate``, and not the evaluation."""
    result = await AsyncEvaluate(devset=devset(size=4), metric=fails_without_words, display_progress=False).acall(
        Chain()
    )

    assert 75.0 == result.score


async def test_scores_are_rounded_alike():
    """Of 160 examples 23 are right: 14.38 in DSPy's order of dividing and rounding, 14.37 in another."""
    examples, right = devset(size=160), iter([True] * 23 + [False] * 137)
    scores = {example.question: next(right) for example in examples}
    options = {"devset": examples, "metric": lambda e, p: scores[e.question], "display_progress": False}
    program = dspy.Module()
    program.forward = lambda question: dspy.Prediction(answer="")

    assert dspy.Evaluate(**options)(program).score == (await AsyncEvaluate(**options).acall(program)).score == 14.38


class Nameless:
    def __repr__(self):
        raise RuntimeError("no text")


async def test_example_without_a_text():
    """An example that cannot be printed fails like another; the evaluation goes on."""
    examples = devset(size=3)
    examples[1] = dspy.Example(**examples[1], thing=Nameless()).with_inputs("question", "thing")
    result = await AsyncEvaluate(devset=examples, metric=is_right).acall(Chain())

    assert [True, 0.0, True] == [score for *_, score in result.results]


class Hears(BaseCallback):
    """Notes who began and who ended, and what an evaluation was told and gave."""

    def __init__(self):
        self.heard, self.evaluations = Counter(), []

    def on_evaluate_start(self, call_id, instance, inputs):
        given = {key: inputs[key] for key in ("program", "callback_metadata")}
        self.evaluations.append((given, inputs["metric"] or instance.metric, inputs["devset"] or instance.devset))

    def on_evaluate_end(self, call_id, outputs, exception=None):
        self.evaluations.append((outputs.score, [score for *_, score in outputs.results], exception))


def _noting(event):
    def note(self, call_id, instance=None, inputs=None, outputs=None, exception=None):
        self.heard[event, type(instance).__name__, type(exception).__name__] += 1

    return note


for _event in ("module", "lm", "adapter_format", "adapter_parse"):
    for _end in ("start", "end"):
        setattr(Hears, f"on_{_event}_{_end}", _noting(f"{_event}_{_end}"))


@pytest.mark.parametrize("metric", [is_right, fails_once])
async def test_callbacks(metric):
    """A callback of the user's, given to the evaluator or set, is told the same by both."""
    program, examples = Chain(), devset(size=4)
    told = {}
    for cls in (dspy.Evaluate, AsyncEvaluate):
        own, everywhere = Hears(), Hears()
        evaluator = cls(devset=examples, metric=metric, num_threads=2)
        evaluator.callbacks = [own]
        with dspy.context(callbacks=[everywhere]):
            call = getattr(evaluator, "acall", evaluator)(program, callback_metadata={"metric_key": "mine"})
            if cls is AsyncEvaluate:
                await call
        told[cls] = own.evaluations, own.heard, everywhere.evaluations, everywhere.heard

    assert told[dspy.Evaluate] == told[AsyncEvaluate]
    assert 2 == len(told[AsyncEvaluate][0]) == len(told[AsyncEvaluate][2])
    assert told[AsyncEvaluate][3]["lm_start", "EchoLM", "NoneType"] > 0
