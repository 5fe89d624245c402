"""Whole traces arrive in the store, whatever makes them and whatever order their spans end in."""

import contextvars
import gc
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest
from mlflow.entities import Feedback
from mlflow.entities.trace_location import UCSchemaLocation
from mlflow.tracing import provider as tracing_provider
from mlflow.tracing.client import TracingClient
from mlflow.tracing.export import inference_table
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor
from mlflow.tracing.trace_manager import InMemoryTraceManager
from stores import call, check_sum, span_processor, wait_until

from dspy_mlflow_async import export
from dspy_mlflow_async.export import installation
from dspy_mlflow_async.export.assemble import recent
from dspy_mlflow_async.export.assemble.open_trace import OpenTrace
from dspy_mlflow_async.export.operations import TraceOperation, TraceUpdate
from dspy_mlflow_async.seams import mlflow_traces


def test_a_trace_arrives_whole(sqlite):
    """All spans, their parents, the token total, previews and sizes are there."""
    trace_id = call()

    assert export.flush(100)
    trace = sqlite.read()[trace_id]
    by_name = {span.name: span for span in trace.data.spans}
    assert {"root", "child 0", "child 1", "child 2"} == set(by_name)
    assert {by_name["root"].span_id} == {by_name[f"child {n}"].parent_id for n in range(3)}
    assert {"input_tokens": 6, "output_tokens": 3, "total_tokens": 9} == trace.info.token_usage
    assert '{"question": "text"}' == trace.info.request_preview
    assert "OK" == trace.info.state
    assert "root" == trace.info.tags["mlflow.traceName"]
    assert '"num_spans": 4' in trace.info.trace_metadata["mlflow.trace.sizeStats"]


def test_stats_count_traces(sqlite):
    """Every trace is counted in one place, while it is open, waiting and stored."""
    sqlite.stop_writing()

    with mlflow.start_span("open"):
        assert export.ExportStats(started=1, open=1) == export.stats()
    assert export.ExportStats(started=1, ended=1, waiting=1) == export.stats()
    sqlite.queue.work()
    assert export.ExportStats(started=1, ended=1, stored=1) == export.stats()


def test_stats_always_add_up(sqlite):
    """Also when they are read in the middle of everything."""
    done = threading.Event()
    seen = []

    def look():
        while not done.wait(0.001):
            seen.append(export.stats())

    watcher = threading.Thread(target=look)
    watcher.start()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: call(), range(100)))
    assert export.flush(110)
    done.set()
    watcher.join(10)

    for stats in seen:
        check_sum(stats)
    assert export.ExportStats(started=100, ended=100, stored=100) == export.stats()


def test_many_threads_lose_nothing(sqlite):
    """300 calls on 32 threads give 300 whole traces."""
    with ThreadPoolExecutor(32) as pool:
        ids = list(pool.map(lambda _: call(), range(300)))

    assert export.flush(110)
    traces = sqlite.read()
    assert set(ids) == set(traces)
    assert {4} == {len(trace.data.spans) for trace in traces.values()}
    assert {9} == {trace.info.token_usage["total_tokens"] for trace in traces.values()}


def test_flush_under_load_waits_for_what_had_ended(sqlite):
    """A busy service can flush: what comes meanwhile is not waited for."""
    is_over = threading.Event()

    def work():
        while not is_over.is_set():
            call()
            while export.stats().waiting > 200 and not is_over.wait(0.01):  # more than any store takes at once
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        ids = [call() for _ in range(20)]
        assert export.flush(60)
        assert set(ids) <= set(sqlite.read())
    finally:
        is_over.set()
    for thread in threads:
        thread.join(30)
    assert export.flush(100)
    stats = export.stats()
    assert stats.started == stats.stored


