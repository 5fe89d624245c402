"""Event-loop lag of the example service with tracing on and off, side by side.

    python benchmarks/web.py [RATE [SECONDS]]      requests a second, for so long; 20 and 8 by default

Requests come at a fixed rate from a process of their own, and the LM answers from another after 100 ms. In the server
a timer of 5 ms says how much later than asked it is woken. On and off take turns, so that a noisy machine is noisy for
both.
"""

# ruff: noqa: ASYNC110, ASYNC240 - a script that measures; its own loop does nothing else
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
INTERVAL = 0.005
ROUNDS = 3
# Tracing off; on, as by default, writing from a thread; on, writing from a process.
HOWS = ("off", "thread", "process")
ENDPOINT = """
import sys
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
text = "[[ ## reasoning ## ]]\\nhm\\n\\n[[ ## answer ## ]]\\nyes\\n\\n[[ ## completed ## ]]"
with LocalEndpoint(lambda body: text, latency=0.1, keep_requests=False) as endpoint:
    print(endpoint.api_base, flush=True)
    sys.stdin.read()
"""


def serve(port: int, how: str, result: str) -> None:
    """The server's process."""
    import uvicorn

    import dspy_mlflow_async
    from dspy_mlflow_async import asgi

    on = dspy_mlflow_async.autolog
    if how == "process":
        dspy_mlflow_async.autolog = lambda: on(export="process")
    elif how == "off":
        dspy_mlflow_async.autolog = lambda: None
        asgi.TracingMiddleware = lambda app, **options: app  # noqa: ARG005
    sys.path.insert(0, str(EXAMPLES))
    import fastapi_app

    async def main() -> None:
        lags: list[float] = []

        async def probe() -> None:
            while True:
                begun = time.perf_counter()
                await asyncio.sleep(INTERVAL)
                lags.append(time.perf_counter() - begun - INTERVAL)

        server = uvicorn.Server(uvicorn.Config(fastapi_app.app, port=port, log_level="warning"))
        probing = asyncio.create_task(probe())
        serving = asyncio.create_task(server.serve())
        while not Path(f"{result}.begin").exists():
            await asyncio.sleep(0.05)
        await asyncio.to_thread(dspy_mlflow_async.flush, 60)  # the store's own start is not what is measured
        Path(f"{result}.ready").touch()
        lags.clear()
        cpu = time.process_time()
        while not Path(f"{result}.end").exists():
            await asyncio.sleep(0.05)
        cpu = time.process_time() - cpu
        probing.cancel()
        Path(result).write_text(json.dumps({"lags": lags, "cpu": cpu}))
        server.should_exit = True
        await serving

    asyncio.run(main())


async def ask(url: str, rate: float, seconds: float) -> AsyncIterator[list[float]]:
    """Send requests at a rate, however long each takes; gives nothing once warm, and then their latencies."""
    import httpx

    latencies: list[float] = []

    async def one(http: httpx.AsyncClient, number: int) -> None:
        begun = time.perf_counter()
        response = await http.post("/ask", json={"question": f"what of @n{number}-{time.time_ns()}"}, timeout=60)
        assert response.status_code == 200, response.text  # noqa: PLR2004
        latencies.append(time.perf_counter() - begun)

    async with httpx.AsyncClient(base_url=url) as http:
        await asyncio.gather(*(one(http, number) for number in range(20)))
        latencies.clear()
        yield []
        tasks, begin = [], time.perf_counter()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(one(http, number)))
        await asyncio.gather(*tasks)
    yield latencies


async def measure(api_base: str, folder: Path, how: str, rate: float, seconds: float) -> dict[str, Any]:
    """One server, started, warmed and measured."""
    folder.mkdir()
    port, result = free_port(), folder / "result.json"
    environment = {
        **os.environ,
        "LM_API_BASE": api_base,
        "OPENAI_API_KEY": "none",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DSPY_CACHEDIR": str(folder / "cache"),
        "DSPY_MLFLOW_ASYNC_SPOOL": str(folder / "spool"),
    }
    command = [sys.executable, __file__, "--serve", str(port), how, str(result)]
    process = subprocess.Popen(command, env=environment)  # noqa: ASYNC220
    try:
        await _until_up(port, process)
        asking = ask(f"http://127.0.0.1:{port}", rate, seconds)
        await anext(asking)
        Path(f"{result}.begin").touch()
        while not Path(f"{result}.ready").exists():
            await asyncio.sleep(0.05)
        latencies = await anext(asking)
        Path(f"{result}.end").touch()
        await asyncio.to_thread(process.wait, 60)
        return {**json.loads(result.read_text()), "latencies": latencies}
    finally:
        process.kill()


async def _until_up(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:  # noqa: PERF203
            assert process.poll() is None
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise TimeoutError


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shown(values: list[float]) -> str:
    """Milliseconds: median, p95, p99."""
    cuts = statistics.quantiles(values, n=100)
    return "p50 {:6.2f}  p95 {:6.2f}  p99 {:6.2f} ms".format(*(1000 * cuts[at] for at in (49, 94, 98)))


async def compare(rate: float, seconds: float, api_base: str) -> None:
    """Measure on and off in turns, and print a line for each."""
    got: dict[str, dict[str, Any]] = defaultdict(lambda: {"lags": [], "latencies": [], "cpu": 0.0})
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):
            for how in HOWS:
                result = await measure(api_base, Path(folder) / f"{turn}-{how}", how, rate, seconds)
                for key, value in result.items():
                    got[how][key] += value
    for how in HOWS:
        cpu = 1000 * got[how]["cpu"] / len(got[how]["latencies"])
        lag, latency = shown(got[how]["lags"]), shown(got[how]["latencies"])
        print(f"{how:8}lag {lag}   request {latency}   CPU {cpu:.1f} ms a request")


def main() -> None:
    """Start the endpoint, and compare."""
    rate = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 8.0  # noqa: PLR2004
    environment = {**os.environ, "DSPY_CACHEDIR": tempfile.mkdtemp()}
    endpoint = subprocess.Popen(
        [sys.executable, "-c", ENDPOINT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        asyncio.run(compare(rate, seconds, endpoint.stdout.readline().strip()))
    finally:
        endpoint.stdin.close()
        endpoint.wait(10)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]), *sys.argv[3:])
    else:
        main()
