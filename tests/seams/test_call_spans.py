"""Spans of DSPy's calls, which are made without the SDK's constructor: nobody who looks at one can tell."""

import copy
import gc
import json
import threading

import dspy
import mlflow
import pytest
from mlflow.entities import LiveSpan, SpanEvent
from mlflow.entities.span import create_mlflow_span
from mlflow.tracing import sampling
from mlflow.tracing.attachments import Attachment
from mlflow.tracing.provider import provider
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

from dspy_mlflow_async.seams.mlflow_call_span import CallSpan
from dspy_mlflow_async.seams.mlflow_live import register
from dspy_mlflow_async.seams.mlflow_packed_spans import PackedSpans, packed
from echo import EchoLM

READ = (
    *("attributes", "dropped_attributes", "dropped_events", "dropped_links", "end_time", "events", "kind", "links"),
    *("instrumentation_scope", "name", "parent", "resource", "start_time", "status"),
)


class Recorder(SpanProcessor):
    """Stands where the processor of traces does."""

    takes_calls = True

    def __init__(self):
        self.ended = []

    def call_started(self, span):
        return register(span, "tr-1", mlflow.tracing.trace_manager._Trace(None))

    def call_ended(self, span):
        self.ended.append(span)


class Asking(dspy.Module):
    """Asks a function for what it answers in a call."""

    def __init__(self, ask):
        super().__init__()
        self.ask = ask

    def forward(self, question):
        return dspy.Prediction(answer=self.ask())


def span_of_a_call():
    """The SDK's span that is current in a call."""
    return Asking(lambda: mlflow.get_current_active_span()._span)(question="@a").answer


@pytest.fixture
def calls(traces, monkeypatch):
    """What begins the spans of calls, with a recorder behind it."""
    known = span_of_a_call().begun_by
    monkeypatch.setattr(known.tracer.span_processor, "_span_processors", (Recorder(),))
    return known


def pair(calls, above=None):
    """A span of ours, and one that the SDK has made of the same facts."""
    ours = calls.begin("call", above).span
    theirs = ReadableSpan.__new__(type(calls.tracer.start_span("other", record_exception=True)))
    Span.__init__(
        theirs,
        name="call",
        context=ours.get_span_context(),
        parent=None if above is None else above.get_span_context(),
        sampler=calls.tracer.sampler,
        resource=calls.tracer.resource,
        attributes=dict(ours.recorded),
        limits=calls.tracer._span_limits,
        instrumentation_info=calls.tracer.instrumentation_info,
        instrumentation_scope=calls.tracer._instrumentation_scope,
    )
    theirs._start_time = ours._start_time
    return ours, theirs


def shown(span):
    """All that a span shows."""
    read = {name: getattr(span, name) for name in READ}
    read["attributes"] = dict(read["attributes"])
    read["events"] = [(event.name, dict(event.attributes)) for event in read["events"]]
    read["links"] = [(link.context, dict(link.attributes)) for link in read["links"]]
    read["status"] = (span.status.status_code, span.status.description)
    return read


def test_a_span_of_a_call_is_one_of_the_sdk(calls):
    """It has all the parts that the SDK gives a span, the same ones, and no private one is missing."""
    ours, theirs = pair(calls)

    assert isinstance(ours, Span)
    assert shown(theirs) == shown(ours)
    assert set() == {name for name in theirs.__dict__ if not hasattr(ours, name)}
    assert theirs.get_span_context() == ours.get_span_context()
    assert json.loads(theirs.to_json()) == json.loads(ours.to_json())


def test_ids_are_as_the_sdk_makes_them(calls):
    """The flags of a root are those of its tracer, and a child has its trace, its flags and its state."""
    probe = calls.tracer.start_span("probe").get_span_context()
    root = calls.begin("root", None).span
    child = calls.begin("child", root).span
    below = calls.begin("below", child).span

    assert (probe.trace_flags, probe.trace_state, False) == (
        root.get_span_context().trace_flags,
        root.get_span_context().trace_state,
        root.get_span_context().is_remote,
    )
    assert probe.trace_flags == below.get_span_context().trace_flags
    assert below.parent == child.get_span_context()
    assert 1 == len({span.context.trace_id for span in (root, child, below)})
    assert 3 == len({span.context.span_id for span in (root, child, below)})


def test_under_a_span_of_the_sdk(calls):
    """One below somebody else's span has its trace, its flags and its state."""
    theirs = calls.tracer.start_span("theirs")
    ours = calls.begin("call", theirs).span

    assert theirs.get_span_context() == ours.parent
    assert theirs.context.trace_id == ours.context.trace_id
    assert theirs.context.trace_flags == ours.context.trace_flags


