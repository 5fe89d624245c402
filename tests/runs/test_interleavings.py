"""Runs, evaluations and compiles that begin and end in any order, in tasks and threads, compared with a model."""

import asyncio
import contextvars
import itertools
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import dspy
import hypothesis.strategies as st
import mlflow
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from mlflow import MlflowClient
from runtools import PARENT, TIMEOUT, Candidates, Program, Store, devset, exact, flush

import dspy_mlflow_async
from dspy_mlflow_async.seams.dspy import global_callbacks

STATUS = {None: "FINISHED", ValueError: "FAILED", asyncio.CancelledError: "KILLED"}


class Thread:
    """Runs functions one by one in a thread and a context of its own."""

    def __init__(self, context):
        self._context = context
        self._pool = ThreadPoolExecutor(1)

    def __call__(self, function):
        return self._pool.submit(self._context.run, function).result(TIMEOUT)

    def close(self):
        self._pool.shutdown()


class Task:
    """Runs functions one by one in a task of its own, on a thread that all tasks share."""

    def __init__(self, context, loop):
        self._loop = loop
        started = asyncio.run_coroutine_threadsafe(self._start(context), loop)
        self._queue, self._task = started.result(TIMEOUT)

    async def _start(self, context):
        queue = asyncio.Queue()
        task = context.run(lambda: asyncio.get_running_loop().create_task(self._serve(queue)))
        return queue, task

    async def _serve(self, queue):
        while (order := await queue.get()) is not None:
            function, answer = order
            try:
                answer.set_result(function())
            except BaseException as error:  # noqa: BLE001 - handed on
                answer.set_exception(error)

    def __call__(self, function):
        async def ask():
            answer = asyncio.get_running_loop().create_future()
            await self._queue.put((function, answer))
            return await answer

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(TIMEOUT)

    def close(self):
        asyncio.run_coroutine_threadsafe(self._queue.put(None), self._loop).result(TIMEOUT)
        asyncio.run_coroutine_threadsafe(asyncio.wait_for(self._task, TIMEOUT), self._loop).result(TIMEOUT)


class Run:
    """What the model expects of a run."""

    def __init__(self, name, parent, opener=None):
        self.name, self.parent, self.opener = name, parent, opener
        self.is_taken = opener is None  # by the evaluation or compile that made it
        self.status = "RUNNING"
        self.series = defaultdict(list)
        self.run_id = None


def without(runs, run):
    """``runs`` less this one."""
    return tuple(each for each in runs if each is not run)


class Actor:
    """What the model knows of a task or thread."""

    def __init__(self, do, active=(), compiling=None):
        self.do = do
        self.active = tuple(active)
        self.compile = compiling
        self.open = []  # (end, state before), innermost last


