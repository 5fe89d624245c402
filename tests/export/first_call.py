"""A program that times its event loop during the first traced call of the process."""

import asyncio
import json
import sys
import time
from pathlib import Path

import dspy
import mlflow

import dspy_mlflow_async
from echo import EchoLM

FOLDER, URI = sys.argv[1:]
TICK = 0.005  # seconds


async def main():
    predict = dspy.Predict("question -> answer")
    await predict.acall(question="@warm")  # what DSPy does once is not ours
    mlflow.set_tracking_uri(URI)
    dspy_mlflow_async.autolog(silent=True)
    gaps, is_over = [], asyncio.Event()

    async def tick():
        while not is_over.is_set():
            begun = time.perf_counter()
            await asyncio.sleep(TICK)
            gaps.append(time.perf_counter() - begun - TICK)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0)
    begun, cpu = time.perf_counter(), time.thread_time()
    await predict.acall(question="@first")
    seconds, cpu = time.perf_counter() - begun, time.thread_time() - cpu
    await asyncio.sleep(1.5)  # the writer takes up the trace meanwhile
    is_over.set()
    await ticking
    return {"call": seconds, "cpu": cpu, "gap": max(gaps), "last": mlflow.get_last_active_trace_id()}


dspy.configure(lm=EchoLM())
answer = asyncio.run(main())
answer["stored"] = dspy_mlflow_async.flush(60 if "sqlite" in URI and "file.txt" not in URI else 3)
stats = dspy_mlflow_async.stats()
answer["safe"] = stats.stored + stats.waiting + stats.spooled
if answer["stored"]:
    trace = mlflow.get_trace(answer["last"])
    answer["experiment"] = mlflow.get_experiment(trace.info.experiment_id).name
begun = time.perf_counter()
dspy_mlflow_async.autolog(disable=True)
answer["off"] = time.perf_counter() - begun
(Path(FOLDER) / "answer.json").write_text(json.dumps(answer))