def test_what_is_done_to_a_span(calls):
    """Attributes, events, links, names, states and exceptions are taken and refused as by the SDK's."""
    other = SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1))

    def use(span):
        span.set_attribute("one", "1")
        span.set_attributes({"two": 2, "three": [3]})
        span.set_attribute("", "nameless")
        span.add_event("happened", {"how": "well"})
        span.add_link(other, {"why": "so"})
        span.update_name("renamed")
        span.set_status(Status(StatusCode.ERROR, "first"))
        span.set_status(StatusCode.ERROR, "second")
        span.set_status(StatusCode.UNSET)
        recording = span.is_recording()
        span._end_time = 1_000
        span.set_attribute("late", "1")
        span.add_event("late")
        span.set_status(StatusCode.OK)
        return shown(span), recording, span.is_recording()

    ours, theirs = map(use, pair(calls))

    assert theirs == ours


def test_status_that_is_set(calls):
    """One that is OK stays, whoever sets another, and a description alone is warned of."""

    def use(span):
        span.set_status(Status(StatusCode.UNSET))
        span.set_status(Status(StatusCode.OK))
        span.set_status(Status(StatusCode.ERROR, "no"))
        return shown(span)["status"]

    ours, theirs = map(use, pair(calls))

    assert theirs == ours == (StatusCode.OK, None)


def refuses(attributes):
    """Whether attributes can no longer be changed."""
    try:
        attributes["late"] = "1"
    except TypeError:
        return True
    return False


