"""Examples from stored traces: what was asked and answered comes back, typed, labelled, weighted and compilable."""

import asyncio
import json
import logging
import os
import random
import runpy
import uuid
from pathlib import Path

import dspy
import mlflow
import pydantic
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mlflow.entities import AssessmentSource
from typer.testing import CliRunner

import dspy_mlflow_async
from dspy_mlflow_async.cli import app
from dspy_mlflow_async.cli.harvest import aexamples_from_traces, examples_from_traces
from echo import Chain, EchoLM

PICTURE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # noqa: E501


TEXT = st.characters(codec="utf-8", exclude_characters="\0")  # no database takes what is left out


class Item(pydantic.BaseModel):
    name: str
    count: int


class Order(dspy.Signature):
    """Fill an order."""

    item: Item = dspy.InputField()
    tags: list[str] = dspy.InputField()
    picture: dspy.Image = dspy.InputField()
    history: dspy.History = dspy.InputField()
    filled: Item = dspy.OutputField()
    notes: list[str] = dspy.OutputField()


@pytest.fixture
def experiment(request, tmp_path, monkeypatch):
    """An experiment of the test's own, with our tracer on."""
    name = request.node.name
    mlflow.set_experiment(
        experiment_id=mlflow.create_experiment(name, artifact_location=(tmp_path / "artifacts").as_uri())
    )
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    mlflow.tracing.reset()
    dspy_mlflow_async.autolog(silent=True)
    yield name
    mlflow.tracing.reset()


def harvested(experiment, *args, **kwargs):
    dspy_mlflow_async.flush()
    return examples_from_traces(*args, experiment=experiment, **kwargs)


def answering(**fields):
    return EchoLM(answer=fields.get)


def test_round_trip_of_types(experiment):
    """Models, lists, pictures and histories come back as the signature has them, and as they were."""
    dspy.configure(lm=answering(filled='{"name": "x", "count": 2}', notes='["a", "b"]'))
    asked = {
        "item": Item(name="i", count=1),
        "tags": ["t", "u"],
        "picture": dspy.Image(url=PICTURE),
        "history": dspy.History(messages=[{"tags": ["t"], "notes": ["n"]}]),
    }
    answered = dspy.Predict(Order)(**asked)

    (example,) = harvested(experiment, Order)
    assert dspy.Example(**asked, filled=answered.filled, notes=answered.notes).with_inputs(*asked) == example
    assert set(asked) == set(example.inputs().keys())
    assert [Item, Item] == [type(example.item), type(example.filled)]


@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    asked=st.lists(
        st.tuples(st.text(TEXT, min_size=1, max_size=20), st.lists(st.integers(), max_size=3)),
        min_size=1,
        max_size=4,
        unique_by=json.dumps,
    )
)
def test_round_trip_of_anything(experiment, asked):
    """Whatever texts and numbers were asked come back, each once."""
    random.seed(os.urandom(8))  # Hypothesis sets the seed, by which OpenTelemetry makes its ids
    name = mlflow.create_experiment(f"{experiment}-{uuid.uuid4()}")
    mlflow.set_experiment(experiment_id=name)
    dspy.configure(lm=answering(answer="yes"))
    predict = dspy.Predict("question: str, numbers: list[int] -> answer: str")
    for question, numbers in asked:
        predict(question=question, numbers=numbers)

    found = harvested(name, predict, include_masked=True, include_cut=True)
    assert asked == [(each.question, each.numbers) for each in found]
    assert {"yes"} == {each.answer for each in found}


def test_outermost_and_inner_calls(experiment):
    """By default the outermost call makes the example; a signature finds inner predictors, reasoned ones too."""
    Chain()(question="@a")
    dspy.ChainOfThought("question -> answer")(question="@b")

    outermost = harvested(experiment)
    drafts = harvested(experiment, "question -> draft")
    reasoned = harvested(experiment, "question -> answer")
    by_program = harvested(experiment, program="Chain")
    assert [("@a", "@a"), ("@b", "@b")] == [(each.question, each.answer) for each in outermost]
    assert [({"question": "@a", "draft": "@a"}, {"question"})] == [
        (dict(each), set(each.inputs().keys())) for each in drafts
    ]
    assert [{"question": "@b", "answer": "@b"}] == [dict(each) for each in reasoned]
    assert [{"question": "@a", "answer": "@a"}] == [dict(each) for each in by_program]


