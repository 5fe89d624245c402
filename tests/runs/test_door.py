"""Everything that is stored passes one door: planted secrets, and what a hook takes out, are nowhere in the store."""

import asyncio
import json
import logging
import re
from pathlib import Path

import dspy
import mlflow
import pytest
from mlflow.entities.trace_location import MlflowExperimentLocation
from runtools import Candidates, Program

import dspy_mlflow_async
from dspy_mlflow_async import aevaluate_all, request, run
from dspy_mlflow_async.evaluate.case import Case
from dspy_mlflow_async.runs import artifacts
from dspy_mlflow_async.spans.door import Door
from echo import EchoLM

PERSON = "ada@example.org"  # what the hook takes out
SECRETS = {
    "header": "Bearer planted-0header9a7c",
    "api key": "planted1apikey",
    "azure": "planted2azure",
    "aws": "planted3aws",
    "vertex": "planted4vertex",
    "model list": "planted5modellist",
    "question": "sk-proj-planted6questionplanted6",
    "address": "planted7address",
    "answer": "ghp_planted8answerplanted8answerplanted8xx",
    "metric": "hf_planted9metricplanted9metricplanted9",
    "failure": "AKIAPLANTED0FAILURE0",
    "optimizer": "planted11optimizer",
    "session": "glpat-planted12sessionplanted12",
    "user": "xoxb-planted13userplanted13user",
    "tag": "planted14tag",
    "metadata": "npm_planted15metadataplanted15metadata12345",
    "case": "sk-ant-planted16caseplanted16case",
    "run": "dapi0123456789abcdef0123456789abcde1",
    "description": "planted17description",
    "json": "planted18json",
    "demo": "AIzaplanted19demoplanted19demoplanted19",
}


def redact(value):
    """Take a person out."""
    return value.replace(PERSON, "[gone]") if isinstance(value, str) else value


def planted_lm(**more):
    """An LM whose arguments are full of secrets."""
    return EchoLM(
        answer=lambda field, marker: f"{marker} {SECRETS['answer']} {PERSON}",
        headers={"Authorization": SECRETS["header"], "X-Person": PERSON},
        aws_secret_access_key=SECRETS["aws"],
        vertex_credentials={"private": SECRETS["vertex"]},
        azure_ad_token=SECRETS["azure"],
        model_list=[{"litellm_params": {"api_key": SECRETS["model list"], "model": "x"}}],
        api_key=SECRETS["api key"],
        **more,
    )


def question(marker):
    """What a stranger writes."""
    return (
        f"@{marker} {SECRETS['question']} postgres://me:{SECRETS['address']}@db/x {PERSON} "
        f'{{"api_key": "{SECRETS["json"]}"}}'
    )


def examples(*markers):
    """A devset of such."""
    return [
        dspy.Example(question=question(marker), answer=f"@{marker} {PERSON}").with_inputs("question")
        for marker in markers
    ]


def metric(example, prediction, trace=None):
    """A metric that tells what it saw, and fails now and then."""
    if "@fails" in example.question:
        raise ValueError(f"no {SECRETS['failure']} for {PERSON}")
    return dspy.Prediction(score=0.5, feedback=f"{SECRETS['metric']} {PERSON} {prediction.answer}")


def raw(folder):
    """Every file below a folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def leaks(files, also=()):
    """What was planted and is there, with the place; a secret is sought in part, too."""
    wanted = {name: secret.removeprefix("Bearer ") for name, secret in SECRETS.items()} | {"person": PERSON}
    return [
        (name, str(path), content[max(content.find(secret.encode()) - 80, 0) :][:160])
        for path, content in files.items()
        for name, secret in wanted.items()
        if secret.encode() in content or secret[:14].encode() in content
    ]


@pytest.fixture
def planted(store, tmp_path, monkeypatch):
    """A store and a spool of their own, with a tracer that has a hook."""
    spool = tmp_path / "spool"
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(spool))
    uri = f"sqlite:///{tmp_path / 'raw.db'}"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("raw", artifact_location=str(tmp_path / "artifacts")))
    dspy_mlflow_async.autolog(
        log_evals=True, log_compiles=True, log_traces_from_compile=True, redact=redact, durable=True, silent=True
    )
    yield tmp_path
    mlflow.set_tracking_uri(before)


def stored_in(folder):
    """The raw bytes of all that was stored, once it is."""
    assert dspy_mlflow_async.flush()
    files = raw(folder)
    assert any(path.name == "raw.db" for path in files)
    return files


def test_an_evaluation(planted):
    """Its spans, its feedback, ``model.json``, the params, the tags and the result table."""
    dspy.configure(lm=planted_lm())
    program = Program()
    program.answer.demos = [dspy.Example(question=f"@demo {SECRETS['demo']}", answer=PERSON)]
    program.set_lm(planted_lm())
    dspy.Evaluate(devset=examples("one", "fails"), metric=metric, num_threads=2, display_progress=False)(program)

    files = stored_in(planted)
    assert [] == leaks(files)
    assert {"model.json", "result_table.json"} <= {path.name for path in files}
    (model,) = (json.loads(content) for path, content in files.items() if path.name == "model.json")
    assert "[masked]" in json.dumps(model)
    assert "[gone]" in json.dumps(model)


def test_what_was_masked_can_be_loaded(tmp_path):
    """``model.json`` is still the state of a program, and byte by byte what DSPy saves where it shows no secret."""
    program, path = Program(), tmp_path / "model.json"
    plain = artifacts.program_state(program)
    headers = {"Authorization": SECRETS["header"]}
    program.set_lm(dspy.LM("openai/x", headers=headers, azure_ad_token=SECRETS["azure"], api_version="2024-10-21"))
    path.write_bytes(Door().document(artifacts.program_state(program)))
    loaded = Program()
    loaded.load(path)

    assert plain == Door().document(plain)
    state = {"token": {"demos": [{"password": "kept"}], "api_key": "planted"}, "lm": {"password": "planted"}}
    assert {
        "token": {"demos": [{"password": "kept"}], "api_key": "[masked]"},
        "lm": {"password": "[masked]"},
    } == json.loads(Door().document(json.dumps(state).encode()))
    assert b"planted" not in path.read_bytes()
    assert ("openai/x", "2024-10-21") == (loaded.answer.lm.model, loaded.answer.lm.kwargs["api_version"])


def test_a_compile(planted):
    """The optimizer's arguments, the best program, the data sets and the runs of its evaluations."""

    class Tuned(Candidates):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.service_token, self.note = SECRETS["optimizer"], f"for {PERSON}, {SECRETS['question']}"

        def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
            best = super().compile(student, trainset=trainset, valset=valset)
            best.answer.demos = [dspy.Example(question=f"@demo {SECRETS['demo']}", answer=PERSON)]
            best.set_lm(planted_lm())
            return best

    dspy.configure(lm=planted_lm())
    Tuned([("a", 1)]).compile(
        Program(), trainset=examples("one", "two"), valset=examples("three"), password=SECRETS["optimizer"]
    )

    files = stored_in(planted)
    assert [] == leaks(files)
    assert {"best_model.json", "trainset.json", "valset.json"} <= {path.name for path in files}


