"""Evaluations whose examples run in worker processes: the same books, the same rules, and no example lost."""

import asyncio
import contextlib
import os
import threading

import dspy
import mlflow
import psutil
import pytest
from elsewhere_examples import KillsOnce, Says, Waits, Where, is_right, judge, propose

from dspy_mlflow_async import AsyncEvaluate, aevaluate_all, autolog, evaluate_all, flush
from dspy_mlflow_async.remote import Processes, on
from dspy_mlflow_async.testing import tree
from echo import EchoLM, predict_tree


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """Two processes, with a spool of their own, for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSPY_MLFLOW_ASYNC_SPOOL", str(tmp_path_factory.mktemp("spool")))
        with Processes(2) as started:
            yield started


def examples(size, prefix="@e"):
    """Examples whose right answer is their question."""
    return [dspy.Example(question=f"{prefix}-{n}", answer=f"{prefix}-{n}").with_inputs("question") for n in range(size)]


def evaluate(programs, devset, workers, metric=is_right, **options):
    return evaluate_all(programs, devset=devset, metric=metric, workers=workers, display_progress=False, **options)


def stored(experiment):
    assert flush(30)
    return mlflow.search_traces(locations=[experiment], return_type="list", include_spans=True)


def ids_of(case):
    """The traces of a case's examples, by its table."""
    table = mlflow.artifacts.load_dict(f"runs:/{case.run_id}/result_table.json")
    return [row[table["columns"].index("trace_id")] for row in table["data"]]


def marks(folder):
    """What the programs have left in a folder."""
    return {path.name for path in folder.iterdir()}


def plain(case):
    """What must be the same wherever the examples have run."""
    return case.status, case.score, case.examples, case.errors, case.first_error, case.input_tokens, case.output_tokens


@pytest.mark.long
def test_a_remote_evaluation_is_a_local_one(experiment, workers):
    """Scores, errors, tokens, runs, traces, feedback and table rows are those of an evaluation in this process."""
    autolog(silent=True)
    devset = [*examples(6), *examples(1, "@bad")]
    programs = {"one": Where(), "two": Where()}
    here = evaluate(programs, devset, None)
    there = evaluate(programs, devset, workers)
    traces = stored(experiment)
    by_run = {
        case.run_id: sorted(
            (tree(trace), trace.info.state, [(a.name, a.value) for a in trace.info.assessments])
            for trace in traces
            if trace.info.trace_metadata["mlflow.sourceRun"] == case.run_id
        )
        for case in (here["one"], there["one"])
    }
    pids = {prediction.pid for _, prediction, _ in there["one"].result.results[:6]}

    assert [plain(case) for case in here.cases] == [plain(case) for case in there.cases]
    assert by_run[here["one"].run_id] == by_run[there["one"].run_id]
    assert ("Where.forward", [predict_tree()]) in [each for each, *_ in by_run[there["one"].run_id]]
    assert os.getpid() not in pids
    assert pids <= {int(report.process.partition(":")[2]) for report in there.workers}
    assert 14 == sum(report.examples for report in there.workers)
    assert all(report.books.is_settled for report in there.workers)
    metrics = [mlflow.get_run(each["two"].run_id).data.metrics for each in (here, there)]
    assert metrics[0].keys() == metrics[1].keys()
    assert metrics[0]["eval"] == metrics[1]["eval"]


