"""Whatever happens to the store, everything is there afterwards, once."""

import contextlib
import contextvars
import gc
import itertools
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
import sqlalchemy
from mlflow.entities import Feedback, Metric, Param, RunTag
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST
from mlflow.store.db.utils import _get_managed_session_maker
from mlflow.tracking.request_header.databricks_request_header_provider import DatabricksRequestHeaderProvider
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import QueuePool
from stores import call, read, wait_until

from dspy_mlflow_async import export
from dspy_mlflow_async.export.operations import TraceOperation
from dspy_mlflow_async.export.queue import pending, store_queue
from dspy_mlflow_async.export.queue.pipeline import Pipeline
from dspy_mlflow_async.export.spool import segments as spools
from dspy_mlflow_async.export.spool.format import scan
from dspy_mlflow_async.export.spool.paths import segments_of
from dspy_mlflow_async.export.write import errors, prepare
from dspy_mlflow_async.export.write.errors import Outcome, Verdict, classify
from dspy_mlflow_async.seams import mlflow_store
from dspy_mlflow_async.seams.mlflow_http import Status
from dspy_mlflow_async.workers import map_concurrently
from mlflow_server import free_port, mlflow_server


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    """Come back soon: what is tested is that we do."""
    pause = errors.Backoff.pause
    monkeypatch.setattr(errors.Backoff, "pause", lambda self: min(0.2, pause(self)))


def arrived(installed, ids):
    """Exactly these traces are in the store, each whole."""
    traces = installed.read()
    return set(ids) == set(traces) and {4} == {len(trace.data.spans) for trace in traces.values()}


@pytest.mark.long
def test_a_server_that_is_killed_and_comes_back(make, server):
    """Traces and run results of an outage are kept on disk and sent in the background when it is over."""
    installed = make(uri=server.uri)
    ids = [call() for _ in range(5)]
    assert export.flush(100)
    run_id = mlflow.tracking.MlflowClient(server.uri).create_run(installed.experiment_id).info.run_id
    writer = export.run_writer(server.uri)
    writer.log(run_id, metrics=[Metric("score", 1.0, 1, 0)])
    assert writer.settle(run_id)
    server.kill()
    try:
        ids += [call() for _ in range(20)]
        writer.log(run_id, metrics=[Metric("score", 2.0, 2, 1)], params=[Param("p", "v")])
        writer.artifact(run_id, "folder/table.json", b"{}")
        writer.end(run_id, "FINISHED", 1234)
        assert not writer.settle(run_id)
        assert not export.flush(30)
        stats = export.stats()
        assert (5, 0, 20) == (stats.stored, stats.waiting, stats.spooled)
        mode = installed.queue.spool.folder.stat().st_mode & 0o777
        assert 0o700 == mode
        assert {0o600} == {f.stat().st_mode & 0o777 for f in installed.queue.spool.folder.iterdir()}
    finally:
        server.start()

    wait_until(lambda: export.stats().stored == 25, 60)
    assert export.flush(100)
    assert arrived(installed, ids)
    client = mlflow.tracking.MlflowClient(server.uri)
    run = client.get_run(run_id)
    assert [1.0, 2.0] == [metric.value for metric in client.get_metric_history(run_id, "score")]
    assert ({"p": "v"}, "FINISHED", 1234) == (run.data.params, run.info.status, run.info.end_time)
    assert ["folder/table.json"] == [file.path for file in client.list_artifacts(run_id, "folder")]
    assert [] == segments_of(installed.queue.spool.folder) or export.stats().spooled == 0


def test_pauses_leave_the_programs_random_numbers_alone():
    """A program that has seeded ``random`` gets the numbers that it gets without us."""
    random.seed(1)
    expected = [random.random() for _ in range(3)]  # noqa: S311 - no secret
    random.seed(1)
    backoff = errors.Backoff()
    seen = [(backoff.pause(), random.random())[1] for _ in range(3)]  # noqa: S311 - no secret

    assert expected == seen


@pytest.mark.long
def test_a_server_that_is_down_at_start(make, server):
    """What it takes is asked when it is there: spans go where they belong, in batches, and not into artifacts."""
    installed = make(uri=server.uri)
    server.kill()
    try:
        rest_store = type(installed.queue.writer.client.store)
        rest_store._get_server_version.cache_clear()  # this process is new, and has never seen the server
        ids = [call() for _ in range(10)]
        assert not export.flush(20)
    finally:
        server.start()

    wait_until(lambda: export.flush(5), 60)
    assert arrived(installed, ids)
    takes_batches = mlflow_store.supports_span_batches(installed.queue.writer.client)  # from MLflow 3.12 on
    assert takes_batches is installed.queue.writer.takes_batches
    assert installed.queue.writer.takes_spans


