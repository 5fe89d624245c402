"""The harness can fail: what is lost or doubled in the store makes a row that does not balance, and the exit code 1."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from faults import cases_loads
from faults.audit import Ledger, Row, Whole
from faults.harness import Bench, Options, World, double_one, lose_one
from faults.report import code_of, write_docs

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A bench, and a place in which a program has made three calls and come to its end."""
    folder = tmp_path_factory.mktemp("faults")
    bench = Bench(Options(), World(folder), folder)
    place = bench.sqlite("three calls")
    child = bench.start(place, "programs.in_turns", turns=[["go", 3, 60]], feedback="score")
    child.meet("go")
    child.go()
    (is_flushed,), stats = child.end()
    assert is_flushed
    yield bench, place, stats
    bench.close()


@pytest.mark.long
def test_a_program_that_nothing_happens_to(done):
    """What was called is stored, and the row says so."""
    bench, place, stats = done
    row = bench.audit(place, said=[stats], feedback=["score"])

    assert [] == row.problems
    assert (3, 3, 0, 0) == (row.made, row.stored, row.doubled, row.lost)
    assert 0 == code_of([row])


@pytest.mark.long
def test_counters_that_say_something_else(done):
    """What `stats()` says is compared with what is found, and must add up."""
    bench, place, stats = done

    assert ["stats(): 2 stored, and 3 are found"] == bench.audit(
        place, said=[stats | {"started": 3, "stored": 2, "waiting": 1}]
    ).problems
    assert "stats(): 4 started, and 3 in all places" in bench.audit(place, said=[stats | {"started": 4}]).problems
    dropped = bench.audit(place, said=[stats | {"dropped": 1, "started": 4}], may=("stored", "dropped"))
    assert "3 made, and 4 in all places" in dropped.problems
    assert "1 dropped" in bench.audit(place, said=[stats | {"dropped": 1}]).problems


def test_feedback_that_is_missing(done):
    """A stored trace without what was said of it is no whole one."""
    bench, place, stats = done

    assert ["3 stored without their feedback"] == bench.audit(place, said=[stats], feedback=["other"]).problems


def test_a_call_that_is_nowhere(done):
    """A call that ended, and that nobody has heard of."""
    bench, place, _ = done
    ledger = Ledger(place.ledger.path.with_name("other"))
    ledger.path.write_text(place.ledger.path.read_text())
    ledger.begin("tr-nowhere", Whole(5, 12))
    assert 0 == bench.audit(_with(place, ledger)).lost  # it is open
    ledger.end("tr-nowhere")
    row = bench.audit(_with(place, ledger))
    ledger.close()

    assert (4, 3, 1) == (row.made, row.stored, row.lost)
    assert 1 == code_of([row])


def _with(place, ledger):
    import dataclasses

    return dataclasses.replace(place, ledger=ledger)


def test_a_trace_that_nobody_has_begun(done):
    """It counts as doubled."""
    bench, place, _ = done
    ledger = Ledger(place.ledger.path.with_name("less"))
    lines = place.ledger.path.read_text().splitlines()
    ledger.path.write_text("\n".join(lines[2:]) + "\n")
    row = bench.audit(_with(place, ledger))
    ledger.close()

    assert (2, 2, 1) == (row.made, row.stored, row.doubled)
    assert 1 == code_of([row])


def test_a_span_twice_and_a_trace_taken_away(done):
    """Done to the tables themselves: the last tests of this store."""
    bench, place, stats = done
    double_one(place)
    row = bench.audit(place, said=[stats])
    assert 1 == row.doubled
    assert 1 == code_of([row])

    lose_one(place)
    row = bench.audit(place, said=[stats])
    assert (3, 2, 1) == (row.made, row.stored, row.lost)
    assert 1 == code_of([row])


@pytest.mark.long
@pytest.mark.parametrize(("spoil", "code"), [("lose", 1), ("double", 1), (None, 0)])
def test_the_command(tmp_path, spoil, code):
    """It ends with 1 and names the row where a trace was lost or doubled, and with 0 where none was."""
    out = tmp_path / "rows.json"
    arguments = ["--only", "deep", "--json", str(out), *(["--spoil", spoil] if spoil else [])]
    done = subprocess.run([sys.executable, str(HERE), *arguments], check=False, capture_output=True, text=True)

    assert code == done.returncode, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert (spoil == "lose", spoil == "double") == (bool(row["lost"]), bool(row["doubled"]))
    assert (f"{row['case']}: 1 " in done.stdout) == bool(spoil)
    assert bool(row["problems"]) == bool(spoil)


def test_rows_by_themselves():
    """A row with nothing in it, and one that does not add up, are not balanced; skipping all is no success."""
    assert ["nothing was made"] == Row("empty").problems
    assert ["3 made, and 2 in all places"] == Row("odd", made=3, stored=2).problems
    assert [] == Row("even", made=3, stored=2, dead=1).problems
    assert 1 == code_of([Row("skipped", skipped="not here")])


def test_what_grows():
    """A leak of each kind is found by its slope, and noise is not."""

    def sample(calls, **grown):
        noise = calls % 3
        return [calls, 10**8 + grown.get("bytes", 0) * calls + noise * 10_000, 20 + noise // 2, 30, 4]

    def growth(**grown):
        return cases_loads.growth_of([sample(calls, **grown) for calls in range(0, 200_000, 1_000)])

    assert [] == cases_loads.what_grows(growth())
    assert [] == cases_loads.what_grows(growth(bytes=100))
    (leak,) = cases_loads.what_grows(growth(bytes=5_000))
    assert leak.startswith("memory grew by")
    leaks = [[calls, 10**8, 20 + calls // 1_000, 30 + calls // 1_000, calls // 1_000] for calls in range(0, 9_000, 100)]
    assert ["threads", "descriptors", "files"] == [
        found.split()[-1] for found in cases_loads.what_grows(cases_loads.growth_of(leaks))
    ]


def test_the_table_of_the_docs(tmp_path):
    """It stands between its marks, and the rest of the page stays."""
    page = tmp_path / "faults.md"
    page.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
    row = {"case": "one", "skipped": None, "note": "a note", "problems": []} | dict.fromkeys(
        ("made", "stored", "spooled", "dead", "dropped", "sampled_out", "doubled", "lost"), 1_000
    )
    write_docs(page, {"rows": [row], "versions": {}, "time": "2026-01-01", "command": "x", "python": "3"})

    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| one | 1,000 |" in text
    assert "old" not in text
