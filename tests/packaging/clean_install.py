"""What a clean install must do, with the wheel and its dependencies alone: doctor, an evaluation, and its report."""

import subprocess
import sys
import tempfile
from pathlib import Path

import dspy
import mlflow
from dspy.utils.dummies import DummyLM

import dspy_mlflow_async

COMMAND = [sys.executable, "-m", "dspy_mlflow_async.cli"]


def main() -> None:
    """Do it in a folder of its own; raises where something fails."""
    subprocess.run([*COMMAND, "doctor"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{Path(folder) / 'mlflow.db'}"
        mlflow.set_tracking_uri(store)
        dspy.configure(lm=DummyLM([{"answer": "4"}] * 10))
        dspy_mlflow_async.autolog()
        comparison = dspy_mlflow_async.evaluate_all(
            {"one": dspy.Predict("question -> answer"), "two": dspy.Predict("question -> answer")},
            devset=[dspy.Example(question=f"2+{n}", answer="4").with_inputs("question") for n in range(3)],
            metric=lambda example, prediction: example.answer == prediction.answer,
        )
        assert dspy_mlflow_async.flush(60)
        report = subprocess.run(
            [*COMMAND, "report", comparison.run_id, "--tracking-uri", store], check=True, capture_output=True, text=True
        )
        assert "100.0" in report.stdout, report.stdout
        sys.stdout.write(report.stdout)


if __name__ == "__main__":
    main()
