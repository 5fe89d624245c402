"""Stores that can be taken away: sqlite files, a real `mlflow server`, and a proxy that misbehaves on request."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

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
        self.queue._start = lambda: None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real `mlflow server` over a sqlite file, which can be killed and started again on the same port."""

    def __init__(self, folder: Path, database: Path):
        self.folder = folder
        self.database = database
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "DSPY_"))}
        env["MLFLOW_DISABLE_TELEMETRY"] = "true"
        env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--backend-store-uri",
            f"sqlite:///{self.database}",
            "--default-artifact-root",
            str(self.folder / "artifacts"),
            "--workers",
            "1",
        ]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=env, start_new_session=True, cwd=self.folder
            )
        wait_until(self.answers, 90)

    def answers(self):
        if self.process.poll() is not None:
            raise AssertionError((self.folder / "server.log").read_text()[-2000:])
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200  # noqa: S310
        return False

    def kill(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
            self.process = None


class Proxy:
    """Stands before a server and fails as told: a status to answer, "hang up", "slow", or None."""

    def __init__(self, port):
        self.port = port
        self.fault = None
        self.faults = 0
        self.seen = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, contextlib.suppress(OSError):
            client.settimeout(60)
            request = self._read_request(client)
            if not request:
                return
            fault = self.fault
            if fault is not None:
                self.faults += 1
                self.seen.set()
            if isinstance(fault, int):
                body = b'{"detail": "proxy"}'
                client.sendall(
                    b"HTTP/1.1 %d Proxy\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
                    b"Connection: close\r\n\r\n%s" % (fault, len(body), body)
                )
                return
            with socket.create_connection(("127.0.0.1", self.port), timeout=60) as upstream:
                upstream.sendall(request)
                answer = b""
                while chunk := upstream.recv(65536):
                    answer += chunk
            if fault == "hang up":  # the server has done its work, and the answer is lost half-way
                client.sendall(answer[:5])
                return
            client.sendall(answer)

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