def test_an_http_proxy_that_is_gone_and_comes_back(make, server, monkeypatch):
    """The environment's proxies are looked up again for each batch, as everything else that may change."""
    installed = make(uri=server.uri)
    ids = [call()]
    assert export.flush(100)
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("http_proxy", os.environ["HTTP_PROXY"])
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    ids += [call() for _ in range(3)]
    assert not export.flush(20)
    assert (1, 3) == (export.stats().stored, export.stats().spooled)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    wait_until(lambda: export.flush(5), 60)
    assert arrived(installed, ids)


@pytest.mark.parametrize("fault", [500, 429, 401, 503, "hang up"])
def test_a_server_that_fails(make, proxy, fault):
    """Errors that may go away are retried until they have; a lost answer does not double anything."""
    installed = make(uri=proxy.uri)
    ids = [call()]
    assert export.flush(100)
    run_id = mlflow.tracking.MlflowClient(proxy.uri).create_run(installed.experiment_id).info.run_id
    writer = export.run_writer(proxy.uri)
    proxy.fault = fault
    ids += [call() for _ in range(8)]
    held = call()
    ids.append(held)
    export.release(held, assessments=[Feedback(name="score", value=1.0)])
    writer.log(run_id, metrics=[Metric("score", 2.0, 2, 1)])
    assert not writer.settle(run_id)
    assert proxy.seen.wait(20)
    assert not export.flush(20)
    proxy.fault = None

    wait_until(lambda: export.flush(5), 60)
    assert arrived(installed, ids)
    assert 1 == len(installed.read()[held].info.assessments)
    assert 1 == len(mlflow.tracking.MlflowClient(proxy.uri).get_metric_history(run_id, "score"))
    assert export.ExportStats(started=10, ended=10, stored=10) == export.stats()


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param(("slow", "slow"), id="slow"),
        pytest.param(("slow", "hang up", "slow", "cut"), id="hangs up"),
    ],
)
def test_a_server_that_stumbles_while_the_program_goes_on(make, proxy, answers):
    """Callers do not wait for it, and everything is there afterwards, once: feedback and metrics, too.

    A slow answer comes when callers have got three more calls done meanwhile, and not before.
    """
    installed = make(uri=proxy.uri)
    ids, worked = [call()], []
    assert export.flush(100)
    client = mlflow.tracking.MlflowClient(proxy.uri)
    run_id = client.create_run(installed.experiment_id).info.run_id
    writer = export.run_writer(proxy.uri)
    no_answer, over, steps = threading.Event(), threading.Event(), itertools.count()

    def work():
        step = next(steps)
        trace_id = call()
        export.release(trace_id, assessments=[Feedback(name="score", value=1.0)])
        writer.log(run_id, metrics=[Metric("score", 1.0, step, step)])
        ids.append(trace_id)
        worked.append(step)

    def go_on():
        while not over.wait(0.1):
            work()

    class Slow(threading.Event):
        """Wait until callers have got on, as long as they go on at all."""

        def wait(self, timeout=None):
            begun = len(worked)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: over.is_set() or len(worked) >= begun + 3)
                return
            held_up.append(begun)

    held_up = []
    faults = [Slow() if answer == "slow" else answer for answer in answers]
    proxy.fault = itertools.chain([no_answer], itertools.cycle(faults))
    ids.append(call())
    assert proxy.seen.wait(20)
    for _ in range(20):
        work()
    assert 1 == proxy.faults  # the server has not answered anybody meanwhile
    no_answer.set()
    threads = [threading.Thread(target=go_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: proxy.faults > len(answers) + 1, 60)
    over.set()
    for thread in threads:
        thread.join(30)
    proxy.fault = None

    assert [] == held_up
    wait_until(lambda: export.flush(5), 60)
    assert arrived(installed, ids)
    assert [0, 0, *[1] * len(worked)] == sorted(len(trace.info.assessments) for trace in installed.read().values())
    assert len(worked) == len(client.get_metric_history(run_id, "score"))
    assert export.ExportStats(started=len(ids), ended=len(ids), stored=len(ids)) == export.stats()
    assert 0 == sum(info.records for info in export.spools())


def test_what_comes_in_turns_is_written_together(make, proxy):
    """Traces, what is said of each, and the metrics of two runs: requests do not grow with the turns they take."""
    installed = make(uri=proxy.uri)
    client = mlflow.tracking.MlflowClient(proxy.uri)
    runs = [client.create_run(installed.experiment_id).info.run_id for _ in range(2)]
    ids = [call()]
    assert export.flush(100)
    installed.stop_writing()
    proxy.answers.clear()
    for step in range(30):
        ids.append(call())
        export.release(ids[-1], assessments=[Feedback(name="score", value=1.0)])
        for run_id in runs:
            export.run_writer(proxy.uri).log(run_id, metrics=[Metric("score", 1.0, step, step)])
    installed.write_again()

    assert export.flush(100)
    asked = Counter(request.split(b" ", 2)[1].rpartition(b"/")[2] for request, _ in proxy.answers)
    # 30 begun, and all spans in one batch where MLflow takes those (from 3.12 on).
    spans = 1 if installed.queue.writer.takes_batches else 30
    assert {b"traces": 30 + spans, b"assessments": 30, b"log-batch": 2} == asked
    assert arrived(installed, ids)
    assert [30, 30] == [len(client.get_metric_history(run_id, "score")) for run_id in runs]


def test_the_metrics_of_an_outage_are_sent_together(make, proxy):
    """What a run has logged while the server was away takes a few requests, not one for each score."""
    installed = make(uri=proxy.uri)
    client = mlflow.tracking.MlflowClient(proxy.uri)
    run_id = client.create_run(installed.experiment_id).info.run_id
    writer = export.run_writer(proxy.uri)
    proxy.fault = 503
    writer.log(run_id, metrics=[Metric("score", 0.0, 0, 0)])
    wait_until(lambda: export.spools() and export.spools()[0].records, 60)
    for step in range(1, 60):
        writer.log(run_id, metrics=[Metric("score", step / 60, step, step)])
    assert not export.flush(10)
    assert 60 == export.spools()[0].records
    proxy.answers.clear()
    proxy.fault = None

    wait_until(lambda: export.flush(5), 60)
    asked = Counter(request.split(b" ", 2)[1].rpartition(b"/")[2] for request, _ in proxy.answers)
    assert asked[b"log-batch"] <= 3
    proxy.answers.clear()
    assert list(range(60)) == sorted(metric.step for metric in client.get_metric_history(run_id, "score"))


@pytest.mark.skipif(not mlflow_store.finalizes(), reason="before MLflow 3.12 spans go first, trace by trace")
def test_a_server_far_away_is_asked_several_things_at_once(make, proxy):
    """What a long way costs is paid once for several traces, not once for each of them."""
    installed = make(uri=proxy.uri)
    ids = [call()]
    assert export.flush(100)
    installed.stop_writing()
    ids += [call() for _ in range(20)]
    answer = proxy.fault = threading.Event()
    installed.write_again()
    ids.append(call())  # wakes the writer

    wait_until(lambda: proxy.faults >= 4, 60)  # and none of them has been answered yet
    answer.set()
    assert export.flush(100)
    assert arrived(installed, ids)
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "dspy-mlflow-async-request"], 10)


