"""Evaluations and compiles are MLflow's: data sets as inputs of their runs, labels as expectations on the traces."""

import json
import subprocess
import sys
import threading
import time

import dspy
import mlflow
import pytest
import sqlalchemy
from mlflow import MlflowClient
from mlflow.tracking import fluent
from runtools import TIMEOUT, Candidates, Program, devset, evaluate, exact

import dspy_mlflow_async
from dspy_mlflow_async.export import operations
from dspy_mlflow_async.export.spool import codec
from dspy_mlflow_async.runs import feedback
from dspy_mlflow_async.runs.datasets import dataset_input
from dspy_mlflow_async.spans.door import Door
from echo import EchoLM, feedback_on

KEY = "sk-proj-" + "a1B2" * 12


def inputs_of(run):
    """(name, digest, use, rows) of each data set of a run."""
    return [
        (
            each.dataset.name,
            each.dataset.digest,
            {tag.key: tag.value for tag in each.tags}["mlflow.data.context"],
            json.loads(each.dataset.profile)["num_rows"],
        )
        for each in run.inputs.dataset_inputs
    ]


def expected_of(trace):
    """The expectations of a trace by name."""
    return {each.name: each.expectation.value for each in trace.info.assessments if each.expectation is not None}


def test_the_devset_is_an_input_of_the_run(runs):
    """Name, digest, use, size and columns, as ``mlflow.log_input`` notes them; the same devset has the same digest."""
    evaluate("a", 1, 3)
    evaluate("a", 1, 3)
    evaluate("b", 1, 2)
    first, again, other = runs.runs()

    ((name, digest, use, size),) = inputs_of(first)
    assert ("devset", "eval", 3) == (name, use, size)
    assert inputs_of(first) == inputs_of(again)
    assert digest != inputs_of(other)[0][1]
    dataset = first.inputs.dataset_inputs[0].dataset
    assert {"question", "gold"} == {column["name"] for column in json.loads(dataset.schema)["mlflow_colspec"]}
    assert "code" == mlflow.data.get_source(dataset)._get_source_type()


def test_the_input_is_there_while_the_evaluation_runs(runs):
    """It is noted when the run begins, so that one that is killed has it, too."""
    seen = []

    def metric(example, prediction):
        run_id = mlflow.active_run().info.run_id
        dspy_mlflow_async.flush()
        seen.append(inputs_of(fluent.get_run(run_id)))
        return 1.0

    evaluate("a", 1, 1, metric=metric)

    assert [["devset"]] == [[name for name, *_ in found] for found in seen]


def test_the_data_sets_of_a_compile(runs):
    """Trainset and valset are inputs of the compile's run, and the devset of each evaluation one of its own run."""
    Candidates([("a", 1)]).compile(Program(), trainset=devset("t", 1, 4), valset=devset("v", 1, 2))
    root, child = sorted(runs.runs(), key=lambda run: "mlflow.parentRunId" in run.data.tags)

    assert [("trainset", "training", 4), ("valset", "validation", 2)] == sorted(
        (name, use, size) for name, _, use, size in inputs_of(root)
    )
    assert [("devset", "eval")] == [(name, use) for name, _, use, _ in inputs_of(child)]


class Counting(list):
    """A devset that makes its examples when they are asked for."""

    reads = 0

    def __iter__(self):
        type(self).reads += 1
        return super().__iter__()


def test_a_devset_of_a_class_is_read_as_often_as_without_a_tracer(runs):
    """What may run code of the user's is not read by us: the examples that DSPy has read are the data set."""

    def reads(logs):
        dspy_mlflow_async.autolog(log_evals=logs, silent=True)
        Counting.reads = 0
        dspy.Evaluate(devset=Counting(devset("c", 1, 2)), metric=exact, display_progress=False)(Program())
        return Counting.reads

    assert reads(logs=False) == reads(logs=True)
    assert [("devset", "eval", 2)] == [(name, use, size) for name, _, use, size in inputs_of(runs.runs()[-1])]


