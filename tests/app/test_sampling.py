"""Sampling: by ratio when a trace begins, by outcome when it has ended; whole traces, and the books agree."""

import asyncio

import dspy
import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

import dspy_mlflow_async
from dspy_mlflow_async import request, wrap
from dspy_mlflow_async.requests.sampling import is_kept
from dspy_mlflow_async.seams import mlflow_trace_settings
from dspy_mlflow_async.testing import tree
from echo import Chain, EchoLM, chain_tree


def assert_books_balance():
    stats = dspy_mlflow_async.stats()
    places = ("stored", "waiting", "spooled", "dead", "dropped", "sampled_out", "open")
    assert stats.started == sum(getattr(stats, place) for place in places), stats


@given(trace_id=st.integers(1, 2**128 - 1), ratio=st.floats(0, 1))
def test_the_decision_is_opentelemetrys(trace_id, ratio):
    """Whether decided before or after, a trace is kept where ``TraceIdRatioBased`` would keep it."""
    theirs = TraceIdRatioBased(ratio).should_sample(None, trace_id, "").decision.is_sampled()

    assert theirs == is_kept(trace_id, ratio)


def test_a_ratio_decides_by_trace_id(traces, sampled):
    """About the ratio of the traces is there, each whole, those that their ids say; the others are counted."""
    wrapped = wrap(Chain(), sample=0.25)
    for number in range(400):
        wrapped(question=f"@{number}")

    assert 60 <= len(traces) <= 140
    assert 400 - len(traces) == sampled()
    assert [chain_tree()] * len(traces) == [tree(trace) for trace in traces]
    assert all(is_kept(int(trace.info.trace_id[3:], 16), 0.25) for trace in traces)
    assert_books_balance()


def test_nothing_below_a_trace_that_is_left_out(traces, sampled):
    """The user's own spans and the calls in DSPy's threads go with the trace that they would be in."""
    program = Chain()

    with request("answer", sample=0.0) as r:
        with mlflow.start_span("own"):
            program(question="@a")
        dspy.Parallel(num_threads=4, disable_progress_bar=True)([(program, {"question": f"@{n}"}) for n in range(8)])
    program(question="@after")

    assert ["@after"] == [trace.data.spans[0].inputs["question"] for trace in traces]
    assert (1, None, 18) == (sampled(), r.trace_id, len(r.lm_calls))


def test_outside_nothing_is_sampled(traces):
    """A ratio holds for its own calls: a neighbour's and the rest of the process are complete."""
    wrapped, program = wrap(Chain(), sample=0.0), Chain()

    async def main():
        await asyncio.gather(*(one.acall(question="@a") for one in [wrapped, program] * 20))

    asyncio.run(main())

    assert 20 == len(traces)


def test_a_trace_that_began_outside_is_not_decided_on(traces):
    """Only the root decides: a wrapped program inside another trace is part of it."""
    with mlflow.start_span("outside"):
        wrap(Chain(), sample=0.0)(question="@a")

    assert ("outside", [chain_tree()]) == tree(traces[0])


def test_the_sampler_goes_with_autolog():
    """``autolog(disable=True)`` takes the sampler out again."""
    from mlflow.tracing import provider

    dspy_mlflow_async.autolog(silent=True)
    initialize = provider._initialize_tracer_provider
    with request(sample=0.5):
        assert isinstance(provider._get_tracer("x").sampler, mlflow_trace_settings.RatioSampler)
        mlflow.tracing.reset()
        assert isinstance(provider._get_tracer("x").sampler, mlflow_trace_settings.RatioSampler)

    dspy_mlflow_async.autolog(disable=True)

    assert not isinstance(provider._get_tracer("x").sampler, mlflow_trace_settings.RatioSampler)
    assert provider._initialize_tracer_provider is not initialize or initialize.__module__ == provider.__name__


def test_mlflows_own_ratio_still_counts(captured, monkeypatch):
    """``MLFLOW_TRACE_SAMPLING_RATIO`` decides outside, and where ``sample`` is left alone."""
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0.0")
    mlflow.tracing.reset()
    dspy_mlflow_async.autolog(silent=True)

    Chain()(question="@a")
    wrap(Chain())(question="@b")
    wrap(Chain(), sample=0.9999999)(question="@c")

    assert ["@c"] == [trace.data.spans[0].inputs["question"] for trace in captured]


# --- by outcome, in the real exporter -----------------------------------------------------------------------------


@pytest.fixture
def experiment(request, store_uri, monkeypatch):
    """An experiment of this test, with our exporter."""
    experiment_id = mlflow.create_experiment(request.node.nodeid)
    dspy_mlflow_async.autolog(silent=True)
    return experiment_id


def stored_markers(experiment_id):
    assert dspy_mlflow_async.flush(20)
    found = mlflow.search_traces(locations=[experiment_id], return_type="list")
    return sorted(trace.data.spans[0].inputs["question"] for trace in found)


def test_bad_ones_are_kept(experiment, sampled):
    """Failed and cancelled calls are stored, whole, while none of the good ones is."""

    def during(marker):
        if marker.startswith("@bad"):
            raise ValueError("no")
        if marker.startswith("@gone"):
            raise asyncio.CancelledError

    wrapped = wrap(Chain(), sample={"ok": 0.0, "error": 1.0}, experiment_id=experiment)
    with dspy.context(lm=EchoLM(during=during)):
        for number in range(5):
            wrapped(question=f"@good{number}")
            with pytest.raises(ValueError, match="no"):
                wrapped(question=f"@bad{number}")
            with pytest.raises(asyncio.CancelledError):
                wrapped(question=f"@gone{number}")

    assert [f"@{kind}{n}" for kind in ("bad", "gone") for n in range(5)] == stored_markers(experiment)
    assert 5 == sampled()
    assert_books_balance()


def test_slow_ones_are_kept(experiment, sampled):
    """A call that took longer than ``slow`` seconds is kept, however it ended."""
    for slow, marker in ((0.0, "@kept"), (60.0, "@left")):
        wrap(Chain(), sample={"ok": 0, "slow": slow}, experiment_id=experiment)(question=marker)

    assert ["@kept"] == stored_markers(experiment)
    assert 1 == sampled()


def test_the_users_own_traces_are_decided_on_too(experiment, sampled):
    """Whatever begins a trace in the scope: spans of the user, and feedback that comes late for one left out."""
    with request(sample={"ok": 0.0}, experiment_id=experiment), mlflow.start_span("own") as span:
        Chain()(question="@a")

    dspy_mlflow_async.export.release(span.trace_id, tags={"late": "yes"})
    assert [] == stored_markers(experiment)
    assert 1 == sampled()
    assert 0 == dspy_mlflow_async.stats().dead
    assert_books_balance()


def test_a_share_of_the_good_ones(experiment, sampled):
    """``ok`` keeps the same traces as a plain ratio would."""
    wrapped = wrap(dspy.Predict("question -> answer"), sample={"ok": 0.3}, experiment_id=experiment)
    for number in range(60):
        wrapped(question=f"@{number}")

    assert dspy_mlflow_async.flush(20)
    found = mlflow.search_traces(locations=[experiment], return_type="list", include_spans=False)
    assert 60 == len(found) + sampled()
    assert all(is_kept(int(trace.info.trace_id[3:], 16), 0.3) for trace in found)


def test_a_trace_below_a_span_of_the_users_own(experiment, sampled):
    """A trace whose root is the user's own span is left out as a whole, by how that ends."""
    with request(experiment_id=experiment, sample={"ok": 0}), mlflow.start_span("own"):
        Chain()(question="@a")

    assert [] == stored_markers(experiment)
    assert 1 == sampled()