@pytest.mark.long
def test_flush_does_not_wait_for_what_overflows_meanwhile(make, monkeypatch):
    """What finds no room in memory goes to the disk, and is not what had ended when the flush began."""
    installed = make(max_waiting_bytes=40_000)
    queue = installed.queue
    may_write, is_writing, is_over = threading.Event(), threading.Event(), threading.Event()
    write = queue.writer.write

    def write_one_batch(items):
        may_go_on = is_over if is_writing.is_set() else may_write
        is_writing.set()
        may_go_on.wait(60)
        return write(items)

    monkeypatch.setattr(queue.writer, "write", write_one_batch)
    has_begun = threading.Event()
    hurry = queue.hurry
    monkeypatch.setattr(queue, "hurry", lambda: (has_begun.set(), hurry()))
    first = call()
    with ThreadPoolExecutor(1) as pool:
        assert is_writing.wait(60)
        flushing = pool.submit(export.flush, 60)
        assert has_begun.wait(60)
        while export.stats().spooled < 5:
            call()
        may_write.set()
        try:
            assert flushing.result(60)
            assert {first} == set(installed.read())
            assert export.stats().spooled == 5
        finally:
            is_over.set()
    assert export.flush(100)
    stats = export.stats()
    assert stats.started == stats.stored


def test_undone_after_the_collectors_callbacks_were_cleared(sqlite):
    """The list is everybody's: that ours is gone keeps nothing from being undone."""
    theirs = [each for each in gc.callbacks if not getattr(each, "__module__", "").startswith("dspy_mlflow_async")]
    assert len(theirs) < len(gc.callbacks)
    gc.callbacks[:] = theirs
    sqlite.undo()
    assert MlflowV3SpanExporter is type(span_processor().span_exporter)


def test_spans_that_the_collector_ends_while_we_hold_locks(sqlite):
    """A generator that nobody has finished ends its spans wherever Python's garbage collector happens to run."""

    class Cycle:
        """Left to the garbage collector."""

    def generate(*spans):
        try:
            yield
        finally:
            for span in spans:
                span.end()

    with mlflow.start_span("root") as root:
        child = mlflow.start_span_no_context("child", parent_span=root)
    other = mlflow.start_span_no_context("other")
    cycle = Cycle()
    cycle.itself, cycle.generator = cycle, generate(child, other)
    next(cycle.generator)
    assembler = sqlite.pipeline.assembler
    (entry,) = (each for each in assembler.entries.values() if each.identity.trace_id == root.trace_id)
    with assembler.lock, entry.children.lock, sqlite.queue.pending.lock:
        del cycle
        gc.collect()
    assert child.end_time_ns

    assert export.flush(100)
    traces = sqlite.read()
    assert ["child", "root"] == sorted(span.name for span in traces[root.trace_id].data.spans)
    assert ["other"] == [span.name for span in traces[other.trace_id].data.spans]
    assert export.ExportStats(started=2, ended=2, stored=2) == export.stats()


def test_mlflows_own_flush_waits_for_us(sqlite):
    """`flush_trace_async_logging` and `search_traces(flush=True)` find everything that has ended."""
    first = call()
    mlflow.flush_trace_async_logging()
    assert {first} == set(sqlite.read())

    second = call()
    flush = {"flush": True} if "flush" in inspect.signature(mlflow.search_traces).parameters else {}
    if not flush:  # mlflow < 3.12
        mlflow.flush_trace_async_logging()
    found = mlflow.search_traces(locations=[sqlite.experiment_id], return_type="list", **flush)
    assert {first, second} == {trace.info.trace_id for trace in found}
    assert second == mlflow.get_last_active_trace_id()
    assert second == mlflow.get_trace(second).info.trace_id


def test_a_child_that_ends_after_its_root_belongs_to_the_trace(sqlite):
    """The trace is not written before its last child has ended, and its total has that child's tokens."""
    may_end = threading.Event()
    has_begun = threading.Event()

    def straggle():
        with mlflow.start_span("straggler") as span:
            has_begun.set()
            assert may_end.wait(10)
            span.set_attribute("mlflow.chat.tokenUsage", {"input_tokens": 5, "output_tokens": 5, "total_tokens": 10})

    with mlflow.start_span("root") as root:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(straggle,))
        thread.start()
        assert has_begun.wait(10)
    assert 1 == export.stats().waiting
    may_end.set()
    thread.join(10)

    assert export.flush(100)
    trace = sqlite.read()[root.trace_id]
    assert ["root", "straggler"] == sorted(span.name for span in trace.data.spans)
    assert 10 == trace.info.token_usage["total_tokens"]