def test_what_is_left_out(experiment, caplog):
    """Failed calls, cut and masked values, and judges' calls, unless they are asked for."""

    def fail(marker):
        if marker == "@bad":
            raise ValueError("no")

    dspy_mlflow_async.autolog(silent=True, max_value_bytes=400)
    dspy.configure(lm=EchoLM(during=fail))
    predict = dspy.Predict("question -> answer")
    predict(question="@good")
    with pytest.raises(ValueError, match="no"):
        predict(question="@bad")
    predict(question=f"{'long ' * 200}@long")
    predict(question=f"ghp_{'a1B2' * 9} @masked")

    assert ["@good"] == [each.answer for each in harvested(experiment)]
    assert ["@good", "@long"] == [each.answer for each in harvested(experiment, include_cut=True)]
    assert ["@good", "@masked"] == [each.answer for each in harvested(experiment, include_masked=True)]


def test_what_does_not_fit_the_types(experiment, caplog):
    """What was stored with other types than the signature has now is left out, and counted in a warning."""
    dspy.Predict("question -> answer")(question="@many")

    with caplog.at_level(logging.WARNING, "dspy_mlflow_async"):
        assert [] == harvested(experiment, "question -> answer: int")
    assert "1 calls were left out" in caplog.text


def test_labels_weights_and_duplicates(experiment):
    """An expectation takes its output's place, feedback weighs, and of equal inputs the best is kept."""
    predict = dspy.Predict("question -> answer")
    human = AssessmentSource("HUMAN", "me")
    for question, weight, expected in (
        ("@a", True, None),
        ("@a", False, None),
        ("@b", False, "right"),
        ("@c", None, None),
    ):
        predict(question=question)
        dspy_mlflow_async.flush()
        trace = (
            mlflow.get_last_active_trace_id()
            or mlflow.search_traces(max_results=1, return_type="list")[0].info.trace_id
        )
        if weight is not None:
            mlflow.log_feedback(trace_id=trace, name="helpful", value=weight, source=human)
        if expected is not None:
            mlflow.log_expectation(trace_id=trace, name="answer", value=expected, source=human)

    found = harvested(experiment, weight_by="helpful")
    assert [("@a", "@a", 1.0), ("@b", "right", 0.0), ("@c", "@c", None)] == [
        (each.question, each.answer, each.get("weight")) for each in found
    ]
    assert ["@a"] == [each.question for each in harvested(experiment, weight_by="helpful", min_weight=0.5)]
    assert 4 == len(harvested(experiment, deduplicate=False))
    assert 1 == len(harvested(experiment, limit=1))


def test_filters(experiment):
    """By the hash of a predictor, by what a function says of the trace, by run; and in an event loop."""
    with dspy_mlflow_async.request(session_id="s1"):
        Chain()(question="@one")
    changed = Chain()
    changed.first.signature = changed.first.signature.with_instructions("Be short.")
    with mlflow.start_run() as run:
        changed(question="@two")
    dspy_mlflow_async.flush()
    (trace,) = mlflow.search_traces(filter_string="metadata.`mlflow.trace.session` = 's1'", return_type="list")
    hashes = [span.attributes["program_hash"] for span in trace.data.spans if span.name == "Predict.forward"]

    assert ["@one"] == [each.question for each in harvested(experiment, program_hash=hashes[0])]
    assert ["@two"] == [each.question for each in harvested(experiment, run=run.info.run_id)]
    by_session = harvested(experiment, where=lambda row: row.metadata.get("mlflow.trace.session") == "s1")
    assert ["@one"] == [each.question for each in by_session]
    assert by_session == asyncio.run(aexamples_from_traces(experiment=experiment, program_hash=hashes[0]))
    with pytest.raises(ValueError, match="no experiment"):
        examples_from_traces(experiment="nowhere")
    with pytest.raises(TypeError, match="a signature is"):
        examples_from_traces(5)


def test_command(experiment, tmp_path):
    """A line of JSON for each example, with inputs and labels apart; what is wrong is said in a sentence."""
    Chain()(question="@a")
    dspy_mlflow_async.flush()
    out = tmp_path / "examples.jsonl"
    done = CliRunner().invoke(
        app, ["harvest", "--out", str(out), "--experiment", experiment, "--signature", "question -> draft"]
    )
    wrong = CliRunner().invoke(app, ["harvest", "--out", str(out), "--experiment", "nowhere"])
    (line,) = map(json.loads, out.read_text().splitlines())

    assert 0 == done.exit_code
    assert ({"question": "@a"}, {"draft": "@a"}) == (line["inputs"], line["labels"])
    assert line["trace_id"].startswith("tr-")
    assert 2 == wrong.exit_code


def test_what_production_teaches(tmp_path, monkeypatch):
    """The example of the docs: traces of production, harvested, make a compile whose score is better than before."""
    monkeypatch.chdir(tmp_path)
    script = Path(__file__).parents[2] / "examples" / "learn_from_traces.py"

    before, after = runpy.run_path(str(script))["main"](f"sqlite:///{tmp_path}/mlflow.db")
    assert before < after
