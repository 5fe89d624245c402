"""The spool: what is written can be read, what is damaged is skipped and counted, and replay sends it once."""

import contextlib
import errno
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities import Expectation, Feedback, Metric, Param, RunTag, SpanEvent
from stores import call, read, wait_until

from dspy_mlflow_async import export
from dspy_mlflow_async.export.operations import RunOperation, TraceUpdate
from dspy_mlflow_async.export.queue import store_queue
from dspy_mlflow_async.export.spool import codec, segments
from dspy_mlflow_async.export.spool.format import done_offsets, frame, mark_done, scan
from dspy_mlflow_async.export.spool.paths import Lock, segments_of
from dspy_mlflow_async.export.write import errors


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_lines_can_be_read_back(payloads):
    """Any payloads, in their order, with their offsets."""
    data = b"".join(map(frame, payloads))

    found = list(scan(data))
    assert payloads == [payload for _, payload in found]
    assert all(data[offset:].startswith(frame(payload)) for offset, payload in found)


def test_a_segment_cut_at_every_byte():
    """Whole lines before the cut are read, the torn one is counted once, nothing is invented."""
    payloads = [b'{"a": 1}', b'{"b": "x\\n"}', b"{}"]
    lines = [frame(payload) for payload in payloads]
    data = b"".join(lines)
    ends = list(itertools.accumulate(map(len, lines)))
    for cut in range(len(data) + 1):
        whole = sum(cut >= end - 1 for end in ends)  # the line's end may be missing
        is_torn = cut > (ends[whole - 1] if whole else 0)
        assert [*payloads[:whole], *[None] * is_torn] == [payload for _, payload in scan(data[:cut])]


def test_every_flipped_bit():
    """A flipped bit costs at most one record, and is counted unless it hit the end of a line."""
    payloads = [b'{"a": 1}', b'{"b": "xyz"}', b'{"c": []}']
    data = b"".join(map(frame, payloads))
    for index in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[index] ^= 1 << bit
            found = [payload for _, payload in scan(bytes(damaged))]
            good = [payload for payload in found if payload is not None]
            assert len(good) >= 2
            assert set(good) <= set(payloads)
            assert len(good) == 3 or None in found


def test_damaged_notes_of_what_is_done_cost_nothing(tmp_path):
    """A damaged note counts as not written: the record is sent again, never forgotten."""
    segment = tmp_path / "1-1-a.seg"
    segment.write_bytes(b"")
    mark_done(segment, [0, 1234])
    mark_done(segment, [99], stored=False)
    note = segment.with_suffix(".done")
    data = note.read_bytes()
    whole = {0: True, 1234: True, 99: False}

    assert whole == done_offsets(segment)
    for index in range(len(data)):
        damaged = bytearray(data)
        damaged[index] ^= 1
        note.write_bytes(damaged)
        assert done_offsets(segment).items() <= whole.items()


