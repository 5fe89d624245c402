"""Small services over small programs, and a server's side of them by hand."""

import asyncio
import time

import httpx
from fastapi import FastAPI

from dspy_mlflow_async.asgi import TracingMiddleware
from echo import Chain

program = Chain()


def fastapi(**options):
    app = FastAPI()
    app.add_middleware(TracingMiddleware, **options)
    return app


def client(app, **options):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app, **options), base_url="http://test")


def unseen(function):
    """The code of a function, of which nobody has been warned yet, however often a test runs in this process."""
    return function.__code__.replace(co_name=f"at_{time.time_ns()}")


def meta(trace, key):
    return trace.info.trace_metadata.get(f"mlflow.trace.{key}")


def attribute(trace, key):
    return trace.data.spans[0].get_attribute(key)


def asking_app(**options):
    app = fastapi(**options)

    @app.post("/ask/{topic}")
    async def ask(topic: str):
        return {"answer": (await program.acall(question=f"@{topic}")).answer}

    @app.get("/health")
    async def health():
        return "fine"

    return app


class Wire:
    """A server's side of one request, by hand."""

    def __init__(self, path="/ask/a", method="POST", **more):
        self.scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": [], **more,
        }  # fmt: skip
        self.inbox = asyncio.Queue()
        self.inbox.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        self.sent = []

    async def send(self, message):
        self.sent.append(message)
