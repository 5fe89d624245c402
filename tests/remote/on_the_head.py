"""Evaluates here and on the actors of a Ray cluster, on whose head it runs, and prints what the store has of both.

Usage: ``python on_the_head.py ADDRESS``, with ``MLFLOW_TRACKING_URI``. It says "up" once a second machine may join.
"""

import json
import subprocess
import sys
import threading
import time

import cloudpickle
import dspy
import elsewhere_examples
import mlflow
import ray
from elsewhere_examples import Where, is_right

import dspy_mlflow_async
import echo
from dspy_mlflow_async.remote import Ray
from dspy_mlflow_async.testing import tree

JOIN_SECONDS = 120.0
OPTIONS = ["--num-cpus", "1", "--object-store-memory", str(100 * 2**20), "--disable-usage-stats"]


def begin_cluster(address):
    """Start Ray's head, and wait for a second machine."""
    start = ["ray", "start", "--head", "--node-ip-address", address, "--port", "6379", "--include-dashboard", "false"]
    subprocess.run([*start, *OPTIONS], check=True, stdout=sys.stderr)
    sys.stdout.write("up\n")
    sys.stdout.flush()
    ray.init(f"{address}:6379", _node_ip_address=address, log_to_driver=False, logging_level="ERROR")
    deadline = time.monotonic() + JOIN_SECONDS
    while sum(node["Alive"] for node in ray.nodes()) < 2:
        assert time.monotonic() < deadline, ray.nodes()
        threading.Event().wait(0.1)


def evaluate(workers):
    """Evaluate, and return what came home and what the store has under the run."""
    names = [*(f"@e-{number}" for number in range(24)), "@bad", "@wrong"]
    devset = [dspy.Example(question=name, answer=name).with_inputs("question") for name in names]
    devset[-1].answer = "@right"
    comparison = dspy_mlflow_async.evaluate_all(
        {"one": Where()}, devset=devset, metric=is_right, workers=workers, display_progress=False
    )
    case = comparison["one"]
    return {
        "case": [case.status, case.score, case.examples, case.errors, case.input_tokens, case.output_tokens],
        "run": mlflow.get_run(case.run_id).info.status,
        "parent": mlflow.get_run(case.run_id).data.tags["mlflow.parentRunId"] == comparison.run_id,
        "run_id": case.run_id,
        "workers": [[each.process, each.examples, each.losses] for each in comparison.workers],
    }


def stored(experiment, run_id):
    """Return the traces of a run, sorted: their spans, states, and what was found and expected of each."""
    traces = mlflow.search_traces(locations=[experiment], return_type="list", include_spans=True)
    return sorted(
        [
            repr(tree(trace)),
            str(trace.info.state),
            sorted((each.name, repr(each.value)) for each in trace.info.assessments),
            trace.info.token_usage,
        ]
        for trace in traces
        if trace.info.trace_metadata["mlflow.sourceRun"] == run_id
    )


def main(address):
    begin_cluster(address)
    # Only what the cluster's image has is on the other machine, so that the user's own modules travel.
    for module in (echo, elsewhere_examples):
        cloudpickle.register_pickle_by_value(module)
    dspy.configure(lm=echo.EchoLM())
    dspy_mlflow_async.autolog(silent=True)
    experiment = mlflow.set_experiment("two-machines").experiment_id
    with Ray(2, num_cpus=1, in_flight=8) as workers:
        found = {"here": evaluate(None), "there": evaluate(workers)}
    assert dspy_mlflow_async.flush(60)
    for each in found.values():
        each["traces"] = stored(experiment, each["run_id"])
    found["nodes"] = sorted([node["NodeManagerHostname"], node["NodeManagerAddress"]] for node in ray.nodes())
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
