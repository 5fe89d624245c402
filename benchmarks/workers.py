"""One actor of Ray against two, on a program that waits for its LM: does the second one double the work?

    python benchmarks/workers.py [EXAMPLES [LATENCY]]      LM latency in seconds; 2 by default

Each actor has 16 examples in flight, so that one of them waits for the LM nearly all of the time, whatever else the
machine does. `python -m benchmarks --only workers` measures what an example costs.
"""

import asyncio
import os
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import dspy

IN_FLIGHT = 16
ANSWER = "[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"


class WaitingLM(dspy.BaseLM):  # type: ignore[misc]
    """Answers after a while, in the actor itself."""

    forward_contract = "legacy"  # DSPy 3.3 wants it said

    def __init__(self, latency: float) -> None:
        super().__init__("scripted/waiting", "chat", 0.0, 1000, cache=False)
        self.latency = latency

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        """The answer, as a provider gives it."""
        message = SimpleNamespace(content=ANSWER, tool_calls=None)
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        choices = [SimpleNamespace(message=message, finish_reason="stop")]
        return SimpleNamespace(choices=choices, usage=usage, model=self.model)

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        """The same, later."""
        await asyncio.sleep(self.latency)
        return self.forward(prompt, messages)


async def is_right(example: Any, prediction: Any, trace: Any = None) -> bool:
    """Exact match."""
    return bool(example.answer == prediction.answer)


def main(size: int, latency: float) -> None:
    """Evaluate on one actor and on two, twice, and print what each took."""
    import mlflow
    import ray

    import dspy_mlflow_async
    from dspy_mlflow_async import AsyncEvaluate
    from dspy_mlflow_async.remote import Ray

    folder = tempfile.mkdtemp(prefix="dma-", dir="/tmp")
    os.chdir(folder)
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "DSPY_MLFLOW_ASYNC_SPOOL": f"{folder}/spool"}
    os.environ |= environment
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment("workers")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
        _temp_dir=f"{folder}/ray",
        runtime_env={"env_vars": environment},
    )
    dspy.configure(lm=WaitingLM(latency))
    dspy_mlflow_async.autolog(silent=True)

    def seconds(workers: Any, count: int) -> float:
        devset = [dspy.Example(question=f"question {n}", answer="yes").with_inputs("question") for n in range(count)]
        evaluator = AsyncEvaluate(devset=devset, metric=is_right, workers=workers, max_concurrency=4 * IN_FLIGHT)
        began = time.perf_counter()
        asyncio.run(evaluator.acall(dspy.Predict("question -> answer")))
        return time.perf_counter() - began

    for count in (1, 2, 1, 2):
        with Ray(count, num_cpus=0.5, in_flight=IN_FLIGHT) as workers:
            seconds(workers, count * IN_FLIGHT)  # the imports
            took = seconds(workers, size)
        print(f"{count} actors: {took:.1f} s, {size / took:.1f} a second; load {os.getloadavg()[0]:.1f}", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 192, float(sys.argv[2]) if len(sys.argv) > 2 else 2.0)