def test_headers_and_proxies_are_found_out_once_for_a_batch(make, server, monkeypatch):
    """MLflow asks every provider of headers, and requests the whole environment for proxies, for each request."""
    installed = make(uri=server.uri)
    call()
    assert export.flush(100)
    installed.stop_writing()
    ids = [call() for _ in range(30)]
    asked = []
    in_context, scan = DatabricksRequestHeaderProvider.in_context, urllib.request.getproxies_environment
    monkeypatch.setattr(
        DatabricksRequestHeaderProvider, "in_context", lambda self: asked.append("headers") or in_context(self)
    )
    monkeypatch.setattr("requests.utils.getproxies", lambda: asked.append("proxies") or scan())
    installed.write_again()
    assert export.flush(100)
    found_out = Counter(asked)
    lanes = 4  # which may begin at the same time
    assert 0 == found_out["headers"]  # once for the process, and that was above
    assert 1 <= found_out["proxies"] <= lanes + 1
    assert set(ids) <= set(installed.read())


@pytest.mark.long
def test_a_server_that_keeps_no_spans(make, tmp_path):
    """Files behind a server: it says so when it is given spans, and gets them as artifacts."""
    with mlflow_server(tmp_path, str(tmp_path / "mlruns")) as server:
        installed = make(uri=server.uri)
        ids = [call() for _ in range(3)]
        assert export.flush(100)
        assert arrived(installed, ids)
        assert not installed.queue.writer.takes_spans


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.skipif(not mlflow_store.finalizes(), reason="before MLflow 3.12 spans go first, trace by trace")
def test_a_lane_that_ends_without_a_word(make, server, monkeypatch):
    """No error, and no answer either: the trace counts as not begun, and is tried again."""
    installed = make(uri=server.uri)
    ids = [call()]
    assert export.flush(100)
    installed.stop_writing()
    writer, start, broken, verdicts = installed.queue.writer, mlflow_store.start_trace, [], {}
    write = writer.write

    def end_some(client, info, **options):
        if threading.current_thread().name == "dspy-mlflow-async-request" and len(broken) < 2:
            broken.append(info.trace_id)
            sys.exit()
        return start(client, info, **options)

    def note(items):
        outcomes = write(items)
        for outcome in outcomes:
            verdicts.setdefault(outcome.operation.key, outcome.verdict)
        return outcomes

    monkeypatch.setattr(mlflow_store, "start_trace", end_some)
    monkeypatch.setattr(writer, "write", note)
    ids += [call() for _ in range(20)]
    installed.write_again()
    wait_until(lambda: export.flush(30), 60)
    assert broken
    assert {Verdict.AWAY} == {verdicts[key] for key in broken}
    assert arrived(installed, ids)


