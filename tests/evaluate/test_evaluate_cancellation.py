"""Cancelling an evaluation, wherever it is: examples end, runs are KILLED, nothing is left behind."""

import asyncio
import threading

import anyio
import dspy
import mlflow
import pytest
from mlflow import MlflowClient
from small import examples

import dspy_mlflow_async
from clean import assert_context_is_clean
from dspy_mlflow_async import AsyncEvaluate, aevaluate_all
from dspy_mlflow_async.evaluate import fingerprint, journal, local_records, stored_runs
from dspy_mlflow_async.evaluate.example_result import Outcome
from dspy_mlflow_async.evaluate.journal import Journal, Stored
from dspy_mlflow_async.runs import selection
from dspy_mlflow_async.runs.handle import RunHandle
from dspy_mlflow_async.spans.door import Door
from dspy_mlflow_async.testing import tree
from echo import EchoLM


class Steps(dspy.Module):
    """An LM call, then some turns of the loop."""

    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict("question -> answer")

    async def aforward(self, question):
        answer = await self.predict.acall(question=question)
        for _ in range(3):
            await asyncio.sleep(0)
        return answer


async def is_right(example, prediction):
    await asyncio.sleep(0)
    return example.answer == prediction.answer


async def cancelled_after(turns, call):
    """Cancel ``call`` after so many turns of the loop; gives whether it was in time."""
    before = asyncio.all_tasks()
    task = asyncio.ensure_future(call)
    for _ in range(turns):
        await asyncio.sleep(0)
    was_running = not task.done()
    task.cancel()
    try:
        await asyncio.wait_for(task, 30)
    except asyncio.CancelledError:
        assert was_running
    assert asyncio.all_tasks() == before
    return task.cancelled()


async def test_at_every_await(traces):
    """At whichever turn of the loop it comes: every trace that began is whole and ended, and no task is left."""
    turns, was_cancelled, outcomes = 0, True, set()
    while was_cancelled:
        traces.clear()
        evaluator = AsyncEvaluate(devset=examples(size=3), metric=is_right, max_concurrency=2)
        was_cancelled = await cancelled_after(turns, evaluator.acall(Steps()))
        for trace in traces:
            name, outcome, _ = tree(trace, "outcome")
            assert "Steps.forward" == name
            outcomes.add(outcome)
        assert_context_is_clean()
        # LM calls and metrics hop to threads, for which the loop turns any number of times: let them end.
        await asyncio.sleep(0.002)
        turns += 1 if turns < 40 else 40

    assert {"ok", "cancelled"} == outcomes
    assert 3 == len(traces)
    assert turns > 20


@pytest.mark.parametrize("turns", [2, 60])
async def test_run_is_killed(traces, runs, turns):
    """The evaluation's run ends KILLED; what was stored of it stays."""
    dspy_mlflow_async.autolog(silent=True, log_evals=True)
    evaluator = AsyncEvaluate(devset=examples(size=3), metric=is_right)
    hold = asyncio.Event()

    async def wait(marker):
        await hold.wait()

    with dspy.context(lm=EchoLM(aduring=wait)):
        assert await cancelled_after(turns, evaluator.acall(Steps()))

    assert {"eval": "KILLED"} == {name: run.info.status for name, run in runs().items()}


async def test_all_are_killed(traces, runs):
    """Cancelling ``aevaluate_all`` ends its runs KILLED, but for the cases that were over."""
    begun, hold = asyncio.Event(), asyncio.Event()

    async def wait(marker):
        begun.set()
        await hold.wait()

    class Answers(dspy.Module):
        async def aforward(self, question):
            return dspy.Prediction(answer=question)

    async def cancel_when_begun():
        with dspy.context(lm=EchoLM(aduring=wait)):
            task = asyncio.ensure_future(
                aevaluate_all(
                    {"quick": Answers(), "slow": Steps()},
                    devset=examples(size=3),
                    metric=is_right,
                    max_concurrency=8,
                    display_progress=False,
                )
            )
        await asyncio.wait_for(begun.wait(), 30)
        while runs().get("quick") is None or runs()["quick"].info.status != "FINISHED":  # noqa: ASYNC110 - the store tells nobody
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 30)

    await asyncio.wait_for(cancel_when_begun(), 60)

    assert {"evaluate_all": "KILLED", "quick": "FINISHED", "slow": "KILLED"} == {
        name: run.info.status for name, run in runs().items()
    }
    assert {"cancelled"} == {
        tree(trace, "outcome")[1] for trace in traces if trace.data.spans[0].name == "Steps.forward"
    }