def test_a_span_ends_once(calls):
    """Of threads that end it at once, one does; what can be written after that is what the SDK lets anybody write."""
    span = calls.begin("call", None).span
    attributes = span._attributes
    together = threading.Barrier(4, timeout=10)

    def end():
        together.wait()
        span.end()

    threads = [threading.Thread(target=end) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (recorder,) = calls.tracer.span_processor._span_processors
    assert [span] == recorder.ended
    theirs = calls.tracer.start_span("theirs")
    theirs.end()
    assert [refuses(theirs._attributes)] * 2 == [refuses(attributes), refuses(span._attributes)]


def test_two_threads_get_the_same_parts(calls):
    """Whoever asks first, all see one lock, one list of events, one mapping of attributes."""
    found = []
    together = threading.Barrier(8, timeout=10)

    def ask(span):
        together.wait()
        found.append([id(getattr(span, name)) for name in ("_lock", "_events", "_links", "_attributes", "_context")])

    for _ in range(20):
        span = calls.begin("call", None).span
        threads = [threading.Thread(target=ask, args=(span,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert 1 == len({tuple(each) for each in found})
        found.clear()


def test_mlflows_span_of_a_call(calls):
    """It is one of MLflow's live spans, with the same parts, texts and refusals."""
    live = calls.begin("call", None).live
    theirs = create_mlflow_span(pair(calls)[1], "tr-1")

    assert isinstance(live, LiveSpan)
    assert "tr-1" == live.trace_id == live.request_id
    assert set(theirs.__dict__) - {"trace_id"} == {name for name in theirs.__dict__ if hasattr(live, name)} - {
        "trace_id"
    }
    assert repr(theirs).partition("(")[0] == repr(live).partition("(")[0]
    assert ({}, [], "call") == (live._attachments, live._links, live._original_name)
    with pytest.raises(AttributeError):
        live.get  # noqa: B018 - asked for its error
    with pytest.raises(TypeError):
        copy.deepcopy(live)
    assert live.trace_id == copy.copy(live).trace_id
    live.set_attributes({"list": [1], "text": "a"})
    live.add_event(SpanEvent("happened", attributes={"how": "well"}))
    assert ([1], "a") == (live.get_attribute("list"), live.get_attribute("text"))
    still = live.to_immutable_span()
    assert (live.attributes, live.to_dict()) == (still.attributes, still.to_dict())
    assert ["happened"] == [event.name for event in still.events]


def test_what_a_user_does_inside_of_a_call(stored):
    """The current span of MLflow takes all that its own would, in the store too, and so do spans below it."""

    class Program(dspy.Module):
        def __init__(self):
            super().__init__()
            self.predict = dspy.Predict("question -> answer")

        def forward(self, question):
            span = mlflow.get_current_active_span()
            span.set_attribute("mine", {"a": 1})
            span.add_event(SpanEvent("noted", attributes={"what": "this"}))
            mlflow.update_current_trace(tags={"tag": "value"}, metadata={"kept": "yes"})
            with mlflow.start_span("below") as below:
                below.set_inputs({"question": question})
                return self.predict(question=question)

    with dspy.context(lm=EchoLM()):
        Program()(question="@a")

    (trace,) = stored()
    by_name = {span.name: span for span in trace.data.spans}
    root = by_name["Program.forward"]
    assert {"a": 1} == root.get_attribute("mine")
    assert ["noted"] == [event.name for event in root.events]
    assert (root.span_id, by_name["below"].span_id) == (
        by_name["below"].parent_id,
        by_name["Predict.forward"].parent_id,
    )
    assert ("value", "yes") == (trace.info.tags["tag"], trace.info.trace_metadata["kept"])


@pytest.mark.usefixtures("traces")
def test_the_sdks_own_where_others_listen():
    """Where a second processor listens, or a sampler decides, spans are the SDK's own."""
    assert CallSpan is type(span_of_a_call())

    active = provider.get()._active_span_processor
    before = active._span_processors
    heard = []

    class Listener(SpanProcessor):
        def on_start(self, span, parent_context=None):
            heard.append((span.name, parent_context is not None))

        def on_end(self, span):
            heard.append((span.name, span.end_time is not None))

    active._span_processors = (*before, Listener())
    try:
        assert CallSpan is not type(span_of_a_call())
    finally:
        active._span_processors = before
    assert [("Asking.forward", True)] * 2 == heard

    token = sampling._SAMPLING_RATIO_OVERRIDE.set(0.9999999)
    try:
        assert CallSpan is not type(span_of_a_call())
    finally:
        sampling._SAMPLING_RATIO_OVERRIDE.reset(token)
    assert CallSpan is type(span_of_a_call())


def test_who_comes_to_listen_in_the_middle_of_a_call(calls):
    """A span that began before is told to all who listen when it ends, as the SDK would."""
    span = calls.begin("call", None).span
    told = []

    class Listener(SpanProcessor):
        def on_end(self, span):
            told.append(span)

    (recorder,) = calls.tracer.span_processor._span_processors
    recorder.on_end = told.append
    calls.tracer.span_processor._span_processors = (recorder, Listener())
    span.end()

    assert ["call"] * 2 == [each.name for each in told]
    assert all(isinstance(each, ReadableSpan) and not isinstance(each, CallSpan) for each in told)


# --- those that wait --------------------------------------------------------------------------------------------------


def ended_calls(calls, *statuses):
    """MLflow's spans of calls that have ended, each below the one before it."""
    lives, above = [], None
    for number, status in enumerate(statuses):
        above, live = calls.begin(f"call {number}", above)
        live.set_inputs({"question": f"é {number}"})
        live.set_attribute("number", number)
        above.set_attribute("numbers", [1, 2])
        above.set_status(status)
        lives.append(live)
    for live in reversed(lives):
        live._span.end()
    return lives


def test_a_span_that_waits_is_the_same_span(calls):
    """It is packed, and unpacked again for whoever looks."""
    given = ended_calls(calls, Status(StatusCode.OK), Status(StatusCode.ERROR, "no"), Status(StatusCode.UNSET))
    spans = packed(given)

    assert isinstance(spans, PackedSpans)
    assert 3 == len(spans)
    assert spans[0] is next(iter(spans))
    for before, after in zip(given, spans, strict=True):
        assert type(before) is type(after)
        assert shown(before._span) == shown(after._span)
        assert before._span.get_span_context() == after._span.get_span_context()
        assert before.to_dict() == after.to_dict()
        assert before.to_immutable_span().to_dict() == after.to_immutable_span().to_dict()
        assert before.trace_id == after.trace_id


def test_the_garbage_collector_passes_by_what_waits(calls):
    """A thousand traces that wait were looked at again and again, object by object."""
    given = ended_calls(calls, *[Status(StatusCode.OK)] * 4)
    for live in given:
        del live._span.recorded["numbers"]
    packed(given)  # the names of attributes are the same in all traces
    gc.collect()
    spans = packed(given)
    gc.collect(0)

    assert [calls] == [held for held in gc.get_referents(spans) if gc.is_tracked(held) and held is not PackedSpans]


@pytest.mark.parametrize(
    "more",
    [
        lambda live: live.add_event(SpanEvent("event")),
        lambda live: live._span.add_link(SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1))),
        lambda live: live.set_inputs({"image": Attachment(content_type="image/png", content_bytes=b"1")}),
    ],
)
def test_what_has_more_waits_as_it_is(calls, more):
    """Events, links and files are not packed."""
    root, live = calls.begin("root", None)
    child = calls.begin("child", root)
    more(child.live)
    child.span.end()
    root.end()
    spans = [live, child.live]

    assert packed(spans) is spans


def test_what_is_not_of_calls_alone_waits_as_it_is(calls):
    """Spans of others, and spans whose parents are elsewhere."""
    root, live = calls.begin("root", None)
    theirs = register(calls.tracer.start_span("theirs"), "tr-1", mlflow.tracing.trace_manager._Trace(None))
    child = calls.begin("child", root)
    for given in ([], [theirs], [live, theirs], [child.live]):
        assert packed(given) is given
