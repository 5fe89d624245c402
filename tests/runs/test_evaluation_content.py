"""What an evaluation's run holds: params, program, score, table, statistics and tags."""

import importlib
import json
import math
import sys
import threading
import time

import dspy
import mlflow
import pytest
from runtools import SOURCE_RUN, TIMEOUT, Program, devset, evaluate, exact, markers

from dspy_mlflow_async.runs import artifacts
from dspy_mlflow_async.runs.example import Example
from dspy_mlflow_async.runs.results import Results, quantile
from dspy_mlflow_async.seams.mlflow_runs import cost_in_usd
from dspy_mlflow_async.spans.door import Door
from echo import EchoLM


def test_params_program_and_score(runs):
    """As MLflow: the program's state as params and ``model.json``, the LM as ``lm_params``, the score as ``eval``."""
    evaluate("a", 3, 4)

    run = runs.run("eval")
    assert 75.0 == run.data.metrics["eval"]
    assert ["model.json", "program.mmd", "program.svg", "result_table.json"] == runs.artifacts(run)
    assert (
        "Given the fields `question`, produce the fields `answer`."
        == run.data.params["Program.answer.signature.instructions"]
    )
    lm = json.loads(run.data.params["lm_params"])
    assert ("echo/one", "chat", False, 0.0, 1000) == tuple(
        lm[key] for key in ("model", "model_type", "cache", "temperature", "max_tokens")
    )
    loaded = Program()
    loaded.load_state(runs.json(run, "model.json"))
    assert "answer" in runs.json(run, "model.json")


def test_secrets_are_masked_in_lm_params(runs):
    """API keys are left out as by MLflow, and what else names a secret is masked."""
    lm = EchoLM()
    lm.kwargs |= {
        "api_key": "sk-1",
        "aws_secret_access_key": "sk-2",
        "extra_headers": {"Authorization": "sk-3"},
        "n": 1,
    }
    dspy.configure(lm=lm)
    evaluate("a")

    params = runs.run("eval").data.params["lm_params"]
    assert "sk-" not in params
    assert 1 == json.loads(params)["n"]


@pytest.mark.parametrize("num_threads", [1, 4])
def test_the_table_has_a_row_per_example_in_devset_order(runs, num_threads):
    """Score, fields of example and prediction, trace, error and duration, in the order of the devset."""
    evaluate("a", 2, 6, num_threads=num_threads)

    rows = runs.table(runs.run("eval"))
    traces = {trace.data.spans[0].inputs["question"]: trace.info.trace_id for trace in runs.traces()}
    assert markers("a", 6) == [row["example_question"] for row in rows] == [row["pred_answer"] for row in rows]
    assert [1.0, 1.0, 0.0, 0.0, 0.0, 0.0] == [row["score"] for row in rows]
    assert [traces[marker] for marker in markers("a", 6)] == [row["trace_id"] for row in rows]
    assert [None] * 6 == [row["error"] for row in rows]
    assert all(0 < row["duration_seconds"] < TIMEOUT for row in rows)
    assert [
        "score", "example_question", "example_gold", "pred_answer", "trace_id", "error", "duration_seconds",
    ] == list(rows[0])  # fmt: skip


@pytest.mark.parametrize("num_threads", [1, 3])
def test_failed_examples_have_rows_too(runs, num_threads):
    """A program or metric that raises: the row stands in its place, with the error, the trace and the failure score."""

    def during(question):
        if question == "@a-1":
            raise ValueError("program @a-1")

    def metric(example, prediction):
        if example.question == "@a-3":
            raise ValueError("metric @a-3")
        return 1.0

    evaluate("a", 5, 5, program=Program(during), metric=metric, num_threads=num_threads)

    run = runs.run("eval")
    rows = runs.table(run)
    traces = {trace.data.spans[0].inputs["question"]: trace.info.trace_id for trace in runs.traces()}
    assert markers("a", 5) == [row["example_question"] for row in rows]
    assert [None, "ValueError: program @a-1", None, "ValueError: metric @a-3", None] == [row["error"] for row in rows]
    assert [1.0, 0.0, 1.0, 0.0, 1.0] == [row["score"] for row in rows]
    assert [traces[marker] for marker in markers("a", 5)] == [row["trace_id"] for row in rows]
    assert (5.0, 2.0, 60.0) == tuple(run.data.metrics[key] for key in ("examples", "errors", "eval"))


