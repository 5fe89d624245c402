"""The concurrency cases of the other tests, as programs that leave a store behind, for any tracer.

``python audit_cases.py theirs URI`` runs them under MLflow's own, whose patches of optimizers stay in the process.
"""

import asyncio
import contextlib
import contextvars
import functools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dspy
import mlflow

import dspy_mlflow_async

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "runs")]

from runtools import Candidates, Program, devset, evaluate, in_threads

from echo import TIMEOUT, Barrier, Chain, EchoLM, Switching


class InParallel(dspy.Module):
    """Calls its step through ``dspy.Parallel``."""

    def __init__(self):
        super().__init__()
        self.step = dspy.Predict("question -> answer")

    def forward(self, questions):
        parallel = dspy.Parallel(num_threads=2, disable_progress_bar=True)
        return parallel([(self.step, {"question": each}) for each in questions])


class Desk(InParallel):
    """Asks in parallel, and then makes one reply of the answers."""

    def __init__(self):
        super().__init__()
        self.last = dspy.Predict("facts: list[str] -> reply")

    def forward(self, questions):
        return self.last(facts=[each.answer for each in super().forward(questions)])


def theirs(**settings):
    """MLflow's own tracer, less ``track_usage``."""
    mlflow.dspy.autolog(**{"log_evals": True, "log_compiles": True, "log_traces_from_compile": True} | settings)
    dspy.configure(track_usage=False)


def ours(**settings):
    """Our tracer."""
    dspy_mlflow_async.autolog(
        **{"log_evals": True, "log_compiles": True, "log_traces_from_compile": True, "silent": True} | settings
    )


def parallel(turn_on):
    dspy.configure(lm=EchoLM(during=Barrier(2)))
    InParallel()(questions=["@a", "@b"])


def parallel_between(turn_on):
    Desk()(questions=["@p", "@q"])


def gathered(turn_on):
    async def main():
        await asyncio.gather(*(Chain().acall(question=f"@g{number}") for number in range(3)))

    asyncio.run(main())


def evaluations_at_once(turn_on):
    meet = Barrier(2)  # at each example
    in_threads(
        lambda: evaluate("one", 1, 3, program=Program(meet)),
        lambda: evaluate("two", 2, 3, program=Program(meet)),
    )


def compiles_at_once(turn_on):
    meet = Barrier(2)

    def compile_(*plan):
        optimizer = Candidates(plan, program=lambda: Program(meet))
        return lambda: optimizer.compile(Program(), trainset=devset("t", 1, 1))

    in_threads(compile_(("x0", 1), ("x1", 2)), compile_(("y0", 3), ("y1", 4)))


def evaluation_in_a_span(turn_on):
    with mlflow.start_span("mine"):
        evaluate("in", 1, 3, program=Chain(), metric=drafted)


def metric_without_a_name(turn_on):
    evaluate("nameless", 1, 3, metric=functools.partial(drafted))


def judged(turn_on):
    judge = dspy.Predict("answer -> verdict")

    def metric(example, prediction, trace=None):
        return judge(answer=prediction.answer).verdict == example.gold

    evaluate("judged", 1, 3, metric=metric, num_threads=2)


def many_workers(turn_on):
    evaluate("worker", 4, 8, num_threads=4, program=Chain(), metric=drafted)


def drafted(example, prediction, trace=None):
    return float(example.gold == prediction.answer)


def switched_in_a_call(turn_on):
    def switched_then_another():
        Switching(turn_on)(question="@a")
        turn_on(log_traces=True)
        Chain()(question="@next")

    contextvars.copy_context().run(switched_then_another)  # what leaks, leaks there


def outliving_its_caller(turn_on):
    reached, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def hold(each):
        reached.set()
        assert go_on.wait(TIMEOUT)

    class Ended(dspy.utils.BaseCallback):
        def on_module_end(self, call_id, outputs, exception=None):
            ended.set()

    @mlflow.trace(name="request")
    async def request():
        await dspy.asyncify(dspy.Predict("question -> answer"))(question="@a")

    async def main():
        task = asyncio.create_task(request())
        assert await asyncio.to_thread(reached.wait, TIMEOUT)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.02)  # longer than what counts as the same time
        go_on.set()
        assert await asyncio.to_thread(ended.wait, TIMEOUT)

    dspy.configure(lm=EchoLM(during=hold), callbacks=[*dspy.settings.callbacks, Ended()])
    asyncio.run(main())


def requests(turn_on):
    """Sessions side by side; for ours, in requests."""

    def ask(number):
        scope = dspy_mlflow_async.request(session_id=f"s{number}") if turn_on is ours else contextlib.nullcontext()
        with scope:
            Chain()(question=f"@r{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(8)))


FAULTY = (  # what MLflow's own tracer, which knows one call of a thread at a time, gets wrong; and judges
    *(parallel, parallel_between, evaluations_at_once, compiles_at_once, evaluation_in_a_span),
    *(metric_without_a_name, judged, switched_in_a_call, outliving_its_caller),
)
CASES = (*FAULTY, gathered, many_workers, requests)


def run_all(turn_on, cases):
    """Run each of these cases in an experiment of its own, named after it and the tracer."""
    for case in cases:
        mlflow.set_experiment(f"{turn_on.__name__}-{case.__name__}")
        dspy.configure(lm=EchoLM(), callbacks=[], track_usage=False)
        turn_on()
        try:
            case(turn_on)
        finally:
            while mlflow.active_run():
                mlflow.end_run()
            dspy_mlflow_async.flush()
            mlflow.dspy.autolog(disable=True)
            dspy_mlflow_async.autolog(disable=True)


if __name__ == "__main__":
    import tqdm
    from runtools import NoBar

    tqdm.tqdm = NoBar
    mlflow.set_tracking_uri(sys.argv[2])
    run_all({"theirs": theirs, "ours": ours}[sys.argv[1]], FAULTY)
