"""``AsyncEvaluate`` in this process against 1, 2 and 4 worker processes, on a sqlite file and on a server.

    python benchmarks/workers.py [EXAMPLES [LATENCY [IN_FLIGHT]]]      LM latency in seconds; 0.2 by default

Each contestant is a process of its own with its workers, warmed up; so is the endpoint, whose CPU nobody is charged
with. The LM calls are real HTTP through LiteLLM. Measured: wall time until the last trace is stored, and CPU for each
example of the process that evaluates and of its workers.
"""

import asyncio
import inspect
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from evaluate import ENDPOINT

CONTESTANTS = (None, 1, 2, 4)
STORES = ("sqlite", "server")


def contestant(workers: int | None, size: int, limit: int, api_base: str, uri: str) -> None:
    """Evaluate, and print what it took as JSON."""
    import dspy
    import mlflow

    import dspy_mlflow_async
    from dspy_mlflow_async import AsyncEvaluate
    from dspy_mlflow_async.evaluate.remote_examples import Crew
    from dspy_mlflow_async.remote import Processes

    os.chdir(tempfile.mkdtemp())
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(f"workers-{workers}")
    engine = {"engine": "litellm"} if "engine" in inspect.signature(dspy.LM).parameters else {}
    dspy.configure(lm=dspy.LM("openai/scripted", api_base=api_base, api_key="none", cache=False, **engine))
    devset = [dspy.Example(question=f"question {n}", answer="yes").with_inputs("question") for n in range(size)]
    dspy_mlflow_async.autolog(silent=True)
    pool = None if workers is None else Processes(workers)
    crews: list[Crew] = []

    class Evaluate(AsyncEvaluate):
        def _conditions(self, most: int) -> Any:
            conditions = super()._conditions(most)
            crews.append(conditions.crew)
            return conditions

    def evaluate(examples: list[Any]) -> float:
        evaluator = Evaluate(devset=examples, metric=is_right, max_concurrency=limit, workers=pool)
        score: float = asyncio.run(evaluator.acall(dspy.Predict("question -> answer"))).score
        dspy_mlflow_async.flush()
        return score

    def used() -> tuple[float, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        books = () if crews[-1] is None else crews[-1].report()
        return usage.ru_utime + usage.ru_stime, sum(each.books.cpu_seconds for each in books if each.books)

    if pool is not None:
        pool.start()
        time.sleep(20)  # the imports
    evaluate(devset[: 4 * limit])
    before, began = used(), time.perf_counter()
    score = evaluate(devset)
    seconds, after = time.perf_counter() - began, used()
    print(json.dumps({"score": score, "seconds": seconds, "cpu": [b - a for a, b in zip(before, after, strict=True)]}))
    if pool is not None:
        pool.end()


async def is_right(example: Any, prediction: Any, trace: Any = None) -> bool:
    """Exact match."""
    return bool(example.answer == prediction.answer)


def server(folder: str) -> tuple[Any, str]:
    """Start a server, and return its process and its address."""
    port = 57000 + os.getpid() % 1000
    command = [
        sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/artifacts",
    ]  # fmt: skip
    with Path(folder, "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=2).close()
            break
        except OSError:
            time.sleep(0.1)
    return process, uri


def main() -> None:
    """Run all contestants and print a table."""
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    latency = float(sys.argv[2]) if len(sys.argv) > 2 else 0.2
    limit = int(sys.argv[3]) if len(sys.argv) > 3 else 32
    environment = {
        **os.environ,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "AIOHTTP_CONNECTOR_LIMIT_PER_HOST": "1000",
        "DSPY_CACHEDIR": tempfile.mkdtemp(),
        "DSPY_MLFLOW_ASYNC_SPOOL": tempfile.mkdtemp(),
    }
    endpoint = subprocess.Popen(
        [sys.executable, "-c", ENDPOINT, str(latency)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert endpoint.stdout is not None
    api_base = endpoint.stdout.readline().strip()
    print(
        f"| store | {size} examples of {latency:g} s, {limit} in flight | seconds | a second | CPU here | CPU there |"
    )
    print("|---|---|---|---|---|---|")
    for store in STORES:
        folder = tempfile.mkdtemp()
        process, uri = (None, f"sqlite:///{folder}/mlflow.db") if store == "sqlite" else server(folder)
        for workers in CONTESTANTS:
            arguments = [str(workers or 0), str(size), str(limit), api_base, uri]
            command = [sys.executable, "-W", "ignore", __file__, "contestant", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
                continue
            told = json.loads(done.stdout.splitlines()[-1])
            here, there = (1000 * seconds / size for seconds in told["cpu"])
            name = "this process" if workers is None else f"workers={workers}"
            rate = size / told["seconds"]
            print(
                f"| {store} | {name} | {told['seconds']:.1f} | {rate:.0f} | {here:.1f} ms | {there:.1f} ms |",
                flush=True,
            )
        if process is not None:
            process.terminate()
    endpoint.kill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["contestant"]:
        contestant(int(sys.argv[2]) or None, int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
    else:
        main()
