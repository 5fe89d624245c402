"""Work for other processes, in a module that they can import."""

import concurrent.futures
import multiprocessing.pool
import os
import threading
from pathlib import Path

import dspy
import mlflow

import dspy_mlflow_async
from dspy_mlflow_async import attached


class Fan(dspy.Module):
    """Sends its questions to other processes, each below the span of its own call."""

    def __init__(self, submit):
        super().__init__()
        self.submit = submit
        self.step = dspy.Predict("question -> answer")

    def forward(self, questions, name):
        futures = [self.submit(self.step, question=question) for question in questions]
        return dspy.Prediction(answers=[future.result(60).answer for future in futures])


def settle_both(folder):
    """Bring to the store what this process has traced, while the other process of the pool does so."""
    Path(folder, str(os.getpid())).touch()
    for _ in range(3000):
        if len(list(Path(folder).iterdir())) == 2:
            return settle()
        threading.Event().wait(0.02)
    raise AssertionError("the other process does not come")


def settle():
    """Bring to the store what this process has traced."""
    assert dspy_mlflow_async.flush(30)
    return os.getpid(), dspy_mlflow_async.stats()


def call_attached(carried, question):
    """What a task of Celery's does with what it has been given."""
    with attached(carried):
        answer = dspy.Predict("question -> answer")(question=question).answer
        run = mlflow.active_run()
    return answer, None if run is None else run.info.run_id, settle()[1]


def leave_behind(carried, question):
    """Ends a call in a thread that goes on after the block, and begins another one there."""
    begun, go = threading.Event(), threading.Event()
    program = dspy.Predict("question -> answer")

    def work():
        with mlflow.start_span("left-behind"):
            begun.set()
            go.wait(30)
        program(question=question)

    with attached(carried):
        settings = dict(dspy.settings.config)
        thread = threading.Thread(target=lambda: run_with(settings, thread_function))
        thread_function = dspy_mlflow_async.propagate(work)
        thread.start()
        begun.wait(30)
    go.set()
    thread.join(60)
    return settle()[1]


def run_with(settings, function):
    """Calls a function with the LM of these settings: a thread has no overrides of DSPy's."""
    with dspy.context(lm=settings["lm"]):
        function()


def predict_in_task(function, question):
    """A user's own task that calls a propagated function itself, and wants its result."""
    return function(question=question).answer


def call_in_thread(function, question):
    """A user's own pool over there: who asks it is in this process, and wants the result."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool, multiprocessing.pool.ThreadPool(1) as other:
        results = [
            pool.submit(function, question=question).result(30),
            other.apply(function, (), {"question": question}),
        ]
    return [type(each).__name__ for each in results], [each.answer for each in results]


async def ask_async(question):
    """A coroutine function, as Dask calls and awaits it."""
    return (await dspy.Predict("question -> answer").acall(question=question)).answer


def ask_and_fail(question):
    """Uses tokens, and raises."""
    dspy.Predict("question -> answer")(question=question)
    raise ValueError("it was of no use")


def kind_of(result):
    """What another task gets of a result."""
    return type(result).__name__