class Machine(RuleBasedStateMachine):
    """Each rule lets one actor do one thing; the model says which runs there are then."""

    new_store = None

    def __init__(self):
        super().__init__()
        self.numbers = itertools.count()
        self.runs = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    @initialize()
    def begin(self):
        self.store = self.new_store()
        (self.callback,) = [each for each in global_callbacks() if isinstance(each, dspy_mlflow_async.TracingCallback)]
        self.actors = [Actor(Thread(contextvars.copy_context()))]

    # --- actors

    @precondition(lambda self: len(self.actors) < 5)
    @rule(data=st.data(), kind=st.sampled_from(["thread", "bridge", "task"]))
    def spawn(self, data, kind):
        """A plain thread inherits nothing; ``to_thread`` and tasks inherit the context of whoever starts them."""
        parent = data.draw(st.sampled_from(self.actors))
        context = parent.do(contextvars.copy_context) if kind != "thread" else contextvars.Context()
        do = Task(context, self.loop) if kind == "task" else Thread(context)
        inherited = () if kind == "thread" else parent.active
        self.actors.append(Actor(do, inherited, None if kind == "thread" else parent.compile))

    def pick(self, data):
        return data.draw(st.sampled_from(self.actors))

    # --- runs

    def made(self, name, parent, opener=None):
        run = Run(name, parent, opener)
        self.runs.append(run)
        return run

    def enter(self, actor, end, run, compiling=None):
        actor.open.append((end, actor.active, actor.compile))
        actor.active = (*actor.active, run)
        actor.compile = compiling or actor.compile
        run.run_id = actor.do(lambda: mlflow.active_run().info.run_id)

    @rule(data=st.data(), ours=st.booleans(), nested=st.booleans())
    def open_run(self, data, ours, nested):
        actor = self.pick(data)
        name = f"run{next(self.numbers)}"
        if not ours and not nested and any(run.opener is actor for run in actor.active):
            with pytest.raises(Exception, match="already active"):
                actor.do(lambda: mlflow.start_run(run_name=name))
            return
        run = self.made(name, actor.active[-1] if actor.active else None, actor)

        def begin():
            scope = dspy_mlflow_async.run(name) if ours else mlflow.start_run(run_name=name, nested=nested)
            scope.__enter__()
            return scope

        scope = actor.do(begin)

        def end(error):
            actor.do(lambda: scope.__exit__(error, error and error(), None))
            # MLflow knows no cancellation.
            run.status = STATUS[error] if ours or error is None else "FAILED"

        self.enter(actor, end, run)
        actor.open[-1] = (*actor.open[-1], run)

    # --- evaluations and compiles

    def place(self, actor, name):
        """The contract: which run it logs into, and whether that is its own."""
        top = actor.active[-1] if actor.active else None
        if top is not None and top.opener is actor and not top.is_taken:
            top.is_taken = True
            return top, False
        return self.made(name, top), True

    @rule(data=st.data(), key=st.sampled_from(["eval", "full"]))
    def begin_evaluation(self, data, key):
        actor = self.pick(data)
        call_id = f"call{next(self.numbers)}"
        compiling, step = actor.compile, None
        if compiling is not None:
            step = compiling.steps[key]
            compiling.steps[key] += 1
            run, is_own = self.made(f"{key}_{step}", compiling.run), True
        else:
            run, is_own = self.place(actor, key)
        evaluation = dspy.Evaluate(devset=devset("a", 1, 1), metric=exact, num_threads=1)
        inputs = {"program": None, "callback_metadata": {"metric_key": key}}
        actor.do(lambda: self.callback.on_evaluate_start(call_id, evaluation, inputs))

        def end(error):
            score = float(next(self.numbers))
            outputs = None if error else dspy.Prediction(score=score, results=[])
            actor.do(lambda: self.callback.on_evaluate_end(call_id, outputs, error and error()))
            if error is None:
                run.series["eval"].append((0, score))
                if compiling is not None:
                    compiling.run.series[key].append((step, score))
            self.leave(run, is_own, error)

        self.enter(actor, end, run)

    @rule(data=st.data())
    def begin_compile(self, data):
        actor = self.pick(data)
        call_id = f"call{next(self.numbers)}"
        optimizer, inputs = Candidates([]), {"trainset": []}
        if actor.compile is not None:  # it belongs to the outermost
            actor.do(lambda: self.callback.on_compile_start(call_id, optimizer, inputs))
            actor.open.append(
                (
                    lambda error: actor.do(lambda: self.callback.on_compile_end(call_id, None, error and error())),
                    actor.active,
                    actor.compile,
                )
            )
            return
        run, is_own = self.place(actor, None)
        actor.do(lambda: self.callback.on_compile_start(call_id, optimizer, inputs))

        def end(error):
            actor.do(lambda: self.callback.on_compile_end(call_id, None if error else Program(), error and error()))
            self.leave(run, is_own, error)

        compiling = type("Compiling", (), {"run": run, "steps": defaultdict(int)})
        self.enter(actor, end, run, compiling)

    def leave(self, run, is_own, error):
        if is_own:
            run.status = STATUS[error]
        run.is_taken = is_own

    @precondition(lambda self: any(actor.open for actor in self.actors))
    @rule(data=st.data(), error=st.sampled_from([None, None, *STATUS]))
    def end_innermost(self, data, error):
        actor = data.draw(st.sampled_from([each for each in self.actors if each.open]))
        self.end_one(actor, error)

    @precondition(lambda self: any(self.blocks(actor) for actor in self.actors))
    @rule(data=st.data())
    def end_out_of_order(self, data):
        """A run's block ends while others that began later go on; what logs into that run goes on, too."""
        actor = data.draw(st.sampled_from([each for each in self.actors if self.blocks(each)]))
        index = data.draw(st.sampled_from(self.blocks(actor)))
        end, *_, run = actor.open.pop(index)
        actor.active = without(actor.active, run)
        for place, (later, active, *rest) in enumerate(actor.open):
            if place >= index:
                actor.open[place] = (later, without(active, run), *rest)
        end(None)
        self.check(actor)

    @staticmethod
    def blocks(actor):
        """The places of the runs that the actor has opened itself, and in which nothing is going on."""
        return [index for index, (*_, run) in enumerate(actor.open) if isinstance(run, Run) and not run.is_taken]

    def end_one(self, actor, error):
        end, actor.active, actor.compile, *_ = actor.open.pop()
        end(error)
        self.check(actor)

    @rule(data=st.data())
    def log(self, data):
        """A fluent call lands in the run that is active there, and makes none."""
        actor = self.pick(data)
        if actor.active and actor.active[-1].status == "RUNNING":
            key = f"metric{next(self.numbers)}"
            actor.do(lambda: mlflow.log_metric(key, 1))
            actor.active[-1].series[key].append((0, 1.0))

    def check(self, actor):
        found = actor.do(mlflow.active_run)
        expected = actor.active[-1].run_id if actor.active else None
        assert expected == (found and found.info.run_id)

    # --- the end

    def teardown(self):
        try:
            if hasattr(self, "actors"):
                for actor in self.actors:
                    while actor.open:
                        self.end_one(actor, None)
                self.compare()
        finally:
            for actor in getattr(self, "actors", ()):
                actor.do.close()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(TIMEOUT)
            self.loop.close()

    def compare(self):
        flush()
        found = {run.info.run_id: run for run in self.store.runs()}
        assert {run.run_id for run in self.runs} == set(found)
        for run in self.runs:
            stored = found[run.run_id]
            assert run.status == stored.info.status
            assert (run.parent and run.parent.run_id) == stored.data.tags.get(PARENT)
            if run.name is not None and run.name.startswith(("run", "eval", "full")):
                assert run.name == stored.info.run_name
            for key, points in run.series.items():
                history = MlflowClient().get_metric_history(run.run_id, key)
                assert sorted(points) == sorted((metric.step, metric.value) for metric in history)
            known = set(run.series) | {
                "examples", "errors", "latency_p50_seconds", "latency_p95_seconds", "input_tokens", "output_tokens",
                "lm_calls", "cost_usd",
            }  # fmt: skip
            assert {name.partition("/")[0] for name in stored.data.metrics} <= known  # a compile's are by role, too


@pytest.mark.timeout(600)
@pytest.mark.long
def test_any_interleaving(store_uri, tmp_path, monkeypatch):
    """Every run is there, with the parent, status, steps and metrics that the model expects, and no other is."""
    monkeypatch.setattr("dspy_mlflow_async.runs.artifacts.plot_of_series", lambda series: b"")
    number = itertools.count()
    with Store.new_experiment("interleavings", tmp_path, monkeypatch):
        dspy_mlflow_async.autolog(log_evals=True, log_compiles=True, silent=True)

        class WithStore(Machine):
            def new_store(self):
                name = f"{tmp_path.name}-{next(number)}"
                experiment_id = mlflow.create_experiment(name, artifact_location=(tmp_path / name).as_uri())
                monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", experiment_id)
                return Store(experiment_id)

        run_state_machine_as_test(
            WithStore,
            settings=settings(
                max_examples=15,
                stateful_step_count=25,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