def test_spans_that_outlive_the_bound_are_added(make):
    """After `children_timeout` the trace is written as it is; late spans and their tokens follow."""
    installed = make(children_timeout=0.2)
    with mlflow.start_span("root") as root:
        mlflow.start_span_no_context("before", parent_span=root).end()
        late = mlflow.start_span_no_context("late", parent_span=root)
        grandchild = mlflow.start_span_no_context("grandchild", parent_span=late)

    wait_until(lambda: export.stats().stored == 1)
    names = lambda: sorted(span.name for span in installed.read()[root.trace_id].data.spans)  # noqa: E731
    assert ["before", "root"] == names()
    grandchild.set_attribute("mlflow.chat.tokenUsage", {"input_tokens": 5, "output_tokens": 5, "total_tokens": 10})
    grandchild.end()
    late.end()

    assert export.flush(100)
    assert ["before", "grandchild", "late", "root"] == names()
    assert 10 == installed.read()[root.trace_id].info.token_usage["total_tokens"]
    assert export.ExportStats(started=1, ended=1, stored=1) == export.stats()


def test_spans_that_outlive_many_other_traces_are_added(make, monkeypatch):
    """What is still open is waited for, however many traces come and go meanwhile."""
    monkeypatch.setattr(recent, "RECENT", 50)
    installed = make(children_timeout=0.2)
    with mlflow.start_span("root") as root:
        late = mlflow.start_span_no_context("late", parent_span=root)
    wait_until(lambda: export.stats().stored == 1)
    for _ in range(60):
        call(children=0)
    late.end()

    assert export.flush(100)
    assert 2 == len(TracingClient(installed.uri).get_trace(root.trace_id).data.spans)


def test_spans_that_end_while_others_of_their_late_trace_begin(make):
    """Whichever of the late spans is open when another one ends, none is lost."""
    installed = make(children_timeout=0.2)
    with mlflow.start_span("root") as root:
        one = mlflow.start_span_no_context("one", parent_span=root)
        two = mlflow.start_span_no_context("two", parent_span=root)
    wait_until(lambda: export.stats().stored == 1)
    three = mlflow.start_span_no_context("three", parent_span=one)
    one.end()
    two.end()
    three.end()

    assert export.flush(100)
    trace = installed.read()[root.trace_id]
    assert ["one", "root", "three", "two"] == sorted(span.name for span in trace.data.spans)


def test_a_span_that_begins_after_the_trace_was_handed_on_is_added(sqlite):
    """A worker that outlives its root may start its next span when nothing else is open."""
    with mlflow.start_span("root") as root:
        pass
    assert export.flush(100)

    late = mlflow.start_span_no_context("late", parent_span=root)
    child = mlflow.start_span_no_context("child", parent_span=late)
    child.end()
    late.end()

    assert export.flush(100)
    spans = {span.name: span for span in sqlite.read()[root.trace_id].data.spans}
    assert {"root", "late", "child"} == set(spans)
    assert spans["late"].span_id == spans["child"].parent_id
    assert 0 == len(InMemoryTraceManager.get_instance()._traces)


def test_a_trace_that_is_open_for_long_becomes_visible(make):
    """It is in the store, in progress, with what has ended so far; at its end it is whole."""
    installed = make(visible_after=0.2)
    with mlflow.start_span("root") as root:
        with mlflow.start_span("first"):
            pass
        wait_until(lambda: root.trace_id in installed.read(include_spans=False))
        wait_until(lambda: installed.read().get(root.trace_id))
        trace = installed.read()[root.trace_id]
        assert "IN_PROGRESS" == trace.info.state
        assert ["first"] == [span.name for span in trace.data.spans]
        with mlflow.start_span("second"):
            pass
        wait_until(lambda: len(installed.read()[root.trace_id].data.spans) == 2)

    assert export.flush(100)
    trace = installed.read()[root.trace_id]
    assert "OK" == trace.info.state
    assert ["first", "root", "second"] == sorted(span.name for span in trace.data.spans)
    assert export.ExportStats(started=1, ended=1, stored=1) == export.stats()


