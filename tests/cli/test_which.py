"""``dspy-mlflow-async which`` and ``report --lineage``: from a program back to its compile, and on to its traces."""

import contextlib
import functools
import json
import sqlite3

import dspy
import mlflow
import pytest
from typer.testing import CliRunner

import dspy_mlflow_async
from dspy_mlflow_async.cli import app
from dspy_mlflow_async.cli.lineage import aorigin_of, origin_of
from dspy_mlflow_async.cli.lineage.origins import Found, Origin
from dspy_mlflow_async.cli.lineage.reading import Candidate, Lineage, Score
from dspy_mlflow_async.cli.lineage.showing import lines_of, section
from dspy_mlflow_async.runs.lineage import hash_of
from dspy_mlflow_async.spans.describe import program_hash
from echo import Chain, EchoLM

MODEL = "m-" + "0" * 32


def exact(example, prediction, trace=None):
    return example.answer == prediction.answer


@pytest.fixture
def experiment(stored):
    """The test's own experiment, whose runs alone are looked at."""
    mlflow.set_experiment(experiment_id=stored.experiment_id)
    return stored.experiment_id


@pytest.fixture
def origin(experiment):
    """``origin_of``, in this experiment."""
    return functools.partial(origin_of, experiment=experiment)


@pytest.fixture
def which(experiment):
    """A function that calls the command."""
    return lambda *arguments: CliRunner().invoke(app, ["which", *arguments, "--experiment", experiment])


def examples(*names):
    return [dspy.Example(question=each, answer=each).with_inputs("question") for each in names]


class Proposing(dspy.teleprompt.Teleprompter):
    """Changes the first predictor of a chain, then the second of that."""

    def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
        evaluate = dspy.Evaluate(devset=trainset, metric=exact, num_threads=1)
        for name in ("first", "second"):
            dspy.Predict("x -> y")(x="@idea")
            student = student.deepcopy()
            predictor = getattr(student, name)
            predictor.signature = predictor.signature.with_instructions(f"Improved {name} <&>.")
            evaluate(student)
        return student


@pytest.fixture
def compiled(experiment):
    """A compiled chain, whose compile and one later call are in the store, and the id of that call's trace."""
    dspy_mlflow_async.autolog(silent=True, log_compiles=True, log_evals=True)
    dspy.configure(lm=EchoLM())
    program = Proposing().compile(Chain(), trainset=examples("@a", "@b"))
    with dspy_mlflow_async.request(session_id="later") as record:
        program(question="@later")
    other = Chain()
    other(question="@other")
    dspy_mlflow_async.flush()
    return program, record.trace_id


def test_from_hash_file_trace_and_program(compiled, tmp_path, origin):
    """Each leads to the compile and its optimizer, to the step and the score, and to the one trace made since."""
    program, trace_id = compiled
    program.save(tmp_path / "program.json")
    origins = [origin(each) for each in (program, str(tmp_path / "program.json"), trace_id, hash_of(program))]

    for each in origins:
        (found,) = each.candidates
        assert ("Proposing", hash_of(program)) == (found.lineage.optimizer, found.candidate.hash)
        assert found.candidate.hash == found.lineage.result == each.hash
        assert [("eval", 1, 100.0, 2, "exact")] == [
            (score.key, score.step, score.value, score.examples, score.metric) for score in found.candidate.scores
        ]
        assert "eval_1" == mlflow.get_run(found.candidate.scores[0].run_id).info.run_name
        assert ["second: “Improved second <&>.”"] == found.lineage.changes(found.candidate)
        assert () == each.evaluations
        assert [trace_id] == [made.trace_id for made in each.traces]


def test_a_predictor_that_several_have(compiled, origin):
    """The hash of a predictor leads to all programs that have it, and to the traces that called it."""
    program, trace_id = compiled
    found = origin(program_hash(program.first))

    assert 2 == len(found.candidates)
    assert {hash_of(program)} < {each.candidate.hash for each in found.candidates}
    assert (None, [trace_id]) == (found.hash, [each.trace_id for each in found.traces])


def test_words(compiled, tmp_path, which):
    """The command says it in lines, or as JSON; its exit code is 1 where nothing has the program, 2 for no program."""
    program, trace_id = compiled
    said = which(trace_id)
    record, same = json.loads(which(trace_id, hash_of(program), "--json").output)
    Chain().save(tmp_path / "other.json")
    other = dspy.Predict("question -> answer")
    other.signature = other.signature.with_instructions("Of nobody.")
    other.save(tmp_path / "nobody.json")
    (tmp_path / "list.json").write_text("[]")

    assert 0 == said.exit_code, said.output
    assert f"program {hash_of(program)}: " in said.output
    assert "what it returned" in said.output
    assert "100 at eval 1 on 2 by exact, run " in said.output
    assert "1 traces, from 20" in said.output
    assert [trace_id] == [each["trace_id"] for each in record["traces"]]
    assert record["candidates"][0]["is_result"]
    assert record["candidates"] == same["candidates"]
    assert "the program that it was given" in which(str(tmp_path / "other.json")).output
    assert 1 == which(str(tmp_path / "nobody.json")).exit_code
    assert 1 == which("0123456789ab").exit_code
    for wrong in (str(tmp_path / "list.json"), "tr-nowhere", "nothing", MODEL):
        done = which(wrong)
        assert (2, 1) == (done.exit_code, len(done.stderr.splitlines())), wrong


