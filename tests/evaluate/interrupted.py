"""A script that evaluates three programs over a scripted LM, to be killed: ``interrupted.py STORE API_BASE [RUN]``."""

import signal
import sys

import dspy
import mlflow

import dspy_mlflow_async
from dspy_mlflow_async import evaluate_all

# A shell's background job, and so what it starts, ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

SIZE = 60


def is_right(example, prediction, trace=None):
    if example.question.endswith("7"):
        raise ValueError("no sevens")
    return example.answer == prediction.answer


def devset():
    return [
        dspy.Example(question=f"question {n}", answer="yes" if n % 3 else "no").with_inputs("question")
        for n in range(SIZE)
    ]


def programs():
    return {name: dspy.Predict(f"question -> answer: str, {name}: str") for name in ("one", "two", "three")}


def evaluate(resume=None):
    return evaluate_all(
        programs(),
        devset=devset(),
        metric=is_right,
        max_concurrency=6,
        max_errors=SIZE,
        display_progress=False,
        resume=resume,
    )


def lm_at(api_base):
    return dspy.LM("openai/scripted", api_base=api_base, api_key="none", cache=False)


def main():
    store, api_base, *run = sys.argv[1:]
    mlflow.set_tracking_uri(store)
    dspy.configure(lm=lm_at(api_base))
    dspy_mlflow_async.autolog(silent=True)
    evaluate(*run)


if __name__ == "__main__":
    main()
