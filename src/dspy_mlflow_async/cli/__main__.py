"""``python -m dspy_mlflow_async.cli``: the command, where the console script is not on the PATH."""

from dspy_mlflow_async.cli import main

main()
