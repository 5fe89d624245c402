"""The middleware, app by app, without a network: what it records, and what it leaves alone."""

import asyncio
import ipaddress
import logging
from dataclasses import replace
from types import FunctionType

import httpx
import mlflow
import pytest
from apps import asking_app, attribute, client, fastapi, meta, program, unseen
from fastapi import APIRouter, BackgroundTasks, FastAPI, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

import dspy_mlflow_async
from dspy_mlflow_async import wrap
from dspy_mlflow_async.asgi import TracingMiddleware
from dspy_mlflow_async.testing import tree
from echo import chain_tree

SAMPLED, UNSAMPLED = (f"00-{'1' * 32}-b7ad6b7169203331-{flag}" for flag in ("01", "00"))


async def test_a_request_is_a_trace(traces):
    """Named by method and template, with session, user, status and its id in the response; nothing of the body."""
    app = asking_app(session_id="x-session-id", user=lambda scope: "ada", tags={"service": "qa"})

    async with client(app) as http:
        response = await http.post("/ask/cats?key=hush", json={"pass": "word"}, headers={"X-Session-Id": "s-1"})

    (trace,) = traces
    assert {"answer": "@cats"} == response.json()
    assert ("POST /ask/{topic}", [chain_tree()]) == tree(trace)
    assert trace.info.trace_id == response.headers["x-trace-id"]
    assert ("s-1", "ada", "qa") == (meta(trace, "session"), meta(trace, "user"), trace.info.tags["service"])
    assert ("POST", "/ask/{topic}", 200, "ok") == tuple(
        attribute(trace, key) for key in ("http.request.method", "http.route", "http.response.status_code", "outcome")
    )
    assert "hush" not in trace.to_json()
    assert "word" not in trace.to_json()


async def test_a_request_without_dspy_is_none(traces):
    """Health checks and pages that are not found make no trace, and tell no id."""
    async with client(asking_app()) as http:
        responses = [await http.get("/health"), await http.get("/nowhere")]

    assert [] == traces
    assert [False, False] == ["x-trace-id" in response.headers for response in responses]


async def test_all_that_a_handler_does_is_one_trace(traces):
    """Several calls at once, spans of the user and sync code in threads: one trace."""
    app = fastapi()

    @app.get("/many")
    async def ask_many():
        with mlflow.start_span("own"):
            await asyncio.gather(program.acall(question="@a"), asyncio.to_thread(program, question="@b"))
        return (await wrap(program, session_id="wrapped").acall(question="@c")).answer

    @app.get("/sync")
    def ask_in_thread():
        return program(question="@d").answer

    async with client(app) as http:
        await http.get("/many")
        await http.get("/sync")

    many, sync = traces
    assert ("GET /many", ["Chain.forward", "own"]) == (tree(many)[0], sorted(child[0] for child in tree(many)[1]))
    assert ("GET /sync", [chain_tree()]) == tree(sync)


@pytest.mark.parametrize(
    ("path", "template"),
    [("/v1/items/3", "/v1/items/{item}"), ("/sub/x/7", "/sub/x/{y}"), ("/t/acme/x/7", "/t/{tenant}/x/{y}")],
)
async def test_templates_of_routers_and_mounts(traces, path, template):
    """A template has the prefixes of routers and mounts, and no value of a parameter."""
    app, router, sub = fastapi(), APIRouter(prefix="/items"), FastAPI()

    @router.get("/{item}")
    async def item(item: int):
        await program.acall(question="@a")

    @sub.get("/x/{y}")
    async def x(y: str):
        await program.acall(question="@a")

    app.include_router(router, prefix="/v1")
    app.mount("/sub", sub)
    app.mount("/t/{tenant}", sub)

    async with client(app, root_path="/api") as http:
        response = await http.get(f"/api{path}")

    assert 200 == response.status_code
    assert (f"GET {template}", template) == (tree(traces[0])[0], attribute(traces[0], "http.route"))


async def test_a_handler_that_raises(traces):
    """The exception passes unchanged, and is on the trace; so is a server error's status; a client's error is none."""
    app, error = fastapi(), RuntimeError("broken")

    @app.get("/{how}")
    async def fail(how: str):
        await program.acall(question="@a")
        raise error if how == "raise" else HTTPException(int(how))

    async with client(app) as http:
        with pytest.raises(RuntimeError) as raised:
            await http.get("/raise")
        await http.get("/503")
        await http.get("/404")

    assert error is raised.value
    assert [("ERROR", "error", 500), ("ERROR", "error", 503), ("OK", "ok", 404)] == [
        (trace.info.state.value, attribute(trace, "outcome"), attribute(trace, "http.response.status_code"))
        for trace in traces
    ]
    assert "RuntimeError: broken" in traces[0].data.spans[0].status.description


