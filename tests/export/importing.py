"""A program whose imports are recorded, and which then works while somebody holds the lock of MLflow's import hooks."""

import json
import sys
import threading
from pathlib import Path

import dspy
import mlflow

import dspy_mlflow_async
from echo import EchoLM

FOLDER, URI = sys.argv[1:]


class Recorder:
    """A finder that finds nothing, and notes which thread has looked for what."""

    def __init__(self):
        self.seen = []

    def find_spec(self, name, path=None, target=None):
        self.seen.append(f"{threading.current_thread().name}: {name}")


def work():
    """One call, one evaluation with a run; and whether all of it is stored."""
    dspy.Predict("question -> answer")(question="@one")
    devset = [dspy.Example(question="@two", answer="@two").with_inputs("question")]
    evaluate = dspy.Evaluate(devset=devset, metric=lambda *_: 1.0, num_threads=1, display_progress=False)
    evaluate(dspy.Predict("question -> answer"))
    return dspy_mlflow_async.flush(60)


def work_while_hooks_are_locked():
    from mlflow.utils import import_hooks

    answers = []
    worker = threading.Thread(target=lambda: answers.append(work()), daemon=True)
    with import_hooks._post_import_hooks_lock:
        worker.start()
        worker.join(60)
    return answers


mlflow.set_tracking_uri(URI)
recorder = Recorder()
sys.meta_path.insert(0, recorder)
dspy.configure(lm=EchoLM(model="openai/gpt-4o-mini"))
dspy_mlflow_async.autolog(silent=True, log_evals=True)
warm = [work(), work()]
imports_litellm = "litellm" in sys.modules
recorder.seen.clear()
again = [work(), work_while_hooks_are_locked()]
imports = list(recorder.seen)
costs = [trace.info.trace_metadata.get("mlflow.trace.cost") for trace in mlflow.search_traces(return_type="list")]
answer = {"warm": warm, "again": again, "imports": imports, "litellm": imports_litellm, "costs": costs}
(Path(FOLDER) / "answer.json").write_text(json.dumps(answer))
