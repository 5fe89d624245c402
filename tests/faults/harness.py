"""The side of a case that looks on: stores and spools of its own, programs that may be killed, and the audit."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import sqlalchemy

from dspy_mlflow_async import export
from faults.audit import Ledger, audit, connect
from mlflow_server import mlflow_server

TESTS = Path(__file__).resolve().parent.parent
CASES = {}
QUIET = {  # nothing of a machine's own settings, and nobody outside of it is asked
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "DO_NOT_TRACK": "true",
    "DSPY_MLFLOW_ASYNC_STRICT": "1",  # internal errors are raised
    "PYTHONWARNINGS": "ignore",
}
_START = f"import sys; sys.path.insert(0, {str(TESTS)!r}); from faults.child import main; main(sys.argv[1])"


class SkippedError(Exception):
    """What the case needs is not here."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How much of it.

    Attributes:
        long: The sizes that take hours, in place of those that take seconds.
        rounds: How often something is killed; None for the case's own number.
        calls: How many calls are made under load; None for the case's own number.
        soak: Seconds that the soak takes; None for its own.
        spoil: "lose" or "double" one stored trace before each audit, to see that it is found; else None.
    """

    long: bool = False
    rounds: int | None = None
    calls: int | None = None
    soak: float | None = None
    spoil: str | None = None


def case(function):
    """Register a function that takes a `Bench` and yields rows; its name and its docstring are the case's."""
    CASES[function.__name__] = function
    return function


def needs(*modules):
    """Skip the case unless these can be imported."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise SkippedError(f"{', '.join(missing)} not installed")


def wait_until(condition, timeout):
    """Poll, with a bound, for what another process does."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        threading.Event().wait(0.01)


class World:
    """What cases share: an empty store to copy, and one server. Both are made when they are first asked for."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self._lock = threading.RLock()
        self._stack = contextlib.ExitStack()

    def close(self):
        self._stack.close()

    def empty_store(self):
        """The path of a sqlite file with MLflow's tables, and the experiment 1."""
        with self._lock:
            return self._empty_store

    @functools.cached_property
    def _empty_store(self):
        path = self.folder / "empty.db"
        make_experiment(f"sqlite:///{path}")
        return path

    def server(self):
        """The server, and the URI of its database."""
        with self._lock:
            return self._server

    @functools.cached_property
    def _server(self):
        path = self.folder / "server.db"
        shutil.copyfile(self.empty_store(), path)
        database = f"sqlite:///{path}"
        return self._stack.enter_context(mlflow_server(self.folder / "server", database)), database


def make_experiment(uri, name="faults"):
    """Make an experiment, and MLflow's tables where there are none, in a process of its own; gives its id."""
    make = "import mlflow, sys; mlflow.set_tracking_uri(sys.argv[1]); print(mlflow.create_experiment(sys.argv[2]))"
    command = [sys.executable, "-c", make, uri, name]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | QUIET, timeout=120)
    return done.stdout.split()[-1]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the traces of one row go.

    Attributes:
        case: The row's name.
        folder: Its own folder.
        uri: The store, as the program has it.
        experiment_id: The experiment.
        database: The URI of the database behind it.
        ledger: What its programs note.
    """

    case: str
    folder: Path
    uri: str
    experiment_id: str
    database: str
    ledger: Ledger

    @property
    def spool(self):
        return self.folder / "spool"

    @property
    def environment(self):
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        return os.environ | QUIET | {
            "DSPY_MLFLOW_ASYNC_SPOOL": str(self.spool),
            "DSPY_CACHEDIR": str(self.folder / "cache"),
            "TMPDIR": str(temporary),
        }  # fmt: skip


class Child:
    """A program in a process of its own."""

    def __init__(self, command, place, answer):
        self._place = place
        self._answer = answer
        self.log = place.folder / "stderr"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=-1, stdout=-1, stderr=log, text=True, env=place.environment, start_new_session=True
            )
        self.pid = self.process.pid
        self._lines = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        with self.process.stdout as stdout:
            for line in stdout:
                self._lines.put(line.strip())
        self._lines.put(None)

    def meet(self, word, timeout=120):
        """Wait until the program has come to a word."""
        deadline = time.monotonic() + timeout
        line = ""
        while line != f"@{word}":
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            assert line is not None, f"the program did not come to {word!r}: {self.last_words()}"

    def go(self):
        """Let it go on."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self, timeout=120):
        """Wait for its end; gives what the program gave, and what `stats()` said."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            code = f"no end within {timeout} s"
        assert code == 0, f"the program ended with {code}: {self.last_words()}"
        said = json.loads(self._answer.read_text())
        return said["given"], said["stats"]

    def kill(self):
        """End it without warning, and nobody else."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait(30)
        self.process.stdin.close()

    def children(self):
        """The processes that drain its spool."""
        with contextlib.suppress(psutil.Error):
            return [child for child in psutil.Process(self.pid).children() if child.status() != psutil.STATUS_ZOMBIE]
        return []

    def last_words(self):
        return self.log.read_text(errors="replace")[-1500:]


