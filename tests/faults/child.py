"""The side of a case that is a program: it calls DSPy with the tracer on, notes each call, and may be killed."""

import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path

CALL_SPANS = 5  # of `call`: itself, the predictor, the adapter's two, the LM's
CALL_TOKENS = 12  # as EchoLM counts them for "@x"


class Clock:
    """``time.time`` and ``time.time_ns`` that can be set, as those of a machine can."""

    def __init__(self):
        self.offset = 0  # seconds
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + self.offset
        time.time_ns = lambda: now_ns() + self.offset * 10**9


class Program:
    """What a program has to work with.

    Attributes:
        uri: The store.
        experiment_id: The experiment.
        folder: Of the case.
        ledger: Where `call` and `acall` note.
        clock: Its clock, where the case sets it; else None.
    """

    def __init__(self, order, clock=None):
        import dspy
        import mlflow
        from mlflow.entities.trace_location import MlflowExperimentLocation

        import dspy_mlflow_async
        from echo import EchoLM
        from faults.audit import Ledger, Whole

        self.uri, self.experiment_id, self.folder = order["uri"], order["experiment_id"], Path(order["folder"])
        self.clock = clock
        self.ledger = Ledger(order["ledger"])
        self.whole = Whole
        self._usual = Whole(CALL_SPANS, CALL_TOKENS)
        self._start_span, self._log_feedback = mlflow.start_span, mlflow.log_feedback
        self._step = dspy.Predict("question -> answer")
        mlflow.set_tracking_uri(self.uri)
        mlflow.tracing.set_destination(MlflowExperimentLocation(self.experiment_id))
        self.lm = EchoLM()
        dspy.configure(lm=self.lm)
        dspy_mlflow_async.autolog(silent=True, **order["options"])

    def call(self, text="@x", feedback=None):
        """One call of a DSPy program, noted when it began and when it ended; ``feedback`` is the name of one for it."""
        with self._start_span("call") as span:
            self.ledger.begin(span.trace_id, self._usual)
            self._step(question=text)
            if feedback is not None:
                self._log_feedback(trace_id=span.trace_id, name=feedback, value=1.0)
        self.ledger.end(span.trace_id)

    async def acall(self, text="@x"):
        """The same in a task."""
        with self._start_span("call") as span:
            self.ledger.begin(span.trace_id, self._usual)
            await self._step.acall(question=text)
        self.ledger.end(span.trace_id)

    def meet(self, word):
        """Say how far it is, and wait until the case says to go on."""
        sys.stdout.write(f"@{word}\n")
        sys.stdout.flush()
        if not sys.stdin.readline():
            sys.exit("the case has gone away")


def main(order):
    """Run the program that an order names, and leave what it gives, and what `stats()` says, in a file."""
    order = json.loads(order)
    clock = Clock() if order["sets_clock"] else None  # before anybody takes the functions by name
    module, _, name = order["program"].rpartition(".")
    program = Program(order, clock)
    given = getattr(importlib.import_module(f"faults.{module}"), name)(program, **order["arguments"])

    from dspy_mlflow_async import stats

    said = {"given": given, "stats": dataclasses.asdict(stats())}
    new = Path(order["answer"] + ".new")
    new.write_text(json.dumps(said))
    new.rename(order["answer"])