@pytest.mark.parametrize("how", ["env", "evaluate"])
def test_synchronous_writing(sqlite, monkeypatch, how):
    """Where MLflow writes at once, so do we: the trace is there when the call returns."""
    if how == "env":
        monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
        trace_id = call()
    else:
        from mlflow.pyfunc.context import Context, set_prediction_context

        with set_prediction_context(Context(request_id="question 1", is_evaluate=True)):
            trace_id = call()
        assert trace_id == mlflow.get_trace("question 1").info.trace_id

    assert {trace_id} == set(sqlite.read())
    assert 1 == export.stats().stored


def test_synchronous_writing_of_a_trace_that_was_shown_before(make, monkeypatch):
    """What was to be stored of it while it was open may still wait; nobody has to, for that."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    installed = make(visible_after=0.1)
    installed.stop_writing()
    with mlflow.start_span("root") as root:
        with mlflow.start_span("child"):
            pass
        wait_until(lambda: installed.queue.pending.has(root.trace_id))

    assert ["root", "child"] == [span.name for span in installed.read()[root.trace_id].data.spans]
    assert export.ExportStats(started=1, ended=1, stored=1) == export.stats()


def test_text_that_no_database_takes(sqlite):
    """Lone surrogates and NUL are replaced, and the trace is stored."""
    with mlflow.start_span("na\ud800me") as root:
        root.set_inputs({"question": "a\ud800b\0c"})
        root.set_outputs("\udfff")
        root.add_event(mlflow.entities.SpanEvent("ev\udc00ent", attributes={"k": "\ud800"}))
    export.hold(root.trace_id)
    export.release(root.trace_id, tags={"tag": "x\ud800"})

    assert export.flush(100)
    span = sqlite.read()[root.trace_id].data.spans[0]
    assert "na\N{REPLACEMENT CHARACTER}me" == span.name
    assert {"question": "a\N{REPLACEMENT CHARACTER}b\0c"} == span.inputs


def test_a_large_trace_and_a_large_output(sqlite):
    """5,000 spans in one trace, and 10 MiB in one span."""
    with mlflow.start_span("root") as root:
        for number in range(5000):
            mlflow.start_span_no_context(f"{number}", parent_span=root).end()
    with mlflow.start_span("big") as big:
        big.set_outputs("x" * 10 * 2**20)

    assert export.flush(110)
    traces = sqlite.read()
    assert 5001 == len(traces[root.trace_id].data.spans)
    assert 10 * 2**20 == len(traces[big.trace_id].data.spans[0].outputs)


def test_nothing_stays_behind_in_memory(sqlite):
    """MLflow's trace manager forgets every trace, and the assembler keeps a bounded number of small records."""
    ids = set()
    for _ in range(1200):
        with mlflow.start_span("x") as span:
            ids.add(span.trace_id)
    assembler = sqlite.pipeline.assembler

    assert 0 == len(InMemoryTraceManager.get_instance()._traces)
    assert 0 == len(InMemoryTraceManager.get_instance()._otel_id_to_mlflow_trace_id)
    assert 0 == len(assembler.entries)
    kept = [each for each in gc.get_objects() if type(each) is OpenTrace and each.identity.trace_id in ids]
    assert 1000 == len(assembler.recent) == len(kept)
    assert all(assembler.recent.named(entry.identity.trace_id) is entry for entry in assembler.recent)
    assert all(not entry.trace.span_dict for entry in assembler.recent)
    assert export.flush(110)