def test_lanes_run_side_by_side_each_in_a_copy_of_the_context():
    variable = contextvars.ContextVar("variable", default=None)
    variable.set("caller's")
    both, seen, threads = threading.Barrier(2, timeout=10), [], set()

    def work(item):
        seen.append((item, variable.get()))
        threads.add(threading.current_thread())
        both.wait()
        return True

    map_concurrently(work, [0, 1], 8)
    assert [(0, "caller's"), (1, "caller's")] == sorted(seen)
    assert 2 == len(threads)
    assert [threading.current_thread()] == [thread for thread in threads if thread.is_alive()]


def test_nothing_further_is_begun_once_a_lane_says_so():
    seen = []
    map_concurrently(lambda item: seen.append(item) or item < 2, range(10), 1)
    assert [0, 1, 2] == seen


def test_a_refusal_goes_to_the_dead_letters(sqlite):
    """A deleted experiment takes no traces: they are kept with the reason, and not tried for ever."""
    client = mlflow.tracking.MlflowClient(sqlite.uri)
    client.delete_experiment(sqlite.experiment_id)
    call()

    assert export.flush(100)
    assert 1 == export.stats().dead
    letters = (sqlite.queue.spool.folder / "dead.letters").read_bytes()
    ((_, letter),) = scan(letters)
    assert b"must be in the 'active' state" in letter
    (info,) = export.spools()
    assert (1, 0) == (info.dead, info.records)


def test_one_bad_record_does_not_hold_up_the_others(sqlite, monkeypatch):
    """A record that fails again and again while others are stored goes to the dead letters."""
    monkeypatch.setattr(pending, "SUSPICIONS", 3)
    prepared = prepare.prepare

    def fail_for_bad(operation):
        if any(span.name == "bad" for span in operation.spans):
            raise ValueError("bad")
        return prepared(operation)

    monkeypatch.setattr(prepare, "prepare", fail_for_bad)
    call("bad")
    for _ in range(20):
        call()
        export.flush(5)
        if export.stats().dead:
            break

    stats = export.stats()
    assert (1, 0, 0) == (stats.dead, stats.spooled, stats.waiting)
    assert stats.started - 1 == stats.stored


def test_memory_is_bounded(make):
    """What the memory may not hold goes to the disk in the caller's thread, and arrives too."""
    installed = make(max_waiting_bytes=20_000)
    installed.stop_writing()
    ids = [call(text="x" * 3000) for _ in range(20)]
    stats = export.stats()

    assert stats.waiting < 8
    assert 20 == stats.waiting + stats.spooled
    assert installed.queue.pending.size <= 20_000
    installed.write_again()
    assert export.flush(100)
    assert arrived(installed, ids)


def test_feedback_follows_its_trace_to_the_disk(make):
    """A follow-up of a spooled trace waits behind it."""
    installed = make(max_waiting_bytes=0)
    installed.stop_writing()
    trace_id = call()
    installed.queue.options = export.ExportOptions()
    export.release(trace_id, assessments=[Feedback(name="score", value=1.0)])

    assert 0 == installed.queue.pending.resident
    waiting = installed.queue.pending.take(10, 10**6)
    installed.queue.pending.release(waiting)
    assert [trace_id] * 2 == [entry.reference.key for entry in waiting]
    installed.write_again()
    assert export.flush(100)
    assert 1 == len(installed.read()[trace_id].info.assessments)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, where the test may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "none", folder]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small tmpfs here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # noqa: S607