def test_one_example_object_at_several_places(runs):
    """The same object thrice in the devset, worked on at once and overtaking each other: each row has its own trace."""
    shared = dspy.Example(question="@same", gold="no").with_inputs("question")
    other = dspy.Example(question="@other", gold="no").with_inputs("question")
    gates = [threading.Event() for _ in range(3)]
    turns = iter(range(3))
    lock = threading.Lock()

    class Numbered(dspy.Module):
        def forward(self, question):
            if question == "@other":
                return dspy.Prediction(answer="@other")
            with lock:
                turn = next(turns)
            if turn < 2:
                gates[turn + 1].wait(TIMEOUT)  # the last one that begins is the first that ends
            gates[turn].set()
            return dspy.Prediction(answer=f"@{turn}")

    examples = [shared, other, shared, shared]
    result = dspy.Evaluate(devset=examples, metric=exact, num_threads=4)(Numbered())

    answers = {trace.info.trace_id: trace.data.spans[0].outputs["answer"] for trace in runs.traces()}
    rows = runs.table(runs.run("eval"))
    assert [prediction.answer for _, prediction, _ in result.results] == [row["pred_answer"] for row in rows]
    assert [row["pred_answer"] for row in rows] == [answers[row["trace_id"]] for row in rows]


def test_one_object_of_which_some_fail(runs):
    """Duplicates of which the first fails: the error stands in the failed row."""
    shared = dspy.Example(question="@same", gold="@same").with_inputs("question")
    calls = []

    def during(question):
        calls.append(question)
        if len(calls) == 1:
            raise ValueError("first")

    dspy.Evaluate(devset=[shared, shared], metric=exact, num_threads=1)(Program(during))

    rows = runs.table(runs.run("eval"))
    assert [("ValueError: first", 0.0), (None, 1.0)] == [(row["error"], row["score"]) for row in rows]
    assert 2 == len({row["trace_id"] for row in rows})


def test_one_prediction_object_for_all(runs):
    """A program that always returns the same object: each row still has a trace of its own example."""
    same = dspy.Prediction(answer="@same")

    class Same(dspy.Module):
        def forward(self, question):
            return same

    evaluate("a", 0, 4, program=Same(), num_threads=2)

    rows = runs.table(runs.run("eval"))
    traces = {trace.data.spans[0].inputs["question"]: trace.info.trace_id for trace in runs.traces()}
    assert [traces[marker] for marker in markers("a", 4)] == [row["trace_id"] for row in rows]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_failed_examples_of_a_devset_that_makes_them_anew(runs, num_threads):
    """New objects at each iteration: the rows of those that failed have their error and trace all the same."""

    class Anew:
        def __len__(self):
            return 4

        def __iter__(self):
            return iter(devset("a", 4, 4))

        def __getitem__(self, index):
            return devset("a", 4, 4)[index]

    def during(question):
        if question in {"@a-1", "@a-2"}:
            raise ValueError(question)

    dspy.Evaluate(devset=Anew(), metric=exact, num_threads=num_threads, max_errors=9)(Program(during))

    run = runs.run("eval")
    assert 2.0 == run.data.metrics["errors"]
    rows = runs.table(run)
    assert [None, "ValueError: @a-1", "ValueError: @a-2", None] == [row["error"] for row in rows]
    assert all(row["trace_id"] for row in rows)


