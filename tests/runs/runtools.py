"""Reads runs back from the store as nested literals, and starts evaluations and compiles side by side."""

import asyncio
import contextlib
import json
import re
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import dspy
import mlflow
from dspy.teleprompt import Teleprompter
from mlflow import MlflowClient
from mlflow.tracking import fluent

from dspy_mlflow_async import export
from dspy_mlflow_async.spans import tracer
from echo import find_marker

TIMEOUT = 60.0  # seconds; the bound of every wait, on a machine where much else runs
SOURCE_RUN = "mlflow.sourceRun"
PARENT = "mlflow.parentRunId"


class NoBar:
    """Stands in for ``tqdm.tqdm``."""

    class _Instances:
        def clear(self):
            pass

    _instances = _Instances()

    def __init__(self, iterable=None, *args, **kwargs):
        self.iterable = iterable

    def __iter__(self):
        return iter(self.iterable)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class Store:
    """What is in one experiment of MLflow's store."""

    def __init__(self, experiment_id):
        self.experiment_id = experiment_id

    @classmethod
    @contextlib.contextmanager
    def new_experiment(cls, name, folder, monkeypatch):
        """An experiment of this name, active in this block."""
        monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
        name = re.sub(r"[^\w-]+", "-", name)
        taken = {experiment.name for experiment in mlflow.search_experiments()}
        while name in taken:
            name += "+"
        experiment_id = mlflow.create_experiment(name, artifact_location=(folder / "artifacts").as_uri())
        monkeypatch.setattr(fluent, "_active_experiment_id", experiment_id)
        fluent._last_active_run_id.set(None)
        mlflow.tracing.reset()  # its exporter keeps the trace manager that the last test has left
        try:
            yield cls(experiment_id)
        finally:
            flush()
            while mlflow.active_run():
                mlflow.end_run()
            mlflow.tracing.reset()

    def runs(self):
        """All runs, oldest first."""
        flush()
        found = mlflow.search_runs(
            [self.experiment_id], output_format="list", order_by=["attributes.start_time ASC"], max_results=5000
        )
        return sorted(found, key=lambda run: (run.info.start_time, run.info.run_name))

    def run(self, name):
        """The only run of this name."""
        (found,) = [run for run in self.runs() if run.info.run_name == name]
        return found

    def tree(self):
        """All runs as nested tuples: name, status, children; siblings by name."""
        runs = self.runs()
        known = {run.info.run_id for run in runs}
        children = defaultdict(list)
        for run in runs:
            parent = run.data.tags.get(PARENT)
            children[parent if parent in known else None].append(run)

        def nodes(parent):
            return sorted((run.info.run_name, run.info.status, nodes(run.info.run_id)) for run in children[parent])

        return nodes(None)

    def children(self, run):
        """The runs below this one, by name."""
        return {child.info.run_name: child for child in self.runs() if child.data.tags.get(PARENT) == run.info.run_id}

    def series(self, run, key):
        """All values of a metric as (step, value), by step."""
        history = MlflowClient().get_metric_history(run.info.run_id, key)
        return sorted((metric.step, metric.value) for metric in history)

    def artifacts(self, run):
        """The names of its artifacts."""
        return sorted(each.path for each in MlflowClient().list_artifacts(run.info.run_id))

    def json(self, run, name):
        """One artifact, read as JSON."""
        return json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{name}"))

    def table(self, run, name="result_table.json"):
        """The rows of a table, as dicts."""
        table = self.json(run, name)
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]

    def traces(self):
        """All traces, oldest first."""
        tracer.end_abandoned()
        flush()
        found = mlflow.search_traces(
            locations=[self.experiment_id], return_type="list", max_results=5000, include_spans=True
        )
        return sorted(found, key=lambda trace: trace.data.spans[0].start_time_ns if trace.data.spans else 0)

    def traces_by_run(self):
        """The markers of the traces by the name of the run that they are attributed to."""
        names = {run.info.run_id: run.info.run_name for run in self.runs()}
        found = defaultdict(list)
        for trace in self.traces():
            run_id = trace.info.trace_metadata.get(SOURCE_RUN)
            found[names.get(run_id, run_id)].append(find_marker(trace.data.spans[0].inputs))
        return {name: sorted(markers) for name, markers in found.items()}


