"""Event-loop lag of the example service with tracing on and off, side by side: ``python tests/app/lag.py [rate] [s]``.

Requests come at a fixed rate from a process of their own. In the server a timer of 5 ms says how much later than asked
it is woken. On and off take turns, so that a noisy machine is noisy for both.
"""

# ruff: noqa: ASYNC110, ASYNC240, PERF203, T201 - a script that measures; its own loop does nothing else
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
INTERVAL = 0.005
ROUNDS = 3
# Tracing off; on, as by default, writing from a thread; on, writing from a process.
HOWS = ("off", "thread", "process")


def serve(port, how, result):
    """The server's process."""
    import uvicorn

    import dspy_mlflow_async
    from dspy_mlflow_async import asgi

    if how == "process":
        on = dspy_mlflow_async.autolog
        dspy_mlflow_async.autolog = lambda: on(export="process")
    elif how == "off":
        dspy_mlflow_async.autolog = lambda: None
        asgi.TracingMiddleware = lambda app, **options: app
    sys.path.insert(0, str(HERE.parents[1] / "examples"))
    import fastapi_app

    async def main():
        lags = []

        async def probe():
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


async def ask(url, rate, seconds):
    """Send requests at a rate, however long each takes; gives their latencies."""
    import httpx

    latencies = []

    async def one(http, number):
        begun = time.perf_counter()
        response = await http.post("/ask", json={"question": f"what of @n{number}-{time.time_ns()}"}, timeout=60)
        assert response.status_code == 200, response.text
        latencies.append(time.perf_counter() - begun)

    async with httpx.AsyncClient(base_url=url) as http:
        await asyncio.gather(*(one(http, number) for number in range(20)))  # warm
        latencies.clear()
        yield None
        tasks, begin = [], time.perf_counter()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(one(http, number)))
        await asyncio.gather(*tasks)
    yield latencies


async def measure(endpoint, empty, folder, how, rate, seconds):
    """One server, started, warmed and measured."""
    import subprocess

    from servers import environment

    from mlflow_server import free_port

    folder.mkdir()
    shutil.copyfile(empty, folder / "mlflow.db")
    port, result = free_port(), folder / "result.json"
    env = environment(folder, endpoint, f"sqlite:///{folder}/mlflow.db", PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    command = [sys.executable, __file__, "serve", str(port), how, str(result)]
    process = subprocess.Popen(command, env=env)  # noqa: ASYNC220
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
        return json.loads(result.read_text()) | {"latencies": latencies}
    finally:
        process.kill()


async def _until_up(port, process):
    for _ in range(1200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            assert process.poll() is None
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise TimeoutError


def shown(values):
    """Milliseconds: median, p95, p99."""
    cuts = statistics.quantiles(values, n=100)
    return "p50 {:6.2f}  p95 {:6.2f}  p99 {:6.2f} ms".format(*(1000 * cuts[at] for at in (49, 94, 98)))


async def compare(rate, seconds):
    """Measure on and off in turns."""
    import mlflow
    from servers import script

    from dspy_mlflow_async.cli.endpoint import LocalEndpoint

    got = defaultdict(lambda: {"lags": [], "latencies": [], "cpu": 0.0})
    with LocalEndpoint(script, latency=0.1) as endpoint, tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.db"
        mlflow.MlflowClient(f"sqlite:///{empty}").search_experiments()
        for turn in range(ROUNDS):
            for how in HOWS:
                result = await measure(endpoint, empty, Path(folder) / f"{turn}-{how}", how, rate, seconds)
                for key, value in result.items():
                    got[how][key] += value
    for how in HOWS:
        cpu = 1000 * got[how]["cpu"] / len(got[how]["latencies"])
        lag, latency = shown(got[how]["lags"]), shown(got[how]["latencies"])
        print(f"{how:8}lag {lag}   request {latency}   CPU {cpu:.1f} ms a request")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(int(sys.argv[2]), *sys.argv[3:])
    else:
        asyncio.run(compare(*(float(value) for value in [*sys.argv[1:], "20", "8"][:2])))
