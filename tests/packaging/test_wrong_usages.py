"""Wrong calls, in Python and on the command line: each is refused at once, in one sentence, and changes nothing."""

import asyncio

import dspy
import mlflow
import pytest
from typer.testing import CliRunner

import dspy_mlflow_async as dma
from dspy_mlflow_async import cli, remote, testing
from dspy_mlflow_async.composition import is_installed
from echo import EchoLM

PROGRAM = dspy.Predict("question -> answer")
DEVSET = [dspy.Example(question="1 + 1?", answer="2").with_inputs("question")]


def metric(example, prediction, trace=None):
    return 1.0


async def of_the_call(question):
    return "alice"


def evaluator(**options):
    return dma.AsyncEvaluate(**{"devset": DEVSET, "metric": metric, **options})


def evaluate(program=PROGRAM, **options):
    return asyncio.run(evaluator(**options).acall(program))


def evaluate_all(programs=None, **options):
    return dma.evaluate_all(
        {"a": PROGRAM} if programs is None else programs, **{"devset": DEVSET, "metric": metric, **options}
    )


def case(name="a", program=PROGRAM, **options):
    return dma.Case(name, program, **options)


async def app(scope, receive, send):
    pass


PYTHON = [
    # autolog and TracingCallback
    (lambda: dma.autolog("yes"), "log_traces must be True or False, not 'yes'"),
    (lambda: dma.autolog(log_evals=1), "log_evals must be True or False, not 1"),
    (lambda: dma.autolog(disable=None), "disable must be True or False, not None"),
    (lambda: dma.autolog(silent="no"), "silent must be True or False, not 'no'"),
    (lambda: dma.autolog(context_runs="no"), "context_runs must be True or False, not 'no'"),
    (lambda: dma.autolog(propagate_threads=1), "propagate_threads must be True or False, not 1"),
    (lambda: dma.autolog(max_value_bytes="1MB"), "max_value_bytes must be a number of bytes, not '1MB'"),
    (lambda: dma.autolog(max_value_bytes=0), "max_value_bytes must be at least 1, not 0"),
    (lambda: dma.autolog(mask_contents="no"), "mask_contents must be True or False, not 'no'"),
    (lambda: dma.autolog(redact="password"), "redact must be a function of one value, not 'password'"),
    (lambda: dma.autolog(export="proces"), "export must be 'thread' or 'process', not 'proces'"),
    (lambda: dma.autolog(durable="yes"), "durable must be True or False, not 'yes'"),
    (lambda: dma.autolog(visible_after=-1), "visible_after must be 0 or more, not -1"),
    (lambda: dma.autolog(visible_after=float("nan")), "visible_after must be 0 or more, not nan"),
    (lambda: dma.autolog(children_timeout="30"), "children_timeout must be a number of seconds, not '30'"),
    (lambda: dma.autolog(exit_timeout=None), "exit_timeout must be a number of seconds, not None"),
    (lambda: dma.autolog(max_waiting_bytes=1.5), "max_waiting_bytes must be a whole number of bytes, not 1.5"),
    (lambda: dma.autolog(max_spool_bytes=-1), "max_spool_bytes must be 0 or more, not -1"),
    (lambda: dma.TracingCallback(log_traces="yes"), "log_traces must be True or False, not 'yes'"),
    (lambda: dma.TracingCallback(redact=3), "redact must be a function of one value, not 3"),
    # threads, flush, runs
    (lambda: dma.propagate(3), "propagate takes a function that can be called, not 3"),
    (lambda: dma.carry(secrets="none"), "secrets must be 'carried' or 'environment', not 'none'"),
    (lambda: dma.attached({}).__enter__(), "attached takes what carry() has returned, not {}"),
    (lambda: remote.Processes("2"), "workers must be a whole number of processes, not '2'"),
    (lambda: remote.Processes(0), "workers must be at least 1, not 0"),
    (lambda: remote.Executor(3), "executor must be a concurrent.futures.Executor, or make one, not 3"),
    (lambda: remote.on(None).__enter__(), "on takes workers, not None"),
    (lambda: evaluator(workers=0), "workers must be at least 1, not 0"),
    (lambda: evaluate_all(workers=0), "workers must be at least 1, not 0"),
    (
        lambda: evaluate_all(workers="2"),
        "workers must be a number of processes, or Processes, Ray or Executor of dspy_mlflow_async.remote, not '2'",
    ),
    (lambda: dma.flush("10"), "timeout must be a number of seconds, not '10'"),
    (lambda: dma.flush(-1), "timeout must be 0 or more seconds, not -1"),
    (lambda: dma.run(3), "name must be a text, not 3"),
    (lambda: dma.run(tags="nightly"), "tags must be a mapping of names to values, not 'nightly'"),
    # services
    (lambda: dma.wrap(3), "wrap takes a program that can be called, not 3"),
    (
        lambda: dma.wrap(dspy.Predict),
        "wrap takes a program, and Predict is a class; pass an instance of it: Predict(...)",
    ),
    (lambda: dma.wrap(PROGRAM, name=3), "name must be a text, not 3"),
    (
        lambda: dma.wrap(PROGRAM, tags=["a"]),
        "tags must be a mapping or a function of the call's arguments, not ['a']",
    ),
    (lambda: dma.wrap(PROGRAM, sample=2), "sample must be from 0 to 1, not 2"),
    (lambda: dma.wrap(PROGRAM, experiment_id=""), "experiment_id must not be empty"),
    (
        lambda: dma.wrap(PROGRAM, user=of_the_call),
        f"user must not be async: it is asked where nothing can be awaited, not {of_the_call!r}",
    ),
    (
        lambda: dma.wrap(PROGRAM, inputs="all"),
        "inputs must be True, False or a function of what would be shown, not 'all'",
    ),
    (
        lambda: dma.request(metadata=3),
        "metadata must be a mapping or a function of the call's arguments, not 3",
    ),
    (lambda: dma.asgi.TracingMiddleware(3), "app must be an ASGI application, not 3"),
    (
        lambda: dma.asgi.TracingMiddleware(app, websocket="each"),
        "websocket must be 'connection' or 'message', not 'each'",
    ),
    (
        lambda: dma.asgi.TracingMiddleware(app, flush_timeout="5"),
        "flush_timeout must be a number of seconds, not '5'",
    ),
    # evaluations
    (
        lambda: evaluator(max_concurency=3),
        "AsyncEvaluate has no argument 'max_concurency'; did you mean 'max_concurrency'?",
    ),
    (lambda: evaluator(max_concurrency=0), "max_concurrency must be at least 1, not 0"),
    (lambda: evaluator(timeout=0), "timeout must be more than 0 seconds, not 0"),
    (lambda: evaluator(max_errors="few"), "max_errors must be a number, not 'few'"),
    (lambda: evaluator(failure_score=None), "failure_score must be a number, not None"),
    (lambda: evaluate(dspy.Predict), "program is the class Predict; pass an instance of it: Predict(...)"),
    (lambda: evaluate(3), "program must be a dspy.Module or another callable, not int"),
    (
        lambda: evaluate(metric=None),
        "there is no metric: pass metric=, a function of an example and a prediction",
    ),
    (lambda: evaluate(devset=[]), "devset must contain at least one example, got an empty devset."),
    (lambda: evaluate(devset=[{"question": "1 + 1?"}]), "devset must be a list of dspy.Example, not of dict"),
    (
        lambda: case(program="not a program"),
        "the program of case 'a' must be a dspy.Module or another callable, not str",
    ),
    (lambda: case(name=" "), "a case needs a name, not ' '"),
    (lambda: case(lm="openai/gpt-4o"), "case 'a': lm must be a dspy.LM or another dspy.BaseLM, not 'openai/gpt-4o'"),
    (lambda: case(settings={"lmm": EchoLM()}), "case 'a': dspy.settings has no lmm"),
    (
        lambda: case(lm=EchoLM(), settings={"lm": EchoLM()}),
        "case 'a' has lm of its own, and another in its settings",
    ),
    (lambda: evaluate_all({}), "there is nothing to evaluate: programs is empty"),
    (
        lambda: evaluate_all(PROGRAM),
        "programs must be a mapping of name to program, or a list of Case, not a Predict",
    ),
    (lambda: evaluate_all([PROGRAM]), "each of a list of cases must be a Case, not a Predict"),
    (lambda: evaluate_all([case(), case()]), "case names must differ; there is more than one 'a'"),
    (lambda: evaluate_all(devset=None), "case 'a': there is no devset: pass devset=, a list of dspy.Example"),
    (lambda: evaluate_all(devset="1 + 1?"), "case 'a': devset must be a list of dspy.Example, not str"),
    (lambda: evaluate_all(baseline="b"), "baseline must be the name of a case (a), not 'b'"),
    (lambda: evaluate_all(max_cost=0), "max_cost must be more than 0 US dollars, not 0"),
    (lambda: evaluate_all(seed=-1), "seed must be a whole number, 0 or more, not -1"),
    (lambda: evaluate_all(metrics=metric), "evaluate_all has no argument 'metrics'; did you mean 'metric'?"),
    (lambda: evaluate_all(resume=3), "a run id is a text, not 3"),
]

