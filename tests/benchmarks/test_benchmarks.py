"""The benchmark harness: what it runs, what it writes, and what it calls a failure. No time is looked at."""

import copy
import dataclasses
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import dspy
import dspy.utils.callback
import mlflow
import pytest

import dspy_mlflow_async
from benchmarks import cells, cli, compare, docs, drivers, programs, report, results, run, stores, tables, wanted
from benchmarks.cells import Cell
from benchmarks.contestants import CONTESTANTS, PATCHED
from echo import EchoLM

ROOT = Path(__file__).parents[2]
STORED = Path(__file__).with_name("results.json")


@pytest.fixture
def stored():
    """The data of a small run, as it was stored; the test's own to change."""
    return json.loads(STORED.read_text())


def sample_of(data, cell, contestant):
    """The first sample of a contestant in a cell."""
    samples = next(each for each in data["cells"] if each["id"] == cell)["samples"]
    return next(sample for sample in samples if sample["contestant"] == contestant)


# --- cells ---


@pytest.mark.parametrize("chosen", [cells.full(), cells.quick()], ids=["full", "quick"])
def test_cells_are_well_formed(chosen):
    """Ids are unique; drivers and contestants exist; several evaluations or tasks have a call each."""
    ids = [cell.id for cell in chosen]

    assert len(ids) == len(set(ids))
    assert set() == {cell.driver for cell in chosen} - drivers.DRIVERS.keys()
    assert set() == {each for cell in chosen for each in cell.contestants} - CONTESTANTS.keys()
    assert [] == [cell.id for cell in chosen if cell.calls < cell.groups]
    assert {"pool"} == {cell.driver for cell in chosen if cells.SUPPRESS in cell.contestants}


def test_quick_run_has_every_way_to_call_and_every_contestant():
    """What the full run measures, the quick run checks."""
    full, quick = cells.full(), cells.quick()

    assert {cell.driver for cell in full} == {cell.driver for cell in quick}
    assert {cell.store for cell in full} == {cell.store for cell in quick}
    assert set(CONTESTANTS) == {each for cell in quick for each in cell.contestants}


def test_full_run_has_the_axes_that_were_promised():
    """Threads to 64, in three pools for 1, 8, 32; tasks to 1,000, payloads to 1 MiB, depth to 50, 50,000 calls."""
    full = cells.full()

    threads = {(cell.driver, cell.workers) for cell in full if cell.axis == "threads"}
    pools = {(driver, n) for driver in ("parallel", "evaluate") for n in (1, 8, 32)}
    assert threads == pools | {("pool", n) for n in (1, 2, 4, 8, 16, 32, 64)}
    assert [1, 10, 100, 1000] == [cell.workers for cell in full if cell.axis == "tasks"]
    assert [1024, 32 * 1024, 1024 * 1024] == [cell.payload for cell in full if cell.axis == "payload"]
    assert [1, 10, 50] == [cell.depth for cell in full if cell.axis == "depth"]
    assert [4, 41, 201, 1001] == [programs.span_count(cell.depth, cell.width) for cell in full if cell.axis == "spans"]
    assert max(cell.calls for cell in full) == 50_000
    assert {20, 50} == {cell.rate for cell in full if {"ours", "ours-process"} <= set(cell.contestants)} - {0}
    assert {"openinference-otlp", "ours-plugin"} < {
        each for cell in full if cell.store == "server" for each in cell.contestants
    }


def test_every_cell_of_the_full_run_gives_the_writer_its_turn():
    """2,000 calls or 10 seconds at least, or it is not timed; the quick run times a thread and a process."""
    for cell in cells.full():
        assert cell.calls >= 2000 or cell.seconds >= 10 or not cell.is_timed
    timed = [cell for cell in cells.quick() if cell.is_timed]
    assert {"ours", "ours-process"} == {each for cell in timed for each in cell.contestants}


def test_every_bound_that_is_wanted_is_measured_by_a_cell():
    """A cell that is renamed takes its bound along."""
    ids = {cell.id for cell in cells.full()}

    assert set(wanted.CELLS) <= ids


def test_choose_by_axis_by_id_and_by_pattern():
    """An axis, a cell, a pattern; the order is the suite's."""
    ids = [cell.id for cell in cells.choose(cells.full(), ["tasks", "threads/pool-8", "threads/par*-32"])]

    assert ids == ["threads/pool-8", "threads/parallel-32", "tasks/1", "tasks/10", "tasks/100", "tasks/1000"]