def test_a_full_disk_is_counted(make, small_disk, monkeypatch, caplog):
    """What neither memory nor disk can hold is dropped, with one warning; what they hold is stored in the end."""
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(small_disk / "spool"))
    installed = make(max_waiting_bytes=300_000)
    installed.stop_writing()
    ids = [call(text="x" * 3000) for _ in range(100)]
    stats = export.stats()

    assert 100 == stats.dropped + stats.waiting + stats.spooled
    assert min(stats.dropped, stats.waiting, stats.spooled) > 5
    assert 1 == sum("cannot write to the spool" in record.message for record in caplog.records)
    installed.write_again()
    assert export.flush(100)
    stats = export.stats()
    assert (100, 0, 0) == (stats.dropped + stats.stored, stats.waiting, stats.spooled)
    traces = installed.read()
    assert stats.stored == len(set(ids) & set(traces)) == len(traces)
    assert {4} == {len(trace.data.spans) for trace in traces.values()}


def test_durable_on_a_full_disk(make, small_disk, monkeypatch, caplog):
    """What the disk does not take is kept in memory, and stored, as if `durable` were off; the program goes on."""
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(small_disk / "spool"))
    installed = make(durable=True)
    installed.stop_writing()
    ids = [call(text="x" * 3000) for _ in range(60)]

    assert (60, 0) == (export.stats().waiting, export.stats().dropped)
    assert 1 == sum("cannot write to the spool" in record.message for record in caplog.records)
    installed.write_again()
    assert export.flush(100)
    assert arrived(installed, ids)


def test_a_slow_store_does_not_slow_the_program(make, monkeypatch):
    """Handing over takes as long with 2,000 waiting traces as with none."""
    installed = make()
    installed.stop_writing()

    def cost():
        begun = time.thread_time()
        for _ in range(100):
            call()
        return time.thread_time() - begun

    cost()
    first = min(cost() for _ in range(3))
    for _ in range(1500):
        call()
    last = min(cost() for _ in range(3))

    assert last < first * 1.5
    installed.write_again()


def test_a_clock_that_goes_backwards(make, monkeypatch):
    """Waiting is by the monotonic clock."""
    installed = make(children_timeout=0.3)
    now = time.time
    with mlflow.start_span("root") as root:
        mlflow.start_span_no_context("open", parent_span=root)
        monkeypatch.setattr(time, "time", lambda: now() - 86_400)

    wait_until(lambda: root.trace_id in read(installed.uri, installed.experiment_id))


def test_run_operations_keep_their_order(sqlite):
    """Once something of a run waits, all later operations of that run wait behind it; other runs do not."""
    client = mlflow.tracking.MlflowClient(sqlite.uri)
    one, two = (client.create_run(sqlite.experiment_id).info.run_id for _ in range(2))
    writer = export.run_writer(None)
    urgent = sqlite.queue.synchronous.writer
    writer.log(one, metrics=[Metric("m", 1, 1, 0)], params=[Param(f"p{n}", "1") for n in range(150)])
    assert writer.settle(one)
    sqlite.stop_writing()
    urgent.write, write = lambda items: [queueing_outcome(item) for item in items], urgent.write
    writer.log(one, metrics=[Metric("m", float("nan"), 2, 1)])
    assert not writer.settle(one)
    urgent.write = write
    writer.log(one, metrics=[Metric("m", 3, 3, 2)])
    writer.end(one, "FAILED", 99)
    writer.log(two, tags=[RunTag("t", "1")])
    assert writer.settle(two)
    assert "RUNNING" == client.get_run(one).info.status
    assert "1" == client.get_run(two).data.tags["t"]

    sqlite.write_again()
    assert export.flush(100)
    assert 3 == len(client.get_metric_history(one, "m"))
    assert ("FAILED", 150) == (client.get_run(one).info.status, len(client.get_run(one).data.params))


def queueing_outcome(item):
    return Outcome(item, Verdict.AWAY, OSError("away"))


@pytest.mark.parametrize("first", ["the process saves", "the store answers"])
def test_the_process_ends_while_the_store_takes_a_batch(sqlite, monkeypatch, first):
    """Whoever is first, each trace is counted once, nothing is called lost, and the disk keeps what is not stored."""
    taking, go = threading.Event(), threading.Event()
    write, queue = type(sqlite.queue.writer).write, sqlite.queue

    def slow_write(self, items):
        outcomes = write(self, items) if first == "the store answers" else None
        taking.set()
        assert go.wait(20)
        return outcomes or write(self, items)

    monkeypatch.setattr(type(queue.writer), "write", slow_write)
    ids = [call() for _ in range(10)]
    assert not export.flush(0.2)
    assert taking.wait(20)
    queue.save_everything()
    saved = export.stats()
    go.set()
    queue.worker.thread.join(20)

    assert (10, 0) == (saved.spooled, saved.waiting)
    assert export.ExportStats(started=10, ended=10, stored=10) == export.stats()
    assert set(ids) == set(sqlite.read())
    assert 0 == queue.pending.spooled == sum(info.records for info in export.spools())