def test_more_open_traces_than_mlflows_cache_holds(sqlite):
    """MLflow's cache forgets the oldest of 1,000 open traces; ours are all stored."""
    roots = [mlflow.start_span_no_context(f"{n}") for n in range(1100)]
    for root in roots:
        mlflow.start_span_no_context("child", parent_span=root).end()
        root.end()

    assert export.flush(110)
    traces = sqlite.read()
    assert {root.trace_id for root in roots} == set(traces)
    assert {2} == {len(trace.data.spans) for trace in traces.values()}


def test_remote_spans_are_stored(sqlite):
    """Spans below a parent in another process are stored, though their root never ends here."""
    from mlflow.tracing.distributed import (
        get_tracing_context_headers_for_http_request,
        set_tracing_context_from_http_request_headers,
    )

    with mlflow.start_span("client") as root:
        headers = get_tracing_context_headers_for_http_request()
    assert export.flush(100)

    def serve():
        with set_tracing_context_from_http_request_headers(headers), mlflow.start_span("server") as span:
            span.set_inputs(1)

    sqlite.pipeline.assembler.recent.clear()  # as in a process that has not seen the root
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join(10)
    assert export.flush(100)

    assert ["client", "server"] == sorted(span.name for span in sqlite.read()[root.trace_id].data.spans)


def test_attachments_are_uploaded(sqlite):
    """Binary values go to the artifact store, as with MLflow's exporter."""
    from mlflow.tracing.attachments import Attachment

    with mlflow.start_span("root") as root:
        root.set_inputs({"image": Attachment(content_type="image/png", content_bytes=b"PNG")})

    assert export.flush(100)
    trace = sqlite.read()[root.trace_id]
    reference = Attachment.parse_ref(trace.data.spans[0].inputs["image"])
    repository = mlflow.tracing.client.TracingClient(sqlite.uri)._get_artifact_repo_for_trace(trace.info)
    assert b"PNG" == repository.download_trace_attachment(reference["attachment_id"])


