"""The local endpoint: real HTTP, scripted answers, failures on request, a thousand connections at once."""

import asyncio
import json
import threading

import dspy
import httpx
import pytest

from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint, text_of

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def post(endpoint, body=None, **kwargs):
    return httpx.post(f"{endpoint.api_base}/chat/completions", json=body or HELLO, timeout=20, **kwargs)


def test_answers_with_usage_and_keeps_the_request():
    """A text becomes a completion; its tokens are reported, and the request is kept with them."""
    with LocalEndpoint(lambda body: f"{text_of(body)} yourself") as endpoint:
        answer = post(endpoint).json()
        (request,) = endpoint.requests

    assert "hello yourself" == answer["choices"][0]["message"]["content"]
    assert request.usage == answer["usage"]
    assert "hello" == request.text
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]


def test_dspy_lm_takes_its_answers_and_its_usage():
    """DSPy's own client understands it: answer and usage."""
    reply = {"content": "Yes.", "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
    with LocalEndpoint(lambda body: reply) as endpoint:
        lm = dspy.LM("openai/scripted", api_base=endpoint.api_base, api_key="none", cache=False)
        answers = lm("Are we there?")

    assert ["Yes."] == answers
    assert 12 == lm.history[-1]["usage"]["total_tokens"]


def test_streams_in_pieces_with_usage_at_the_end():
    """With ``stream`` the answer comes as events: role, words, the reason it ended, usage if asked for, [DONE]."""
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    with LocalEndpoint(lambda body: "one two three") as endpoint:
        lines = [line.removeprefix("data: ") for line in post(endpoint, body).text.split("\n\n") if line]

    events = [json.loads(line) for line in lines[:-1]]
    assert "[DONE]" == lines[-1]
    assert "one two three" == "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert "stop" == events[-2]["choices"][0]["finish_reason"]
    assert events[-1]["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
def test_fails_as_the_script_says(status):
    """A status other than 200 comes as OpenAI's error, with headers, and bills no tokens."""
    reply = {"status": status, "content": "no", "headers": {"Retry-After": "1"}}
    with LocalEndpoint(lambda body: reply) as endpoint:
        answer = post(endpoint)

    assert (status, "no", "1") == (answer.status_code, answer.json()["error"]["message"], answer.headers["Retry-After"])
    assert {} == endpoint.requests[0].usage


def test_script_that_raises_is_a_500_with_its_words():
    """What the script raises is the answer of a server that has failed."""

    def fail(body):
        raise KeyError("nobody")

    with LocalEndpoint(fail) as endpoint:
        answer = post(endpoint)

    assert (500, "KeyError: 'nobody'") == (answer.status_code, answer.json()["error"]["message"])


def test_hangs_up_before_the_answer_and_in_the_middle_of_a_stream():
    """``hang_up`` closes the connection: at once, or after half of a stream."""
    with LocalEndpoint(lambda body: {"content": "one two three four", "hang_up": True}) as endpoint:
        with pytest.raises(httpx.RemoteProtocolError):
            post(endpoint)
        with pytest.raises(httpx.RemoteProtocolError):
            post(endpoint, {**HELLO, "stream": True})


def test_unknown_path_says_what_is_known():
    """Anything else is a 404 that says what this endpoint is; the list of models is there."""
    with LocalEndpoint(lambda body: "") as endpoint:
        unknown = httpx.get(f"{endpoint.api_base}/files")
        models = httpx.get(f"{endpoint.api_base}/models")

    assert 404 == unknown.status_code
    assert "/v1/chat/completions" in unknown.json()["error"]["message"]
    assert "scripted" == models.json()["data"][0]["id"]


def test_blocking_scripts_wait_for_each_other():
    """With ``blocking`` each call has a thread, so that scripts may meet at a barrier."""
    barrier = threading.Barrier(20)

    def meet(body):
        barrier.wait(20)
        return "met"

    async def ask_all(endpoint):
        async with httpx.AsyncClient(timeout=30) as client:
            url = f"{endpoint.api_base}/chat/completions"
            return await asyncio.gather(*(client.post(url, json=HELLO) for _ in range(20)))

    with LocalEndpoint(meet, blocking=True) as endpoint:
        answers = asyncio.run(ask_all(endpoint))

    assert 20 == sum(answer.status_code == 200 for answer in answers)


async def test_thousand_requests_at_once():
    """A thousand connections are open at once, and each gets its own answer."""
    everybody, arrived = asyncio.Event(), []

    async def answer(body):
        arrived.append(None)
        if len(arrived) == 1000:
            everybody.set()
        await asyncio.wait_for(everybody.wait(), 30)
        return text_of(body)

    async def ask(endpoint, number):
        reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
        body = json.dumps({"messages": [{"role": "user", "content": f"n{number}"}]}).encode()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        text = (await asyncio.wait_for(reader.read(), 60)).partition(b"\r\n\r\n")[2]
        writer.close()
        await writer.wait_closed()
        return json.loads(text)["choices"][0]["message"]["content"]

    with LocalEndpoint(answer, keep_requests=False) as endpoint:
        answers = await asyncio.gather(*(ask(endpoint, number) for number in range(1000)))

    assert [f"n{number}" for number in range(1000)] == answers
    assert [] == endpoint.requests


def test_leaves_no_thread_and_refuses_to_be_used_outside():
    """After the block its thread is gone, and its port is an error that says how to use it."""
    with LocalEndpoint(lambda body: "") as endpoint:
        assert post(endpoint).status_code == 200

    assert "local-endpoint" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(RuntimeError, match="with LocalEndpoint"):
        endpoint.api_base  # noqa: B018
    with pytest.raises(ValueError, match="latency"):
        LocalEndpoint(lambda body: "", latency=-1)