DIGEST = """\
import dspy
from types import SimpleNamespace
from dspy_mlflow_async.runs.datasets import dataset_input
from dspy_mlflow_async.spans.door import Door
run = SimpleNamespace(data=SimpleNamespace(tags={}))
examples = [dspy.Example(b={"n": 1.5, "o": object()}, a="@a").with_inputs("a"), dspy.Example(a=10**30, b="\\ud800")]
print(dataset_input("devset", "eval", examples, run, Door()).dataset.digest)
"""


def test_a_digest_is_the_same_in_every_process(runs):
    """Neither addresses nor the seed of Python's hashes are in it."""
    digests = {subprocess.check_output([sys.executable, "-c", DIGEST], text=True) for _ in range(2)}

    assert 1 == len(digests)


def test_two_note_one_data_set_at_once(runs):
    """MLflow looks whether a data set is there, then inserts it. Who comes second tries again, and is not refused."""
    ours = devset("a", 1, 1)
    others = MlflowClient().create_run(runs.experiment_id, run_name="other")
    raced = []

    def insert_before(connection, cursor, statement, parameters, context, executemany):
        if statement.startswith("INSERT INTO datasets") and not raced:
            raced.append(statement)
            noted = dataset_input("devset", "eval", ours, others, Door())
            thread = threading.Thread(target=MlflowClient().log_inputs, args=[others.info.run_id, [noted]])
            thread.start()
            thread.join(TIMEOUT)

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", insert_before)
    try:
        evaluate("a", 1, 1)
        first, second = runs.runs()
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", insert_before)

    assert raced
    assert [("devset", "eval")] == [(name, use) for name, _, use, _ in inputs_of(first)]
    assert inputs_of(first) == inputs_of(second)


def test_a_data_set_survives_on_disk(runs):
    """The spool keeps an input as it was."""
    (run,) = [evaluate("a", 1, 1), *runs.runs()][1:]
    dataset = dataset_input("devset", "eval", devset("a", 1, 2), run, Door())
    record = codec.encode(operations.RunOperation(key="k", datasets=[dataset]))

    (restored,) = codec.decode(record).datasets
    assert dataset.to_dictionary() == restored.to_dictionary()


# --- labels -------------------------------------------------------------------------------------------------------


def test_labels_are_expectations(store):
    """What an example has and the program was not given stands on the trace; the feedback is as before."""
    dspy_mlflow_async.autolog(silent=True)
    evaluate("a", 1, 2)

    traces = store.traces()
    assert [{"gold": "@a-0"}, {"gold": "no"}] == list(map(expected_of, traces))
    assert [["exact"], ["exact"]] == [[each.name for each in feedback_on(trace)] for trace in traces]
    assert {"HUMAN"} == {
        each.source.source_type for trace in traces for each in trace.info.assessments if each.expectation is not None
    }


@pytest.mark.parametrize("how", ["program", "metric"])
def test_a_failed_example_has_its_labels(store, how):
    """Where program or metric raise, a reader sees what would have been right."""
    dspy_mlflow_async.autolog(silent=True)

    def fail(*_):
        raise ValueError("no")

    with dspy.context(lm=EchoLM(during=fail)) if how == "program" else dspy.context():
        evaluate("a", 1, 1, metric=fail if how == "metric" else exact)

    assert [{"gold": "@a-0"}] == list(map(expected_of, store.traces()))


def test_labels_are_masked_and_bounded(store):
    """They pass the same door as everything else, and many of them are one."""
    dspy_mlflow_async.autolog(silent=True)
    some = dspy.Example(question="@a", gold=f"a {KEY}", long="x" * 100_000, none=None).with_inputs("question")
    many = dspy.Example(question="@b", **{f"label_{n}": n for n in range(50)}).with_inputs("question")
    dspy.Evaluate(devset=[some, many], metric=lambda *_: 1, num_threads=1, display_progress=False)(Program())

    first, second = map(expected_of, store.traces())
    assert ("a [masked]", {"gold", "long"}) == (first["gold"], set(first))
    assert feedback.MAX_FEEDBACK_BYTES + 100 > len(first["long"])
    assert {"labels": {f"label_{n}": n for n in range(50)}} == second


