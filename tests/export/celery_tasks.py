"""The tasks of a Celery worker: an app as a user writes it, with a broker and a result store on the disk."""

import os

import dspy
import mlflow
from celery import Celery
from mlflow.entities.trace_location import MlflowExperimentLocation

import dspy_mlflow_async
from echo import EchoLM

folder = os.environ["CELERY_FOLDER"]
app = Celery("tasks", broker="filesystem://", backend=f"file://{folder}/results")
app.conf.update(
    broker_transport_options={f"data_folder_{way}": f"{folder}/queue" for way in ("in", "out")}
    | {"control_folder": f"{folder}/control"},
    task_default_queue="tests",
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
)

if uri := os.environ.get("CELERY_STORE"):
    mlflow.set_tracking_uri(uri)
    mlflow.tracing.set_destination(MlflowExperimentLocation(os.environ["CELERY_EXPERIMENT"]))
    dspy.configure(lm=EchoLM())
    dspy_mlflow_async.autolog()


@app.task
def answer(question):
    """Make one trace; returns the process that made it."""
    dspy.Predict("question -> answer")(question=question)
    return os.getpid()