def test_choose_refuses_what_names_nothing():
    """A typo is not an empty run."""
    with pytest.raises(ValueError, match="no cell fits 'thread'"):
        cells.choose(cells.full(), ["threads", "thread"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nothing"], "no cell fits"),
        (["--contestants", "nobody"], "no contestant nobody"),
        (["--report", "nowhere.json"], "nowhere.json"),
        (["--compare", str(STORED), str(Path(__file__))], "is no JSON"),
    ],
)
def test_arguments_that_make_no_sense(capsys, arguments, said):
    """Exit code 2, with the reason, before anything runs."""
    assert cli.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_list_runs_nothing(capsys):
    """It shows the cells that would run."""
    assert cli.main(["--list", "--quick", "--only", "tasks"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["tasks/100", "tasks/1000"]


# --- results ---


def test_stored_results_fit_the_schema():
    """They are read, and whole."""
    assert results.load(STORED).problems() == []


@pytest.mark.parametrize(
    ("break_it", "place"),
    [
        (lambda data: data.pop("machine"), "machine"),
        (lambda data: data.update(schema=1), "schema"),
        (lambda data: data.update(surprise=1), "surprise"),
        (lambda data: data["cells"][0]["samples"][0].update(found=-1), "cells/0/samples/0"),
        (lambda data: data["cells"][0]["parameters"].update(driver="magic"), "cells/0/parameters/driver"),
    ],
)
def test_schema_refuses(stored, break_it, place):
    """Missing, unknown and impossible values, with their place."""
    break_it(stored)

    with pytest.raises(ValueError, match=place):
        results.validate(stored)


@pytest.mark.parametrize(
    ("found", "whole", "said"),
    [(29, 29, "29 traces in the store, 30 expected"), (30, 28, "2 of 30 traces"), (31, 30, "31 traces in the store")],
)
def test_a_trace_of_ours_that_is_missing_broken_or_doubled_is_a_problem(stored, found, whole, said):
    """Completeness is judged."""
    sample_of(stored, "threads/pool-1", "ours").update(found=found, whole=whole)

    (problem,) = results.Results(stored).problems()

    assert said in problem


def test_a_trace_where_none_should_be_is_a_problem(stored):
    """Switched off means that nothing is stored."""
    sample_of(stored, "threads/pool-1", "ours-suppress").update(found=1)

    assert len(results.Results(stored).problems()) == 1


def test_traces_that_others_lose_are_a_finding(stored):
    """They stand in the report, and fail nothing."""
    sample_of(stored, "threads/pool-1", "mlflow").update(found=10, whole=9)
    found = results.Results(stored)

    assert found.problems() == []
    assert "39 of 60" in report.as_markdown(found)


def test_a_cell_that_did_not_run_is_a_problem_whoever_failed(stored):
    """With the line of the error that says what it is."""
    error = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: so it is\nlog'
    stored["cells"][0]["samples"][0] = {"contestant": "off", "round": 1, "error": error, "attempts": 2}
    results.validate(stored)

    assert results.Results(stored).problems() == ["threads/pool-1, off: did not run: ValueError: so it is"]


def test_ratios_are_taken_within_a_round(stored):
    """Round by round, above the empty callback's figure of the same round; then the median and the extremes."""
    figures = {"floor": (100, 200), "ours": (150, 300), "mlflow": (300, 600)}
    for sample in stored["cells"][0]["samples"]:
        if sample["contestant"] in figures:
            sample["wall_us"] = figures[sample["contestant"]][sample["round"] - 1]
    cell = results.Results(stored).cells[0]

    assert cell.ratio("wall_us", "ours", "mlflow", "floor") == results.Spread(0.25, 0.25, 0.25, 2)
    assert cell.above_floor("ours", "wall_us") == results.Spread(75, 50, 100, 2)
    assert cell.ratio("wall_us", "ours", "nobody") is None


# --- validity ---


@pytest.fixture
def paced(stored):
    """A sample of ours whose background is known, with the empty callback's beside it."""
    cell = next(each for each in stored["cells"] if each["id"] == "rate/10-a-second")
    sample = next(each for each in cell["samples"] if each["contestant"] == "ours")
    sample.update(caller_cpu_us=1000, cpu_calls_us=2100, cpu_children_calls_us=0, cpu_stored_us=2600, cpu_children_us=0)
    floor = sample | {"contestant": "floor", "caller_cpu_us": 400, "cpu_calls_us": 500, "cpu_stored_us": 500}
    cell["samples"].append(floor | {"found": 0, "whole": 0, "expected": 0})
    return stored, sample


def cell_of(data, cell_id):
    """The cell as it is read."""
    return results.Results(data).cell(cell_id)


def test_share_of_the_background_is_that_of_process_and_children_without_callers(paced):
    """What the empty callback's process does besides calling is no background; a child's work is."""
    stored, sample = paced
    cell = cell_of(stored, "rate/10-a-second")

    assert cell.inside(sample) == pytest.approx(1000 / 1500)
    sample.update(cpu_children_calls_us=500, cpu_children_us=4500)
    assert cell.inside(sample) == pytest.approx(1500 / 6000)
    sample.update(cpu_stored_us=1110, cpu_children_us=0)
    assert cell.inside(sample) is None
    sample.update(cpu_stored_us=None)
    assert cell.inside(sample) is None


def test_a_window_with_less_than_half_of_the_background_is_invalid_and_a_problem_of_ours(paced):
    """It fails the run, and stands in the report as a lower bound."""
    stored, sample = paced
    sample.update(cpu_stored_us=3200)

    (problem,) = results.Results(stored).problems()

    assert problem == "rate/10-a-second, ours, round 1: invalid: 48% of the background's CPU fell into the window"
    assert tables.above_floor(cell_of(stored, "rate/10-a-second"), "ours", "wall_us").startswith("≥ ")
    assert not tables.above_floor(cell_of(stored, "rate/10-a-second"), "ours", "caller_cpu_us").startswith("≥ ")
    assert "**invalid**: 48%" in report.as_markdown(results.Results(stored))


def test_an_invalid_window_of_a_peer_makes_a_bound_of_the_ratio(paced):
    """It flatters the peer, so that ours is at most as dear as the ratio says."""
    stored, sample = paced
    samples = next(each for each in stored["cells"] if each["id"] == "rate/10-a-second")["samples"]
    floor = samples[-1]
    floor["wall_us"] = sample["wall_us"] / 2
    samples.append(sample | {"contestant": "mlflow", "cpu_stored_us": 9000, "wall_us": sample["wall_us"] * 2})

    assert results.Results(stored).problems() == []
    cell = cell_of(stored, "rate/10-a-second")
    assert tables.ratio(cell, "wall_us", "ours", "mlflow") == "≤ 0.33"
    assert tables.ratio(cell, "wall_us", "mlflow", "ours") == "≥ 3.00"


def test_a_window_that_is_too_short_is_invalid_where_times_count(stored):
    """Cells that only ask whether all arrives are as short as they like."""
    cell = stored["cells"][0]
    assert not cell["parameters"]["is_timed"]
    cell["parameters"]["is_timed"] = True

    problems = results.Results(stored).problems()

    assert problems
    assert all("invalid: the window had" in problem for problem in problems)


def test_openinference_without_a_span_for_each_lm_call_is_invalid(stored):
    """It records no LM call of some classes: a cheaper job than everybody else's."""
    stored["cells"][0]["parameters"]["is_timed"] = True
    sample = sample_of(stored, "threads/pool-1", "openinference")
    assert sample["report"]["lm_spans"] >= sample["calls"]
    sample.update(wall_us=1e6)
    assert cell_of(stored, "threads/pool-1").invalid(sample) is None
    sample["report"]["lm_spans"] = 0

    assert cell_of(stored, "threads/pool-1").invalid(sample) == f"0 LM spans of {sample['calls']} calls"


def test_last_thousand_over_first_counts_since_the_writer_began():
    """What comes while the writer still lingers is no beginning."""
    early = [[500, 0.5, 1.0, 1.0, 1.0], [1000, 0.9, 1.0, 1.0, 1.0]]
    late = [[1500 + 500 * n, 1.5 + n, wall, 2 * wall, 1.0] for n, wall in enumerate((10, 10, 99, 30, 20))]
    sample = {"marks": early + late}

    assert results.last_over_first(2)(sample) == 2.5
    assert results.last_over_first(4)(sample) == 1.0
    assert results.last_over_first(2)({"marks": early}) is None
    assert results.last_over_first(2)({"marks": []}) is None


def test_a_busy_machine_tells_no_times(stored):
    """Neither in the short table nor beside what is wanted; CPU is used up on any machine."""
    stored["cells"][0]["parameters"]["is_timed"] = False
    short = tables.in_short(results.Results(stored))
    stored["machine"].update(load_before=0.1, steal=0.0)
    quiet = tables.in_short(results.Results(stored))

    row, quiet_row = ((text.split("| ours |")[1].split("\n")[0]).split("|") for text in (short, quiet))
    assert row[0].strip() == "-" != quiet_row[0].strip()
    assert row[2] == quiet_row[2] != " - "
    assert "the same ÷ MLflow | ≤ 0.06 | not told" not in wanted.as_table(results.Results(stored))


def test_a_disturbed_sample_tells_no_times(stored):
    """Those of the others in its cell are told, as far as they need none of its own."""
    stored["machine"].update(load_before=0.1)
    stored["cells"][0]["parameters"]["is_timed"] = False
    for cell in stored["cells"]:
        for sample in cell["samples"]:
            sample.update(steal=0.0)
    told = {}
    for who in ("", "ours", "floor"):
        for sample in stored["cells"][0]["samples"] if who else ():
            sample.update(steal=0.3 if sample["contestant"] == who else 0.0)
        rows = tables.in_short(results.Results(stored)).split("\n")
        told[who] = {row.split("|")[1].strip(): row.split("|")[2].strip() != "-" for row in rows[2:]}

    assert told[""]["ours"]
    assert told[""]["OpenInference, in memory"]
    assert told["ours"] == told[""] | {"ours": False}
    assert not any(told["floor"].values())
    assert "the same ÷ MLflow | ≤ 0.06 | not told: the hypervisor took too much | - | - |" in wanted.as_table(
        results.Results(stored)
    )


def test_wanted_is_reached_only_where_all_cells_are_within_and_known(stored):
    """The worst cell counts; what was not measured is not reached."""
    text = wanted.as_table(results.Results(stored))

    assert "| lost | 0 | 0.00 | all | yes |" in text
    assert "until stored ÷ window, 10,000 calls | ≤ 1.10 | not measured | - | - |" in text
    assert "| the same ÷ MLflow | ≤ 0.06 | not told: the machine was busy | - | - |" in text
    sample_of(stored, "threads/pool-1", "ours").update(whole=29)
    assert "| lost | 0 | 1.00 | all | no |" in wanted.as_table(results.Results(stored))
    for sample in stored["cells"][0]["samples"]:
        sample.update(caller_cpu_us={"floor": 100, "ours": 110, "openinference": 200}.get(sample["contestant"], 500))
    assert "÷ OpenInference | ≤ 0.20 | 0.10 | pool-1 | yes |" in wanted.as_table(results.Results(stored))


# --- report, comparison, docs ---


def test_report_and_plots_from_stored_results(tmp_path):
    """The command writes the report with all its parts, and a plot for all that was measured."""
    assert cli.main(["--report", str(STORED), "--out", str(tmp_path)]) == 0

    text = (tmp_path / "report.md").read_text()
    assert {"overhead.svg", "cpu.svg", "found.svg", "calls.svg", "report.md"} == {p.name for p in tmp_path.iterdir()}
    assert "This machine was busy with something else" in text
    assert "60 of 60" in text
    assert "every trace of ours that should be in the store is there" in text


def test_comparison_with_itself_shows_nothing(capsys):
    """No noise is reported as a change."""
    assert cli.main(["--compare", str(STORED), str(STORED)]) == 0
    assert "Nothing beyond noise" in capsys.readouterr().out


def test_comparison_shows_what_moved(stored):
    """A slower call, more CPU for a trace, and lost traces; and which cells cannot be compared."""
    old = results.Results(copy.deepcopy(stored))
    for sample in stored["cells"][0]["samples"]:
        if sample["contestant"] == "ours":
            sample["wall_us"] *= 2
            sample["whole"] -= 3
    stored["cells"][1]["parameters"]["calls"] += 1
    dropped = stored["cells"].pop()

    text = compare.as_markdown(old, results.Results(stored))

    assert "| threads/pool-1 | ours | wall time / off |" in text
    assert "+100%" in text
    assert "| threads/pool-1 | ours | whole traces found | 60 of 60 | 54 of 60 |" in text
    assert f"{stored['cells'][1]['id']} | - | other sizes: not compared" in text
    assert f"Only in the old run: {dropped['id']}." in text


def test_comparison_takes_a_base_that_both_runs_have(stored):
    """Without tracing off in one of them, both are held against the empty callback."""
    old = results.Results(copy.deepcopy(stored))
    samples = stored["cells"][0]["samples"]
    stored["cells"][0]["samples"] = [sample for sample in samples if sample["contestant"] != "off"]

    assert "Nothing beyond noise" in compare.as_markdown(old, results.Results(stored))


def test_docs_are_written_between_their_markers(tmp_path):
    """The real page: each marker is filled, what is around them stays, and doing it twice changes nothing."""
    page = tmp_path / "performance.md"
    original = (ROOT / "docs" / "performance.md").read_text()
    page.write_text(original)
    found = results.load(STORED)

    docs.update(found, STORED, page)
    once = page.read_text()
    docs.update(found, STORED, page)

    assert page.read_text() == once
    assert "| ours, durable=True |" in once
    assert original.count("<!-- figures: ") == once.count("<!-- figures: ") == 5
    assert "<!-- figures: in-short -->\n<!-- end -->" not in once


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- figures: typo -->\n\n<!-- end -->", "'typo'"),
        ("<!-- figures: source -->\n", "no end"),
    ],
)
def test_docs_with_bad_markers(tmp_path, text, said):
    """A marker that nothing fills, or without an end, is an error: no figure goes stale in silence."""
    page = tmp_path / "page.md"
    page.write_text(text)

    with pytest.raises(ValueError, match=said):
        docs.update(results.load(STORED), STORED, page)


