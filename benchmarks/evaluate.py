"""``dspy.Evaluate`` in 64 threads against ``AsyncEvaluate`` with 64 and 1,000 examples in flight.

    python benchmarks/evaluate.py [EXAMPLES [LATENCY]]      LM latency in seconds; 0.2 by default

Each contestant is a process of its own, warmed up; so is the endpoint, whose CPU nobody is charged with. The LM calls
are real HTTP through LiteLLM. Measured: wall time of the evaluation, CPU of the process until the traces are stored,
peak memory above what it has after the warm-up, and threads. The CPU of DSPy and LiteLLM, some 4 ms per call, bounds
all of them at one core; tasks gain where the latency is such that 64 threads mostly wait.
"""

import asyncio
import inspect
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

CONTESTANTS = {
    "dspy.Evaluate, 64 threads": ("threads", 64),
    "AsyncEvaluate, 64 in flight": ("tasks", 64),
    "AsyncEvaluate, 1,000 in flight": ("tasks", 1000),
}
ENDPOINT = """
import sys
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
text = "[[ ## answer ## ]]\\nyes\\n\\n[[ ## completed ## ]]"
with LocalEndpoint(lambda body: text, latency=float(sys.argv[1]), keep_requests=False) as endpoint:
    print(endpoint.api_base, flush=True)
    sys.stdin.read()
"""


def contestant(kind: str, limit: int, size: int, api_base: str, *, is_traced: bool) -> None:
    """Evaluate, and print what it took as JSON."""
    import dspy
    import mlflow

    import dspy_mlflow_async
    from dspy_mlflow_async import AsyncEvaluate

    folder = tempfile.mkdtemp()
    os.chdir(folder)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    # DSPy 3.4's own engine opens at most 100 connections; LiteLLM as many as it is told.
    engine = {"engine": "litellm"} if "engine" in inspect.signature(dspy.LM).parameters else {}
    dspy.configure(lm=dspy.LM("openai/scripted", api_base=api_base, api_key="none", cache=False, **engine))
    devset = [dspy.Example(question=f"question {n}", answer="yes").with_inputs("question") for n in range(size)]
    program = dspy.Predict("question -> answer")

    def metric(example: Any, prediction: Any) -> bool:
        return example.answer == prediction.answer

    async def ametric(example: Any, prediction: Any) -> bool:
        return example.answer == prediction.answer

    def evaluate(examples: list[Any]) -> Any:
        if kind == "threads":
            return dspy.Evaluate(devset=examples, metric=metric, num_threads=limit)(program)
        return asyncio.run(AsyncEvaluate(devset=examples, metric=ametric, max_concurrency=limit).acall(program))

    if is_traced:
        mlflow.search_experiments()
        dspy_mlflow_async.autolog(silent=True)
    evaluate(devset[:64])
    threads, stop = [threading.active_count()], threading.Event()

    def count_threads() -> None:
        while not stop.wait(0.05):
            threads.append(threading.active_count())

    counter = threading.Thread(target=count_threads, daemon=True)
    counter.start()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    result = evaluate(devset)
    seconds = time.perf_counter() - began
    stop.set()
    if is_traced:
        dspy_mlflow_async.flush()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        json.dumps(
            {
                "score": result.score,
                "seconds": seconds,
                "cpu": cpu,
                "memory": (after.ru_maxrss - before.ru_maxrss) / 1024,
                "threads": max(threads),
            }
        )
    )


def main() -> None:
    """Run all contestants and print a table."""
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    latency = float(sys.argv[2]) if len(sys.argv) > 2 else 0.2
    environment = {
        **os.environ,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "AIOHTTP_CONNECTOR_LIMIT_PER_HOST": "1000",
        "DSPY_CACHEDIR": tempfile.mkdtemp(),
    }
    endpoint = subprocess.Popen(
        [sys.executable, "-c", ENDPOINT, str(latency)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    api_base = endpoint.stdout.readline().strip()
    print(f"{size} examples, LM latency {latency * 1000:.0f} ms")
    print(f"{'':<44}{'examples/s':>12}{'CPU ms each':>13}{'memory MB':>11}{'threads':>9}")
    for is_traced in (False, True):
        for name, (kind, limit) in CONTESTANTS.items():
            arguments = [kind, str(limit), str(size), api_base, str(int(is_traced))]
            done = subprocess.run(
                [sys.executable, __file__, "--one", *arguments],
                capture_output=True,
                text=True,
                env=environment,
                check=False,
            )
            if done.returncode != 0:
                raise SystemExit(f"{name} ended with {done.returncode}: {done.stdout[-1000:]} {done.stderr[-3000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            assert found["score"] == 100.0
            label = f"{name}{', traced' if is_traced else ''}"
            print(
                f"{label:<44}{size / found['seconds']:>12.0f}{1000 * found['cpu'] / size:>13.2f}"
                f"{found['memory']:>11.0f}{found['threads']:>9}",
                flush=True,
            )
    endpoint.stdin.close()
    endpoint.wait(10)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        kind, limit, size, api_base, is_traced = sys.argv[2:]
        contestant(kind, int(limit), int(size), api_base, is_traced=is_traced == "1")
    else:
        main()
