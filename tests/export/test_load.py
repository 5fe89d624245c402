"""Under load nothing is lost, nothing is doubled, and nobody waits who need not."""

import asyncio
import contextlib
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest
from stores import check_sum, read, wait_until
from test_spool import PROGRAM, finish, place, start  # noqa: F401 - `place` is a fixture

from dspy_mlflow_async import export
from dspy_mlflow_async.export.spool.paths import segments_of

TASKS = 128
# Writing one takes about 6 ms of CPU, most of them SQLAlchemy's: all 20,000 take minutes.
CALLS = int(os.environ.get("DSPY_MLFLOW_ASYNC_TEST_CALLS") or 1_000)


@pytest.mark.timeout(120 + CALLS // 20)
def test_many_tasks_lose_nothing(make):
    """Each call is there once, as itself, those that the memory could not hold too; the books are always right."""
    installed = make(max_waiting_bytes=1_000 * CALLS)
    names, seen = {}, []

    async def work(task, all_begun):
        for number in range(task, CALLS, TASKS):
            with mlflow.start_span(f"call {number}") as span:
                if number < TASKS:  # so that all of them are open at once
                    if number == min(TASKS, CALLS) - 1:
                        seen.append(export.stats())
                        all_begun.set()
                    await asyncio.wait_for(all_begun.wait(), 20)
                await asyncio.sleep(0)  # others go on in the middle of it
            names[span.trace_id] = [span.name]
        seen.append(export.stats())

    async def main():
        all_begun = asyncio.Event()
        await asyncio.gather(*(work(task, all_begun) for task in range(TASKS)))

    asyncio.run(main())
    assert export.flush(100 + CALLS // 20)

    assert min(TASKS, CALLS) == seen[0].open
    assert 0 < max(stats.spooled for stats in seen)
    for stats in seen:
        check_sum(stats)
    assert export.ExportStats(started=CALLS, ended=CALLS, stored=CALLS) == export.stats()
    assert CALLS == len(names)
    assert names == {key: [span.name for span in trace.data.spans] for key, trace in installed.read().items()}
    assert 0 == sum(info.records for info in export.spools())


# Works in two threads until it is told otherwise, line by line: says how it goes, or comes to its end.
LOAD = """
import json
from mlflow.entities import Feedback

ids, over = [], threading.Event()

def work():
    while not over.wait(0.25):
        trace_id = call()
        export.release(trace_id, assessments=[Feedback(name="score", value=1.0)])
        ids.append(trace_id)

threads = [threading.Thread(target=work) for _ in range(2)]
[thread.start() for thread in threads]
for order in sys.stdin:
    if order == "look\\n":
        stats = export.stats()
        print(json.dumps([stats.stored, stats.spooled]), flush=True)
    else:
        over.set()
        [thread.join(30) for thread in threads]
        is_stored = export.flush(100) if order == "flush\\n" else None
        stats = export.stats()
        print(json.dumps([ids, is_stored, stats.started, stats.stored]), flush=True)
"""


def tell(order, *processes):
    """What programs that run `LOAD` answer."""
    for process in processes:
        process.stdin.write(f"{order}\n")
        process.stdin.flush()
    lines = [process.stdout.readline() for process in processes]
    assert all(lines), [process.communicate(timeout=30)[1] for process in processes]
    return [json.loads(line) for line in lines]


def results_of(answers):
    """What a server has answered to each request about one trace."""
    results = {}
    for request, status in answers:
        line, _, _ = request.partition(b"\r\n")
        found = re.search(rb"tr-[0-9a-f]{32}", request)
        if found and line.startswith(b"POST"):
            what = "feedback" if b"/assessments" in line else "trace"
            results.setdefault((what, found[0].decode()), []).append(status)
    return results


@pytest.mark.long
def test_processes_with_one_spool_in_an_outage(make, server, proxy, tmp_path):
    """Two go on, one ends meanwhile, and replays meet them afterwards: nothing is lost, refused or done twice."""
    installed = make(uri=proxy.uri)
    with contextlib.ExitStack() as stack:
        programs = []
        for what in ("", "", "ends"):
            program = PROGRAM.replace("exit_timeout=60.0", "exit_timeout=0.5") if what else PROGRAM
            place = proxy.uri, installed.experiment_id
            programs.append(stack.enter_context(start(LOAD, *place, "", program=program)))
            stack.callback(programs[-1].kill)
        ids = [process.stdout.readline().strip() for process in programs]
        wait_until(lambda: all(stored > 5 for stored, _ in tell("look", *programs)), 60)
        server.kill()
        try:
            wait_until(lambda: all(spooled > 5 for _, spooled in tell("look", *programs)), 60)
            ids += tell("end", programs[2])[0][0]
            _, err = programs[2].communicate(timeout=60)
            assert "could not be stored in time" in err
        finally:
            server.start()
        with ThreadPoolExecutor(2) as pool:
            replays = list(pool.map(lambda _: export.replay(), range(2)))
        for theirs, is_stored, started, stored in tell("flush", *programs[:2]):
            assert (True, len(theirs) + 1, len(theirs) + 1) == (is_stored, started, stored)
            ids += theirs
        for process in programs[:2]:
            process.communicate(timeout=60)

    assert 0 < sum(replay.traces for replay in replays)
    traces = installed.read()
    assert len(ids) == len(set(ids)) == len(traces)
    assert set(ids) == set(traces)
    assert [] == [segment for info in export.spools() for segment in segments_of(info.folder)]
    assert [0] == [info.dead for info in export.spools()]
    results = results_of(proxy.answers)
    assert {("trace", trace_id) for trace_id in ids} <= set(results)
    assert {200} == {status for statuses in results.values() for status in statuses}
    assert [1] * (len(ids) - 3) == [n for trace in traces.values() if (n := len(trace.info.assessments))]


FORKS = """
import faulthandler, json, multiprocessing
from dspy_mlflow_async.export.write import fork_gate
faulthandler.register(signal.SIGUSR1)

def work(ids, go_on):
    while go_on():
        ids.append(call())
        threading.Event().wait(0.03)

def flush():  # so that the writer does not rest
    while not over.is_set():
        export.flush(1)

def threads_of(number, ids, go_on):
    threads = [threading.Thread(target=work, args=(ids, go_on)) for _ in range(number)]
    [thread.start() for thread in threads]
    return threads

def child(path):
    ids = []
    [thread.join(60) for thread in threads_of(2, ids, lambda: len(ids) < 10)]
    stats = export.stats()
    assert len(ids) == stats.started == stats.ended, stats
    with open(path, "w") as file:
        json.dump(ids, file)

assert export.flush(60)
ids, over = [], threading.Event()
threads = [*threads_of(2, ids, lambda: not over.is_set()), threading.Thread(target=flush)]
threads[-1].start()
context, children = multiprocessing.get_context("fork"), []
for number in range(10):
    while not fork_gate.writes._inside:  # the writer is at work
        threading.Event().wait(0.001)
    children.append(context.Process(target=child, args=(f"{what}/{number}",)))
    children[-1].start()
[process.join(4) for process in children]
over.set()
[process.join(60 / 10) for process in children]
for process in children:
    if process.exitcode is None:  # it says where it hangs
        os.kill(process.pid, signal.SIGUSR1)
        process.join(1)
        process.kill()
assert [0] * 10 == [process.exitcode for process in children]
[thread.join(30) for thread in threads]
assert export.flush(80)
stats = export.stats()
assert stats.started == stats.stored == len(ids) + 1, stats
with open(f"{what}/parent", "w") as file:
    json.dump(ids, file)
"""


def test_forks_under_load(place, tmp_path):  # noqa: F811
    """Ten forks while threads call and the writer writes: nobody hangs, and everything of everybody is there, once."""
    process = start(FORKS, *place, str(tmp_path))
    (first,), err = finish(process, 110)

    assert 0 == process.returncode, err
    assert "" == err
    by_process = {file.name: json.loads(file.read_text()) for file in tmp_path.iterdir() if file.is_file()}
    assert 11 == len(by_process)
    assert all(len(ids) >= 10 for ids in by_process.values())
    ids = [first, *itertools.chain(*by_process.values())]
    traces = read(*place)
    assert len(ids) == len(set(ids)) == len(traces)
    assert set(ids) == set(traces)
    assert {2} == {len(trace.data.spans) for trace in traces.values()}
    assert 0 == sum(info.records for info in export.spools())
