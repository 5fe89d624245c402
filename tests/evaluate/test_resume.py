"""A process is killed in the middle of an ``evaluate_all``, over real HTTP: another one goes on where it was."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import dspy
import mlflow
import pytest
from interrupted import SIZE, evaluate, lm_at

from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint, text_of

HERE = Path(__file__).parent


class Script:
    """Answers, and counts who has asked what; after so many answers it tells the test."""

    def __init__(self, answers):
        self.asked = Counter()
        self.enough = threading.Event()
        self._answers = answers

    def __call__(self, body):
        text = text_of(body)
        field = re.findall(r"\[\[ ## (one|two|three) ## \]\]", text)[-1]
        number = int(re.findall(r"question (\d+)", text)[-1])
        self.asked[field, number] += 1
        if sum(self.asked.values()) >= self._answers:
            self.enough.set()
        answer = "yes" if (number + len(field)) % 4 else "no"
        return f"[[ ## answer ## ]]\n{answer}\n\n[[ ## {field} ## ]]\nx\n\n[[ ## completed ## ]]"


def shown(comparison):
    return {
        name: (case.score, case.standard_error, case.errors, case.examples, case.input_tokens, case.difference)
        for name, case in comparison.items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, _empty_store):
    """What an uninterrupted evaluation gives."""
    mlflow.set_tracking_uri(_store(tmp_path_factory.mktemp("whole"), _empty_store))
    with LocalEndpoint(Script(10**9)) as endpoint, dspy.context(lm=lm_at(endpoint.api_base)):
        return shown(evaluate())


def _store(folder, empty):
    path = folder / "mlflow.db"
    path.write_bytes(empty.read_bytes())
    return f"sqlite:///{path}"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.long
def test_killed_and_resumed(whole, tmp_path, monkeypatch, _empty_store, store_uri, how):  # noqa: PT019 - the fixture is named so
    """Only what was not finished is run again, and the result is that of an uninterrupted evaluation."""
    monkeypatch.chdir(tmp_path)
    store, script = _store(tmp_path, _empty_store), Script(3 * SIZE // 2)
    with LocalEndpoint(script, latency=0.05) as endpoint:
        process = subprocess.Popen(
            [sys.executable, HERE / "interrupted.py", store, endpoint.api_base],
            env={**os.environ, "DSPY_MLFLOW_ASYNC_STRICT": "0", "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "true"},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert script.enough.wait(90), process.stderr.read()
            process.send_signal(how)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        before = Counter(script.asked)
        mlflow.set_tracking_uri(store)
        runs = {run.info.run_name: run for run in mlflow.search_runs(search_all_experiments=True, output_format="list")}
        with dspy.context(lm=lm_at(endpoint.api_base)):
            comparison = evaluate(resume=runs["evaluate_all"].info.run_id)
        mlflow.set_tracking_uri(store_uri)
    again = sum((script.asked - before).values()) - (3 * SIZE - len(before))

    assert process.returncode in {-how, 1, 130}
    assert ("KeyboardInterrupt" in errors) is (how is signal.SIGINT)
    if how is signal.SIGINT:
        assert {"KILLED"} == {run.info.status for run in runs.values()}
    assert whole == shown(comparison)
    assert 3 * SIZE // 2 <= sum(before.values()) < 3 * SIZE
    assert 0 <= again <= 12  # at most those in flight, and those whose answers had come but which were not over
