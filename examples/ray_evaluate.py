"""Evaluate two programs on a Ray cluster, with one run for each, below one parent run.

    pip install "dspy-mlflow-async[ray]"
    mlflow server &
    MLFLOW_TRACKING_URI=http://127.0.0.1:5000 OPENAI_API_KEY=... python examples/ray_evaluate.py

On a cluster: `ray job submit -- python examples/ray_evaluate.py`, with DSPy, MLflow and this package in its image, and
a tracking URI that its workers can reach. Without one, Ray starts on this machine.
"""

import sys
from typing import Any

import dspy

import dspy_mlflow_async as dma
from dspy_mlflow_async.remote import Ray

ANSWERS = {"capital of France?": "Paris", "capital of Japan?": "Tokyo", "capital of Peru?": "Lima"}


def is_right(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """Say whether the answer has the right word in it."""
    return example.answer.lower() in prediction.answer.lower()


def main(lm: dspy.BaseLM, workers: Ray, **options: Any) -> Any:
    """Evaluate, and return the comparison.

    Args:
        lm: The language model.
        workers: The workers, such as ``Ray(4)``.
        **options: Further ones of ``evaluate_all``.
    """
    dma.autolog()
    devset = [dspy.Example(question=q, answer=a).with_inputs("question") for q, a in ANSWERS.items()]
    programs = {"direct": dspy.Predict("question -> answer"), "reasoned": dspy.ChainOfThought("question -> answer")}
    with dspy.context(lm=lm), workers:
        return dma.evaluate_all(programs, devset=devset, metric=is_right, workers=workers, **options)


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "openai/gpt-4o-mini"
    comparison = main(dspy.LM(model), Ray(4, num_cpus=0.5), max_concurrency=200)
    print(comparison)
    for report in comparison.workers:
        print(report.process, report.examples, "examples, lost:", list(report.losses))
