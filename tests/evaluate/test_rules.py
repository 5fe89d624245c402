"""The rules for failures against a plain sequential model, whatever the mix, the limit and the event loop."""

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass

import anyio
import anyio.lowlevel
import anyio.to_thread
import dspy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspy_mlflow_async import AsyncEvaluate
from dspy_mlflow_async.evaluate import examples as module
from echo import EchoLM

limit_here = ContextVar("limit_here", default=None)


@pytest.fixture
def limits(monkeypatch):
    """Lets an example find the scope that limits its time."""

    def noted(seconds):
        limit = time_limit(seconds)
        limit_here.set(limit)
        return limit

    time_limit = module.time_limit
    monkeypatch.setattr(module, "time_limit", noted)


@dataclass(frozen=True)
class Kind:
    """What one example does."""

    name: str
    score: float = 1.0

    @property
    def fails(self):
        return self.name in {"program fails", "metric fails", "too slow", "no inputs"}


KINDS = st.one_of(
    st.builds(Kind, st.just("quick"), st.sampled_from([0.0, 0.25, 1.0])),
    st.builds(Kind, st.just("slow"), st.sampled_from([0.0, 1.0])),
    st.sampled_from([Kind("program fails"), Kind("metric fails"), Kind("too slow"), Kind("no inputs")]),
)


class Program(dspy.Module):
    """Does what the example says; an LM call is in it where it comes to an answer."""

    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict("question -> answer")

    async def aforward(self, question, kind):
        if kind.name == "program fails":
            raise ValueError("the program fails")
        if kind.name == "too slow":
            if limit_here.get() is not None:
                limit_here.get().deadline = anyio.current_time()  # the time is over now, however fast the machine is
            await anyio.sleep_forever()
        for _ in range(5 if kind.name == "slow" else 0):
            await anyio.lowlevel.checkpoint()
        if in_trio():  # DSPy's own async LM calls need asyncio
            return await anyio.to_thread.run_sync(lambda: self.predict(question=question))
        return await self.predict.acall(question=question)


class SyncProgram(dspy.Module):
    """A program without an ``aforward``."""

    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict("question -> answer")

    def forward(self, question, kind):
        if kind.name == "program fails":
            raise ValueError("the program fails")
        return self.predict(question=question)


def in_trio():
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


async def metric(example, prediction):
    await anyio.lowlevel.checkpoint()
    if example.kind.name == "metric fails":
        raise LookupError("the metric fails")
    assert example.question == prediction.answer  # nobody got another's prediction
    return example.kind.score


def devset_of(kinds):
    devset = []
    for number, kind in enumerate(kinds):
        example = dspy.Example(question=f"@q-{number}", kind=kind)
        devset.append(example if kind.name == "no inputs" else example.with_inputs("question", "kind"))
    return devset


def model(kinds, max_errors, failure_score):
    """What DSPy's rules say, one example after the other."""
    results, errors = [], 0
    for number, kind in enumerate(kinds):
        if kind.fails:
            errors += 1
            if errors >= max_errors:
                return "Execution cancelled due to errors or interruption."
            results.append((None, failure_score))
        else:
            results.append((f"@q-{number}", kind.score))
    return round(100 * sum(score for _, score in results) / len(results), 2), results