async def test_evaluations_side_by_side(traces, runs):
    """Cancelling one evaluation does not touch another in the same loop."""
    dspy_mlflow_async.autolog(silent=True, log_evals=True)
    hold = asyncio.Event()

    async def wait(marker):
        if "@held" in marker:
            await hold.wait()

    def evaluate(prefix):
        evaluator = AsyncEvaluate(devset=examples(prefix, 3), metric=is_right)
        return asyncio.ensure_future(evaluator.acall(Steps(), callback_metadata={"metric_key": prefix[1:]}))

    with dspy.context(lm=EchoLM(aduring=wait)):
        held, free = evaluate("@held"), evaluate("@free")
    result = await asyncio.wait_for(free, 30)
    held.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(held, 30)

    assert 100.0 == result.score
    assert {"held": "KILLED", "free": "FINISHED"} == {name: run.info.status for name, run in runs().items()}
    assert mlflow.active_run() is None


class Gate:
    """Stands before a function of ours that a thread calls: tells when it is there, and lets it go on.

    ``only`` says of the arguments whether that call is meant.
    """

    def __init__(self, monkeypatch, owner, name, only=lambda *_: True):
        self.reached, self.opened, self.passed = threading.Event(), threading.Event(), threading.Event()
        function = getattr(owner, name)

        def waiting(*args, **kwargs):
            if not only(*args):
                return function(*args, **kwargs)
            self.reached.set()
            assert self.opened.wait(30)
            try:
                return function(*args, **kwargs)
            finally:
                self.passed.set()

        monkeypatch.setattr(owner, name, waiting)

    async def cancel_there(self, task):
        assert await asyncio.to_thread(self.reached.wait, 30)
        task.cancel()


class Answers(dspy.Module):
    async def aforward(self, question):
        return dspy.Prediction(answer=question)


def evaluate_two(**options):
    return asyncio.ensure_future(
        aevaluate_all(
            {"one": Answers(), "two": Answers()},
            devset=examples(size=2),
            metric=is_right,
            display_progress=False,
            **options,
        )
    )


async def test_cancelled_while_the_parent_is_created(traces, runs, monkeypatch):
    """Nobody waits for the thread that creates the run; it ends the run KILLED."""
    created, ended = Gate(monkeypatch, stored_runs, "open_parent"), Gate(monkeypatch, stored_runs, "end")
    ended.opened.set()
    task = evaluate_two()
    await created.cancel_there(task)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 30)
    created.opened.set()
    assert await asyncio.to_thread(ended.passed.wait, 30)

    assert {"evaluate_all": "KILLED"} == {name: run.info.status for name, run in runs().items()}


@pytest.mark.parametrize("name", ["open_case", "end"])
async def test_cancelled_while_a_case_is_opened_or_ended(traces, runs, monkeypatch, name):
    """The parent and what was open are KILLED once the await has raised, wherever the cancellation came."""
    gate = Gate(monkeypatch, stored_runs, name)
    task = evaluate_two(max_concurrency=1)
    await gate.cancel_there(task)
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 30)
    found = {name: run.info.status for name, run in runs().items()}

    assert "KILLED" == found.pop("evaluate_all")
    assert found.keys() <= {"one", "two"}
    assert set(found.values()) <= {"FINISHED", "KILLED"}


async def test_cancelled_while_the_parent_is_ended(traces, runs, monkeypatch):
    """The caller gets no comparison, and so the run is not FINISHED; the cases are."""
    gate = Gate(monkeypatch, stored_runs, "end", only=lambda handle, _: handle.run.info.run_name == "evaluate_all")
    task = evaluate_two()
    await gate.cancel_there(task)
    await asyncio.sleep(0)  # the cancellation is delivered while the thread is at work
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 30)

    assert {"evaluate_all": "KILLED", "one": "FINISHED", "two": "FINISHED"} == {
        name: run.info.status for name, run in runs().items()
    }


async def test_cancelled_while_an_evaluation_is_closed(traces, runs, monkeypatch):
    """Its run ends KILLED, before the await raises, and not as what it was on the way to."""
    dspy_mlflow_async.autolog(silent=True, log_evals=True)
    gate = Gate(monkeypatch, selection, "close")
    task = asyncio.ensure_future(AsyncEvaluate(devset=examples(size=2), metric=is_right).acall(Answers()))
    await gate.cancel_there(task)
    await asyncio.sleep(0)  # the cancellation is delivered while the thread is at work
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 30)

    assert {"eval": "KILLED"} == {name: run.info.status for name, run in runs().items()}


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("is_native", [False, True])
async def test_journal_keeps_what_has_ended(experiment, turns, is_native):
    """Whenever the cancellation comes, a finished example is in the store in the end."""
    devset = examples(size=1)
    keys = [fingerprint.fingerprint(example) for example in devset]
    run = MlflowClient().create_run(experiment)
    kept = Journal(RunHandle(run, is_own=False), keys, Stored(), Door())
    kept.add(Outcome(0, prediction=dspy.Prediction(answer="x"), score=True))
    if is_native:
        task = asyncio.ensure_future(kept.keep())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=30)
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(kept.keep)
            for _ in range(turns):
                await asyncio.sleep(0)
            group.cancel_scope.cancel()
    kept.close()
    await kept.end()

    assert {0} == journal.read(run, keys).outcomes.keys()
    assert [] == local_records.read(run.info.run_id)  # the store has it