def test_evaluations_models_and_prompts(experiment, origin):
    """An evaluation of no compile has it, too; the models and prompts that its traces are linked to are named."""
    dspy_mlflow_async.autolog(silent=True, log_evals=True)
    dspy.configure(lm=EchoLM())
    program = Chain()
    dspy.Evaluate(devset=examples("@a"), metric=exact, num_threads=1)(program)
    with dspy_mlflow_async.request(metadata={"mlflow.modelId": MODEL}) as record:
        program(question="@later")
    dspy_mlflow_async.flush()
    mlflow.MlflowClient().set_trace_tag(
        record.trace_id, "mlflow.linkedPrompts", json.dumps([{"name": "desk", "version": "3"}])
    )

    for found in (origin(program), origin(f"models:/{MODEL}")):
        assert [100.0] == [each.score for each in found.evaluations]
        assert 2 == len(found.traces)
        assert ((MODEL,), ("desk/3",)) == (found.models, found.prompts)


async def test_async(compiled, experiment):
    """``aorigin_of`` is the same for an event loop."""
    program, trace_id = compiled

    assert [trace_id] == [each.trace_id for each in (await aorigin_of(program, experiment=experiment)).traces]


def test_report_draws_the_candidates(compiled, tmp_path, origin):
    """``--lineage`` is a tree, each candidate below its parent with what changed; the page has it, and the diffs."""
    program, _ = compiled
    (found,) = origin(program).candidates
    arguments = ["report", found.run_id, "--lineage", "--html", str(tmp_path / "page.html")]
    said = CliRunner().invoke(app, arguments)
    first, second, third = found.lineage.candidates

    lines = said.output.splitlines()
    begin = lines.index("Proposing: 3 candidates")
    assert [f"└── {first}  start", f"    └── {second}  100 eval 0"] == [
        each.rstrip() for each in lines[begin + 1 : begin + 3]
    ]
    assert "first: “Improved first <&>.”" in lines[begin + 3]
    assert f"        └── {third}  100 eval 1 · result" == lines[begin + 4].rstrip()
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1
    assert f'<tspan class="title">{third}</tspan>' in page
    assert "+Improved second &lt;&amp;&gt;." in page
    assert "Improved second <" not in page


def test_what_is_no_lineage():
    """A file of another shape is none, whatever wrote it."""
    for content in (b"", b"[]", b"{}", b'{"candidates": [{}]}', b'{"candidates": 1}', b"\xff"):
        assert Lineage.of(content) is None


def test_reading_makes_no_store(tmp_path):
    """Whoever asks in Python, in a folder where nothing was recorded, is told so."""
    with pytest.raises(ValueError, match="there is no store in"):
        origin_of("0123456789ab", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")

    assert [] == list(tmp_path.iterdir())


def test_nothing_is_made_of_another_database(tmp_path):
    """The tables of MLflow do not come into a file that belongs to somebody else."""
    path = tmp_path / "bills.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bills (n)")
    before = path.read_bytes()
    for words in (["audit"], ["gate", "--min", "score=1"], ["report"], ["which", "0123456789ab"], ["doctor"]):
        done = CliRunner().invoke(app, [*words, "--tracking-uri", f"sqlite:///{path}"])
        assert done.exit_code == (1 if words == ["doctor"] else 2), done.output

    assert before == path.read_bytes()


def test_scores_on_batches_are_one_line(experiment):
    """GEPA scores a candidate on dozens of batches, none of which has a run: how many, from which to which."""
    batches = [Score("eval", None, value, 3, "exact", None) for value in (33.33, 100.0, 66.67)]
    scores = (Score("eval", 0, 75.0, 4, "exact", "r-1"), *batches, Score("eval", None, 50.0, 2, None, None))
    candidate = Candidate("0" * 12, (), None, {}, scores)
    lineage = Lineage("GEPA", "0" * 12, None, {candidate.hash: candidate}, 0, {}, {})
    origin = Origin("0" * 12, frozenset(), (Found("r", "GEPA", lineage, candidate),), (), (), (), ())

    assert [
        "  75 at eval 0 on 4 by exact, run r-1",
        "  33.33 to 100 at eval on 3 by exact, 3 times",
        "  50 at eval on 2",
    ] == lines_of(origin)[2:-1]
    assert "GEPA: 1 candidate<" in section(lineage)
    assert " and 2 more · start" in section(lineage)