async def actual(kinds, max_concurrency, max_errors, failure_score, program=None):
    evaluator = AsyncEvaluate(
        devset=devset_of(kinds),
        metric=metric,
        max_concurrency=max_concurrency,
        timeout=600,
        max_errors=max_errors,
        failure_score=failure_score,
    )
    with dspy.context(lm=EchoLM()):
        try:
            result = await evaluator.acall(program or Program())
        except Exception as error:  # noqa: BLE001 - what the model says, too
            return str(error)
    return result.score, [(getattr(p, "answer", None), score) for _, p, score in result.results]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(KINDS, min_size=1, max_size=10),
    max_concurrency=st.integers(1, 12),
    max_errors=st.integers(1, 12),
    failure_score=st.sampled_from([0.0, 0.5]),
)
def test_any_mix(limits, backend, kinds, max_concurrency, max_errors, failure_score):
    """The same result, rows in devset order, or the same exception."""
    expected = model(kinds, max_errors, failure_score)

    assert expected == anyio.run(actual, kinds, max_concurrency, max_errors, failure_score, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_sync_only(backend):
    """A program without ``aforward`` runs in worker threads, by the same rules."""
    kinds = [Kind("quick"), Kind("program fails"), Kind("quick", 0.25), Kind("metric fails")]

    assert model(kinds, 10, 0.5) == anyio.run(actual, kinds, 3, 10, 0.5, SyncProgram(), backend=backend)


async def test_timeout(traces, monkeypatch):
    """An example that takes too long is a failed one; what it awaited is cancelled, and its trace says so."""
    heard = []
    monkeypatch.setattr(module.dspy_evaluate.PARALLELIZER_LOGGER, "error", heard.append)
    result = await AsyncEvaluate(
        devset=devset_of([Kind("too slow"), Kind("too slow")]), metric=metric, timeout=0.05
    ).acall(Program())
    outcomes = sorted(trace.data.spans[0].get_attribute("outcome") for trace in traces)

    assert 0.0 == result.score
    assert ["cancelled", "cancelled"] == outcomes
    assert "the example took longer than 0.05 seconds" in "".join(heard)


@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
async def test_what_is_no_exception(traces, error):
    """What is no ``Exception`` ends the evaluation as it is, and the other examples with it."""
    begun, others = anyio.Event(), []

    class Ends(dspy.Module):
        async def aforward(self, question, kind):
            if question == "@q-1":
                await begun.wait()
                raise error
            if question == "@q-2":
                begun.set()
            try:
                await anyio.sleep_forever()
            finally:
                others.append(question)

    evaluator = AsyncEvaluate(devset=devset_of([Kind("quick")] * 3), metric=metric, max_concurrency=3)
    with pytest.raises(error) as raised:
        await evaluator.acall(Ends())

    assert error is type(raised.value)
    assert ["@q-0", "@q-2"] == sorted(others)
    assert 3 == len(traces)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_several_that_are_no_exceptions(error):
    """Where examples end the evaluation at once the first counts, and comes as it is: not in a group."""
    begun = []

    class Ends(dspy.Module):
        async def aforward(self, question, kind):
            begun.append(question)
            while len(begun) < 3:
                await anyio.lowlevel.checkpoint()
            try:
                await (
                    anyio.lowlevel.checkpoint()
                )  # the first raises here, and the others are cancelled, of which they make their own
            finally:
                raise error(question)

    evaluator = AsyncEvaluate(devset=devset_of([Kind("quick")] * 3), metric=metric, max_concurrency=3)
    with pytest.raises(error) as raised:
        await evaluator.acall(Ends())

    assert error is type(raised.value)


async def test_cancelled_while_many_errors():
    """With the error that is one too many, what is in flight is cancelled, and nothing new begins."""
    begun, cancelled = [], []

    class Fails(dspy.Module):
        async def aforward(self, question, kind):
            begun.append(question)
            if question == "@q-1":
                while len(begun) < 3:
                    await anyio.lowlevel.checkpoint()
                raise ValueError("enough")
            try:
                await anyio.sleep_forever()
            except BaseException:
                cancelled.append(question)
                raise

    evaluator = AsyncEvaluate(devset=devset_of([Kind("quick")] * 9), metric=metric, max_concurrency=3, max_errors=1)
    with pytest.raises(Exception, match="Execution cancelled"):
        await evaluator.acall(Fails())

    assert ["@q-0", "@q-1", "@q-2"] == begun
    assert ["@q-0", "@q-2"] == sorted(cancelled)


async def test_settings_are_each_examples_own():
    """What an example does to DSPy's settings and usage tracker, no other sees."""
    seen = []

    class Changes(dspy.Module):
        async def aforward(self, question, kind):
            seen.append(dspy.settings.get("mark"))
            from dspy.dsp.utils.settings import thread_local_overrides

            thread_local_overrides.get()["mark"] = question
            await anyio.lowlevel.checkpoint()
            return dspy.Prediction(answer=question)

    with dspy.context(mark="mine"):
        await AsyncEvaluate(devset=devset_of([Kind("quick")] * 4), metric=metric, max_concurrency=2).acall(Changes())
        seen.append(dspy.settings.mark)

    assert ["mine"] * 5 == seen


async def test_usage_tracker_is_copied():
    """As in DSPy's worker threads, an outer usage tracker is copied for each example, and gains nothing."""
    with dspy.context(lm=EchoLM()), dspy.track_usage() as tracker:
        await AsyncEvaluate(devset=devset_of([Kind("quick")] * 2), metric=metric).acall(Program())
        in_tasks = dict(tracker.usage_data)
    with dspy.context(lm=EchoLM()), dspy.track_usage() as tracker:
        dspy.Evaluate(devset=devset_of([Kind("quick")] * 2), metric=lambda *judged: 1.0, num_threads=2)(
            dspy.Predict("question, kind -> answer")
        )
        in_threads = dict(tracker.usage_data)

    assert in_threads.keys() == in_tasks.keys()


async def test_thousand_in_flight():
    """1,000 examples at once, in one thread."""
    import threading

    meeting, size = asyncio.Event(), 1000
    arrived = 0

    class Meets(dspy.Module):
        async def aforward(self, question, kind):
            nonlocal arrived
            arrived += 1
            if arrived == size:
                meeting.set()
            await asyncio.wait_for(meeting.wait(), 100)
            return dspy.Prediction(answer=question)

    before = threading.active_count()
    result = await AsyncEvaluate(devset=devset_of([Kind("quick")] * size), metric=metric, max_concurrency=size).acall(
        Meets()
    )

    assert 100.0 == result.score
    assert threading.active_count() <= before + 1