# --- measuring ---


def test_counting_agrees_with_mlflow(store_uri):
    """What SQL finds in the store is what MLflow finds: traces, spans, and from when on they count."""
    mlflow.set_experiment("counted")
    dspy_mlflow_async.autolog(silent=True)
    dspy.configure(lm=EchoLM())
    for _ in range(3):
        dspy.Predict("question -> answer")(question="@it")
    with mlflow.start_span("of another shape"):
        pass
    dspy_mlflow_async.flush()
    traces = mlflow.search_traces(return_type="list")
    database = Path(store_uri.removeprefix("sqlite:///"))
    latest = max(trace.info.request_time for trace in traces)

    assert stores.count(database, "counted", 0, spans=4) == stores.Found(traces=4, whole=3, spans=13)
    assert len(traces) == 4
    assert sum(len(trace.data.spans) for trace in traces) == 13
    assert stores.count(database, "counted", latest + 1, spans=4) == stores.Found(0, 0, 0)
    assert stores.count(database, "another", 0, spans=4) == stores.Found(0, 0, 0)


def test_counting_after_a_process_that_ended_within_a_transaction(store_uri, tmp_path):
    """What it had not committed is rolled back by whoever looks next, for which the file is to be written."""
    database = tmp_path / "mlflow.db"
    database.write_bytes(Path(store_uri.removeprefix("sqlite:///")).read_bytes())
    ends_within = """
        import os, sqlite3, sys
        connection = sqlite3.connect(sys.argv[1])
        connection.execute("PRAGMA cache_size = 1")  # so that what is not committed is in the file already
        rows = [(f"{number}", "x" * 1000) for number in range(1000)]
        connection.executemany("INSERT INTO experiments (name, artifact_location) VALUES (?, ?)", rows)
        os._exit(0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(ends_within), str(database)], check=True, timeout=60)

    assert Path(f"{database}-journal").exists()
    assert stores.count(database, "1", 0, spans=4) == stores.Found(0, 0, 0)


@pytest.mark.parametrize(("depth", "width"), [(1, 1), (3, 1), (1, 2)])
async def test_programs_have_the_spans_that_are_expected(traces, depth, width):
    """In both call forms."""
    program = programs.make_program(depth, width)
    with dspy.context(lm=programs.ScriptedLM()):
        program(question="sync")
        await program.acall(question="async")

    assert [programs.span_count(depth, width)] * 2 == [len(trace.data.spans) for trace in traces]


def test_a_window_ends_after_its_calls_or_its_seconds():
    """Whatever comes first, for who takes one call and for who takes many."""
    window = drivers.Window(3, 60.0)

    assert [0, 1, 2, None, None] == [window.take() for _ in range(5)]
    assert drivers.Window(3, 0.0).take() is None
    assert list(drivers.Window(5, 60.0).chunks(2)) == [2, 2, 1]
    assert list(drivers.Window(5, 0.0).chunks(2)) == []


def test_calls_at_a_rate_are_due_at_their_time_and_wait_for_nobody():
    """No call begins before it is due, and the last one is due when the seconds are over."""
    began = []
    cell = Cell("tiny", "rate", "rate", workers=2, rate=100, seconds=0.1)

    driven = drivers.at_a_rate(cell, lambda question: began.append(time.perf_counter()), "", 1000)

    assert driven.calls == len(began) == 11
    assert max(began) - min(began) >= 0.09


def test_latency_at_a_rate_counts_from_the_moment_that_a_call_was_due():
    """A slow call is waited for by those that were due meanwhile."""
    cell = Cell("tiny", "rate", "rate", workers=1, rate=100, seconds=0.02)

    driven = drivers.at_a_rate(cell, lambda question: time.sleep(0.015), "", 1000)

    assert driven.calls == 3
    assert driven.latencies[-1] >= 3 * 0.015 - 0.02


def test_patches_that_the_empty_callback_is_measured_with_are_taken_out_again():
    """They are ours, and they are undone: what they save is measured by itself."""
    before = (dspy.utils.callback.inspect, dspy.utils.callback._get_on_start_handler)

    installed = CONTESTANTS[PATCHED].install()
    during = (dspy.utils.callback.inspect, dspy.utils.callback._get_on_start_handler)
    installed.uninstall()

    assert all(now is not then for now, then in zip(during, before, strict=True))
    assert before == (dspy.utils.callback.inspect, dspy.utils.callback._get_on_start_handler)
    assert dspy.settings.callbacks == []


class Watcher:
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def began(self, cell, samples):
        self.told.append((cell.id, samples))

    def sampled(self, cell, contestant, round_number):
        self.told.append((cell.id, contestant.id, round_number))

    def ended(self, cell):
        self.told.append((cell["id"], len(cell["samples"])))


@pytest.mark.timeout(300)
@pytest.mark.long
def test_tiny_run():
    """Three cells: processes interleaved A B A B, traces counted, figures complete, nothing missing."""
    pool = Cell("tiny", "pool", workers=2, calls=4, contestants=("off", "ours"), once=("off",), rounds=2)
    series = Cell("tiny", "sink", "series", 2, calls=4, step=2, store="sink", contestants=("ours",), rounds=1)
    held = Cell("tiny", "held", workers=2, calls=4, store="held", contestants=("ours",))
    chosen = [dataclasses.replace(cell, is_timed=False) for cell in (pool, series, held)]
    watcher = Watcher()

    data = run.run(chosen, mode="quick", watcher=watcher)

    results.validate(data)
    found = results.Results(data)
    assert found.problems() == []
    order = [(sample["contestant"], sample["round"]) for sample in data["cells"][0]["samples"]]
    assert order == [("off", 1), ("ours", 1), ("ours", 2)]
    assert [0, 4, 4] == [sample["whole"] for sample in data["cells"][0]["samples"]]
    (sample,) = data["cells"][1]["samples"]
    assert (sample["whole"], sample["found_spans"], [mark[0] for mark in sample["marks"]]) == (4, 16, [2, 4])
    (sample,) = data["cells"][2]["samples"]
    assert sample["whole"] == 4
    assert sample["memory_waiting_mib"] is not None
    assert [
        ("tiny/pool", 3),
        ("tiny/pool", "off", 1),
        ("tiny/pool", "ours", 1),
        ("tiny/pool", "ours", 2),
        ("tiny/pool", 3),
        ("tiny/sink", 1),
        ("tiny/sink", "ours", 1),
        ("tiny/sink", 1),
        ("tiny/held", 1),
        ("tiny/held", "ours", 1),
        ("tiny/held", 1),
    ] == watcher.told


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_sample_that_fails_is_recorded_with_its_error():
    """It is tried again, and then stands in the results with its traceback; the run goes on."""
    broken = Cell("tiny", "broken", "no such driver", calls=1, contestants=("off",), is_timed=False)

    data = run.run([broken], mode="quick", watcher=Watcher())

    (sample,) = data["cells"][0]["samples"]
    assert sample["attempts"] == 2
    assert "KeyError: 'no such driver'" in sample["error"]
    (problem,) = results.Results(data).problems()
    assert problem.startswith("tiny/broken, off: did not run: KeyError")