def test_a_segment_stays_open_while_somebody_waits_for_the_disk(tmp_path, monkeypatch):
    """Another caller begins a new segment between the decision to sync the old one and the sync itself."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1)
    written = segments.Spool(tmp_path / "spool", "uri")
    sync_file, synced = segments.sync_file, []
    other = threading.Thread(target=lambda: written.put(b"{}", key="second", counted=1))

    def slow_sync(handle):
        if not synced:
            before = os.fstat(handle)
            other.start()
            other.join(0.5)  # it waits for us
            synced.append(os.path.samestat(before, os.fstat(handle)))
        sync_file(handle)

    monkeypatch.setattr(segments, "sync_file", slow_sync)
    first = written.put(b"[]", key="first", counted=1, sync=True)
    other.join(20)
    written.close()

    assert [True] == synced
    assert b"[]" == written.read(first)
    assert 2 == len(segments_of(written.folder))


def test_a_sync_that_fails_when_a_segment_is_closed(tmp_path, monkeypatch):
    """Who waits for it is not told that the record is safe."""

    def fail(handle):
        raise OSError(errno.EIO, "the disk is broken")

    written = segments.Spool(tmp_path / "spool", "sqlite:///x.db")
    reference = written.put(b"{}", key="tr-1", counted=1)
    monkeypatch.setattr(segments, "sync_file", fail)
    written.close()  # before the one who has written it comes to its sync
    with pytest.raises(OSError, match="could not be synced"):
        written.sync(reference)


def test_a_full_segment_is_its_writers_until_it_is_done_with(tmp_path, monkeypatch):
    """Nobody else may send or delete what its living writer still counts on; a new one is locked from its beginning."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1)
    written = segments.Spool(tmp_path / "spool", "uri")
    references = [written.put(b"{}", key=str(n), counted=1) for n in range(3)]
    locks = [Lock(segment) for segment in segments_of(written.folder)]

    assert [False] * 3 == [lock.acquire() for lock in locks]
    written.done(references[:1])
    assert [reference.segment for reference in references[1:]] == segments_of(written.folder)
    written.close()
    assert [True] * 2 == [lock.acquire() for lock in locks[1:]]
    assert b"{}" == written.read(references[1])
    for lock in locks:
        lock.release()


def test_a_trace_survives_the_codec(sqlite):
    """Spans, events, links, status, attachments, previews, tags, assessments, prompts: all is there again."""
    from mlflow.tracing.attachments import Attachment

    sqlite.stop_writing()
    with mlflow.start_span("root", span_type="AGENT") as root:
        root.set_inputs({"ü": [1, None, "\ud800"], "image": Attachment(content_type="image/png", content_bytes=b"\0")})
        with contextlib.suppress(ZeroDivisionError), mlflow.start_span("child", span_type="LLM") as child:
            child.add_event(SpanEvent("event", attributes={"a": 1, "b": [1.5, 2.5]}))
            if link := getattr(mlflow.entities, "Link", None):  # from mlflow 3.12 on
                child.add_link(link(trace_id="tr-" + "1" * 32, span_id="2" * 16, attributes={"x": "y"}))
            1 / 0  # noqa: B018
        mlflow.update_current_trace(tags={"t": "1"}, metadata={"m": "2"}, client_request_id="c")
        export.hold(root.trace_id)
    export.release(root.trace_id, assessments=[Feedback(name="f", value={"a": 1.0}, rationale="r")])
    (entry,) = sqlite.queue.pending.take_residents()
    item = entry.operation
    sqlite.queue.pending.release([entry])
    again = codec.decode(codec.encode(item))

    def plain(spans):  # OpenTelemetry makes tuples of lists, JSON lists of tuples
        return [json.loads(json.dumps(span.to_dict())) for span in spans]

    assert plain(s.to_immutable_span() for s in item.spans) == plain(again.spans)
    assert [s._attachments.keys() for s in item.spans] == [s._attachments.keys() for s in again.spans]
    assert repr(item.info) == repr(again.info)
    assert (item.key, item.counted, item.stage, item.experiment_id) == (
        again.key,
        again.counted,
        again.stage,
        again.experiment_id,
    )
    sqlite.write_again()
    assert export.flush(100)


def test_other_operations_survive_the_codec():
    """Feedback, expectations, run values, artifacts, NaN and infinity."""
    said = [Feedback(name="f", value=0.5, trace_id="tr-1"), Expectation(name="e", value=["x"], trace_id="tr-1")]
    follow_up = TraceUpdate(key="tr-1", assessments=said, tags={"a": "b"})
    run = RunOperation(
        key="run",
        metrics=[Metric("m", float("inf"), 1, 2), Metric("n", 0.1, 3, 4)],
        params=[Param("p", "v")],
        tags=[RunTag("t", "u")],
        path="a/b",
        content=b"\xff\0",
        status="KILLED",
        end_time_ms=5,
    )
    for item in (follow_up, run):
        again = codec.decode(codec.encode(item))
        again.size = item.size

        assert repr(item) == repr(again)