def test_a_straggler_takes_no_row_of_its_own(runs, monkeypatch):
    """DSPy runs a slow example twice: one row, with the trace of the attempt that counted."""
    from dspy.utils import parallelizer

    init = parallelizer.ParallelExecutor.__init__

    def impatient(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.timeout = 0.05

    monkeypatch.setattr(parallelizer.ParallelExecutor, "__init__", impatient)
    attempts, may_end = [], threading.Event()

    class Slow(dspy.Module):
        def forward(self, question):
            if question == "@a-0":
                attempts.append(question)
                if len(attempts) == 1:
                    may_end.wait(TIMEOUT)
                    return dspy.Prediction(answer="@late")
            return dspy.Prediction(answer=question)

    evaluate("a", 3, 3, program=Slow(), num_threads=3)
    table = runs.table(runs.run("eval"))
    errors = runs.run("eval").data.metrics["errors"]
    may_end.set()
    answers, deadline = {}, time.monotonic() + TIMEOUT
    while "@late" not in answers.values() and time.monotonic() < deadline:
        answers = {trace.info.trace_id: trace.data.spans[0].outputs["answer"] for trace in runs.traces()}

    assert {"@a-0", "@late"} <= set(answers.values())
    assert markers("a", 3) == [row["pred_answer"] for row in table] == [answers[row["trace_id"]] for row in table]
    assert 0.0 == errors
    assert {runs.run("eval").info.run_id} == {trace.info.trace_metadata.get(SOURCE_RUN) for trace in runs.traces()}


class Odd:
    """Neither a dict nor JSON."""

    def __repr__(self):
        return "<odd>"


@pytest.mark.parametrize(
    ("answer", "stored"),
    [
        ("text", "text"),
        (7, 7),
        (None, None),
        (["a", 1], ["a", 1]),
        (Odd(), "<odd>"),
        (b"bytes", None),
        (float("nan"), None),
        ([{"deep": {1: {2, 3}}}], None),
    ],
    ids=["text", "number", "none", "list", "object", "bytes", "nan", "set"],
)
def test_predictions_that_are_not_dict_like(runs, answer, stored):
    """Any object: one column ``pred``; what is no JSON is stored as MLflow's encoder would, never dropped."""
    result = dspy.Evaluate(devset=devset("a", 1, 2), metric=lambda e, p: 1.0, num_threads=1)(lambda question: answer)

    assert 100.0 == result.score
    rows = runs.table(runs.run("eval"))
    assert 2 == len(rows)
    assert {"example_question", "pred"} <= set(rows[0])
    if stored is not None:
        assert stored == rows[0]["pred"]


def test_unequal_keys_and_values_of_all_kinds(runs):
    """Examples and predictions with keys of their own, dates, sets, NaN, models: every row is stored and read."""
    import datetime as dt

    import pydantic

    class Model(pydantic.BaseModel):
        x: int = 1

    examples = [
        dspy.Example(question="@1", when=dt.date(2020, 1, 2)).with_inputs("question"),
        dspy.Example(question="@2", extra={"a": {1, 2}}).with_inputs("question"),
        dspy.Example(question="@3", model=Model(), number=float("inf")).with_inputs("question"),
        dspy.Example(question="@4", odd=Odd(), text="lone \ud800 surrogate").with_inputs("question"),
    ]

    class Uneven(dspy.Module):
        def forward(self, question):
            number = int(question[1:])
            return dspy.Prediction(**{f"key{number}": number, "nan": math.nan if number == 1 else 1.5})

    dspy.Evaluate(devset=examples, metric=lambda e, p: 1.0, num_threads=2)(Uneven())

    run = runs.run("eval")
    rows = runs.table(run)
    assert ["@1", "@2", "@3", "@4"] == [row["example_question"] for row in rows]
    assert [1, None, None, None] == [row["pred_key1"] for row in rows]
    assert [None, 2, None, None] == [row["pred_key2"] for row in rows]
    assert [None, 1.5, 1.5, 1.5] == [row["pred_nan"] for row in rows]
    assert "2020-01-02" in str(rows[0]["example_when"])
    assert {"x": 1} == rows[2]["example_model"] or "x=1" in str(rows[2]["example_model"])
    assert 4 == len(mlflow.load_table("result_table.json", run_ids=[run.info.run_id]))


def test_mlflow_reads_the_table_back(runs):
    """``mlflow.load_table`` finds the tables of all evaluations, as it does MLflow's own."""
    evaluate("a", 1, 2)
    evaluate("b", 2, 2)

    frame = mlflow.load_table("result_table.json", extra_columns=["run_id"])
    assert sorted(markers("a", 2) + markers("b", 2)) == sorted(frame["example_question"])
    assert {1.0, 0.0} == set(frame["score"])


def test_ten_thousand_rows_in_bounded_time():
    """The table of 10,000 rows of the size of an answer is made in seconds; a quadratic one would take minutes."""
    rows = [
        {
            "score": 1.0,
            "example_question": f"question {i} " * 10,
            "pred_answer": f"answer {i} " * 50,
            "trace_id": f"tr-{i}",
        }
        for i in range(10_000)
    ]
    begun = time.process_time()
    content = artifacts.table_json(artifacts.columns_of(rows), Door())

    assert time.process_time() - begun < 10
    assert 10_000 == len(json.loads(content)["data"])


@pytest.mark.parametrize("shared", ["nothing", "prediction", "example", "everything"])
def test_ten_thousand_results_are_matched_in_bounded_time(shared):
    """Whichever objects the rows share: each row finds its own, in linear time."""
    same_item, same_prediction = dspy.Example(x=1), dspy.Prediction(y=1)
    ended, rows = [], []
    for index in range(10_000):
        item = same_item if shared in {"example", "everything"} else dspy.Example(x=index)
        noted = Example(None, item)
        noted.prediction = same_prediction if shared in {"prediction", "everything"} else dspy.Prediction(y=index)
        noted.trace_id = f"tr-{index}"
        ended.append(noted)
        rows.append((item, noted.prediction, 1.0))
    begun = time.process_time()
    table = Results(dspy.Prediction(score=1.0, results=rows), ended[::-1] if shared != "everything" else ended).table()

    assert time.process_time() - begun < 10
    assert [f"tr-{index}" for index in range(10_000)] == table["trace_id"]


def test_many_examples_end_to_end(runs):
    """What comes after the last of 2,000 examples takes a bounded time, and every row is in the table."""
    examples = [dspy.Example(question=f"@{i}", gold=f"@{i}").with_inputs("question") for i in range(2_000)]
    ended = []

    def metric(example, prediction):
        ended.append(time.process_time())
        return 1.0

    result = dspy.Evaluate(devset=examples, metric=metric, num_threads=1)(
        lambda question: dspy.Prediction(answer=question)
    )

    assert time.process_time() - ended[-1] < 10
    assert 100.0 == result.score
    rows = runs.table(runs.run("eval"))
    assert [f"@{i}" for i in range(2_000)] == [row["pred_answer"] for row in rows]


def test_statistics(runs):
    """Examples, errors, latency in seconds, tokens in and out of program and metric."""

    def judge(example, prediction):
        dspy.Predict("verdict -> rating")(verdict=prediction.answer)
        return 1.0

    evaluate("a", 4, 4, metric=judge, num_threads=2)

    metrics = runs.run("eval").data.metrics
    assert (4.0, 0.0) == (metrics["examples"], metrics["errors"])
    assert 0 < metrics["latency_p50_seconds"] <= metrics["latency_p95_seconds"] < TIMEOUT
    assert 8 * 10 == metrics["input_tokens"]
    assert 8 * len("@a-0") == metrics["output_tokens"]
    assert "cost_usd" not in metrics  # nobody knows the price of echo/one


def test_cost_where_the_price_is_known(runs):
    """A model with a known price: the cost of all its calls in US dollars."""
    dspy.configure(lm=EchoLM(model="openai/gpt-4o-mini"))
    evaluate("a", 2, 2)

    assert 0 < runs.run("eval").data.metrics["cost_usd"] < 0.01


def test_prices_are_not_looked_for_in_the_network(monkeypatch):
    """LiteLLM, where nobody has imported it, is not imported for its prices: MLflow's own do, and they agree."""
    tokens = {"input_tokens": 1000, "output_tokens": 100}
    models = ["openai/gpt-4o-mini", "echo/one"]
    importlib.import_module("litellm")
    with_litellm = [cost_in_usd(model, tokens) for model in models]
    monkeypatch.delitem(sys.modules, "litellm")
    asked = []
    monkeypatch.setattr("mlflow.utils.request_utils.requests.Session.request", lambda *args, **_: asked.append(args))
    monkeypatch.setattr("mlflow.utils.providers.cloud_storage_http_request", lambda *args, **_: asked.append(args))
    monkeypatch.setattr("mlflow.utils.providers._remote_cache", None)

    without = [cost_in_usd(model, tokens) for model in models]
    assert "litellm" not in sys.modules
    assert [] == asked
    assert [pytest.approx(with_litellm[0]), None] == without


def test_latency_is_the_programs_alone(runs):
    """A slow metric does not count: no more than what passes between the end of one metric and the next one's start."""
    between, ended = [], time.perf_counter()

    def slow(example, prediction):
        nonlocal ended
        between.append(time.perf_counter() - ended)
        time.sleep(0.3)
        ended = time.perf_counter()
        return 1.0

    dspy.Evaluate(devset=devset("a", 1, 3), metric=slow, num_threads=1)(
        lambda question: dspy.Prediction(answer=question)
    )

    metrics = runs.run("eval").data.metrics
    assert metrics["latency_p50_seconds"] <= quantile(sorted(between), 0.5)
    assert metrics["latency_p95_seconds"] <= quantile(sorted(between), 0.95)


@pytest.mark.parametrize(
    ("samples", "p50", "p95"),
    [([], None, None), ([3.0], 3.0, 3.0), ([1.0, 2.0, 3.0], 2.0, 2.9), ([0.0, 1.0], 0.5, 0.95)],
)
def test_quantiles(samples, p50, p95):
    """Interpolated, as NumPy does by default."""
    assert (p50, pytest.approx(p95)) == (quantile(samples, 0.5), quantile(samples, 0.95))


def test_tags(runs):
    """Metric name, devset size and threads, and MLflow's own tags of a run."""
    evaluate("a", 1, 3, num_threads=2)

    tags = runs.run("eval").data.tags
    assert ("exact", "3", "2") == tuple(tags[key] for key in ("dspy.metric", "dspy.devset_size", "dspy.num_threads"))
    assert {"mlflow.user", "mlflow.source.name", "mlflow.runName"} <= set(tags)


def test_a_program_that_cannot_be_saved(runs, caplog):
    """``Module.save`` raises: no ``model.json``, all else is there."""

    class Unsaved(Program):
        def save(self, *args, **kwargs):
            raise ValueError("not mine")

        def dump_state(self, *args, **kwargs):
            raise ValueError("not mine")

    evaluate("a", program=Unsaved())

    run = runs.run("eval")
    assert ["program.mmd", "program.svg", "result_table.json"] == runs.artifacts(run)
    assert ("FINISHED", 50.0) == (run.info.status, run.data.metrics["eval"])
    assert "lm_params" in run.data.params


def test_no_lm_at_all(runs):
    """Without an LM configured: no ``lm_params``, all else is there."""
    dspy.configure(lm=None)
    evaluate("a", program=lambda question: dspy.Prediction(answer=question))

    run = runs.run("eval")
    assert ({}, 50.0) == (run.data.params, run.data.metrics["eval"])


def test_arguments_of_the_call_win(runs):
    """``devset``, ``metric`` and ``num_threads`` given to the call, not to ``Evaluate``, are what is tagged."""

    def other(example, prediction):
        return 1.0

    evaluation = dspy.Evaluate(devset=devset("a", 1, 2), metric=exact, num_threads=1)
    evaluation(Program(), metric=other, devset=devset("b", 1, 3), num_threads=3)

    run = runs.run("eval")
    assert ("other", "3", "3") == tuple(
        run.data.tags[key] for key in ("dspy.metric", "dspy.devset_size", "dspy.num_threads")
    )
    assert markers("b", 3) == [row["example_question"] for row in runs.table(run)]


def test_long_params_are_cut(runs):
    """Instructions longer than a param may be: cut, and whole in ``model.json``."""
    program = Program()
    program.answer.signature = program.answer.signature.with_instructions("x" * 20_000)
    evaluate("a", program=program)

    run = runs.run("eval")
    assert "x" * 6000 == run.data.params["Program.answer.signature.instructions"]
    assert "x" * 20_000 == runs.json(run, "model.json")["answer"]["signature"]["instructions"]