def test_two_threads_flush_at_once(sqlite):
    """Both return when everything is stored."""
    for _ in range(50):
        call()
    results = []
    threads = [threading.Thread(target=lambda: results.append(export.flush(30))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)

    assert [True, True] == results
    assert 50 == export.stats().stored


def test_what_follows_a_suspect_stays_behind_it(sqlite, monkeypatch):
    """Feedback that waits in memory behind a trace that fails for no clear reason is not sent first, and refused."""
    prepared, failed = prepare.prepare, set()

    def fail_once(operation):
        if isinstance(operation, TraceOperation) and operation.key not in failed:
            failed.add(operation.key)
            raise ValueError("once")
        return prepared(operation)

    monkeypatch.setattr(prepare, "prepare", fail_once)
    sqlite.stop_writing()
    ids = [call() for _ in range(store_queue.BATCH_OPERATIONS)]
    for trace_id in ids:
        export.release(trace_id, assessments=[Feedback(name="score", value=1.0)])
    sqlite.write_again()

    wait_until(lambda: export.flush(5), 60)
    assert export.ExportStats(started=len(ids), ended=len(ids), stored=len(ids)) == export.stats()
    assert [1] * len(ids) == [len(trace.info.assessments) for trace in sqlite.read().values()]
    assert 0 == sum(info.dead for info in export.spools())


def test_a_clock_that_goes_backwards_between_segments(make, monkeypatch):
    """Feedback in a later segment is sent after its trace, whatever the clock says."""
    monkeypatch.setattr(spools, "SEGMENT_BYTES", 1)
    installed = make(max_waiting_bytes=0)
    installed.stop_writing()
    trace_id = call()
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() - 86_400 * 10**9)
    export.release(trace_id, assessments=[Feedback(name="score", value=1.0)])
    installed.queue.save_everything()
    folder = installed.queue.spool.folder
    assert 2 == len(segments_of(folder))

    assert (2, 0) == ((summary := export.replay(folder=folder)).stored, summary.dead)
    assert 1 == len(installed.read()[trace_id].info.assessments)


def test_a_suspect_in_one_segment_holds_back_what_follows_in_the_next(make, monkeypatch):
    """A replay does not send feedback before its trace has gone through."""
    monkeypatch.setattr(spools, "SEGMENT_BYTES", 1)
    installed = make(max_waiting_bytes=0)
    installed.stop_writing()
    trace_id = call()
    export.release(trace_id, assessments=[Feedback(name="score", value=1.0)])
    installed.queue.save_everything()
    folder = installed.queue.spool.folder
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "prepare", lambda _: (_ for _ in ()).throw(ValueError("for no clear reason")))
        summary = export.replay(folder=folder)
    assert (2, 0, 0) == (summary.left, summary.stored, summary.dead)

    assert 2 == export.replay(folder=folder).stored
    assert 1 == len(installed.read()[trace_id].info.assessments)


def test_feedback_that_no_disk_can_hold_as_it_is(make):
    """Lone surrogates are repaired on the way to the disk as on the way to the store."""
    installed = make(max_waiting_bytes=0)
    installed.stop_writing()
    trace_id = call()
    feedback = Feedback(name="score", value="a\ud800", rationale="b\udfff", metadata={"k": "c\ud800"})
    error = Feedback(name="error", error=ValueError("d\ud800"))
    export.release(trace_id, assessments=[feedback, error])
    assert 2 == installed.queue.pending.spooled
    installed.write_again()

    assert export.flush(100)
    by_name = {assessment.name: assessment for assessment in installed.read()[trace_id].info.assessments}
    stored = by_name["score"]
    texts = (
        stored.feedback.value,
        stored.rationale,
        stored.metadata["k"],
        by_name["error"].feedback.error.error_message,
    )
    assert tuple(f"{letter}\N{REPLACEMENT CHARACTER}" for letter in "abcd") == texts


def test_a_record_of_a_later_version_is_kept(sqlite):
    """A running process leaves alone what it does not understand; the next version will send it."""
    later = spools.Spool(sqlite.queue.spool.folder, sqlite.uri)
    later.put(b'{"v":99,"kind":"trace","key":"tr-1","counted":1}', key="tr-1", counted=1)
    later.close()
    call()

    assert export.flush(100)
    wait_until(sqlite.queue.is_empty)
    assert 1 == export.spools()[0].records
    assert export.ExportStats(started=1, ended=1, stored=1) == export.stats()