@settings(max_examples=50)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(), max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=3), inner, max_size=3)
        ),
    )
)
def test_any_json_survives(value):
    """Lone surrogates and integers beyond 64 bits included."""
    assert value == codec.loads(codec.dumps(value))


def test_a_later_version_is_left_alone():
    """A record of a format that is not known is not guessed at."""
    with pytest.raises(ValueError, match="version 99"):
        codec.decode(b'{"v": 99}')


# --- replay ---


@pytest.fixture
def spooled(make):
    """A pipeline whose spool holds ten traces, one of them with feedback, and a run's results."""
    installed = make(max_waiting_bytes=0)
    installed.stop_writing()
    ids = [call() for _ in range(10)]
    export.release(ids[0], assessments=[Feedback(name="score", value=1.0)])
    run_id = mlflow.tracking.MlflowClient().create_run(installed.experiment_id).info.run_id
    installed.queue.put(RunOperation(key=run_id, metrics=[Metric("m", 1.0, 1, 0)]))
    installed.queue.put(RunOperation(key=run_id, status="FINISHED", end_time_ms=7))
    installed.queue.save_everything()
    installed.pipeline.queues.clear()
    installed.ids, installed.run_id = ids, run_id
    return installed


def test_spools_are_reported(spooled, spool_dir):
    """Doctor can say what lies where."""
    (info,) = export.spools()

    assert (13, 10, 0, 0, False) == (info.records, info.traces, info.dead, info.damaged, info.in_use)
    assert (spooled.uri, spool_dir) == (info.tracking_uri, info.folder.parent)
    assert not info.is_empty
    assert info.size > 1000


def test_replay_sends_everything_once(spooled):
    """A dry run sends nothing; the second replay has nothing to do."""
    seen = []
    dry = export.replay(tracking_uri=None, folder=None, dry_run=True, progress=seen.append)
    assert (13, 10, 0) == (dry.left, dry.traces, dry.stored)
    assert {} == spooled.read()

    summary = export.replay(tracking_uri=spooled.uri, folder=None, dry_run=False, progress=seen.append)
    assert (13, 10, 0, 0, ()) == (summary.stored, summary.traces, summary.left, summary.dead, summary.errors)
    assert (13, 13) == (seen[-1].done, seen[-1].total)
    traces = spooled.read()
    assert set(spooled.ids) == set(traces)
    assert {9} == {trace.info.token_usage["total_tokens"] for trace in traces.values()}
    assert 1 == len(traces[spooled.ids[0]].info.assessments)
    assert "FINISHED" == mlflow.get_run(spooled.run_id).info.status
    assert [] == list(Path(export.spools()[0].folder).glob("*.seg"))
    assert 0 == export.replay(tracking_uri=None, folder=None, dry_run=False, progress=seen.append).stored


def test_replay_of_what_is_stored_already_doubles_nothing(spooled):
    """The spool of a process that was killed just after storing."""
    folder = export.spools()[0].folder
    copies = {path.name: path.read_bytes() for path in folder.iterdir()}
    export.replay(tracking_uri=None, folder=folder, dry_run=False, progress=lambda _: None)
    for name, content in copies.items():
        (folder / name).write_bytes(content)
    again = export.replay(tracking_uri=None, folder=folder, dry_run=False, progress=lambda _: None)

    assert (13, 0) == (again.stored, again.dead)
    traces = spooled.read()
    assert set(spooled.ids) == set(traces)
    assert {4} == {len(trace.data.spans) for trace in traces.values()}
    assert {9} == {trace.info.token_usage["total_tokens"] for trace in traces.values()}
    assert 1 == len(traces[spooled.ids[0]].info.assessments)
    assert 1 == len(mlflow.tracking.MlflowClient().get_metric_history(spooled.run_id, "m"))