def flush():
    """Everything that is on its way is in the store after this."""
    export.flush()


class Program(dspy.Module):
    """One predictor; its answer is the marker of the question.

    Args:
        during: Called with the question while the program runs.
    """

    def __init__(self, during=None):
        super().__init__()
        self.answer = dspy.Predict("question -> answer")
        self._during = during

    def forward(self, question):
        if self._during is not None:
            self._during(question)
        return self.answer(question=question)

    async def aforward(self, question):
        if self._during is not None:
            self._during(question)
        return await self.answer.acall(question=question)

    def __deepcopy__(self, memo):
        copied = type(self)(self._during)
        copied.answer = self.answer.deepcopy()
        return copied


def devset(name, right, total):
    """Examples ``@name-0``, ``@name-1``, … of which ``Program`` gets the first ``right`` right."""
    return [
        dspy.Example(question=f"@{name}-{index}", gold=f"@{name}-{index}" if index < right else "no").with_inputs(
            "question"
        )
        for index in range(total)
    ]


def markers(name, total):
    """The markers of ``devset``."""
    return [f"@{name}-{index}" for index in range(total)]


def exact(example, prediction, trace=None):
    """Whether the answer is the gold one."""
    return float(example.gold == prediction.answer)


def evaluate(name, right=1, total=2, *, program=None, metric=exact, num_threads=1, **metadata):
    """Evaluate a program on ``devset(name, right, total)``; the metadata are the evaluation's."""
    evaluation = dspy.Evaluate(devset=devset(name, right, total), metric=metric, num_threads=num_threads)
    return evaluation(program or Program(), callback_metadata=metadata or None)


class Meeting:
    """A ``during`` for ``Program``: the first questions of several evaluations wait for each other."""

    def __init__(self, parties):
        self._barrier = threading.Barrier(parties, timeout=TIMEOUT)

    def __call__(self, question):
        if question.endswith("-0"):
            self._barrier.wait()


class Turns:
    """``asyncio.Barrier``, which Python 3.10 has not."""

    def __init__(self, parties):
        self._parties = parties
        self._waiting = []

    async def wait(self):
        if len(self._waiting) + 1 == self._parties:
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                each.set()
            return
        mine = asyncio.Event()
        self._waiting.append(mine)
        await mine.wait()


class Candidates(Teleprompter):
    """Evaluates a candidate per entry of ``plan``, one after the other or in threads of the user's.

    Args:
        plan: (name, right) per evaluation.
        pool: Maps a function over entries; by default one after the other.
        metadata: The evaluations' ``callback_metadata``.
        program: Makes a candidate.
    """

    def __init__(self, plan, pool=map, metadata=None, program=Program, **evaluate):
        super().__init__()
        self.plan = plan
        self._pool = pool
        self._metadata = metadata or {}
        self._program = program
        self._evaluate = evaluate

    def compile(self, student, *, trainset, teacher=None, valset=None, **kwargs):
        def candidate(entry):
            name, right = entry
            return evaluate(name, right, 4, program=self._program(), **self._evaluate, **self._metadata).score

        list(self._pool(candidate, self.plan))
        return student.deepcopy()


def copying_pool(function, items):
    """What GEPA does: a thread per item, each in a copy of this context."""
    import contextvars

    items = list(items)
    with ThreadPoolExecutor(len(items)) as pool:
        futures = [pool.submit(contextvars.copy_context().run, function, item) for item in items]
        return [future.result(TIMEOUT) for future in futures]


def in_threads(*jobs):
    """Each job in a thread of its own."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(TIMEOUT) for future in [pool.submit(job) for job in jobs]]


def in_to_thread(*jobs):
    """Each job through ``asyncio.to_thread``, in a task of its own."""

    async def main():
        tasks = [asyncio.create_task(asyncio.to_thread(job)) for job in jobs]
        return await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT)

    return asyncio.run(main())


def in_asyncify(*jobs):
    """Each job through ``dspy.asyncify``, in a task of its own."""

    async def main():
        return await asyncio.wait_for(asyncio.gather(*(dspy.asyncify(job)() for job in jobs)), TIMEOUT)

    return asyncio.run(main())


AT_ONCE = (in_threads, in_to_thread, in_asyncify)