class RefusedError(Exception):
    pass


async def test_an_error_that_is_handled_carries_the_id(traces):
    """``HTTPException`` and exceptions with a handler are answered inside: header and status are the answer's."""
    app = fastapi()

    @app.exception_handler(RefusedError)
    async def refuse(request, error):
        return JSONResponse({"error": "refused"}, status_code=503)

    @app.get("/{how}")
    async def fail(how: str):
        await program.acall(question="@a")
        raise RefusedError if how == "refused" else HTTPException(418)

    async with client(app) as http:
        answers = [await http.get("/teapot"), await http.get("/refused")]

    assert [418, 503] == [answer.status_code for answer in answers]
    assert [trace.info.trace_id for trace in traces] == [answer.headers["x-trace-id"] for answer in answers]
    assert [("ok", 418), ("error", 503)] == [
        (attribute(trace, "outcome"), attribute(trace, "http.response.status_code")) for trace in traces
    ]


@pytest.mark.parametrize("is_around", [True, False], ids=["around", "added"])
async def test_an_error_that_nobody_handles(traces, is_around):
    """Starlette answers it outside of all ``add_middleware``; only around the whole app we see that answer."""
    app = FastAPI() if is_around else fastapi()

    @app.get("/fail")
    async def fail():
        await program.acall(question="@a")
        raise RefusedError

    async with client(TracingMiddleware(app) if is_around else app, raise_app_exceptions=False) as http:
        answer = await http.get("/fail")

    (trace,) = traces
    assert 500 == answer.status_code == attribute(trace, "http.response.status_code")
    assert "error" == attribute(trace, "outcome")
    assert (trace.info.trace_id if is_around else None) == answer.headers.get("x-trace-id")


async def test_a_response_that_breaks_after_its_start(traces):
    """The status that went out stays, also where the rest never came."""
    app = fastapi()

    @app.get("/stream")
    async def stream():
        async def words():
            yield (await program.acall(question="@a")).answer
            raise RefusedError

        return StreamingResponse(words())

    async with client(app, raise_app_exceptions=False) as http:
        await http.get("/stream")

    assert ("error", 200) == (attribute(traces[0], "outcome"), attribute(traces[0], "http.response.status_code"))


async def test_what_only_the_handler_knows(traces):
    """A session that stands in the body can be told once DSPy has been called."""
    app = fastapi()

    @app.get("/ask")
    async def ask():
        await program.acall(question="@a")
        mlflow.update_current_trace(metadata={"mlflow.trace.session": "from the body"})

    async with client(app) as http:
        await http.get("/ask")

    assert "from the body" == meta(traces[0], "session")


async def test_streams_and_background_tasks_belong_to_it(traces):
    """A stream that calls DSPy after its headers went out, and what runs after the last byte, are in the one trace."""
    app = fastapi()

    @app.get("/stream")
    async def stream(background: BackgroundTasks):
        async def words():
            yield "begin "
            yield (await program.acall(question="@word")).answer

        background.add_task(program.acall, question="@later")
        return StreamingResponse(words(), background=background)

    async with client(app) as http:
        response = await http.get("/stream")

    (trace,) = traces
    assert "begin @word" == response.text
    assert ("GET /stream", [chain_tree(), chain_tree()]) == tree(trace)
    assert trace.info.trace_id == response.headers["x-trace-id"]


async def test_a_callers_trace_is_taken_up(traces):
    """With ``traceparent`` the spans belong to the caller's trace, at once in two requests, and go where it goes."""
    sent = []

    async def ask(http, topic):
        response = await http.post(f"/ask/{topic}", headers={"traceparent": parent, "x-session-id": "s-1"})
        sent.append(response.headers["x-trace-id"])

    async with client(asking_app(session_id="x-session-id", traceparent=True)) as http:
        with mlflow.start_span("caller") as caller:
            parent = f"00-{caller.trace_id[3:]}-{caller.span_id}-01"
            from dspy_mlflow_async.seams import mlflow_spans as seam

            before = seam.detach()  # the server is another process
            await asyncio.gather(ask(http, "a"), ask(http, "b"))
            seam.reattach(before)

    (trace,) = traces
    assert ("caller", [("POST /ask/{topic}", [chain_tree()])] * 2) == tree(trace)
    assert [trace.info.trace_id] * 2 == sent
    assert "s-1" == trace.data.spans[1].get_attribute("mlflow.trace.session")