def test_evaluate_all(planted):
    """The names of cases and runs, the journals for a resume, the comparison, its metrics."""
    dspy.configure(lm=planted_lm())
    program = Program()
    program.set_lm(planted_lm())
    cases = [
        Case(name, program, examples("one", "fails"), metric) for name in ("plain", f"{SECRETS['case']} of {PERSON}")
    ]
    comparison = asyncio.run(aevaluate_all(cases, run_name=f"{SECRETS['run']} {PERSON}", display_progress=False))
    again = asyncio.run(aevaluate_all(cases, resume=comparison.run_id, display_progress=False))

    files = stored_in(planted)
    assert [] == leaks(files)
    assert any(path.suffix == ".jsonl" for path in files)
    assert [2, 2] == [case.examples for case in again.values()]


def test_a_request(planted):
    """Session, user, tags and metadata; a failure's message and stack trace; a run's name and tags."""
    dspy.configure(lm=planted_lm())
    with (
        run(
            f"{SECRETS['run']}-{PERSON}",
            tags={"api_key": SECRETS["tag"], "for": PERSON},
            description=f"{PERSON} token={SECRETS['description']}1",
        ),
        request(
            f"{SECRETS['case']}",
            session_id=f"{SECRETS['session']} {PERSON}",
            user=f"{SECRETS['user']} {PERSON}",
            tags={"api_key": SECRETS["tag"], "who": PERSON},
            metadata={"note": f"{SECRETS['metadata']} {PERSON}"},
        ),
    ):
        Program()(question=question("one"))
    lm = planted_lm(during=lambda marker: (_ for _ in ()).throw(ValueError(f"{SECRETS['failure']} {PERSON}")))
    with dspy.context(lm=lm), pytest.raises(Exception, match="AKIA"):
        Program()(question=question("two"))

    files = stored_in(planted)
    assert [] == leaks(files)
    assert any(b"[gone]" in content for content in files.values())


def test_a_store_that_is_away(tmp_path, monkeypatch):
    """What waits in the spool has passed the door before."""
    spool = tmp_path / "spool"
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(spool))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    mlflow.tracing.set_destination(MlflowExperimentLocation("1"))
    try:
        dspy_mlflow_async.autolog(redact=redact, durable=True, silent=True, exit_timeout=0.5)
        dspy.configure(lm=planted_lm())
        with request("r", session_id=SECRETS["session"], user=PERSON):
            Program()(question=question("one"))
        dspy_mlflow_async.flush(timeout=1.0)
        files = raw(spool)
    finally:
        dspy_mlflow_async.autolog(disable=True)
        mlflow.tracing.reset()
        mlflow.set_tracking_uri(before)

    assert any(b"[gone]" in content for content in files.values())
    assert [] == leaks(files)


def test_the_log(caplog):
    """Errors that are logged, by their text and by their traceback."""
    logger = logging.getLogger("dspy_mlflow_async")
    error = ValueError(SECRETS["failure"])
    logger.warning("Could not %s %d: %s", SECRETS["question"], 5, error, exc_info=error)

    assert 2 <= caplog.text.count("[masked]")
    assert "Could not [masked] 5" in caplog.text
    assert SECRETS["failure"] not in caplog.text
    assert SECRETS["question"] not in caplog.text


def test_nothing_else_goes_to_the_store():
    """Only the door makes a ``Plain`` for what is stored, or does without; a fingerprint and the pass make others."""
    source = Path(dspy_mlflow_async.__file__).parent

    def callers(pattern):
        return {str(path.relative_to(source)) for path in source.rglob("*.py") if re.search(pattern, path.read_text())}

    assert {"spans/door.py", "spans/serialize.py", "evaluate/fingerprint.py"} == callers(r"(?<!class )\bPlain\(")
    assert {"spans/door.py"} == callers(r"(?<!def )\bunchanged_text\(")
