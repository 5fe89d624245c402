"""An OpenAI-compatible endpoint on loopback that answers from a script: for the demo, the tests and the benchmarks."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypedDict

from aiohttp import web  # comes with LiteLLM, so with DSPy: also where mlflow-tracing alone is installed

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_BACKLOG = 2048
_KEEPALIVE_SECONDS = 3600.0
_START_SECONDS = 10.0
_OK = HTTPStatus.OK.value


class Reply(TypedDict, total=False):
    """Answer of a script that says more than a plain text; everything may be left out.

    Attributes:
        content: The text of the assistant's message.
        tool_calls: Its tool calls, in OpenAI's form.
        usage: ``prompt_tokens`` and ``completion_tokens``; by default a quarter of the characters each.
        finish_reason: By default ``stop``, or ``tool_calls`` where there are some.
        status: An HTTP status other than 200 makes the answer an error with ``content`` as its message.
        headers: Further response headers, such as ``Retry-After``.
        latency: Seconds before the answer begins, in place of the endpoint's.
        chunk_latency: Seconds between two pieces of a streamed answer.
        hang_up: Close the connection without an answer; in a streamed answer, after its first half.
    """

    content: str | None
    tool_calls: list[dict[str, Any]]
    usage: dict[str, int]
    finish_reason: str
    status: int
    headers: dict[str, str]
    latency: float
    chunk_latency: float
    hang_up: bool


Script = Callable[[dict[str, Any]], "str | Reply | Awaitable[str | Reply]"]


@dataclass(frozen=True, slots=True)
class Request:
    """One request that the endpoint has got.

    Attributes:
        body: The request's JSON.
        headers: Its headers, names in lower case.
        reply: What the script said to it.
        usage: The tokens that the answer reports, under OpenAI's names; empty for an error.
    """

    body: dict[str, Any]
    headers: Mapping[str, str]
    reply: Reply
    usage: dict[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Message texts of the request, a line break between them."""
        return text_of(self.body)


class LocalEndpoint:
    """A chat-completions server on loopback, in a thread of its own, for as long as the ``with`` block lasts.

    One event loop serves all connections (keep-alive, streaming), so a thousand requests may be open at once::

        with LocalEndpoint(lambda body: "Hi!", latency=0.02) as endpoint:
            lm = dspy.LM("openai/scripted", api_base=endpoint.api_base, api_key="none")

    Args:
        answer: The script: gets the request's JSON and returns the text of the answer, or a ``Reply``; may be a
            coroutine function. What it raises becomes an HTTP 500 with the exception's text.
        latency: Seconds before each answer.
        blocking: Whether ``answer`` may block (wait for an event or a barrier): each call gets a thread.
        keep_requests: Whether ``requests`` is filled. Off, a benchmark's memory stays flat.

    Attributes:
        requests: Every chat completion asked for, in the order the answers were decided.
    """

    def __init__(
        self, answer: Script, latency: float = 0.0, *, blocking: bool = False, keep_requests: bool = True
    ) -> None:
        if latency < 0:
            raise ValueError(f"latency must be 0 or more seconds, not {latency}")
        self.requests: list[Request] = []
        self._answer = answer
        self._latency = latency
        self._keep_requests = keep_requests
        self._pool = ThreadPoolExecutor(1024, thread_name_prefix="endpoint-answer") if blocking else None
        self._port: int | None = None
        self._failure: BaseException | None = None
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="local-endpoint", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on, chosen by the system.

        Raises:
            RuntimeError: Outside of the ``with`` block.
        """
        if self._port is None:
            raise RuntimeError("The endpoint is not running: use it as `with LocalEndpoint(...) as endpoint:`.")
        return self._port

    @property
    def api_base(self) -> str:
        """URL to pass as ``api_base``: ``http://127.0.0.1:PORT/v1``."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        """Start listening.

        Raises:
            OSError: Where loopback has no port to give.
        """
        self._thread.start()
        self._started.wait(_START_SECONDS)
        if self._port is None:
            raise OSError(f"No server could be started on 127.0.0.1: {self._failure}") from self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections and stop."""
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_START_SECONDS)
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._port = None

    # --- the server, in its own thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except OSError as error:
            self._failure = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=0)  # prompts may be of any size
        app.router.add_get("/{base:.*}models", _models)
        app.router.add_post("/{base:.*}chat/completions", self._complete)
        app.router.add_route("*", "/{path:.*}", _unknown)
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=_KEEPALIVE_SECONDS, shutdown_timeout=0)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0, backlog=_BACKLOG).start()
            self._port = runner.addresses[0][1]
            self._started.set()
            await self._stop.wait()
        finally:
            await runner.cleanup()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        try:
            reply = _as_reply(await self._ask(body))
        except Exception as error:  # noqa: BLE001 - whatever the script raises is the server's failure
            reply = Reply(status=500, content=f"{type(error).__name__}: {error}")
        status = reply.get("status", _OK)
        usage = _usage(body, reply) if status == _OK else {}
        if self._keep_requests:
            headers = {name.lower(): value for name, value in request.headers.items()}
            self.requests.append(Request(body, headers, reply, usage))
        if latency := reply.get("latency", self._latency):
            await asyncio.sleep(latency)
        if body.get("stream") and status == _OK:
            return await _stream(request, body, reply, usage)
        if reply.get("hang_up"):
            _hang_up(request)
        answer = _completion(body, reply, usage) if status == _OK else _error(reply.get("content"), status)
        return web.json_response(answer, status=status, headers=reply.get("headers"))

    async def _ask(self, body: dict[str, Any]) -> Any:
        if self._pool is not None:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._answer, body)
        said = self._answer(body)
        return await said if inspect.isawaitable(said) else said