@pytest.mark.long
def test_an_example_whose_process_is_killed_is_tried_again(experiment, workers, tmp_path, capsys):
    """A worker that is killed with examples in hand: each counts once, what is left is marked, and it is said once."""
    autolog(silent=True)
    metric = KillsOnce(str(tmp_path), "@e-3")
    options = {"workers": workers, "metric": metric, "max_concurrency": 4}
    comparison = evaluate_all({"dies": Where()}, devset=examples(8), **options)
    assert 1 == capsys.readouterr().err.count("a worker is lost, and what it had in hand is tried again: ")
    case = comparison["dies"]
    places = {trace_id: str(index) for index, trace_id in enumerate(ids_of(case))}
    traces = stored(experiment)
    counted = {places[each.info.trace_id]: each for each in traces if each.info.trace_id in places}
    (lost,) = [
        each
        for each in traces
        if each.info.trace_id not in places and each.info.tags["dspy_mlflow_async.example"] == "3"
    ]
    (gone,) = [report for report in comparison.workers if report.losses]

    assert ("finished", 100.0, 8, 0) == (case.status, case.score, case.examples, case.errors)
    assert {str(n) for n in range(8)} == set(counted)
    assert all(place == each.info.tags["dspy_mlflow_async.example"] for place, each in counted.items())
    assert "2" == counted["3"].info.tags["dspy_mlflow_async.attempt"]
    assert "1" == lost.info.tags["dspy_mlflow_async.attempt"]
    assert "SIGKILL" in lost.info.tags["dspy_mlflow_async.lost"]
    assert [] == [each for each in counted.values() if "dspy_mlflow_async.lost" in each.info.tags]
    assert 3 in gone.losses
    assert gone.books is None


def test_timeouts_and_max_errors_hold(experiment, workers, tmp_path):
    """An example that takes too long fails and is cancelled over there; too many failed ones end the case."""
    autolog(silent=True)
    comparison = evaluate(
        {"waits": Waits(str(tmp_path))}, examples(4), workers, timeout=0.5, max_errors=2, max_concurrency=2
    )
    case = comparison["waits"]

    assert "failed" == case.status
    assert "Execution cancelled" in str(case.error)
    assert case.first_error == "TimeoutError: the example took longer than 0.5 seconds"
    assert {name.replace("begun", "ended") for name in marks(tmp_path)} <= marks(tmp_path)


async def test_cancelling_cancels_what_runs_elsewhere(experiment, workers, tmp_path):
    """Cancelled, as by Ctrl-C: what the examples await in the workers is cancelled, and the runs are KILLED."""
    autolog(silent=True)
    call = asyncio.create_task(
        aevaluate_all(
            {"waits": Waits(str(tmp_path))},
            devset=examples(2),
            metric=is_right,
            workers=workers,
            display_progress=False,
        )
    )
    while len(marks(tmp_path)) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.02)  # it is another process that tells
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call
    while len(marks(tmp_path)) < 4:  # noqa: ASYNC110
        await asyncio.sleep(0.02)  # it is another process that tells
    assert await asyncio.to_thread(flush, 30)
    runs = await asyncio.to_thread(mlflow.search_runs, [experiment], output_format="list")

    assert {"KILLED"} == {run.info.status for run in runs}
    assert {"begun-@e-0", "begun-@e-1", "ended-@e-0", "ended-@e-1"} == marks(tmp_path)


def test_budget_and_resume_hold(experiment, workers):
    """A budget stops the case; a resume in workers goes on from there, and finished examples are not run again."""
    autolog(silent=True)
    devset = examples(6)
    first = evaluate({"one": Where()}, devset, workers, max_tokens=28, max_concurrency=1)
    second = evaluate({"one": Where()}, devset, workers, resume=first.run_id)

    assert ("stopped", 2) == (first["one"].status, first["one"].examples)
    assert ("finished", 6, 100.0) == (second["one"].status, second["one"].examples, second["one"].score)
    assert 4 == sum(report.examples for report in second.workers)


