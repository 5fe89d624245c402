"""Every metric call of an evaluation gives one feedback on the trace of the prediction that it judged."""

import functools
import threading

import dspy
import mlflow
import pytest
from dspy.evaluate import SemanticF1
from runtools import SOURCE_RUN, TIMEOUT, Program, devset, evaluate, in_threads, markers

import dspy_mlflow_async
from echo import EchoLM, feedback_on, find_marker

JUDGED = "dspy_mlflow_async.judgedTrace"
SCORER = "mlflow.trace.sourceScorer"


def feedback(trace):
    """(name, value, rationale, error's message) of each feedback on a trace."""
    return [
        (each.name, each.feedback.value, each.rationale, each.feedback.error and each.feedback.error.error_message)
        for each in feedback_on(trace)
    ]


def feedback_by_marker(store):
    """The feedback on each trace that no judge has made."""
    return {find_marker(trace.data.spans[0].inputs): feedback(trace) for trace in predictions(store)}


def predictions(store):
    """The traces that no judge has made."""
    return [trace for trace in store.traces() if SCORER not in trace.info.tags]


def plain(example, prediction, trace=None):
    return 0.5


def boolean(example, prediction):
    return example.gold == prediction.answer


def explained(example, prediction):
    return dspy.Prediction(score=0.25, feedback=f"about {example.question}")


def number(example, prediction):
    import numpy as np

    return np.float64(0.75)


def parametrised(example, prediction, *, weight):
    return weight


class Judge:
    def __call__(self, example, prediction):
        return 1.0

    def method(self, example, prediction):
        return 2


class Unwilling:
    def __getattr__(self, name):
        raise RuntimeError(name)

    def __call__(self, example, prediction):
        return 1


class Scoring(dspy.Module):
    def forward(self, example, prediction, trace=None):
        return dspy.Prediction(score=0.125)


