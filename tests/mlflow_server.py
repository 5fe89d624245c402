"""A real ``mlflow server`` in processes of its own, over any database, that can be killed and started again."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

START_SECONDS = 120.0
_KEPT_FROM_IT = ("PYTEST", "DSPY_", "MLFLOW_")  # what tests set for themselves


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class MlflowServer:
    """Stays at its address over any number of starts.

    Its folder gets the log and the artifacts; ``backend`` is the URI of its database.
    """

    def __init__(self, folder, backend):
        self._folder = folder
        self._backend = backend
        self._process = None
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1", "--backend-store-uri", self._backend,
            "--artifacts-destination", str(self._folder / "artifacts"),
        ]  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if not key.startswith(_KEPT_FROM_IT)}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment["MLFLOW_ALLOW_FILE_STORE"] = "true"  # for tests of what it does not take
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=self._folder
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            threading.Event().wait(0.05)

    @property
    def _log(self):
        return self._folder / "server.log"

    def _answers(self):
        assert self._process.poll() is None, self._log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:  # noqa: S310
            return answer.status == 200
        return False

    def kill(self):
        """All its processes, at once; the second time there is nothing to do."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


@contextlib.contextmanager
def mlflow_server(folder, backend):
    """One that is up, and gone afterwards."""
    folder.mkdir(exist_ok=True)
    server = MlflowServer(folder, backend)
    try:
        server.start()
        yield server
    finally:
        server.kill()
