"""Worker processes of every kind: however one ends, what had ended in it arrives, and nobody has to do anything."""

import signal

import pytest
from stores import read, wait_until
from test_spool import PROGRAM, finish, place, start  # noqa: F401 - `place` is a fixture

from dspy_mlflow_async import export
from dspy_mlflow_async.export import worker_processes

# The writer of a worker never gets to write: what is stored has come by the disk.
WORKER = """
import dataclasses
import dspy_mlflow_async.export.queue.store_queue as queueing
import dspy_mlflow_async.export.queue.worker as worker

def work(path, count=3):
    current = export.installation.pipeline()
    if not writes:
        current.options = dataclasses.replace(current.options, exit_timeout=0.5)
        worker.Worker.start = lambda self: None
        queueing.StoreQueue.work = lambda self: None
    with open(f"{path}/{os.getpid()}-{os.urandom(3).hex()}", "w") as file:
        file.write("\\n".join(call() for _ in range(count)))
    return os.getpid()
"""

ENDS = {
    "os._exit in a fork": """
pid = os.fork()
if pid == 0:
    work(what)
    os._exit(0)
os.waitpid(pid, 0)
""",
    "kill -9 of a fork": """
pid = os.fork()
if pid == 0:
    work(what)
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(pid, 0)
""",
    "billiard's pool, closed": """
import billiard
pool = billiard.Pool(2)
pool.map(work, [what] * 6)
pool.close()
pool.join()
""",
    "billiard's pool, terminated": """
import billiard
pool = billiard.Pool(2)
pool.map(work, [what] * 6)
pool.terminate()
pool.join()
""",
    "multiprocessing's pool, terminated": """
import multiprocessing
pool = multiprocessing.get_context("fork").Pool(2)
pool.map(work, [what] * 6)
pool.terminate()
pool.join()
""",
    "multiprocessing's process, terminated": """
import multiprocessing, time
context = multiprocessing.get_context("fork")
done = context.Event()
def run():
    work(what)
    done.set()
    time.sleep(60)
process = context.Process(target=run)
process.start()
done.wait(30)
process.terminate()
process.join()
""",
    "a pool of concurrent.futures": """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
    list(pool.map(work, [what] * 6))
""",
    "a pool of concurrent.futures whose worker dies": """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
    for pid in set(pool.map(work, [what] * 6)):
        os.kill(pid, signal.SIGKILL)
""",
}


def begin(body, place, folder, *, writes=False):  # noqa: F811
    return start(f"writes = {writes}\n{WORKER}{body}", *place, str(folder), program=PROGRAM)


def noted(folder):
    """The ids that workers have written down."""
    return {line for file in folder.iterdir() if file.is_file() for line in file.read_text().split()}


@pytest.mark.long
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_what_a_worker_left_arrives(place, tmp_path, end):  # noqa: F811
    """A forked worker writes ahead to the disk, and the process that it came from brings it to the store."""
    folder = tmp_path / "ids"
    folder.mkdir()
    (first,), err = finish(begin(end, place, folder), 100)

    ids = noted(folder)
    assert len(ids) in {3, 18}, err
    assert {first, *ids} == set(read(*place)), err
    assert 0 == sum(info.records for info in export.spools())


def test_a_parent_that_lives_brings_it_soon(place, tmp_path):  # noqa: F811
    """Nobody flushes, nothing of the parent's is written, and no process ends but the worker."""
    folder = tmp_path / "ids"
    folder.mkdir()
    process = begin(ENDS["os._exit in a fork"] + "print('waits', flush=True)\nsys.stdin.read()", place, folder)
    first, said = process.stdout.readline().strip(), process.stdout.readline().strip()

    assert "waits" == said, finish(process)
    wait_until(lambda: {first, *noted(folder)} == set(read(*place)), 20)
    finish(process)  # which ends its input
    assert 0 == process.returncode


def test_what_is_stored_leaves_no_record(place, tmp_path):  # noqa: F811
    """A worker whose writer keeps up leaves nothing to be sent again."""
    folder = tmp_path / "ids"
    folder.mkdir()
    body = """
pid = os.fork()
if pid == 0:
    work(what, 50)
    assert export.flush(60)
    (info,) = export.spools()
    assert (0, 0) == (info.records, info.traces), info
    os._exit(0)
assert 0 == os.waitpid(pid, 0)[1]
"""
    (first,), err = finish(begin(body, place, folder, writes=True), 100)

    assert {first, *noted(folder)} == set(read(*place)), err
    assert 51 == len(read(*place))


def test_a_spool_that_takes_nothing_is_no_word_worth(place, tmp_path):  # noqa: F811
    """Where the disk is read-only, a forked worker works as before, in memory, and warns of nothing."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "ids").mkdir()
    body = """
pid = os.fork()
if pid == 0:
    work(what)
    assert export.flush(60)
    os._exit(0)
assert 0 == os.waitpid(pid, 0)[1]
"""
    program = f"writes = True\n{WORKER}{body}"
    process = start(
        program,
        *place,
        str(tmp_path / "ids"),
        DSPY_MLFLOW_ASYNC_SPOOL=str(tmp_path / "file" / "spool"),
        PYTHONWARNINGS="ignore:This process:DeprecationWarning",  # Python 3.12 and later warn of any fork with threads
    )
    (first,), err = finish(process, 100)

    assert (0, "") == (process.returncode, err)
    assert {first, *noted(tmp_path / "ids")} == set(read(*place))


def test_a_process_that_was_no_fork_does_not_write_ahead(place):  # noqa: F811
    """An ordinary program's traces wait in memory alone."""
    body = "assert [] == [info for info in export.spools() if info.traces], export.spools()\n"
    process = start(body, *place, "", program=PROGRAM.replace("print(call()", "undo\nprint(call()"))
    finish(process)

    assert 0 == process.returncode


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("handler", ["default", "user", "ignored"])
def test_signals_that_end_a_process(place, name, handler):  # noqa: F811
    """By default the process flushes and dies of the signal; a user's handler decides, an ignored one stays ignored."""
    before = {
        "default": f"signal.signal(signal.{name}, signal.SIG_DFL)\n",  # nohup lets its children ignore SIGHUP
        "user": f"signal.signal(signal.{name}, lambda *_: sys.exit(7))\n",
        "ignored": f"signal.signal(signal.{name}, signal.SIG_IGN)\n",
    }[handler]
    program = PROGRAM.replace("uri, experiment_id", f"{before}uri, experiment_id", 1)
    process = start(
        "for _ in range(30): print(call())\nprint('ready', flush=True)\nsys.stdin.read()", *place, "", program=program
    )
    ids = [process.stdout.readline().strip() for _ in range(31)]
    assert "ready" == process.stdout.readline().strip()
    process.send_signal(getattr(signal, name))
    finish(process)  # which ends its input

    assert {"default": -getattr(signal, name), "user": 7, "ignored": 0}[handler] == process.returncode
    assert set(ids) == set(read(*place))


def test_linux_is_asked_once_whether_this_is_a_fork(monkeypatch):
    """Every trace wants to know, in its caller's thread."""
    before = worker_processes.may_end_unheard()
    monkeypatch.setattr(worker_processes, "Path", None)

    assert before is worker_processes.may_end_unheard()