SHAPES = {
    "function": (plain, "plain", 0.5, None),
    "lambda": (lambda example, prediction: 1, "metric", 1, None),
    "boolean": (boolean, "boolean", True, None),
    "partial": (functools.partial(parametrised, weight=0.3), "parametrised", 0.3, None),
    "partial of a partial": (functools.partial(functools.partial(parametrised), weight=3), "parametrised", 3, None),
    "callable object": (Judge(), "Judge", 1.0, None),
    "partial of an object": (functools.partial(Judge()), "Judge", 1.0, None),
    "object that refuses to be looked at": (Unwilling(), "Unwilling", 1, None),
    "bound method": (Judge().method, "method", 2, None),
    "prediction": (explained, "explained", 0.25, "about @a-0"),
    "module": (Scoring(), "Scoring", 0.125, None),
    "numpy": (number, "number", 0.75, None),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_of_metric_gives_feedback(store, shape):
    """Functions, lambdas, partials, callable objects, bound methods, modules, and scores of every kind."""
    metric, name, value, rationale = SHAPES[shape]
    dspy_mlflow_async.autolog(silent=True)
    evaluate("a", 1, 1, metric=metric)

    (found,) = feedback_by_marker(store)["@a-0"]
    assert (name, value, rationale, None) == found
    assert type(value) is type(found[1])


def test_who_scored_is_said(store):
    """The source: code, or an LM judge where the metric is a module."""
    dspy_mlflow_async.autolog(silent=True)
    evaluate("a", 1, 1, metric=plain)
    evaluate("b", 1, 1, metric=Scoring())

    sources = [feedback_on(trace)[0].source for trace in predictions(store)]
    assert [("CODE", "plain"), ("LLM_JUDGE", "Scoring")] == [(each.source_type, each.source_id) for each in sources]


@pytest.mark.parametrize("num_threads", [1, 4])
def test_each_feedback_is_on_its_own_prediction(store, num_threads):
    """One per example, whatever the number of threads, also inside a user's own span."""
    dspy_mlflow_async.autolog(silent=True)
    with mlflow.start_span("@outer"):
        result = evaluate("a", 2, 6, num_threads=num_threads)

    expected = {each: [("exact", float(index < 2), None, None)] for index, each in enumerate(markers("a", 6))}
    found = feedback_by_marker(store)
    assert [] == found.pop("")
    assert expected == found
    assert 33.33 == result.score


def test_evaluations_at_once_do_not_mix_their_feedback(store):
    """Three at the same time, each with its own metric."""
    dspy_mlflow_async.autolog(silent=True)
    barrier = threading.Barrier(6, timeout=TIMEOUT)
    dspy.configure(lm=EchoLM(during=lambda marker: barrier.wait()))

    def metric(name):
        def judge(example, prediction):
            return dspy.Prediction(score=1.0, feedback=f"{name} {prediction.answer}")

        judge.__name__ = name
        return judge

    in_threads(*(lambda n=n: evaluate(n, 2, 4, metric=metric(n), num_threads=2) for n in "abc"))

    expected = {each: [(name, 1.0, f"{name} {each}", None)] for name in "abc" for each in markers(name, 4)}
    assert expected == feedback_by_marker(store)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_raising_metric_changes_nothing_and_says_so(store, num_threads):
    """Error feedback; the result of ``Evaluate`` is the one that it has without tracing."""

    def picky(example, prediction):
        if example.question == "@a-1":
            raise ValueError("no opinion on @a-1")
        return 1.0

    def outcome():
        result = evaluate("a", 4, 4, metric=picky, num_threads=num_threads)
        return result.score, [(dict(e), dict(p), s) for e, p, s in result.results]

    untraced = outcome()
    dspy_mlflow_async.autolog(silent=True)

    assert untraced == outcome()
    assert 75.0 == untraced[0]
    found = feedback_by_marker(store)
    assert [("picky", None, None, "no opinion on @a-1")] == found["@a-1"]
    assert {"@a-0", "@a-1", "@a-2", "@a-3"} == set(found)


class TextlessError(Exception):
    def __str__(self):
        raise ValueError("no text")


def test_an_error_without_a_text_is_told_all_the_same(runs):
    """An exception whose ``__str__`` raises: error feedback on the trace, which is stored, and a word in the table."""

    def metric(example, prediction):
        raise TextlessError

    with pytest.raises(ValueError, match="no text"):  # from Evaluate, which logs it
        evaluate("a", 1, 1, metric=metric)

    (trace,) = runs.traces()
    (told,) = feedback_on(trace)
    assert ("TextlessError", "<no text: ValueError>") == (told.error.error_code, told.error.error_message)


@pytest.mark.parametrize("metric", [lambda e, p: None, lambda e, p: "good", lambda e, p: object()])
def test_a_score_that_cannot_be_summed_fails_as_without_tracing(store, metric):
    """Odd scores: the same error from ``Evaluate``, and none from us."""

    def outcome():
        try:
            return evaluate("a", 1, 2, metric=metric).score
        except Exception as error:  # noqa: BLE001 - told, not hidden
            return type(error)

    untraced = outcome()
    dspy_mlflow_async.autolog(silent=True)

    assert untraced == outcome()


def test_a_program_that_is_no_module_gets_none(store):
    """A function, or a lambda: no feedback, and none for anybody else's trace."""
    dspy_mlflow_async.autolog(silent=True)
    inner = Program()

    def function(question):
        return inner(question=question)

    before = dspy.Predict("question -> answer")
    before(question="@before")
    evaluate("a", 1, 2, program=function)
    evaluate("b", 1, 2, program=lambda question: dspy.Prediction(answer=question))

    assert {"@before": [], "@a-0": [], "@a-1": []} == feedback_by_marker(store)


def test_a_module_without_a_trace_gets_none(store):
    """A module that is not recorded: no feedback on the trace before it."""
    dspy_mlflow_async.autolog(silent=True)

    class Silent(dspy.Module):
        def __call__(self, question):
            return dspy.Prediction(answer=question)

    Program()(question="@before")
    evaluate("a", 1, 2, program=Silent())

    assert {"@before": []} == feedback_by_marker(store)


def test_traces_switched_off_get_none(store):
    """``log_traces_from_eval=False`` and ``mlflow.tracing.context(enabled=False)``: no trace and no feedback."""
    dspy_mlflow_async.autolog(log_traces_from_eval=False, log_evals=True, silent=True)
    result = evaluate("a", 1, 2)

    assert 50.0 == result.score
    assert [] == store.traces()
    assert [None, None] == [row["trace_id"] for row in store.table(store.run("eval"))]


def test_a_program_of_many_modules_is_judged_at_its_root(store):
    """The feedback is on the one trace of the whole program, in threads of its own as well."""
    dspy_mlflow_async.autolog(silent=True)

    class Fans(dspy.Module):
        def __init__(self):
            super().__init__()
            self.step = dspy.Predict("question -> answer")

        def forward(self, question):
            first, _ = self.step.batch(
                [dspy.Example(question=f"{question}-{side}").with_inputs("question") for side in "xy"],
                num_threads=2,
                disable_progress_bar=True,
            )
            return first

    evaluate("a", 1, 2, program=Fans(), num_threads=2)

    assert [["Fans.forward"], ["Fans.forward"]] == [
        [span.name for span in trace.data.spans if span.parent_id is None] for trace in store.traces()
    ]
    assert [1, 1] == [len(feedback_on(trace)) for trace in store.traces()]


# --- LM judges ----------------------------------------------------------------------------------------------------


class Rate(dspy.Signature):
    """Rate an answer."""

    question: str = dspy.InputField()
    rating: str = dspy.OutputField()


def judge_with_an_lm(example, prediction):
    dspy.Predict(Rate)(question=f"is {prediction.answer} right")
    return 0.5


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_judges_calls_are_linked_and_not_confused(runs, num_threads):
    """Its traces name the judged trace and their scorer, are in the same run, and carry no feedback themselves."""
    evaluate("a", 1, 3, metric=judge_with_an_lm, num_threads=num_threads)

    traces = runs.traces()
    judged = {find_marker(t.data.spans[0].inputs): t for t in traces if JUDGED not in t.info.trace_metadata}
    judges = {find_marker(t.data.spans[0].inputs): t for t in traces if JUDGED in t.info.trace_metadata}
    assert set(markers("a", 3)) == set(judged) == set(judges)
    run_id = runs.run("eval").info.run_id
    for marker, judge in judges.items():
        assert judged[marker].info.trace_id == judge.info.trace_metadata[JUDGED]
        assert "judge_with_an_lm" == judge.info.tags[SCORER]
        assert run_id == judge.info.trace_metadata[SOURCE_RUN] == judged[marker].info.trace_metadata[SOURCE_RUN]
        assert SCORER not in judged[marker].info.tags
        assert [] == feedback(judge)
        assert [("judge_with_an_lm", 0.5, None, None)] == feedback(judged[marker])
    rows = runs.table(runs.run("eval"))
    assert [judged[marker].info.trace_id for marker in markers("a", 3)] == [row["trace_id"] for row in rows]


def test_semantic_f1_judges(runs):
    """DSPy's own LM judge: its score is the feedback, its calls are linked."""
    dspy.configure(lm=EchoLM(answer=lambda field, marker: "0.5" if field in {"recall", "precision"} else marker))
    examples = [dspy.Example(question=f"@q{i}", response=f"@r{i}").with_inputs("question") for i in range(2)]
    program = dspy.Predict("question -> response")
    result = dspy.Evaluate(devset=examples, metric=SemanticF1(), num_threads=2)(program)

    assert 50.0 == result.score
    predicted = predictions(runs)
    judges = [trace for trace in runs.traces() if JUDGED in trace.info.trace_metadata]
    assert [[("SemanticF1", 0.5, None, None)]] * 2 == [feedback(trace) for trace in predicted]
    assert ["SemanticF1.forward"] * 2 == [trace.data.spans[0].name for trace in judges]
    assert {t.info.trace_id for t in predicted} == {t.info.trace_metadata[JUDGED] for t in judges}
    assert ["LLM_JUDGE"] * 2 == [feedback_on(trace)[0].source.source_type for trace in predicted]


def test_a_judge_of_an_untraced_prediction_is_linked_to_none(runs):
    """The judge's traces are marked as a scorer's all the same."""
    evaluate("a", 1, 1, program=lambda question: dspy.Prediction(answer=question), metric=judge_with_an_lm)

    (trace,) = runs.traces()
    assert JUDGED not in trace.info.trace_metadata
    assert "judge_with_an_lm" == trace.info.tags[SCORER]
    assert [] == feedback(trace)


def test_a_judge_that_evaluates_itself(runs):
    """A metric that runs an evaluation of its own: inner feedback on inner predictions, the outer on the outer."""

    def nested(example, prediction):
        return evaluate(f"in{example.question[1:]}", 1, 2, metric_key="inner").score / 100

    evaluate("a", 1, 1, metric=nested)

    found = {find_marker(trace.data.spans[0].inputs): feedback(trace) for trace in runs.traces()}
    assert [("nested", 0.5, None, None)] == found["@a-0"]
    assert [("exact", 1.0, None, None)] == found["@ina-0-0"]
    assert [("exact", 0.0, None, None)] == found["@ina-0-1"]
    assert [("eval", "FINISHED", [("inner", "FINISHED", [])])] == runs.tree()


def test_no_mark_of_the_judge_outlives_it(store):
    """After the evaluation, and in the next prediction, nothing is marked as a scorer's."""
    dspy_mlflow_async.autolog(silent=True)
    evaluate("a", 1, 2, metric=judge_with_an_lm)
    Program()(question="@after")

    questions = [trace.data.spans[0].inputs["question"] for trace in predictions(store)]
    assert ["@a-0", "@a-1", "@after"] == questions


def test_metrics_by_position_and_name_see_what_they_saw(store):
    """The metric is called with the very objects that ``Evaluate`` gives it, and keeps its identity in ``Evaluate``."""
    dspy_mlflow_async.autolog(silent=True)
    seen = []

    def metric(example, prediction, trace=None, pred_name=None, pred_trace=None):
        seen.append((example, prediction, trace))
        return 1.0

    examples = devset("a", 1, 2)
    evaluation = dspy.Evaluate(devset=examples, metric=metric, num_threads=1)
    result = evaluation(Program())

    assert metric is evaluation.metric
    assert [(e, p, None) for e, p, _ in result.results] == seen
    assert all(given is kept for (given, _, _), kept in zip(seen, examples, strict=True))