# Of what click and typer say, in words that change with their versions, the names alone.
COMMANDS = [
    (["doctr"], "No such command 'doctr'. Did you mean 'doctor'?"),
    (["--verson"], "--version"),
    (["demo", "now"], "(now)"),
    (["demo", "--api-base", "http://127.0.0.1:9"], "it needs --model too, such as --model openai/NAME."),
    (["demo", "--folder"], "'--folder'"),
    (["doctor", "--tracking_uri", "x"], "--tracking-uri"),
    (["replay", "--folder", "no-such-folder"], "no-such-folder is not a folder."),
    (["replay", "--reason", "gone"], "Invalid value for --reason: is for --dead-letters."),
    (["gat"], "No such command 'gat'. Did you mean 'gate'?"),
    (["gate"], "there is nothing to check; for example --min score=0.8"),
    (["gate", "--min", "score"], "Invalid value for --min: 'score' is not like score=0.8"),
    (["gate", "--max", "=3"], "Invalid value for --max: '3' is not like score=0.8"),
    (["gate", "--min", "score=high"], "min score must be a number, such as 0.8 or 80%, not 'high'"),
    (["gate", "--max", "cost=5%"], "max cost: only score, errors, failures may be in percent, not '5%'"),
    (["gate", "--min", "score=1", "--tolerance", "-1"], "tolerance must be 0 or more, not '-1'"),
    (["gate", "--mim", "score=1"], "--min"),
    (["gate", "--min", "score=1", "--timeout", "0"], "--timeout"),
    (["gate", "--min", "score=1"], "there is no run of an evaluation or a compile in sqlite:///"),
    (["gate", "no-such-run", "--min", "score=1"], "there is no run 'no-such-run', by id or by name, in sqlite:///"),
    (["gate", "--min", "score=1", "--experiment", "nowhere"], "there is no experiment 'nowhere'"),
    (["audit", "--tracking-uri", "sqlite:///nowhere.db"], "there is no store in sqlite:///nowhere.db; run this where"),
    (
        ["gate", "--min", "score=1", "--tracking-uri", "sqlite:///nowhere.db"],
        "there is no store in sqlite:///nowhere.db",
    ),
    (
        ["harvest", "--out", "x.jsonl", "--tracking-uri", "sqlite:///nowhere.db"],
        "there is no store in sqlite:///nowher",
    ),
    (["report", "--tracking-uri", "sqlite:///nowhere.db"], "there is no store in sqlite:///nowhere.db"),
    (["which", "0123456789ab", "--tracking-uri", "sqlite:///nowhere.db"], "there is no store in sqlite:///nowhere.db"),
    (["which", "0123456789ab", "--tracking-uri", "nowhere"], "there is no store in nowhere; run this where"),
    (["report", "no-such-run"], "there is no run 'no-such-run' in sqlite:///"),
    (["report", "--limit", "0", "x"], "--limit"),
    (["report", "--limit", "many", "x"], "--limit"),
]


