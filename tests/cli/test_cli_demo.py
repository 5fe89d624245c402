"""The demo, end to end: what it says of a tracer that works, and of one that does not."""

import pytest

pytestmark = pytest.mark.timeout(180)  # each is a process of its own, on a machine that runs other tests, too

# What takes the tracing context out of DSPy's worker threads.
BREAK_WORKERS = """
from dspy_mlflow_async import hooks
hooks.patch_worker_pool = lambda *args, **kwargs: lambda: None
"""
# What makes each LM span say one token more than the endpoint has counted.
BREAK_TOKENS = """
import dspy_mlflow_async.spans.usage as usage
original = usage.token_usage
usage.token_usage = lambda entries: {key: count + 1 for key, count in original(entries).items()}
"""


@pytest.mark.xdist_group("good-demo")
def test_demo_finds_every_span_in_its_place(good_demo):
    """A fresh run ends with 0, names its folder, shows one tree and the counts, and the command that opens the UI."""
    done, _ = good_demo

    assert done.returncode == 0, done.stdout + done.stderr
    assert "here" in done.stdout.splitlines()[0]
    assert "ResearchDesk.forward" in done.stdout
    assert 4 == done.stdout.count("LM.__call__")
    assert "Every one of 672 spans in 84 traces is where it belongs." in done.stdout
    assert "mlflow ui --backend-store-uri sqlite:///" in done.stdout.splitlines()[-1]
    assert "\x1b" not in done.stdout
    assert "" == done.stderr


@pytest.mark.long
def test_demo_sees_that_worker_threads_have_no_context(command):
    """Without the context in DSPy's worker threads the calls inside fall out of their traces: the demo ends with 1."""
    done = command("demo", before=BREAK_WORKERS)

    assert done.returncode == 1
    assert "Not everything is where it belongs" in done.stdout
    assert "Call #parallel/01 has 4 traces instead of one" in done.stdout


@pytest.mark.long
def test_demo_sees_wrong_tokens(command):
    """Tokens that the endpoint did not bill are a finding."""
    done = command("demo", before=BREAK_TOKENS)

    assert done.returncode == 1
    assert "tokens, the endpoint has counted" in done.stdout


def test_demo_says_what_to_do_about_a_folder_it_cannot_write(command, tmp_path):
    """A folder that cannot be made is an error of one line, with the way out."""
    (tmp_path / "file").write_text("not a folder")

    done = command("demo", "--folder", "file/below")

    assert done.returncode == 1
    assert "--folder PATH" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_demo_says_what_to_do_about_a_store_that_mlflow_cannot_use(command, tmp_path):
    """Made by another version of MLflow, or no database at all."""
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    done = command("demo", "--folder", str(tmp_path))
    assert 1 == done.returncode
    assert "Traceback" not in done.stdout + done.stderr
    assert "mlflow.db: " in done.stdout
    assert "demo --folder PATH" in done.stdout


@pytest.mark.long
def test_demo_says_what_to_do_about_a_model_that_does_not_answer(command):
    """So is a model that does not answer."""
    done = command("demo", "--model", "openai/none", "--api-base", "http://127.0.0.1:9", env={"OPENAI_API_KEY": "none"})

    assert done.returncode == 1
    assert "Check --model and --api-base" in done.stdout
    assert "Traceback" not in done.stdout


def test_api_base_needs_a_model(command):
    """``--api-base`` alone is a usage error that names the other option."""
    done = command("demo", "--api-base", "http://127.0.0.1:9")

    assert done.returncode == 2
    assert "--model" in done.stderr


@pytest.mark.long
def test_demo_runs_on_a_model_of_the_user(command):
    """With --model and --api-base the calls go there; where an answer is in the wrong form, DSPy asks twice."""
    before = """
import atexit
from dspy_mlflow_async.cli.demo.script import Script, load_tickets
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
script, asked = Script(load_tickets()), set()
def answer(body):
    text = str(body["messages"])
    if "#gather/01" in text and len(asked) < 1:
        asked.add(text)
        return "in the wrong form"
    if "JSON" in text:
        return '{"topic": "billing", "reply": "Yes.", "reasoning": "So.", "fact": "None."}'
    return script(body)
endpoint = LocalEndpoint(answer).__enter__()
"""
    done = command(
        "demo", "--model", "openai/mine", "--api-base", "BASE",
        before=before + "import dspy_mlflow_async.cli as cli\n"
        "run = cli.app\n"
        "def with_base(**kwargs):\n"
        "    sys.argv[:] = [endpoint.api_base if word == 'BASE' else word for word in sys.argv]\n"
        "    run(**kwargs)\n"
        "cli.app = with_base\n",
        env={"OPENAI_API_KEY": "none"},
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert "The model is openai/mine" in done.stdout
    assert "is where it belongs" in done.stdout
