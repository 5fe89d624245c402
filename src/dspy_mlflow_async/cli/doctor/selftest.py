"""Self-test of the doctor: a small program in DSPy's worker threads, traced, and its span tree checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dspy

from dspy_mlflow_async import autolog, testing
from dspy_mlflow_async.cli.doctor.findings import Finding, Level
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint
from dspy_mlflow_async.composition import is_installed

_THREADS = 3
_USAGE = "mlflow.chat.tokenUsage"


class _Probe(dspy.Module):
    """Asks three questions at once, in DSPy's worker threads."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = dspy.Predict("question -> answer")

    def forward(self, question: str) -> Any:
        pairs = [(self.ask, {"question": f"{question} {number}"}) for number in range(_THREADS)]
        return dspy.Parallel(num_threads=_THREADS, disable_progress_bar=True)(pairs)


def run(kept: list[Any]) -> Iterator[Finding]:
    """Switch the tracer on for a moment and off again, unless it was on, with the traces kept in memory.

    Args:
        kept: Gets the traces.
    """
    was_on = is_installed()
    with LocalEndpoint(lambda _: "[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]") as endpoint:
        lm = dspy.LM("openai/scripted", api_base=endpoint.api_base, api_key="none", cache=False, num_retries=0)
        try:
            with testing.capture_traces() as traces:
                if not was_on:
                    autolog(silent=True)
                if not is_installed():
                    yield Finding(Level.PROBLEM, "tracer", "autolog() did not reach DSPy's callbacks.")
                with dspy.context(lm=lm):
                    _Probe()(question="Are we there?")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            yield Finding(Level.PROBLEM, "self-test", f"it failed with {type(error).__name__}: {error}")
            return
        finally:
            if not was_on:
                autolog(disable=True)
    kept += traces
    yield _verdict(traces, sum(request.usage["total_tokens"] for request in endpoint.requests))
    yield Finding(
        Level.NOTE,
        "tracer",
        "this command sees its own process only; in yours, print dspy_mlflow_async.cli.doctor.diagnose() to learn "
        "whether a later dspy.configure(callbacks=[...]) has removed it.",
    )


def _verdict(traces: list[Any], billed: int) -> Finding:
    predictor: tuple[str, list[Any]] = (
        "Predict.forward",
        [("ChatAdapter.format", []), ("LM.__call__", []), ("ChatAdapter.parse", [])],
    )
    expected = ("_Probe.forward", [predictor] * _THREADS)
    if len(traces) != 1:
        return Finding(
            Level.PROBLEM,
            "self-test",
            f"one call gave {len(traces)} traces: DSPy's worker threads do not get the tracing context. "
            "Please report this, with the versions above.",
        )
    found = testing.tree(traces[0])
    if found != expected:
        return Finding(Level.PROBLEM, "self-test", f"the tree of one call is not the expected one: {found}")
    usages = (span.get_attribute(_USAGE) for span in traces[0].data.spans if span.name == "LM.__call__")
    counted = sum(usage["total_tokens"] for usage in usages if usage)
    if counted != billed:
        return Finding(Level.PROBLEM, "self-test", f"its spans say {counted} tokens, the endpoint counted {billed}.")
    return Finding(
        Level.OK,
        "self-test",
        f"{_THREADS} calls in DSPy's worker threads stand under the call that made them, with all of {counted} tokens",
    )