@pytest.mark.parametrize(
    "value",
    [
        "",
        "garbage",
        "00-abc-def-01",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"ff-{'1' * 32}-b7ad6b7169203331-01",
        "é" * 9,
    ],
)
async def test_a_malformed_traceparent_is_ignored(traces, value):
    """As the W3C says: then the request is a trace of its own."""
    async with client(asking_app(traceparent=True)) as http:
        response = await http.post("/ask/a", headers=[(b"traceparent", value.encode("latin-1"))])

    assert ("POST /ask/{topic}", [chain_tree()]) == tree(traces[0])
    assert traces[0].info.trace_id == response.headers["x-trace-id"]


async def test_two_traceparents_are_none(traces):
    """A header that comes twice says nothing."""
    one = f"00-{'1' * 32}-b7ad6b7169203331-01"
    async with client(asking_app(traceparent=True)) as http:
        await http.post("/ask/a", headers=[("traceparent", one), ("traceparent", one)])

    assert "1" * 32 not in traces[0].info.trace_id


async def test_a_caller_that_did_not_sample(traces):
    """A caller's trace that is not sampled is not recorded here either, and counted."""
    before = dspy_mlflow_async.stats().callers
    async with client(asking_app(traceparent=True)) as http:
        response = await http.post("/ask/a", headers={"traceparent": UNSAMPLED})

    assert ([], False) == (traces, "x-trace-id" in response.headers)
    assert before.unsampled + 1 == dspy_mlflow_async.stats().callers.unsampled


@pytest.mark.parametrize("header", [SAMPLED, UNSAMPLED])
async def test_strangers_are_not_believed(traces, header):
    """By default no ``traceparent`` adds to another's trace or hides a request; each that came is counted."""
    before = dspy_mlflow_async.stats().callers
    async with client(asking_app()) as http:
        response = await http.post("/ask/a", headers={"traceparent": header})

    (trace,) = traces
    assert ("POST /ask/{topic}", [chain_tree()]) == tree(trace)
    assert "1" * 32 not in trace.info.trace_id
    assert trace.info.trace_id == response.headers["x-trace-id"]
    assert replace(before, ignored=before.ignored + 1) == dspy_mlflow_async.stats().callers


def raising(scope):
    raise RuntimeError("nobody knows")


@pytest.mark.parametrize(
    ("trust", "client_address", "is_believed"),
    [
        (["10.0.0.0/8"], ("10.1.2.3", 1), True),
        (["10.0.0.0/8"], ("11.1.2.3", 1), False),
        (["192.0.2.1", "10.0.0.0/8"], ("::ffff:10.1.2.3", 1), True),
        ((ipaddress.ip_network("fe80::/10"),), ("fe80::1%eth0", 1), True),
        (["0.0.0.0/0"], None, False),
        (["0.0.0.0/0"], ("", 0), False),
        ([], ("127.0.0.1", 1), False),
        (lambda scope: scope["client"][0] == "10.1.2.3", ("10.1.2.3", 1), True),
        (lambda scope: None, ("10.1.2.3", 1), False),
        (raising, ("10.1.2.3", 1), False),
    ],
)
async def test_who_is_believed(traces, trust, client_address, is_believed):
    """A list of networks or a function says whose header is believed; what nobody can tell is not."""
    before = dspy_mlflow_async.stats().callers
    transport = httpx.ASGITransport(asking_app(traceparent=trust), client=client_address)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        response = await http.post("/ask/a", headers={"traceparent": SAMPLED})
    after = dspy_mlflow_async.stats().callers

    assert is_believed == (response.headers["x-trace-id"] == f"tr-{'1' * 32}")
    assert (is_believed, not is_believed) == (after.followed - before.followed, after.ignored - before.ignored)


async def test_sampling_of_requests(traces, sampled):
    """A ratio decides on whole requests, and a response tells no id of a trace that is left out."""
    async with client(asking_app(sample=0.3)) as http:
        responses = [await http.post("/ask/a") for _ in range(60)]

    told = [response.headers["x-trace-id"] for response in responses if "x-trace-id" in response.headers]
    assert told == [trace.info.trace_id for trace in traces]
    assert 60 == len(traces) + sampled()


# --- the lifespan -------------------------------------------------------------------------------------------------


async def live(app):
    inbox, sent = asyncio.Queue(), []
    for kind in ("startup", "shutdown"):
        inbox.put_nowait({"type": f"lifespan.{kind}"})

    async def send(message):
        sent.append(message["type"])

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, inbox.get, send)
    return sent


async def knows_no_lifespan(scope, receive, send):
    assert scope["type"] == "http"


