"""Programs and metrics for worker processes, in a module that they can import."""

import asyncio
import os
import signal
from pathlib import Path

import dspy


class Dies(dspy.Module):
    """Answers, but kills the process that it is in when it meets its example, until ``folder`` has ``times`` marks."""

    def __init__(self, folder, question, times):
        super().__init__()
        self.folder, self.question, self.times = folder, question, times
        self.answer = dspy.Predict("question -> answer")

    def forward(self, question):
        answer = self.answer(question=question)
        marks = len(list(Path(self.folder).iterdir()))
        if question == self.question and marks < self.times:
            Path(self.folder, str(marks)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return answer


class Waits(dspy.Module):
    """Says that it has begun, waits for ever, and says that it was cancelled."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    async def aforward(self, question):
        self.mark(f"begun-{question}")
        try:
            await asyncio.Event().wait()
        finally:
            self.mark(f"ended-{question}")

    def mark(self, name):
        Path(self.folder, name).touch()


class Where(dspy.Module):
    """Answers with its process."""

    def __init__(self):
        super().__init__()
        self.answer = dspy.Predict("question -> answer")

    def forward(self, question):
        if question.startswith("@bad"):
            raise ValueError(f"no answer to {question}")
        self.answer(question=question)
        return dspy.Prediction(answer=question, pid=os.getpid())


class Says(dspy.Module):
    """Says what the LM does, and leaves in ``folder`` a mark of the process that it is in."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.step = dspy.Predict("question -> answer")

    def forward(self, question):
        Path(self.folder, str(os.getpid())).touch()
        return self.step(question=question)


class KillsOnce:
    """A metric that kills the process it is in when it first judges its example: the prediction is traced by then."""

    def __init__(self, folder, question):
        self.folder, self.question = folder, question

    def __call__(self, example, prediction, trace=None):
        mark = Path(self.folder, "killed")
        if example.question == self.question and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return is_right(example, prediction)


def is_right(example, prediction, trace=None):
    """Exact match."""
    return example.answer == prediction.answer


def judge(gold, pred, trace=None, pred_name=None, pred_trace=None):
    """The same in the form that GEPA asks for."""
    return dspy.Prediction(score=float(is_right(gold, pred)), feedback="as it should be")


def propose(field, marker):
    """Fields get the marker, ``@wrong`` ones a wrong one; what has none is asked for an instruction."""
    if not marker:
        return "```\nAnswer with the marker.\n```"
    return "@no" if marker.startswith("@wrong") else marker
