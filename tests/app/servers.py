"""Real servers in processes of their own, an LM that answers by script over HTTP, and clients by the hundred."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import httpx
from mlflow.tracing.client import TracingClient

from dspy_mlflow_async.export import replay
from mlflow_server import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
MARKER = re.compile(r"@[\w-]+")
_FIELD = re.compile(r"\[\[ ## (\w+) ## \]\]")


def script(body):
    """Fill every output field that the prompt asks for; the answer is the marker of the question."""
    text = "\n".join(str(message["content"]) for message in body["messages"])
    marker = marker_of(body)
    is_second = "observation_0" in text
    filled = {
        "next_thought": "hm", "next_tool_name": "finish" if is_second else "price",
        "next_tool_args": "{}" if is_second else json.dumps({"item": "plum" if "plum" in text else "pear"}),
        "reasoning": "because", "answer": f"it is {marker} and nothing else", "urgency": "low", "team": "fruit",
    }  # fmt: skip
    _, _, instruction = str(body["messages"][-1]["content"]).rpartition("Respond with")
    fields = [field for field in dict.fromkeys(_FIELD.findall(instruction)) if field in filled]
    lines = [f"[[ ## {field} ## ]]\n{filled[field]}" for field in fields]
    return "\n\n".join([*lines, "[[ ## completed ## ]]"])


def marker_of(body):
    """The last marker of a request to the LM."""
    found = MARKER.findall(str(body["messages"][-1]["content"]))
    return found[-1] if found else ""


def environment(folder, endpoint, tracking_uri, **more):
    """What a process needs to use this LM and this store, and nothing of the test's own."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "DSPY_", "MLFLOW_"))}
    return env | {
        "LM_API_BASE": endpoint.api_base, "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_DISABLE_TELEMETRY": "true",
        "DSPY_CACHEDIR": str(folder / "cache"), "DSPY_MLFLOW_ASYNC_SPOOL": str(folder / "spool"), **more,
    }  # fmt: skip


class Service:
    """A server process with the app of ``examples/fastapi_app.py``."""

    def __init__(self, folder, command, env):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "server.log"
        command = [part.format(port=self.port) for part in command]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command], stdout=log, stderr=log, env=env, cwd=EXAMPLES, start_new_session=True
            )

    @property
    def log(self):
        return self._log.read_text()

    def wait_until_up(self):
        self._wait(self._answers, 90)

    def _answers(self):
        assert self.process.poll() is None, self.log[-3000:]
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.url}/health", timeout=1).status == 200  # noqa: S310
        return False

    def _wait(self, condition, timeout):
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.log[-3000:]
            threading.Event().wait(0.05)

    def terminate(self):
        """SIGTERM to the process that a process manager knows."""
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self):
        return self.process.wait(60)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


@contextlib.contextmanager
def running(folder, command, env):
    """A service that is up, and gone afterwards."""
    service = Service(folder, command, env)
    try:
        service.wait_until_up()
        yield service
    finally:
        service.kill()


def stored(tracking_uri, experiment_id="0"):
    """All traces in a store, with their spans."""
    found, token = [], None
    client = TracingClient(tracking_uri)
    while True:
        page = client.search_traces(locations=[experiment_id], max_results=200, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def settled(store, folder):
    """All traces of a process that has ended: those in its store, and those that it left in the spool."""
    summary = replay(folder=folder / "spool")
    assert (0, ()) == (summary.dead, summary.errors)
    return stored(store)


# --- clients ------------------------------------------------------------------------------------------------------


class Asked:
    """One request of a client, and what came back."""

    def __init__(self, client, number, kind):
        self.kind = kind
        self.marker = f"@c{client}-n{number}-{kind}"
        self.session, self.user = f"s-{client}-{number % 3}", f"u-{client}"
        self.status = self.trace_id = self.text = None
        self.is_complete = False

    @property
    def path(self):
        return {"ask": "/ask", "agent": "/agent", "hangup": "/ask"}.get(self.kind, "/stream")

    async def send(self, http):
        headers = {"x-session-id": self.session, "x-user": self.user}
        body = {"question": f"what of {self.marker}" + (" and a plum" if self.kind == "agent" else "")}
        if self.kind == "hangup":
            with contextlib.suppress(httpx.TimeoutException):
                await http.post(self.path, json=body, headers=headers, timeout=0.2)
            return
        async with http.stream("POST", self.path, json=body, headers=headers) as response:
            self.status, self.trace_id = response.status_code, response.headers.get("x-trace-id")
            if self.kind == "breakoff":
                await anext(response.aiter_bytes())
                return
            self.text = (await response.aread()).decode()
            self.is_complete = True


async def load(url, seconds, clients, kinds=("ask", "agent", "stream", "breakoff", "hangup")):
    """Many clients at once, each asking one thing after the other; yields what they asked and got when time is up."""
    asked, end = [], time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def client(number, http):
        for count in range(10_000):
            if time.monotonic() > end:
                return
            one = Asked(number, count, kinds[(number + count) % len(kinds)])
            asked.append(one)
            try:
                await one.send(http)
            except httpx.TransportError:
                return  # the server has gone

    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30) as http:
        await asyncio.gather(*(client(number, http) for number in range(clients)))
    return asked