def test_replay_goes_on_where_it_was_interrupted(spooled, monkeypatch):
    """Interrupted after a batch, the next one sends the rest."""
    monkeypatch.setattr(store_queue, "BATCH_OPERATIONS", 4)

    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.replay(tracking_uri=None, folder=None, dry_run=False, progress=interrupt)
    assert 9 == export.spools()[0].records
    assert 4 == len(spooled.read())

    assert 9 == export.replay(tracking_uri=None, folder=None, dry_run=False, progress=lambda _: None).stored
    assert set(spooled.ids) == set(spooled.read())


def test_several_replays_at_once(spooled):
    """They do not get into each other's way."""

    def go(_):
        return export.replay(tracking_uri=None, folder=None, dry_run=False, progress=lambda _: None)

    with ThreadPoolExecutor(3) as pool:
        summaries = list(pool.map(go, range(3)))

    assert 13 == sum(summary.stored for summary in summaries)
    assert set(spooled.ids) == set(spooled.read())


def test_a_damaged_spool_is_sent_as_far_as_it_goes(spooled):
    """A torn tail and a flipped bit are counted and set aside, the rest arrives."""
    (segment,) = export.spools()[0].folder.glob("*.seg")
    data = bytearray(segment.read_bytes())
    data[100] ^= 4
    segment.write_bytes(data[:-40])
    info = export.spools()[0]
    summary = export.replay(tracking_uri=None, folder=None, dry_run=False, progress=lambda _: None)

    assert (11, 2) == (info.records, info.damaged)
    assert (10, 2, 0) == (summary.stored, summary.damaged, summary.left)
    assert 1 == summary.dead  # the feedback on the trace that is lost
    assert set(spooled.ids[1:]) == set(spooled.read())
    assert segment.with_suffix(".damaged").exists()


def test_a_store_that_is_away_keeps_the_spool(spooled, monkeypatch):
    """Nothing is lost, and the reason is told."""
    monkeypatch.setattr(errors.Backoff, "pause", lambda self: 0.01)
    summary = export.replay(
        tracking_uri="http://127.0.0.1:9", folder=export.spools()[0].folder, dry_run=False, progress=lambda _: None
    )

    assert (0, 13) == (summary.stored, summary.left)
    assert "127.0.0.1" in summary.errors[0]
    assert 13 == export.spools()[0].records


def test_what_is_refused_stays_where_no_dead_letter_can_be_written(spooled):
    """A record that is safe on disk is not given up for a letter that the disk does not take."""
    folder = export.spools()[0].folder
    mlflow.MlflowClient(spooled.uri).delete_experiment(spooled.experiment_id)
    (folder / "dead.letters").mkdir()
    summary = export.replay(folder=folder)

    assert (13, 0) == (summary.stored + summary.left, summary.dead)
    assert summary.left >= len(spooled.ids)
    assert any("dead letter" in error for error in summary.errors)
    (folder / "dead.letters").rmdir()
    mlflow.MlflowClient(spooled.uri).restore_experiment(spooled.experiment_id)
    assert 0 == export.replay(folder=folder).left
    assert set(spooled.ids) == set(spooled.read())


def test_a_spool_in_use_is_left_alone(make):
    """The segments of a living process are its own to send."""
    installed = make(max_waiting_bytes=0)
    installed.stop_writing()
    call()
    assert export.spools()[0].in_use
    summary = export.replay(tracking_uri=None, folder=None, dry_run=False, progress=lambda _: None)

    assert (1, 0) == (summary.skipped, summary.stored)
    installed.write_again()
    assert export.flush(100)
    assert 1 == export.stats().stored


# --- processes ---