async def test_async_evaluations_have_them(store):
    """``AsyncEvaluate`` and ``evaluate_all``, where the program is given the inputs by us."""
    dspy_mlflow_async.autolog(silent=True)
    evaluator = dspy_mlflow_async.AsyncEvaluate(devset=devset("a", 2, 2), metric=exact)
    await evaluator.acall(Program())

    assert [{"gold": "@a-0"}, {"gold": "@a-1"}] == sorted(map(expected_of, store.traces()), key=str)


def test_ten_thousand_examples_are_described_in_bounded_time():
    """The digest and the columns of a large data set take a moment, and its record no more room than a small one's."""
    run = type("Run", (), {"data": type("Data", (), {"tags": {}})})
    examples = [dspy.Example(question=f"What is {n}? " * 10, answer=str(n)) for n in range(10_000)]

    begun = time.process_time()
    dataset = dataset_input("devset", "eval", examples, run, Door())

    assert 3.0 > time.process_time() - begun
    assert 1_000 > len(codec.encode(operations.RunOperation(key="k", datasets=[dataset])))


# --- descriptions -------------------------------------------------------------------------------------------------

NOTE = "mlflow.note.content"


class Rewriting(Candidates):
    """An optimizer whose program has other instructions than the one that came."""

    def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
        super().compile(student, trainset=trainset)
        found = student.deepcopy()
        found.answer.signature = found.answer.signature.with_instructions("Answer.\nIn `one` word.")
        return found


def test_a_compile_is_described(runs):
    """Optimizer, best score, arguments, and the instructions as a diff, in Markdown."""
    student = Program()
    student.answer.signature = student.answer.signature.with_instructions("Answer.\nAt length.")
    Rewriting([("a", 1), ("b", 2)]).compile(student, trainset=devset("t", 1, 1))

    text = next(run.data.tags[NOTE] for run in runs.runs() if NOTE in run.data.tags)
    assert text.startswith("**Rewriting** · best `eval` **50** at step 1\n")
    assert "```diff\n Answer.\n-At length.\n+In `one` word.\n```" in text


def test_a_description_of_the_users_stays(runs):
    """In a run that the user has opened and described, the description is the user's."""
    with mlflow.start_run(description="mine"):
        Candidates([]).compile(Program(), trainset=devset("t", 1, 1))
    with mlflow.start_run():
        Candidates([]).compile(Program(), trainset=devset("t", 1, 1))

    first, second = (run.data.tags[NOTE] for run in runs.runs())
    assert "mine" == first
    assert second.startswith("**Candidates**")


def test_a_description_shows_no_secret(runs):
    """It passes the same door as everything else, and keeps to what MLflow takes."""
    student = Program()
    student.answer.signature = student.answer.signature.with_instructions(f"Answer with {KEY}. " + "Long. " * 5_000)
    Candidates([]).compile(student, trainset=devset("t", 1, 1))

    (text,) = [run.data.tags[NOTE] for run in runs.runs()]
    assert "Answer with [masked]" in text
    assert 8_000 >= len(text)


def test_a_comparison_is_described(runs):
    """The parent run of ``evaluate_all`` shows the table that is printed, and names with a bar in them do no harm."""
    programs = {"one|two": Program(), "other": Program()}
    comparison = dspy_mlflow_async.evaluate_all(programs, devset=devset("a", 1, 2), metric=exact)

    parent = runs.run("evaluate_all")
    text = parent.data.tags[NOTE]
    assert inputs_of(parent) == inputs_of(runs.run("other"))
    assert "| one\\|two | 50.0 ± 50.0 |" in text
    assert "Best: one|two, 50.0." in text
    assert text == comparison.to_markdown()