def test_a_resume_marks_what_was_under_way_when_the_evaluation_was_killed(experiment, workers):
    """Traces of an attempt whose outcome never came home count no more, once the example has been done again."""
    autolog(silent=True)
    devset = examples(4)
    first = evaluate({"one": Where()}, devset, workers, max_tokens=28, max_concurrency=1)
    of_run = {"mlflow.sourceRun": first["one"].run_id}
    for index, attempt in (("0", "1"), ("3", "1"), ("3", "2")):  # as its workers have stored them after its end
        tags = {"evaluation": "killed", "example": index, "attempt": attempt}
        tags = {f"dspy_mlflow_async.{name}": value for name, value in tags.items()}
        with mlflow.tracing.context(metadata=of_run, tags=tags), mlflow.start_span("under way"):
            pass
    assert flush(30)
    case = evaluate({"one": Where()}, devset, workers, resume=first.run_id)["one"]
    traces = stored(experiment)
    lost = {each.info.trace_id: "dspy_mlflow_async.lost" in each.info.tags for each in traces}

    assert ("finished", 4) == (case.status, case.examples)
    assert {True} == {lost[each.info.trace_id] for each in traces if each.data.spans[0].name == "under way"}
    assert {False} == {lost[trace_id] for trace_id in ids_of(case)}
    assert 4 + 3 == len(traces)


async def test_async_evaluate_names_what_cannot_be_sent_before_anything_runs(experiment):
    """The same error as `evaluate_all`'s, without a run and without a process."""
    autolog(silent=True, log_evals=True)
    lock, workers, before = threading.Lock(), Processes(1), psutil.Process().children()
    evaluator = AsyncEvaluate(devset=examples(1), metric=lambda e, p: lock is None, workers=workers)
    with pytest.raises(TypeError, match="the metric cannot be sent to another process"):
        await evaluator.acall(Where())

    assert [] == await asyncio.to_thread(mlflow.search_runs, [experiment], output_format="list")
    assert before == psutil.Process().children()


async def test_async_evaluate_takes_workers(experiment, workers):
    """`AsyncEvaluate(workers=...)`: results in devset order, with errors as texts."""
    autolog(silent=True)
    devset = [*examples(3), *examples(1, "@bad")]
    result = await AsyncEvaluate(devset=devset, metric=is_right, workers=workers).acall(Where())

    assert 75.0 == result.score
    assert ["@e-0", "@e-1", "@e-2"] == [prediction.answer for _, prediction, _ in result.results[:3]]


@pytest.mark.parametrize(
    ("part", "program", "metric"),
    [
        ("the program of case 'one'", type("Locked", (Where,), {"lock": None}), is_right),
        ("the metric of case 'one'", Where, lambda lock: lambda e, p: lock is None),
    ],
)
def test_what_cannot_be_sent_is_named_before_anything_runs(experiment, part, program, metric):
    """A program or metric that holds a lock: an error that names it, no process started, and no run made."""
    program = program()
    if "program" in part:
        program.lock = threading.Lock()
    else:
        metric = metric(threading.Lock())
    workers, before = Processes(1), psutil.Process().children()
    with pytest.raises(TypeError, match=f"{part} cannot be sent to another process"):
        evaluate_all({"one": program}, devset=examples(1), metric=metric, workers=workers, display_progress=False)

    assert [] == mlflow.search_runs([experiment], output_format="list")
    assert before == psutil.Process().children()


def test_what_a_script_or_a_notebook_defines_is_sent_along(experiment, workers):
    """Programs, metrics and results of ``__main__`` work in workers, and come home as what they were."""

    class Answer:
        def __init__(self, answer):
            self.answer = answer

    class Mine(dspy.Module):
        def forward(self, question):
            return Answer(question)

    def is_mine(example, prediction, trace=None):
        return isinstance(prediction, Answer) and example.answer == prediction.answer

    for each in (Answer, Mine, is_mine):
        each.__module__ = "__main__"
    autolog(silent=True)
    comparison = evaluate_all(
        {"mine": Mine()}, devset=examples(2), metric=is_mine, workers=workers, display_progress=False
    )

    assert 100.0 == comparison["mine"].score
    assert {Answer} == {type(prediction) for _, prediction, _ in comparison["mine"].result.results}


def test_workers_are_checked():
    """A number below 1, or what is no workers, is refused."""
    for wrong, error in ((0, ValueError), ("2", TypeError), (True, TypeError)):
        with pytest.raises(error, match="workers must be"):
            evaluate({"one": Where()}, examples(1), wrong)


