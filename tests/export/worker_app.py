"""What workers run that are no forks of the test: a function for pools, and a WSGI app for gunicorn."""

import os

import dspy
import mlflow
from mlflow.entities.trace_location import MlflowExperimentLocation

import dspy_mlflow_async
from echo import EchoLM


def trace():
    """Switch the tracer on, for the store in the environment."""
    mlflow.set_tracking_uri(os.environ["WORKER_STORE"])
    mlflow.tracing.set_destination(MlflowExperimentLocation(os.environ["WORKER_EXPERIMENT"]))
    dspy_mlflow_async.autolog(silent=True)


def work(question):
    """Make one trace.

    Returns:
        The process that made it.
    """
    with dspy.context(lm=EchoLM()):
        dspy.Predict("question -> answer")(question=question)
    return os.getpid()


def app(environ, start_response):
    """Make one trace for a request; says which process did."""
    pid = work(environ["QUERY_STRING"])
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(pid).encode()]


if "WORKER_STORE" in os.environ:
    trace()
