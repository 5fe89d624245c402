"""What importing the package costs a program that has imported DSPy and MLflow."""

import subprocess
import sys

MOST = 0.05  # seconds of CPU

PROGRAM = """
import time
import dspy, mlflow
began = time.process_time()
import dspy_mlflow_async
print(time.process_time() - began)
"""


def test_importing_is_cheap():
    """The rooms are imported when they are first used."""
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert float(answer.stdout) < MOST
