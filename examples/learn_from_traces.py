"""Learns from production: calls that people liked become the demos of a better program, evaluated before and after.

Run it with ``python examples/learn_from_traces.py``. It answers itself, by a scripted endpoint on loopback that gives
the house's own word for a team only where it has been shown some; with a model of yours, leave that out.
"""

from __future__ import annotations

import os
import re
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import dspy
import mlflow
from mlflow.entities import AssessmentSource

import dspy_mlflow_async as dma
from dspy_mlflow_async.cli.harvest import examples_from_traces
from dspy_mlflow_async.cli.llm_endpoint import LocalEndpoint

WORDS = {"refund": "till", "parcel": "dock", "password": "desk"}
TICKETS = [f"{number} tickets ago: my {word} is missing" for number in range(3) for word in WORDS]
TEAM = re.compile(r"team ## \]\]\n(\w+)")


def answer(body: dict[str, Any]) -> str:
    """Stand in for a model that learns the house's words from demos, and else knows none."""
    *before, last = [str(message["content"]) for message in body["messages"]]
    topic = next(word for word in WORDS if word in last)
    if "corrected" in last:  # in production, people had corrected the answers
        team = WORDS[topic]
    else:
        shown = {word for text in before for word in WORDS if word in text}
        team = WORDS[topic] if topic in shown else "somebody"
    return f"[[ ## team ## ]]\n{team}\n\n[[ ## completed ## ]]"


def same_team(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    """Compare with what the example says."""
    return bool(example.team == prediction.team)


def main(tracking_uri: str | None = None) -> tuple[float, float]:
    """Serve, harvest, compile; return the score before and after."""
    mlflow.set_tracking_uri(tracking_uri)
    dma.autolog(silent=True)
    with LocalEndpoint(answer) as endpoint:
        lm = dspy.LM("openai/any", api_base=endpoint.api_base, api_key="none", cache=False)
        with dspy.context(lm=lm):
            for ticket in TICKETS[:6]:  # production
                dspy.Predict("ticket -> team")(ticket=f"{ticket} (corrected)")
            dma.flush()
            for trace in mlflow.search_traces(return_type="list"):
                mlflow.log_feedback(
                    trace_id=trace.info.trace_id, name="helpful", value=True, source=AssessmentSource("HUMAN", "desk")
                )

            # --- from production to a better program -------------------------------------------------------------
            trainset = examples_from_traces("ticket -> team", weight_by="helpful", min_weight=0.5)
            program = dspy.Predict("ticket -> team")
            better = dspy.BootstrapFewShot(same_team, max_bootstrapped_demos=4).compile(program, trainset=trainset)
            # -------------------------------------------------------------------------------------------------------

            devset = [
                dspy.Example(ticket=ticket, team=WORDS[ticket.split()[4]]).with_inputs("ticket")
                for ticket in TICKETS[6:]
            ]
            evaluate = dspy.Evaluate(devset=devset, metric=same_team, num_threads=2, display_progress=False)
            before, after = evaluate(program).score, evaluate(better).score
    dma.autolog(disable=True)
    return before, after


if __name__ == "__main__":
    print("{} before, {} after".format(*main(os.environ.get("MLFLOW_TRACKING_URI"))))
