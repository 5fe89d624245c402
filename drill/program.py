"""The program of the drill: calls, one in worker threads, a span and a run of its own, and an evaluation."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import dspy
import mlflow

QUESTIONS = ("first", "second", "third", "fourth")
EXAMPLES = ("fifth", "sixth")
SPAN, METRIC, SCORE = "of-the-user", "of-the-user", 100.0


class _Echo(dspy.BaseLM):
    """Answers with the question."""

    forward_contract = "legacy"

    def __init__(self) -> None:
        super().__init__("echo/one", "chat", 0.0, 1000, cache=False)

    def forward(self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None, **_: Any) -> Any:
        text = str((messages or [{"content": prompt}])[-1]["content"])
        word = next(each for each in (*QUESTIONS, *EXAMPLES) if each in text)
        answer = f"[[ ## answer ## ]]\n{word}\n\n[[ ## completed ## ]]"
        message = SimpleNamespace(content=answer, tool_calls=None)
        usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
        choice = SimpleNamespace(message=message, finish_reason="stop")
        return SimpleNamespace(choices=[choice], usage=usage, model=self.model)


class _Program(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ask = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        return self.ask(question=question)


class _Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[tuple[str, str, str]] = []
        self._last: logging.LogRecord | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record is self._last:  # by way of another logger
            return
        self._last = record
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info))
        self.lines.append((record.name, record.levelname, text))


def _exact(example: Any, prediction: Any, _: Any = None) -> bool:
    return bool(example.answer == prediction.answer)


def run(
    begin: Callable[[], None], flush: Callable[[], Any], further: Callable[[Callable[..., Any]], Any] | None = None
) -> dict[str, Any]:
    """Run it, and tell what a user would see: results, exceptions, the log, and what ``flush`` returns.

    Args:
        begin: Switches the tracing on.
        flush: Waits for what was traced.
        further: Does more with the program, by functions of ours.
    """
    heard = _Heard()
    logging.getLogger().addHandler(heard)
    for name in ("mlflow", "dspy", "dspy_mlflow_async"):
        logging.getLogger(name).addHandler(heard)
    errors: list[str] = []
    results: dict[str, Any] = {}

    @contextlib.contextmanager
    def part(name: str) -> Any:
        try:
            yield
        except BaseException:  # noqa: BLE001 - whatever the user would see
            errors.append(f"{name}: {traceback.format_exc()}")

    with part("autolog"):
        begin()
    dspy.configure(lm=_Echo())
    program = _Program()
    with part("call"):
        results["call"] = program(question="first").answer
    with part("parallel"):
        pairs = [(program, {"question": each}) for each in ("second", "third")]
        found = dspy.Parallel(num_threads=2, disable_progress_bar=True)(pairs)
        results["parallel"] = [each.answer for each in found]
    with part("span"), mlflow.start_span(SPAN) as span:
        span.set_inputs({"at": "home"})
        results["span"] = program(question="fourth").answer
    with part("evaluate"):
        devset = [dspy.Example(question=each, answer=each).with_inputs("question") for each in EXAMPLES]
        evaluate = dspy.Evaluate(devset=devset, metric=_exact, num_threads=2, display_progress=False)
        results["evaluate"] = evaluate(program).score
    with part("run"), mlflow.start_run(run_name="of-the-user"):
        mlflow.log_metric(METRIC, 7.0)
        results["run"] = program(question="first").answer
    if further is not None:
        with part("further"):
            results["further"] = further(program)
    flushed = None
    with part("flush"):
        flushed = flush()
    return {"results": results, "errors": errors, "log": heard.lines, "flushed": flushed}


RESULTS = {
    "call": "first",
    "parallel": ["second", "third"],
    "span": "fourth",
    "evaluate": SCORE,
    "run": "first",
}
FURTHER = ["second", "third", "fourth", "first", True]