@pytest.mark.long
def test_flush_returns_when_neither_the_store_nor_the_disk_takes_anything(make, server, small_disk, monkeypatch):
    """Also without a bound: there is nothing to wait for."""
    monkeypatch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(small_disk / "spool"))
    installed = make(uri=server.uri)
    ids = [call()]
    assert export.flush(100)
    server.kill()
    try:
        ids += [call(text="x" * 3000) for _ in range(60)]
        assert not export.flush()
        assert export.stats().waiting > 0
    finally:
        server.start()

    assert export.flush(100)
    assert arrived(installed, ids)


def test_flush_asks_for_itself(sqlite, monkeypatch):
    """An attempt that began before it, and fails while it waits, says nothing about now."""
    monkeypatch.setattr(store_queue, "ATTEMPTS", 1)
    monkeypatch.setattr(errors.Backoff, "pause", lambda self: 60.0)
    writer, under_way, go = sqlite.queue.writer, threading.Event(), threading.Event()
    write = writer.write

    def away_once(items):
        writer.write = write
        under_way.set()
        assert go.wait(30)
        return [Outcome(item, Verdict.AWAY, ConnectionError("away")) for item in items]

    writer.write = away_once
    ids = [call()]
    assert under_way.wait(30)
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(export.flush, 30)
        wait_until(lambda: sqlite.queue.progress.is_awaited)
        go.set()
        assert flushed.result()
    assert arrived(sqlite, ids)


@pytest.mark.long
def test_new_options_during_an_outage(make, server):
    """What waits goes on waiting in the same place, in order, and is counted when it arrives."""
    installed = make(uri=server.uri)
    ids = [call()]
    assert export.flush(100)
    server.kill()
    try:
        ids += [call() for _ in range(5)]
        assert not export.flush(30)
        assert 5 == export.stats().spooled
        undo = export.install(export.ExportOptions(visible_after=5.0))
        export.release(ids[1], assessments=[Feedback(name="score", value=1.0)])
    finally:
        server.start()

    wait_until(lambda: export.flush(5), 60)
    assert export.ExportStats(started=6, ended=6, stored=6) == export.stats()
    assert arrived(installed, ids)
    assert 1 == len(installed.read()[ids[1]].info.assessments)
    undo()


def test_flush_after_undoing_waits_for_what_is_on_its_way(sqlite, monkeypatch):
    """The traces of a tracer that is off already are stored when `flush` returns."""
    ids = [call() for _ in range(50)]
    sqlite.undo()

    assert export.flush(100)
    assert set(ids) == set(sqlite.read())


def test_projects_with_the_same_relative_store_have_a_spool_each(tmp_path, monkeypatch):
    """`sqlite:///mlflow.db` is another file in another folder, and what lies in its spool can be sent from anywhere."""
    folders = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        spool = Pipeline(export.ExportOptions()).queue("sqlite:///mlflow.db").spool
        folders[spool.folder] = spool.uri

    assert [f"sqlite:///{tmp_path / name / 'mlflow.db'}" for name in ("one", "two")] == list(folders.values())


@pytest.mark.parametrize(
    ("uri", "absolute"),
    [
        ("sqlite:///a/b.db", "sqlite:////there/a/b.db"),
        ("sqlite:////a/b.db", None),
        ("sqlite:///:memory:", None),
        ("sqlite+pysqlite:///b.db", "sqlite+pysqlite:////there/b.db"),
        ("./mlruns", "file:///there/mlruns"),
        ("file:mlruns", "file:///there/mlruns"),
        ("file:///mlruns", None),
        ("http://127.0.0.1:5000", None),
        ("postgresql://user@host/name", None),
        ("databricks", None),
    ],
)
def test_absolute_uris(uri, absolute, monkeypatch):
    """What may mean something else in another working directory does not any more."""
    monkeypatch.setattr(Path, "cwd", classmethod(lambda cls: cls("/there")))

    assert (absolute or uri) == mlflow_store.absolute_uri(uri)


def test_a_store_whose_connections_are_all_in_use(tmp_path):
    """MLflow calls that a bad request, yet it is none: what was to be written waits, and is no dead letter."""
    engine = sqlalchemy.create_engine(
        f"sqlite:///{tmp_path / 'small.db'}", pool_size=1, max_overflow=0, pool_timeout=0.01, poolclass=QueuePool
    )
    sessions = _get_managed_session_maker(sessionmaker(bind=engine), "sqlite")
    with engine.connect(), pytest.raises(mlflow.MlflowException) as caught, sessions() as session:
        session.execute(sqlalchemy.text("select 1"))

    assert "BAD_REQUEST" == caught.value.error_code
    assert Verdict.AWAY is classify(caught.value)
    engine.dispose()