@pytest.mark.parametrize(("call", "sentence"), PYTHON, ids=[sentence.partition(" at 0x")[0] for _, sentence in PYTHON])
def test_python_says_what_is_wrong(call, sentence):
    """The sentence, as the one error that there is; nothing is switched on, and no run is made."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()

    assert sentence == str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert not is_installed()


def test_nothing_was_recorded(store_uri):
    """No wrong call has made a run, an experiment or a trace."""
    for call, _ in PYTHON:
        with pytest.raises((TypeError, ValueError)), testing.capture_traces() as traces:
            call()
        assert [] == traces

    assert ["Default"] == [experiment.name for experiment in mlflow.search_experiments()]
    assert mlflow.search_runs(search_all_experiments=True).empty


@pytest.mark.parametrize(("words", "sentence"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_command_line_says_what_is_wrong(words, sentence, store_uri, tmp_path, monkeypatch):
    """The sentence on standard error, exit code 2, and no traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(cli.app, words, prog_name="dspy-mlflow-async")

    assert 2 == done.exit_code, done.output
    assert sentence in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.output
    assert isinstance(done.exception, SystemExit)
    assert [] == list(tmp_path.iterdir())


def test_public_modules_need_no_import_of_their_own():
    """What a printed hint says works as printed, after an import of the package alone."""
    import subprocess
    import sys

    code = (
        "import dspy_mlflow_async as dma\n"
        "print(callable(dma.cli.doctor.diagnose), callable(dma.testing.tree), callable(dma.asgi.TracingMiddleware))\n"
        "print({'asgi', 'cli', 'testing'} <= {*dir(dma)})"
    )
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100, check=True
    ).stdout

    assert "True True True\nTrue\n" == said