def test_dspys_own_evaluate_runs_elsewhere(experiment, workers):
    """Under `on`, `dspy.Evaluate` unchanged: the same result, run, tokens and rows as here, from other processes."""
    autolog(silent=True, log_evals=True)
    devset = [*examples(3), *examples(1, "@bad")]
    evaluator = dspy.Evaluate(devset=devset, metric=is_right, num_threads=2)
    here = evaluator(Where())
    with on(workers):
        there = evaluator(Where())
    assert flush(30)
    runs = mlflow.search_runs([experiment], output_format="list", order_by=["attributes.start_time"])
    tables = [mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/result_table.json") for run in runs]
    shown = [
        [
            (row[table["columns"].index("score")], row[table["columns"].index("trace_id")] is None)
            for row in table["data"]
        ]
        for table in tables
    ]

    assert here.score == there.score == 75.0
    assert all(prediction.pid != os.getpid() for _, prediction, _ in there.results[:3])
    assert shown[0] == shown[1]
    assert 1 == len({tuple(sorted((k, v) for k, v in run.data.metrics.items() if "token" in k)) for run in runs})


def random_search(program, trainset):
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        is_right, max_bootstrapped_demos=1, num_candidate_programs=1, num_threads=2
    )
    return optimizer.compile(program, trainset=trainset)


def mipro(program, trainset):
    pytest.importorskip("optuna")
    optimizer = dspy.MIPROv2(
        is_right, auto=None, num_candidates=2, max_bootstrapped_demos=1, max_labeled_demos=1, num_threads=2, seed=1
    )
    options = {"num_trials": 2, "minibatch": True, "minibatch_size": 2, "minibatch_full_eval_steps": 1}
    return optimizer.compile(program, trainset=trainset, valset=trainset, **options)


def gepa(program, trainset):
    pytest.importorskip("gepa")
    reflection = EchoLM(answer=propose, model="echo/reflection")
    optimizer = dspy.GEPA(judge, max_metric_calls=20, reflection_lm=reflection, num_threads=2, seed=1)
    return optimizer.compile(program, trainset=trainset, valset=trainset)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("compile_program", [random_search, mipro, gepa])
def test_optimizers_evaluate_elsewhere(experiment, workers, monkeypatch, tmp_path, compile_program):
    """Under `on`: an optimizer's own child runs, steps and scores, and the LM calls by their roles, as here."""
    monkeypatch.setattr("builtins.print", lambda *args, **kwargs: None)  # MIPROv2 shows its prompts
    autolog(silent=True, log_compiles=True, log_evals=True)
    told, pids = [], []
    for where in (None, workers):
        folder = tmp_path / str(where)
        folder.mkdir()
        with dspy.context(lm=EchoLM(answer=propose)), contextlib.nullcontext() if where is None else on(where):
            compile_program(Says(str(folder)), [*examples(3), *examples(1, "@wrong")])
        assert flush(30)
        runs = mlflow.search_runs([experiment], output_format="list", order_by=["attributes.start_time DESC"])
        (compiled, *_) = [run for run in runs if "dspy.optimizer" in run.data.tags]
        children = {
            run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == compiled.info.run_id
        }
        tags = {name: value for name, value in compiled.data.tags.items() if name.startswith("dspy.")}
        scores = {name: (run.data.metrics["eval"], run.info.status) for name, run in children.items()}
        told.append((tags, scores, compiled.data.metrics))
        pids.append(marks(folder))

    assert told[0] == told[1]
    assert (1 if compile_program is gepa else 3) <= len(told[0][1])  # GEPA's minibatches are none
    calls = {name: value for name, value in told[0][2].items() if name.startswith("lm_calls")}
    assert 3 < sum(calls.values())
    assert compile_program is not gepa or {"lm_calls/task", "lm_calls/reflection"} <= set(calls)
    assert {str(os.getpid())} == pids[0]
    assert pids[1] - pids[0]