def test_connections_that_may_only_read_are_not_kept(sqlite):
    """SQLite opens a read-only file for reading, and such a connection stays so when the file may be written."""
    call()
    assert export.flush(60)
    engine = mlflow_store.TracingClient(sqlite.uri).store.engine
    try:
        with contextlib.ExitStack() as stack:  # all that rest in the pool: the next write takes one of them
            for connection in [stack.enter_context(engine.connect()) for _ in range(engine.pool.checkedin())]:
                connection.exec_driver_sql("PRAGMA query_only = ON")
        ids = [call() for _ in range(3)]

        wait_until(lambda: export.flush(10), 30)
        assert set(ids) < set(sqlite.read())
        assert 4 == export.stats().stored
    finally:
        engine.dispose()  # what is left of them would fail the next test


@pytest.mark.long
def test_what_waits_weighs_what_it_takes(make):
    """The bound on memory is one of memory, not of texts alone."""
    installed = make()
    installed.stop_writing()
    call()
    gc.collect()
    tracemalloc.start(1)
    before, weighed = tracemalloc.get_traced_memory()[0], installed.queue.pending.size
    for _ in range(300):
        call()
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()

    assert 0.7 * taken < installed.queue.pending.size - weighed < 1.5 * taken
    installed.write_again()
    assert export.flush(100)


REFUSED = mlflow.MlflowException("no", error_code=INVALID_PARAMETER_VALUE)
MISSING = mlflow.MlflowException("no", error_code=RESOURCE_DOES_NOT_EXIST)


def bad_request(text):
    """How MLflow's SQL store says what its database has said."""
    return mlflow.MlflowException(text, error_code=INVALID_PARAMETER_VALUE)


@pytest.mark.parametrize(
    ("error", "statuses", "verdict"),
    [
        (PermissionError(13, "not to be written", "/mlartifacts"), [Status(200)], Verdict.SUSPECT),
        (FileNotFoundError("gone"), [], Verdict.SUSPECT),
        (ConnectionResetError("reset"), [], Verdict.AWAY),
        (OSError(28, "No space left on device"), [], Verdict.AWAY),
        (mlflow.MlflowException("API request to http://a/b failed with exception refused"), [], Verdict.AWAY),
        # The request before it was answered.
        (
            mlflow.MlflowException("API request to http://a/b failed with exception refused"),
            [Status(200)],
            Verdict.AWAY,
        ),
        (
            mlflow.MlflowException("API request to http://a/b failed with timeout exception late."),
            [Status(200)],
            Verdict.AWAY,
        ),
        (
            mlflow.MlflowException("API request to endpoint /b failed with error code 500 != 200"),
            [Status(500)],
            Verdict.SUSPECT,
        ),
        # What MLflow says in its own JSON is meant; what something before it says is not about the record.
        (REFUSED, [], Verdict.REFUSED),
        (REFUSED, [Status(400, is_mlflows=True)], Verdict.REFUSED),
        (REFUSED, [Status(400)], Verdict.SUSPECT),
        (REFUSED, [Status(413)], Verdict.SUSPECT),
        (MISSING, [Status(404, is_mlflows=True)], Verdict.REFUSED),
        (MISSING, [Status(404)], Verdict.AWAY),
        (MISSING, [Status(405)], Verdict.AWAY),
        (MISSING, [Status(302)], Verdict.AWAY),
        (MISSING, [Status(403, is_mlflows=True)], Verdict.AWAY),
        # A database that takes nothing now, and one that will never take this.
        (
            bad_request("(psycopg2.errors.ReadOnlySqlTransaction) cannot execute INSERT in a read-only transaction"),
            [],
            Verdict.AWAY,
        ),
        (bad_request("(sqlite3.OperationalError) attempt to write a readonly database"), [], Verdict.AWAY),
        (bad_request("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name"), [], Verdict.SUSPECT),
        (
            bad_request(
                '(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint "datasets_pk"'
            ),
            [],
            Verdict.SUSPECT,
        ),
        (bad_request("(sqlite3.IntegrityError) FOREIGN KEY constraint failed"), [], Verdict.REFUSED),
        (bad_request("(psycopg2.InterfaceError) connection already closed"), [], Verdict.AWAY),
        (
            bad_request("(psycopg2.DataError) no\n[SQL: INSERT]\n[parameters: ('in a read-only transaction')]"),
            [],
            Verdict.REFUSED,
        ),
        # The request before it was answered; what is wrong the client has said.
        (REFUSED, [Status(200)], Verdict.REFUSED),
    ],
)
def test_what_an_error_says(error, statuses, verdict):
    """A store that is away is tried again with everything; a record that may be to blame by itself."""
    assert verdict is classify(error, statuses)