async def _models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "scripted", "object": "model"}]})


async def _unknown(request: web.Request) -> web.Response:
    known = "POST /v1/chat/completions and GET /v1/models"
    message = f"This endpoint knows {known}, not {request.method} {request.path}."
    return web.json_response(_error(message, 404), status=404)


def _hang_up(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.close()


def text_of(body: Mapping[str, Any]) -> str:
    """Return all message texts of a chat-completions request, a line break between them."""
    texts: list[str] = []
    for message in body.get("messages") or ():
        content = message.get("content") or ""
        parts = content if isinstance(content, list) else [{"text": content}]
        texts.extend(str(part["text"]) for part in parts if "text" in part)
    return "\n".join(texts)


def _as_reply(said: Any) -> Reply:
    if isinstance(said, str):
        return Reply(content=said)
    if isinstance(said, Mapping):
        return Reply(**said)  # type: ignore[typeddict-item]
    raise TypeError(f"the script must return a text or a dict, not {type(said).__name__}")


def _usage(body: Mapping[str, Any], reply: Reply) -> dict[str, int]:
    said = dict(reply.get("usage") or {})
    prompt = said.pop("prompt_tokens", max(1, len(text_of(body)) // 4))
    completion = said.pop("completion_tokens", max(1, len(reply.get("content") or "") // 4))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        **said,
    }


def _finish_reason(reply: Reply) -> str:
    return reply.get("finish_reason") or ("tool_calls" if reply.get("tool_calls") else "stop")


def _envelope(body: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-local", "object": kind, "created": 0, "model": body.get("model") or "scripted"}


def _completion(body: Mapping[str, Any], reply: Reply, usage: dict[str, int]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.get("content")}
    if calls := reply.get("tool_calls"):
        message["tool_calls"] = calls
    choices = [
        {"index": index, "message": message, "finish_reason": _finish_reason(reply)}
        for index in range(body.get("n") or 1)
    ]
    return {**_envelope(body, "chat.completion"), "choices": choices, "usage": usage}


def _error(message: str | None, status: int) -> dict[str, Any]:
    return {"error": {"message": message or "scripted failure", "type": "scripted", "code": status}}


def _pieces(body: Mapping[str, Any], reply: Reply, usage: dict[str, int]) -> Iterator[dict[str, Any]]:
    envelope = _envelope(body, "chat.completion.chunk")

    def piece(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {**envelope, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}

    yield piece({"role": "assistant", "content": ""})
    words = (reply.get("content") or "").split(" ")
    for number, word in enumerate(words):
        if reply.get("hang_up") and number >= len(words) // 2:
            return
        yield piece({"content": word if number == len(words) - 1 else f"{word} "})
    for number, call in enumerate(reply.get("tool_calls") or ()):
        yield piece({"tool_calls": [{"index": number, **call}]})
    yield piece({}, _finish_reason(reply))
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**envelope, "choices": [], "usage": usage}


async def _stream(
    request: web.Request, body: Mapping[str, Any], reply: Reply, usage: dict[str, int]
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **(reply.get("headers") or {})})
    await response.prepare(request)
    for piece in _pieces(body, reply, usage):
        if piece["choices"] and "content" in piece["choices"][0]["delta"]:
            await asyncio.sleep(reply.get("chunk_latency", 0))
        await response.write(f"data: {json.dumps(piece)}\n\n".encode())
    if reply.get("hang_up"):
        _hang_up(request)
    else:
        await response.write(b"data: [DONE]\n\n")
    return response