@pytest.mark.parametrize("app", [fastapi(), TracingMiddleware(knows_no_lifespan)], ids=["fastapi", "plain"])
async def test_the_shutdown_flushes(app, monkeypatch):
    """Before the server hears that the app has shut down, traces are flushed; an app without a lifespan gets one."""
    from dspy_mlflow_async.asgi import lifespan

    flushed = []
    monkeypatch.setattr(lifespan, "secure", flushed.append)

    assert ["lifespan.startup.complete", "lifespan.shutdown.complete"] == await live(app)
    assert [5.0] == flushed


async def test_an_app_that_fails_to_start():
    """An app that raises in its own lifespan goes on to do so."""

    async def app(scope, receive, send):
        await receive()
        raise RuntimeError("no database")

    with pytest.raises(RuntimeError, match="no database"):
        await live(TracingMiddleware(app))


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"websocket": "frame"}, ValueError),
        ({"session_id": "not a header"}, ValueError),
        ({"session_id": 5}, TypeError),
        ({"response_header": "x: y"}, ValueError),
        ({"flush_timeout": -1}, ValueError),
        ({"flush_timeout": "1"}, TypeError),
        ({"traceparent": "10.0.0.0/8"}, TypeError),
        ({"traceparent": None}, TypeError),
        ({"traceparent": ["my.gateway"]}, ValueError),
        ({"traceparent": asking_app().__call__}, TypeError),
        ({"name": asking_app().__call__}, TypeError),
        ({"session_id": asking_app().__call__}, TypeError),
        ({"sample": {"fast": 1}}, ValueError),
        ({"sample": 2}, ValueError),
        ({"experiment_id": "4711"}, ValueError),
    ],
)
def test_bad_settings_are_refused_at_the_start(settings, error, store_uri):
    """A service does not start with a setting that cannot work."""
    with pytest.raises(error):
        TracingMiddleware(knows_no_lifespan, **settings)


async def test_functions_that_raise_harm_nothing(traces, caplog):
    """A request is answered and traced, whatever the service's own functions of the scope do."""
    raising = {"name": lambda scope: 1 / 0, "user": lambda scope: scope["nothing"], "tags": lambda scope: 5}
    broken = {name: FunctionType(unseen(function), {}) for name, function in raising.items()}

    async with client(asking_app(**broken)) as http:
        with caplog.at_level(logging.WARNING, "dspy_mlflow_async"):
            response = await http.post("/ask/a")

    assert 200 == response.status_code
    assert ["KeyError", "ZeroDivisionError"] == [record.args[1] for record in caplog.records]
    assert ("POST /ask/{topic}", [chain_tree()]) == tree(traces[0])


async def test_long_sessions_are_cut_and_told_apart(traces):
    """A header of 10 KiB makes a session that is cut, with a mark, and two that begin alike stay two."""
    async with client(asking_app(session_id="x-session-id")) as http:
        for end in "ab":
            assert 200 == (await http.post("/ask/a", headers={"x-session-id": "x" * 10240 + end})).status_code

    first, second = (meta(trace, "session") for trace in traces)
    assert (250, 250) == (len(first), len(second))
    assert "… [cut: 10241 characters, sha256 " in first
    assert first != second


# --- other frameworks ---------------------------------------------------------------------------------------------


async def test_a_bare_starlette_app(traces):
    """Under Starlette alone the route's template is found, below a mount as well."""

    async def ask(request):
        return PlainTextResponse((await program.acall(question=f"@{request.path_params['topic']}")).answer)

    routes = [Route("/ask/{topic}", ask), Mount("/sub/{tenant}", routes=[Route("/ask/{topic:path}", ask)])]
    app = Starlette(routes=routes, middleware=[Middleware(TracingMiddleware, user="x-user")])

    async with client(app) as http:
        told = [
            (await http.get(path, headers={"x-user": "ada"})).headers["x-trace-id"]
            for path in ("/ask/a", "/sub/acme/ask/b/c")
        ]

    assert [("/ask/{topic}", "ada", 200), ("/sub/{tenant}/ask/{topic}", "ada", 200)] == [
        (attribute(trace, "http.route"), meta(trace, "user"), attribute(trace, "http.response.status_code"))
        for trace in traces
    ]
    assert told == [trace.info.trace_id for trace in traces]


async def test_an_app_without_a_framework(traces):
    """Any ASGI app will do; without a route the trace is named by its method."""

    async def app(scope, receive, send):
        await program.acall(question="@a")
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with client(TracingMiddleware(app)) as http:
        response = await http.put("/some/where")

    assert [("PUT", [chain_tree()])] == [tree(trace) for trace in traces]
    assert traces[0].info.trace_id == response.headers["x-trace-id"]