PROGRAM = """
import os, signal, sys, threading
import mlflow
from dspy_mlflow_async import export

uri, experiment_id, what = sys.argv[1:4]
mlflow.set_tracking_uri(uri)
mlflow.tracing.set_destination(mlflow.entities.trace_location.MlflowExperimentLocation(experiment_id))
undo = export.install(export.ExportOptions(durable="durable" in what, exit_timeout=60.0))

def call():
    with mlflow.start_span("root") as root:
        with mlflow.start_span("child"):
            pass
    return root.trace_id

print(call(), flush=True)
"""


def start(body, uri, experiment_id, what, *, program=PROGRAM, **env):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return subprocess.Popen(
        [sys.executable, "-c", program + body, uri, experiment_id, what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | env,
    )


def finish(process, timeout=60):
    out, err = process.communicate(timeout=timeout)
    return out.split(), err


@pytest.fixture
def place(store_uri, request):
    experiment_id = mlflow.create_experiment(f"{request.node.name}-{os.urandom(4).hex()}")
    return store_uri, experiment_id


@pytest.mark.long
@pytest.mark.parametrize(
    "end", ["", "raise ValueError", "sys.exit(3)", "import asyncio; asyncio.run(asyncio.sleep(0))"]
)
def test_a_normal_end_stores_everything(place, end):
    """The end of the program, an exception, an exit code, the end of an event loop."""
    process = start(f"for _ in range(30): print(call())\n{end}", *place, "")
    ids, _ = finish(process)

    assert 31 == len(ids)
    assert set(ids) == set(read(*place))
    assert {"": 0, "raise ValueError": 1, "sys.exit(3)": 3}.get(end, 0) == process.returncode


def test_an_end_without_a_store(place):
    """Within the bound the rest goes to the spool, with a line that names the command; replay sends it."""
    process = start(
        "for _ in range(30): print(call())",
        "http://127.0.0.1:9",
        place[1],
        "",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="1",
    )
    ids, err = finish(process)

    assert "31 operations could not be stored in time" in err
    assert "dspy-mlflow-async replay" in err
    summary = export.replay(
        tracking_uri=place[0], folder=export.spools()[0].folder, dry_run=False, progress=lambda _: None
    )
    assert 31 == summary.traces
    assert set(ids) == set(read(*place))


@pytest.mark.parametrize("handler", ["default", "user"])
def test_sigterm(place, handler):
    """Without a handler the process flushes and dies of the signal; with the user's, that decides."""
    body = "import time\nfor _ in range(30): print(call())\nprint('ready', flush=True)\ntime.sleep(60)"
    if handler == "user":
        body = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n" + body
    process = start(body, *place, "")
    ids = [process.stdout.readline().strip() for _ in range(31)]
    assert "ready" == process.stdout.readline().strip()
    process.terminate()
    finish(process)

    assert {"default": -15, "user": 7}[handler] == process.returncode
    assert set(ids) == set(read(*place))


@pytest.mark.long
def test_no_thread_of_ours_is_at_work_when_python_is_taken_down(make, proxy):
    """What writes to a slow store comes to its end first: a daemon that is ended where it stands can crash Python."""
    installed = make(uri=proxy.uri)
    proxy.fault = 0.2  # seconds a request takes
    program = PROGRAM.replace("exit_timeout=60.0", "exit_timeout=0.1").replace(
        "from dspy_mlflow_async import export",
        """
import atexit
def last():
    print(*[t.name for t in threading.enumerate() if t.name.startswith("dspy-mlflow-async")], flush=True)
atexit.register(last)
from dspy_mlflow_async import export
""",
    )
    out, err = finish(start("for _ in range(60): call()", proxy.uri, installed.experiment_id, "", program=program), 100)

    assert 1 == len(out), (out, err)  # the first trace's id, and no thread's name
    assert "could not be stored in time" in err


def test_sigterm_under_load(place):
    """Whatever the threads hold when the signal comes: what had ended is stored, or on disk, and the process ends."""
    body = """
import time
def work():
    while True:
        print(call(), flush=True)
        time.sleep(0.01)
for _ in range(3): threading.Thread(target=work, daemon=True).start()
work()
"""
    process = start(body, *place, "", program=PROGRAM.replace("exit_timeout=60.0", "exit_timeout=5.0"))
    said = [process.stdout.readline() for _ in range(100)]
    process.terminate()
    rest, err = process.communicate(timeout=60)
    ids = set(re.findall("tr-[0-9a-f]{32}", "".join([*said, rest])))

    assert -15 == process.returncode, err
    assert 100 <= len(ids)
    assert 0 == export.replay().left
    assert ids <= set(read(*place))


def test_sigterm_with_an_open_run_and_a_store_that_hangs(make, proxy):
    """The end of the run goes to the disk with the rest, within the bound."""
    installed = make(uri=proxy.uri)
    client = mlflow.tracking.MlflowClient(proxy.uri)
    run_id = client.create_run(installed.experiment_id).info.run_id
    body = f"""
writer = export.run_writer(uri)
export.before_leaving(lambda: writer.end({run_id!r}, "KILLED", 99))
export.flush(60)
print("ready", flush=True)
sys.stdin.read()
"""
    program = PROGRAM.replace("exit_timeout=60.0", "exit_timeout=2.0")
    process = start(body, proxy.uri, installed.experiment_id, "", program=program)
    trace_id = process.stdout.readline().strip()
    assert "ready" == process.stdout.readline().strip()
    proxy.fault = "hang"
    begun = time.monotonic()
    process.terminate()
    _, err = finish(process)
    assert time.monotonic() - begun < 15
    assert "1 operation could not be stored in time" in err
    proxy.fault = None

    assert 1 == export.replay().stored
    assert ("KILLED", 99) == ((info := client.get_run(run_id).info).status, info.end_time)
    assert {trace_id} == set(installed.read())


def test_what_is_traced_after_our_end_is_kept_on_disk(place):
    """A handler that was registered before the import runs after ours: its traces wait for the next process."""
    program = (
        """
import atexit
late = []
atexit.register(lambda: [print(late[0]()) for _ in range(3)])
"""
        + PROGRAM
        + "late.append(call)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    arguments = [sys.executable, "-c", program, *place, ""]
    ids = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout.split()

    assert 4 == len(ids)
    assert 3 == export.replay().stored
    assert set(ids) == set(read(*place))


def test_killed_with_durable_on(place):
    """What has ended is on disk whatever happens then: replay brings all of it, once."""
    body = "while True: print(call(), flush=True)"
    process = start(body, *place, "durable")
    ids = [process.stdout.readline().strip() for _ in range(150)]
    process.kill()
    rest, _ = finish(process)
    ids += [line for line in rest if len(line) == len(ids[0])]
    summary = export.replay(tracking_uri=None, folder=None, dry_run=False, progress=lambda _: None)

    assert 0 == summary.left
    traces = read(*place)
    assert set(ids) <= set(traces)
    assert {2} == {len(trace.data.spans) for trace in traces.values()}


def test_durable_leaves_nothing_on_disk(make, spool_dir):
    """What is stored is removed from the spool."""
    make(durable=True)
    for _ in range(20):
        call()
    assert export.flush(100)

    assert 20 == export.stats().stored
    assert 0 == sum(info.records for info in export.spools())


def test_durable_survives_in_the_spool_until_stored(make):
    """A trace is on disk before the call returns."""
    installed = make(durable=True)
    installed.stop_writing()
    call()

    assert (1, 0) == (export.stats().waiting, export.stats().spooled)
    (info,) = export.spools()
    assert (1, 1) == (info.records, info.traces)
    installed.write_again()
    assert export.flush(100)


def test_a_fork_in_the_middle(place):
    """Parent and child store their own traces, and the child does not send the parent's again."""
    body = """
ids = []
threads = [threading.Thread(target=lambda: [ids.append(call()) for _ in range(20)]) for _ in range(3)]
[t.start() for t in threads]
with mlflow.start_span("shared") as root:
    inherited = mlflow.start_span_no_context("inherited", parent_span=root)
    pid = os.fork()
    if pid == 0:
        assert export.stats() == export.ExportStats(), export.stats()
        with mlflow.start_span("in the child"):
            pass
        inherited.end()
    else:
        assert os.waitpid(pid, 0)[1] == 0
        [t.join() for t in threads]
        inherited.end()
        print(*ids, root.trace_id)
if pid == 0:
    print(*[call() for _ in range(20)], flush=True)
    stats = export.stats()
    assert export.flush(80)
    spans = type(export.stats().remote_spans)(ended=1, stored=1)  # the inherited one
    assert export.stats() == export.ExportStats(started=20, ended=20, stored=20, remote_spans=spans), export.stats()
    os._exit(0)
assert export.flush(80)
assert export.stats().started == 62, export.stats()
"""
    process = start(body, *place, "")
    ids, err = finish(process, 110)

    assert 0 == process.returncode, err
    traces = read(*place)
    assert 82 == len(set(ids)) == len(traces)
    assert ["in the child", "inherited", "shared"] == sorted(s.name for s in traces[ids[-1]].data.spans)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.long
def test_multiprocessing(place, tmp_path, method):
    """A child's traces are stored when it ends, though it leaves without ``atexit``."""
    script = tmp_path / "program.py"
    body = PROGRAM.replace("print(call(), flush=True)", "").replace("sys.argv[1:4]", repr((*place, "")))
    script.write_text(
        body
        + f"""
import multiprocessing

def work():
    for _ in range(5):
        call()

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    processes = [context.Process(target=work) for _ in range(2)]
    [process.start() for process in processes]
    [process.join(60) for process in processes]
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100, check=False)

    assert 0 == done.returncode, done.stderr
    assert 10 == len(read(*place)), done.stderr


def test_the_format_is_as_documented(spooled):
    """A reader that knows only docs/export.md finds the traces."""
    import zlib

    (segment,) = export.spools()[0].folder.glob("*.seg")
    names = []
    for line in segment.read_bytes().split(b"\n")[:-1]:
        checksum, length, payload = line.split(b" ", 2)
        assert int(length) == len(payload)
        assert int(checksum, 16) == zlib.crc32(payload)
        record = json.loads(payload)
        names.append((record["v"], record["kind"]))

    assert [(1, "trace")] * 10 + [(1, "follow_up"), (1, "run"), (1, "run")] == names
    wait_until(lambda: spooled.uri == (segment.parent / "tracking-uri").read_text())


def test_what_a_dead_process_left_is_sent_by_the_next(spooled):
    """Once the store takes something, so it gets what lies in the spool, without being counted here."""
    export.install(export.ExportOptions())
    trace_id = call()

    wait_until(lambda: export.flush(10) and len(spooled.read()) == 11, 30)
    assert {*spooled.ids, trace_id} == set(spooled.read())
    assert 0 == export.spools()[0].records
    stats = export.stats()
    assert 1 == stats.stored
    export.install(export.ExportOptions())()


def test_durable_cares_for_traces_that_wait(make):
    """A held trace, and one whose children are open, are on disk; what is written at last takes their place."""
    installed = make(durable=True)
    with mlflow.start_span("held") as held:
        export.hold(held.trace_id)
    with mlflow.start_span("root") as root:
        child = mlflow.start_span_no_context("child", parent_span=root)
    assert 2 == export.spools()[0].traces
    assert 2 == export.stats().waiting
    export.release(held.trace_id, assessments=[Feedback(name="score", value=1.0)])
    child.end()

    assert export.flush(100)
    traces = installed.read()
    assert (1, 2) == (len(traces[held.trace_id].info.assessments), len(traces[root.trace_id].data.spans))
    assert 0 == sum(info.records for info in export.spools())
