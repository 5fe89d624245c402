"""Ray for real, on this machine: evaluations on its actors, and a propagated function in its tasks."""

import contextlib
import importlib.util
import os
import sys
import threading
from pathlib import Path

import dspy
import mlflow
import pytest
from elsewhere_examples import Dies, Says, Where, is_right

from dspy_mlflow_async import autolog, evaluate_all, flush, propagate, request
from dspy_mlflow_async.remote import Ray, on
from dspy_mlflow_async.testing import tree
from echo import EchoLM, predict_tree

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.timeout(500),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # Ray's own, of its next version
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of this machine, whose workers can import what this process can, and have a spool of their own."""
    paths = os.pathsep.join(sys.path)
    spool = str(tmp_path_factory.mktemp("spool"))
    environment = {"PYTHONPATH": paths, "DSPY_MLFLOW_ASYNC_SPOOL": spool, "RAY_DISABLE_IMPORT_WARNING": "1"}
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def workers(cluster):
    """Two actors for all tests here."""
    with Ray(2, num_cpus=0.5, in_flight=8) as started:
        yield started


def examples(size, prefix="@e"):
    return [dspy.Example(question=f"{prefix}-{n}", answer=f"{prefix}-{n}").with_inputs("question") for n in range(size)]


def evaluate(program, devset, workers, **options):
    return evaluate_all(
        {"one": program}, devset=devset, metric=is_right, workers=workers, display_progress=False, **options
    )


def stored(experiment):
    assert flush(60)
    return mlflow.search_traces(locations=[experiment], return_type="list", include_spans=True)


def test_an_evaluation_on_actors_is_a_local_one(experiment, workers):
    """Scores, errors, tokens, traces and feedback are those of an evaluation in this process."""
    autolog(silent=True)
    devset = [*examples(12), *examples(1, "@bad")]
    here, there = (evaluate(Where(), devset, each)["one"] for each in (None, workers))
    seen = {
        case.run_id: sorted(
            (tree(trace), trace.info.state, [(a.name, a.value) for a in trace.info.assessments])
            for trace in stored(experiment)
            if trace.info.trace_metadata["mlflow.sourceRun"] == case.run_id
        )
        for case in (here, there)
    }

    assert (here.score, here.errors, here.input_tokens) == (there.score, there.errors, there.input_tokens)
    assert seen[here.run_id] == seen[there.run_id]
    assert 13 == len(seen[there.run_id])


def test_an_actor_that_is_killed_loses_no_example(experiment, workers, tmp_path):
    """A worker that is killed in the middle: Ray restarts it, and each example counts once."""
    autolog(silent=True)
    comparison = evaluate(Dies(str(tmp_path), "@e-3", 1), examples(8), workers, max_concurrency=4)
    case = comparison["one"]

    assert ("finished", 100.0, 8, 0) == (case.status, case.score, case.examples, case.errors)
    assert any(3 in report.losses for report in comparison.workers)


def test_dspys_own_evaluate_runs_on_actors(experiment, workers):
    """Under `on`, `dspy.Evaluate` unchanged."""
    autolog(silent=True)
    with on(workers):
        result = dspy.Evaluate(devset=examples(4), metric=is_right, num_threads=4)(Where())

    assert 100.0 == result.score
    assert all(prediction.pid != os.getpid() for _, prediction, _ in result.results)


def test_a_propagated_function_is_one_tree_in_rays_tasks(experiment, cluster, tmp_path):
    """`ray.remote(propagate(program))`: below the span that was current, in its session; its usage comes home."""
    autolog(silent=True)

    class Fan(dspy.Module):
        def __init__(self):
            super().__init__()
            self.step = Says(str(tmp_path))

        def forward(self, question, size):
            task = ray.remote(propagate(self.step))
            return [each.answer for each in ray.get([task.remote(question=f"{question}-{n}") for n in range(size)])]

    with mlflow.tracing.context(metadata={"mlflow.trace.session": "s-1"}), request() as did:
        answers = Fan()(question="@f", size=3)
    settle_all(tmp_path)
    (trace,) = stored(experiment)

    assert ["@f-0", "@f-1", "@f-2"] == answers
    assert ("Fan.forward", [("Says.forward", [predict_tree()])] * 3) == tree(trace)
    assert 3 * 14 == trace.info.token_usage["total_tokens"] == did.usage["total_tokens"]
    assert "s-1" == trace.info.trace_metadata["mlflow.trace.session"]


def settle_all(folder):
    """Let each process that has left its mark store what it has traced.

    Each task stays in its process until all have: so the next one takes another. What Ray has ended meanwhile is on the
    disk, and sent by one of the others.
    """
    settle = ray.remote(settle_here).options(num_cpus=0)
    marked, tasks = {int(each.name) for each in folder.iterdir()}, []
    while any(is_running(pid) and not (folder / f"settled-{pid}").exists() for pid in marked):
        assert len(tasks) < 20
        tasks.append(settle.remote(str(folder)))
        while len(list(folder.glob("settled-*"))) < len(tasks):
            threading.Event().wait(0.02)
    (folder / "all").touch()
    ray.get(tasks)


def is_running(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def settle_here(folder):
    import os
    import threading
    from pathlib import Path

    from dspy_mlflow_async.remote import plan

    assert plan.settle(30).is_settled
    Path(folder, f"settled-{os.getpid()}").touch()
    while not Path(folder, "all").exists():
        threading.Event().wait(0.02)


def test_the_example_runs(experiment, cluster):
    """`examples/ray_evaluate.py` does what it says, with an LM that echoes."""
    path = Path(__file__).parents[2] / "examples" / "ray_evaluate.py"
    spec = importlib.util.spec_from_file_location("ray_evaluate", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    comparison = example.main(
        EchoLM(answer=lambda field, marker: "Paris"), Ray(1, num_cpus=0.5), display_progress=False
    )

    assert ["finished", "finished"] == [case.status for case in comparison.cases]
    assert [3, 3] == [case.examples for case in comparison.cases]
    assert 33.33 == comparison["direct"].score
