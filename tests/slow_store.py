"""A proxy before a real ``mlflow server`` that makes it slow, and counts what it is asked."""

import contextlib
import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_NOT_FORWARDED = {"host", "connection", "transfer-encoding", "content-length", "content-encoding", "accept-encoding"}


class SlowStore:
    """Stands at ``uri``; each request waits ``delay`` seconds, and is noted as method and path.

    Attributes:
        delay: Seconds; may be changed at any time.
        wait: A function that returns when a request may go on, in place of ``delay``.
        is_away: Whether it forwards nothing and answers 503, as a proxy before a server that is down.
        loses: A part of a request's path; such requests are done, and their answers lost.
        requests: What it was asked, oldest first.
    """

    def __init__(self, server_uri):
        self.delay = 0.0
        self.wait = lambda: time.sleep(self.delay)
        self.is_away = False
        self.loses = None
        self.requests = []
        self._target = urlsplit(server_uri)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._http.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def of_runs(self):
        """The requests that are not of traces."""
        return [request for request in self.requests if "/traces" not in request and "/version" not in request]


def _handler_of(store):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            store.requests.append(f"{self.command} {urlsplit(self.path).path}")
            store.wait()
            if store.is_away:
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            connection = http.client.HTTPConnection(store._target.hostname, store._target.port, timeout=60)
            headers = {key: value for key, value in self.headers.items() if key.lower() not in _NOT_FORWARDED}
            if "Content-Encoding" in self.headers:
                headers["Content-Encoding"] = self.headers["Content-Encoding"]
            with contextlib.closing(connection):
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
            if store.loses is not None and store.loses in self.path:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in _NOT_FORWARDED:
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):  # who has asked is gone
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        setattr(Handler, f"do_{method}", Handler._forward)
    return Handler


@contextlib.contextmanager
def slow_store(server_uri):
    """One that is up in this block."""
    store = SlowStore(server_uri)
    try:
        yield store
    finally:
        store.close()
