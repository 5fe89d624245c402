"""Requests like one that a server has answered well, over the connections that are open to it.

For the export room. What precedes the body of a request (credentials, headers, the choice of a proxy and of
certificates) is found out by MLflow and requests, once for each batch. What follows is those bytes again, with
another body: requests and urllib3 take ten times as long for it as the system takes to send it. Connections are
urllib3's, opened and checked by it. Checked on requests 2.32 and 2.34, urllib3 2.8.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

from requests import Response

__all__ = ["NOT_UNDERSTOOD", "Answer", "Repeater", "repeater_of"]

_OK, _REDIRECTS, _BAD_REQUEST = 200, 300, 400
_MOST_HEAD, _PIECE = 65_536, 65_536
_END = b"\r\n\r\n"
# Of a request, what is of its body, or of its connection.
_OF_BODY = {"content-length", "content-type"}
# Where a request or an answer has one of these, requests has more to do with it than is done here.
_OF_OTHERS = {"cookie", "set-cookie", "transfer-encoding", "content-encoding", "expect", "upgrade"}


class Answer(NamedTuple):
    """Answer of a server, with the names that requests has for its parts.

    Attributes:
        status_code: Its HTTP status.
        headers: Of its headers, the one that tells what its body is.
        content: Its body.
    """

    status_code: int
    headers: dict[str, str]
    content: bytes

    def as_response(self, url: str) -> Response:
        """Return it as requests gives it."""
        response = Response()
        response.url, response.status_code, response.raw = url, self.status_code, io.BytesIO(self.content)
        response.headers.update(self.headers)
        response.encoding = "utf-8"
        return response


# Pools of connections, and the connections in them, as urllib3 makes them; others are of what stands in for them.
_KINDS = {
    (f"urllib3.connectionpool.{scheme}ConnectionPool", f"urllib3.connection.{scheme}Connection")
    for scheme in ("HTTP", "HTTPS")
}
NOT_UNDERSTOOD = Answer(0, {}, b"")


class Repeater:
    """Sender of requests like one that has been answered well. Safe for threads.

    Attributes:
        base: The address of the server, to which a path is added.
    """

    def __init__(self, base: str, pool: Any, prefix: str, head: str, seconds: float) -> None:
        self.base = base
        self._pool = pool
        self._prefix = prefix
        self._head = head
        self._seconds = seconds

    def post(self, path: str, headers: str, body: bytes) -> Answer | None:
        """Send a body to a path.

        Args:
            path: Below the server's address.
            headers: Lines about the body, but for its length.
            body: What to send.

        Returns:
            The answer, or that it was not understood; None where no connection is open, and nothing was sent.

        Raises:
            OSError: Where there was none, or it did not come in time.
        """
        try:
            connection = self._pool._get_conn()
        except Exception:  # noqa: BLE001 - the pool was closed, since many others are in use
            return None
        sock, is_reusable = connection.sock, False
        try:
            if sock is None:
                is_reusable = True
                return None
            begin = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._head}{headers}Content-Length: {len(body)}\r\n\r\n"
            sock.settimeout(self._seconds)
            sock.sendall(begin.encode("latin-1") + body)
            answer, is_reusable = _read(sock)
        finally:
            if not is_reusable:
                connection.close()
            self._pool._put_conn(connection)
        return answer


def _read(sock: Any) -> tuple[Answer, bool]:
    """Return the answer, and whether another request may follow it."""
    data = b""
    while (end := data.find(_END)) < 0:
        if len(data) > _MOST_HEAD:
            return NOT_UNDERSTOOD, False
        data += _received(sock)
    lines = data[:end].decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    length, content = headers.get("content-length", ""), data[end + len(_END) :]
    version, _, status = lines[0].partition(" ")
    is_plain = version == "HTTP/1.1" and status[:3].isdecimal() and length.isdecimal()
    if not is_plain or len(headers) < len(lines) - 1 or not _OF_OTHERS.isdisjoint(headers):
        return NOT_UNDERSTOOD, False
    number, rest = int(status[:3]), int(length) - len(content)
    if not (_OK <= number < _REDIRECTS or number >= _BAD_REQUEST) or rest < 0:
        return NOT_UNDERSTOOD, False
    if rest:
        pieces = [content]
        while rest > 0:
            pieces.append(_received(sock))
            rest -= len(pieces[-1])
        content = b"".join(pieces)
    is_kept = rest == 0 and headers.get("connection", "keep-alive").lower() == "keep-alive"
    return Answer(number, {"Content-Type": headers.get("content-type", "")}, content), is_kept


def _received(sock: Any) -> bytes:
    piece: bytes = sock.recv(_PIECE)
    if not piece:
        raise ConnectionResetError("the server has closed the connection without an answer")
    return piece


def repeater_of(response: Any, endpoint: str, seconds: float) -> Repeater | None:
    """Return what sends requests like the one that was answered so; None where others must.

    Args:
        response: The answer, as requests gives it.
        endpoint: The path that was asked for, as MLflow has it.
        seconds: How long an answer may take.
    """
    try:
        request, pool = response.request, response.raw._pool
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _OF_BODY}
        if not _can_repeat(request, response, headers, pool):
            return None
        if not (request.url.endswith(endpoint) and request.path_url.endswith(endpoint)):
            return None
        lines = [f"{name}: {value}" for name, value in {"Host": _host(pool), **headers}.items()]
        if any(len(line.splitlines()) != 1 or not line.isascii() for line in lines):
            return None
        base, prefix = request.url[: -len(endpoint)], request.path_url[: -len(endpoint)]
        return Repeater(base, pool, prefix, "".join(f"{line}\r\n" for line in lines), seconds)
    except Exception:  # noqa: BLE001 - other versions of requests or urllib3, or what stands in for them
        return None


def _can_repeat(request: Any, response: Any, headers: dict[str, Any], pool: Any) -> bool:
    return (
        response.status_code == _OK
        and not response.history
        and request.method == "POST"
        and pool.proxy is None
        and (_name(type(pool)), _name(pool.ConnectionCls)) in _KINDS
        and "Content-Length" in response.headers
        and headers.get("Connection", "keep-alive") == "keep-alive"
        and _OF_OTHERS.isdisjoint(map(str.lower, [*headers, *response.headers]))
    )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _host(pool: Any) -> str:
    """Return what http.client says of the host: without a port that is the scheme's own."""
    host = f"[{pool.host}]" if ":" in pool.host else pool.host
    return host if pool.port == {"http": 80, "https": 443}[pool.scheme] else f"{host}:{pool.port}"
