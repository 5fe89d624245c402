"""What a test sees of the pipeline and of its store, and a proxy before a server that misbehaves on request."""

import contextlib
import dataclasses
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator

import mlflow
from mlflow.tracing import provider as tracing_provider
from mlflow.tracing.client import TracingClient

from dspy_mlflow_async.export import installation as installing

TOKENS = "mlflow.chat.tokenUsage"


def wait_until(condition, timeout=20.0):
    """Poll, with a bound, for what another thread or process does."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s")
        threading.Event().wait(0.02)


def call(name="root", children=3, text="text", tokens=2):
    """One trace of `children + 1` spans; gives its id."""
    with mlflow.start_span(name) as root:
        root.set_inputs({"question": text})
        for number in range(children):
            with mlflow.start_span(f"child {number}") as child:
                child.set_attribute(TOKENS, {"input_tokens": tokens, "output_tokens": 1, "total_tokens": tokens + 1})
        root.set_outputs({"answer": text})
    return root.trace_id


def read(uri, experiment_id, **options):
    """What has arrived in a store, by trace id."""
    found, token = {}, None
    while True:
        page = TracingClient(uri).search_traces(locations=[experiment_id], max_results=500, page_token=token, **options)
        found |= {trace.info.trace_id: trace for trace in page}
        token = page.token
        if not token:
            return found


def check_sum(stats):
    """Every trace that began is in one place."""
    assert stats.started == (stats.stored + stats.waiting + stats.spooled + stats.dead + stats.dropped + stats.open)


class Installed:
    """The pipeline as a test sees it."""

    def __init__(self, uri, experiment_id, undo):
        self.uri = uri
        self.experiment_id = experiment_id
        self.undo = undo

    @property
    def pipeline(self):
        return installing.pipeline()

    @property
    def queue(self):
        return self.pipeline.queue(self.uri)

    def read(self, **options):
        return read(self.uri, self.experiment_id, **options)

    def stop_writing(self):
        """Let nothing leave the queue until `queue.work()` is called by the test."""
        self.queue.worker.is_paused = True

    def write_again(self):
        """Take back `stop_writing`."""
        self.queue.worker.is_paused = False


_TABLES = [
    *("trace_info", "trace_tags", "trace_request_metadata", "trace_metrics", "spans", "span_metrics", "assessments"),
    "entity_associations",
]


class Tables:
    """The tables for traces in the sqlite file of a server."""

    def __init__(self, database, uri):
        self.uri, self._database = uri, database

    def tables(self):
        """Every row of them, sorted."""
        with contextlib.closing(sqlite3.connect(self._database)) as connection:
            connection.row_factory = sqlite3.Row
            return {
                name: sorted(
                    ({key: str(row[key]) for key in row.keys()} for row in connection.execute(f"SELECT * FROM {name}")),  # noqa: S608, SIM118
                    key=repr,
                )
                for name in _TABLES
            }

    def forget(self):
        """Delete what is in them."""
        with contextlib.closing(sqlite3.connect(self._database)) as connection, connection:
            for name in reversed(_TABLES):
                connection.execute(f"DELETE FROM {name}")  # noqa: S608 - names of ours


@dataclasses.dataclass(frozen=True)
class Page:
    """What something before the server answers in its place."""

    status: int = 200
    body: bytes = b"<html><h1>Back soon</h1></html>"
    kind: str = "text/html"
    path: bytes = b""  # of the requests that get it, or a part of it

    @property
    def answer(self):
        kind = f"Content-Type: {self.kind}\r\n" if self.kind else ""
        head = f"HTTP/1.1 {self.status} Page\r\n{kind}Content-Length: {len(self.body)}\r\nConnection: close\r\n\r\n"
        return head.encode() + self.body

    def is_for(self, request):
        return self.path in request.split(b"\r\n", 1)[0]


class Proxy:
    """Stands before a server and fails as told.

    Attributes:
        fault: A status to answer; a `Page`; "hang up" half-way through the answer; "cut" the request half-way; "hang";
            seconds to wait, or an event to wait for, before the server is asked; None; or an iterator of those, one a
            request.
        faults: How many requests have met one.
        seen: Set when one has.
        answers: What the server was asked and has answered: request and status.
    """

    def __init__(self, port, *, keeps_open=False):
        self.port = port
        self._keeps_open = keeps_open
        self.fault = None
        self.faults = 0
        self.seen = threading.Event()
        self.answers = []
        self._in_turn = threading.Lock()
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._closed.set()
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, contextlib.suppress(OSError):
            client.settimeout(60)
            while self._serve_once(client) and self._keeps_open:
                pass

    def _serve_once(self, client):
        """Answer one request; true where another may follow."""
        request = self._read_request(client)
        if not request:
            return False
        fault = self._next_fault()
        page = Page(fault, b'{"detail": "proxy"}', "application/json") if isinstance(fault, int) else fault
        if isinstance(page, Page) and page.is_for(request):
            client.sendall(self._kept(page.answer))
            return True
        if fault == "hang":
            self._closed.wait(60)
            return False
        if isinstance(fault, float):
            self._closed.wait(fault)
        if isinstance(fault, threading.Event):
            fault.wait(60)
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as upstream:
            if fault == "cut":
                upstream.sendall(request[: len(request) // 2])
                return False
            upstream.sendall(request)
            answer = b""
            while chunk := upstream.recv(65536):
                answer += chunk
        if answer:
            self.answers.append((request, int(answer.split(b" ", 2)[1])))
        if fault == "hang up":  # the server has done its work, and the answer is lost half-way
            client.sendall(answer[:5])
            return False
        client.sendall(self._kept(answer))
        return True

    def _kept(self, answer):
        """The answer, of a server that keeps the connection open where this does."""
        head, end, body = answer.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if line.lower() != b"connection: close"]
        return b"\r\n".join(lines) + end + body if self._keeps_open else answer

    def _next_fault(self):
        with self._in_turn:
            fault = next(self.fault) if isinstance(self.fault, Iterator) else self.fault
            self.faults += fault is not None
        if fault is not None:
            self.seen.set()
        return fault

    @staticmethod
    def _read_request(client):
        data = b""
        while b"\r\n\r\n" not in data:
            chunk = client.recv(65536)
            if not chunk:
                return b""
            data += chunk
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        length = next((int(x.split(b":")[1]) for x in lines if x.lower().startswith(b"content-length")), 0)
        while len(body) < length:
            body += client.recv(65536)
        lines = [line for line in lines if not line.lower().startswith(b"connection")]
        return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body


def span_processor():
    """The processor that MLflow's provider uses now."""
    mlflow.tracing.provider._get_tracer(__name__)
    return tracing_provider.provider.get()._active_span_processor._span_processors[0]