@pytest.mark.filterwarnings("ignore:The filesystem tracking backend")
def test_a_store_without_spans_gets_them_as_an_artifact(make, tmp_path, monkeypatch):
    """The file store does not take spans; they are uploaded with the trace."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    installed = make(uri=str(tmp_path / "mlruns"))
    trace_id = call()

    assert export.flush(100)
    assert 4 == len(installed.read()[trace_id].data.spans)


# --- hold and release ---


def test_a_held_trace_waits_for_its_feedback(sqlite):
    """Feedback given before the release goes with the trace, without a write of its own."""
    trace_id = call()
    with mlflow.start_span("root") as root:
        export.hold(root.trace_id)
    sqlite.queue.flush(None)
    assert root.trace_id not in sqlite.read()
    export.release(root.trace_id, assessments=[Feedback(name="score", value=0.5)], metadata={"m": "1"}, tags={"t": "2"})

    assert export.flush(100)
    info = sqlite.read()[root.trace_id].info
    assert [("score", 0.5)] == [(a.name, a.value) for a in info.assessments]
    assert ("1", "2") == (info.trace_metadata["m"], info.tags["t"])
    assert trace_id in sqlite.read()


def test_holds_nest(sqlite):
    """Held twice, a trace is released twice; all that is said goes with it."""
    with mlflow.start_span("root") as root:
        export.hold(root.trace_id)
        export.hold(root.trace_id)
        export.release(root.trace_id, tags={"a": "1"})
    sqlite.queue.flush(None)
    assert {} == sqlite.read()
    export.release(root.trace_id, tags={"b": "2"})

    assert export.flush(100)
    assert {"a": "1", "b": "2"} == {k: v for k, v in sqlite.read()[root.trace_id].info.tags.items() if k in "ab"}


def test_feedback_does_not_overtake_a_trace_that_is_being_handed_on(sqlite, monkeypatch):
    """Feedback that comes in the very moment in which a flush hands its trace on is written after it, not refused."""
    pipeline = installation.pipeline()
    assembling, emit, order, is_said = pipeline.assembler, pipeline.emit, [], threading.Event()
    is_handing_on = threading.Event()

    def emit_slowly(uri, item, is_sync):
        if isinstance(item, TraceOperation):
            is_handing_on.set()
            is_said.wait(0.3)  # so long the feedback may try to overtake
        emit(uri, item, is_sync)
        order.append(type(item))
        is_said.set()

    monkeypatch.setattr(pipeline, "emit", emit_slowly)
    with mlflow.start_span("root") as root:
        export.hold(root.trace_id)
    handing_on = threading.Thread(target=assembling.hand_on, args=(root.trace_id,))
    handing_on.start()
    assert is_handing_on.wait(20)
    export.release(root.trace_id, assessments=[Feedback(name="score", value=1.0)])
    handing_on.join(20)

    assert [TraceOperation, TraceUpdate] == order
    assert export.flush(100)
    assert 0 == export.stats().dead


def test_a_release_after_the_write_follows_it(sqlite):
    """Flush does not wait for a holder; what is said later is added, once."""
    with mlflow.start_span("root") as root:
        export.hold(root.trace_id)
    assert export.flush(100)
    assert {root.trace_id} == set(sqlite.read())
    feedback = Feedback(name="score", value=True)
    export.release(root.trace_id, assessments=[feedback], metadata={"m": "1"}, tags={"t": "2"})

    assert export.flush(100)
    trace = sqlite.read()[root.trace_id]
    assert [("score", True)] == [(a.name, a.value) for a in trace.info.assessments]
    assert ("1", "2") == (trace.info.trace_metadata["m"], trace.info.tags["t"])
    assert 1 == len(trace.data.spans)


def test_a_follow_up_is_idempotent(sqlite):
    """Sent twice, as after a lost answer, an assessment is there once."""
    with mlflow.start_span("root") as root:
        pass
    assert export.flush(100)
    feedback = Feedback(name="score", value=True)
    feedback.assessment_id = "a-" + "1" * 32
    for _ in range(2):
        export.release(root.trace_id, assessments=[feedback])
        assert export.flush(100)

    assert 1 == len(sqlite.read()[root.trace_id].info.assessments)
    assert 0 == export.stats().dead


def test_a_hold_has_a_bound(make):
    """A trace that nobody releases is written after `children_timeout`."""
    installed = make(children_timeout=0.2)
    with mlflow.start_span("root") as root:
        export.hold(root.trace_id)

    wait_until(lambda: root.trace_id in installed.read())
    export.release(root.trace_id)


# --- installing ---


def test_installing_takes_over_what_is_open(make, store_uri):
    """A trace begun under MLflow's exporter and ended under ours is whole, and the undo puts MLflow's back."""
    mlflow.tracing.reset()
    mlflow.set_experiment("before")
    with mlflow.start_span("root") as root:
        child = mlflow.start_span_no_context("child", parent_span=root)
        undo = export.install(export.ExportOptions())
        assert isinstance(span_processor(), MlflowV3SpanProcessor)
        child.end()
    assert export.flush(100)
    spans = mlflow.get_trace(root.trace_id).data.spans
    undo()

    assert ["child", "root"] == sorted(span.name for span in spans)
    assert MlflowV3SpanExporter is type(span_processor().span_exporter)
    undo()
    mlflow.tracing.reset()


def test_undone_in_the_middle_of_a_trace(sqlite):
    """A trace that is open when the pipeline goes stays ours, and counted, until it is stored."""
    with mlflow.start_span("root") as root, mlflow.start_span("child"):
        sqlite.undo()
    mlflow.flush_trace_async_logging()

    assert ["child", "root"] == sorted(span.name for span in mlflow.get_trace(root.trace_id).data.spans)
    assert export.ExportStats(started=1, ended=1, stored=1) == export.stats()


def test_undo_leaves_no_thread(sqlite):
    """What waits is written in the background, and then our threads are gone."""
    trace_id = call()
    sqlite.undo()

    wait_until(lambda: not any(t.name.startswith("dspy-mlflow-async") for t in threading.enumerate()))
    assert trace_id in sqlite.read()


def test_installing_again_replaces_the_options(make):
    """Traces in flight move to the new pipeline."""
    make(children_timeout=100)
    with mlflow.start_span("root") as root:
        late = mlflow.start_span_no_context("late", parent_span=root)
    undo = export.install(export.ExportOptions(children_timeout=0.2))

    wait_until(lambda: export.stats().stored == 1)
    late.end()
    assert export.flush(100)
    assert 2 == len(mlflow.get_trace(root.trace_id).data.spans)
    undo()


def test_a_rebuilt_provider_is_ours_too(sqlite):
    """`set_experiment`, `set_tracking_uri`, `set_destination` and `reset` build a new provider with our exporter."""
    for rebuild in (mlflow.tracing.reset, lambda: mlflow.set_tracking_uri(sqlite.uri), mlflow.tracing.enable):
        rebuild()
        assert "WholeTraceExporter" == type(span_processor().span_exporter).__name__


OTLP = {
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9/v1/traces",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
}
ELSEWHERE = {
    "otlp": OTLP,
    "otlp and mlflow": OTLP | {"MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT": "true"},
    "serving": {"IS_IN_DB_MODEL_SERVING_ENV": "true", "ENABLE_MLFLOW_TRACING": "true"},
    "unity catalog": {},
}


@pytest.mark.parametrize("place", ELSEWHERE)
def test_exporters_to_elsewhere_are_left_alone(store_uri, monkeypatch, place):
    """Whoever sends traces to another place than an MLflow store goes on doing so, before, while and after."""
    for name, value in ELSEWHERE[place].items():
        monkeypatch.setenv(name, value)
    mlflow.tracing.reset()
    if place == "unity catalog":
        monkeypatch.setenv("DATABRICKS_HOST", "http://127.0.0.1:9")
        monkeypatch.setenv("DATABRICKS_TOKEN", "none")
        mlflow.tracing.set_destination(UCSchemaLocation("catalog", "schema"))

    def names():
        span_processor()
        processors = tracing_provider.provider.get()._active_span_processor._span_processors
        return [type(processor.span_exporter).__name__ for processor in processors]

    before = names()
    taken = export.install(export.ExportOptions())
    during = names()
    mlflow.tracing.enable()  # builds the provider anew
    rebuilt = names()
    taken()
    after = names()
    mlflow.tracing.reset()

    ours = ["WholeTraceExporter" if name == "MlflowV3SpanExporter" else name for name in before]
    assert (before, ours, ours, before) == (before, during, rebuilt, after)
    assert ("WholeTraceExporter" in during) == (place == "otlp and mlflow")


@pytest.mark.skipif(not hasattr(inference_table, "maybe_add_trace_to_serving_buffer"), reason="mlflow >= 3.12")
def test_a_served_model_keeps_its_trace_for_the_answer(sqlite, monkeypatch):
    """Also where it has imported IPython, in which nobody has begun a shell."""
    pytest.importorskip("IPython")
    monkeypatch.setenv("IS_IN_DB_MODEL_SERVING_ENV", "true")
    with mlflow.start_span("root") as root:
        mlflow.update_current_trace(client_request_id="asked")

    kept = inference_table._TRACE_BUFFER.pop("asked")
    assert root.trace_id == kept["info"]["trace_id"]


def test_the_shell_is_asked_for_as_mlflow_does(monkeypatch):
    """By ``IPython.get_ipython()``, which embedded shells and other people's tests put their own in place of."""
    pytest.importorskip("IPython")
    monkeypatch.setattr("IPython.get_ipython", object)
    assert mlflow_traces.displays()

    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    assert not mlflow_traces.displays()


def test_housekeeping_runs(store_uri):
    """About once a second and before each flush."""
    called = threading.Event()
    undo = export.install(export.ExportOptions(), housekeeping=called.set)
    export.flush(1)
    assert called.is_set()
    called.clear()
    assert called.wait(5)
    undo()