class Bench:
    """One case's own.

    Attributes:
        options: How much is wanted.
        folder: A folder of its own.
        say: Called with a text that tells how far it is.
    """

    def __init__(self, options, world, folder, say=lambda text: None):
        self.options = options
        self.say = say
        self._world = world
        self.folder = Path(folder)
        self._stack = contextlib.ExitStack()
        self._began = time.monotonic()
        self._number = 0

    def close(self):
        self._stack.close()

    def enter(self, block):
        """Enter a block that ends with the case."""
        return self._stack.enter_context(block)

    def size(self, short, long):
        """How many, short or long."""
        return long if self.options.long else short

    def rounds(self, short, long=200):
        """How many kills."""
        return self.options.rounds or self.size(short, long)

    def calls(self, short, long=20_000):
        """How many calls under load."""
        return self.options.calls or self.size(short, long)

    # --- places ---

    def sqlite(self, name, folder=None):
        """A place in a new sqlite file, in a folder of its own or the one given."""
        own = self._new_folder(name)
        path = (folder or own) / "store.db"
        shutil.copyfile(self._world.empty_store(), path)
        return self._place(name, own, f"sqlite:///{path}", "1")

    def server(self, name, before=None):
        """A place on the real server; ``before`` is the URI of what stands before it."""
        server, database = self._world.server()
        experiment_id = ask(server.uri, "experiments/create", name=f"{name} {time.time_ns()}")["experiment_id"]
        return self._place(name, self._new_folder(name), before or server.uri, experiment_id, database)

    def database(self, name, uri):
        """A place in a database, in which MLflow's tables may be or not."""
        return self._place(name, self._new_folder(name), uri, make_experiment(uri, name))

    @property
    def server_uri(self):
        return self._world.server()[0].uri

    @property
    def server_port(self):
        return self._world.server()[0].port

    def _new_folder(self, name):
        folder = self.folder / "".join(each if each.isalnum() else "-" for each in name)
        folder.mkdir()
        self._began = time.monotonic()
        return folder

    def _place(self, name, folder, uri, experiment_id, database=None):
        ledger = Ledger(folder / "ledger")
        self._stack.callback(ledger.close)
        return Place(name, folder, uri, experiment_id, database or uri, ledger)

    # --- programs ---

    def start(self, place, program, *, prefix=(), sets_clock=False, options=None, **arguments):
        """Start a program, with the tracer on.

        Args:
            place: Where its traces go.
            program: Its module in this package, and its function: "module.function".
            prefix: A command that starts it.
            sets_clock: Whether it has a clock that it may set.
            options: Of `autolog()`.
            arguments: Of the function.
        """
        self._number += 1
        answer = place.folder / f"answer-{self._number}"
        order = {
            "program": program, "arguments": arguments, "options": options or {}, "sets_clock": sets_clock,
            "uri": place.uri, "experiment_id": place.experiment_id, "folder": str(place.folder),
            "ledger": str(place.ledger.path), "answer": str(answer),
        }  # fmt: skip
        child = Child([*prefix, sys.executable, "-c", _START, json.dumps(order)], place, answer)
        self._stack.callback(child.kill)
        return child

    def replay(self, place, *arguments, timeout=300):
        """Let whoever still writes come to its end, then send what is left; gives what the command complains of.

        The writing child of a program that was killed may have been about to begin: it then has files that the command
        leaves to it, and which are the command's only where the child does not end its work.
        """
        command = [sys.executable, "-c", "from dspy_mlflow_async.cli import main; main()", "replay", *arguments]
        while True:
            wait_until(lambda: not any(info.in_use for info in export.spools(place.spool)), timeout)
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, env=place.environment, timeout=timeout
            )
            if done.returncode:
                return [f"replay ended with {done.returncode}: {done.stdout[-500:]}"]
            if "to a process that is running" not in done.stdout:
                return []

    # --- the row ---

    @property
    def seconds(self):
        """How long the row has taken so far."""
        return time.monotonic() - self._began

    def audit(self, place, *, said=(), note="", faults=(), **expected):
        """The row of a place, as it is now."""
        if self.options.spoil is not None:
            SPOILS[self.options.spoil](place)
        row = audit(place.case, place.database, place.experiment_id, place.ledger, place.spool, said=said, **expected)
        return dataclasses.replace(row, note=note, seconds=self.seconds, faults=(*row.faults, *faults))


def ask(server_uri, path, **body):
    """One request to MLflow's API."""
    url = f"{server_uri}/api/2.0/mlflow/{path}"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - our own server
        return json.load(answer)


def lose_one(place):
    """Take one stored trace out of the database, to see that it is missed."""
    first = "(SELECT MIN(request_id) FROM trace_info WHERE experiment_id = :id)"
    with connect(place.database) as connection:
        for where in ("spans WHERE trace_id", "trace_info WHERE request_id"):
            statement = sqlalchemy.text(f"DELETE FROM {where} = {first}")  # noqa: S608 - names of ours
            connection.execute(statement, {"id": int(place.experiment_id)})


def double_one(place):
    """Store one span of a stored trace twice."""
    columns = "trace_id, experiment_id, parent_span_id, name, type, status, start_time_unix_nano, content"
    statement = (
        f"INSERT INTO spans (span_id, {columns}) SELECT 'doubled', {columns} FROM spans "  # noqa: S608 - names of ours
        "WHERE experiment_id = :id ORDER BY trace_id, span_id LIMIT 1"
    )
    with connect(place.database) as connection:
        connection.execute(sqlalchemy.text(statement), {"id": int(place.experiment_id)})


SPOILS = {"lose": lose_one, "double": double_one}
