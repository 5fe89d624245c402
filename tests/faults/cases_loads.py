"""Much at once, much in one trace, for a long time, at any time of day, in any event loop."""

import statistics

import sqlalchemy

from faults.audit import connect
from faults.harness import case, needs
from slow_store import slow_store

# What may be there beyond the bound of the memory: stacks, arenas, buffers of requests, 128 contexts.
SLACK_BYTES = 96 * 2**20
# What a soak may gain for each call after its warm-up. One kept trace of five spans has 30 kB.
SOAK_BYTES_PER_CALL = 500
SOAK_COUNT = 2  # of threads, descriptors, files: pools come and go by one
SOAK_SHORT_SLACK = 12 * 2**20  # what allocators take and give back within seconds


@case
def tasks(bench):
    """Calls in 128 tasks, on a store that is slow: memory stays within its bound."""
    yield _under_load(bench, "with_tasks", "128 tasks, slow store", tasks=128)


@case
def threads(bench):
    """Calls in 64 threads, on a store that is slow: memory stays within its bound."""
    yield _under_load(bench, "with_threads", "64 threads, slow store", threads=64)


def _under_load(bench, program, name, **how):
    calls = bench.calls(300)
    bound = 4 * 2**20 if calls >= 5_000 else 2**19
    text = "@x " + "y" * 2_000
    with slow_store(bench.server_uri) as store:
        place = bench.server(f"{calls:,} calls, {name}", before=store.uri)
        store.delay = 0.02
        options = {"max_waiting_bytes": bound}
        timeout = 60 + calls // 5
        child = bench.start(
            place, f"programs.{program}", options=options, calls=calls, text=text, timeout=timeout, **how
        )
        seen, stats = child.end(timeout + 120 + calls // 20)
        faults = [] if seen["flushed"] else ["flush() returned False"]
        if not seen["spooled"]:
            faults.append("nothing was spooled: the store was not slow enough to try the bound")
        if seen["grown"] > bound + SLACK_BYTES:
            faults.append(f"memory grew by {seen['grown'] / 2**20:.0f} MiB with a bound of {bound / 2**20:.1f} MiB")
        note = f"{seen['spooled']} were in the spool; +{seen['grown'] / 2**20:.0f} MiB"
        return bench.audit(place, said=[stats], note=note, faults=faults)


@case
def wide(bench):
    """One trace of 5,001 spans."""
    place = bench.sqlite("a trace of 5,001 spans")
    is_flushed, stats = bench.start(place, "programs.wide", calls=1_250).end(240)
    yield bench.audit(place, said=[stats], faults=_unless(is_flushed))


@case
def deep(bench):
    """200 modules in one another, sync and async: each span has the one above it as its parent."""
    depth = 200
    place = bench.sqlite(f"nesting of {depth}")
    is_flushed, stats = bench.start(place, "programs.deep", depth=depth).end(240)
    found = set(_depths(place))
    faults = [] if found == {depth + 3} else [f"the traces are {sorted(found)} spans deep, not {depth + 3}"]
    yield bench.audit(place, said=[stats], faults=[*faults, *_unless(is_flushed)])


def _depths(place):
    query = """
    WITH RECURSIVE below(trace_id, span_id, depth) AS (
        SELECT trace_id, span_id, 1 FROM spans WHERE parent_span_id IS NULL
        UNION ALL
        SELECT s.trace_id, s.span_id, b.depth + 1 FROM spans s
        JOIN below b ON s.trace_id = b.trace_id AND s.parent_span_id = b.span_id
    ) SELECT MAX(depth) FROM below GROUP BY trace_id"""
    with connect(place.database) as connection:
        return [depth for (depth,) in connection.execute(sqlalchemy.text(query))]


@case
def soak(bench):
    """A program that goes on: its memory, threads, descriptors and temporary files stay as they are."""
    seconds = bench.options.soak or bench.size(15, 7_200)
    modes = ("thread",) if seconds < 60 else ("thread", "process")
    for mode in modes:
        place = bench.sqlite(f"soak of {seconds:,.0f} s, {mode}")
        pace = 60 if seconds < 60 else 20
        temporary = place.environment["TMPDIR"]
        child = bench.start(
            place, "programs.soak", options={"export": mode}, seconds=seconds, pace=pace, temporary=temporary
        )
        seen, stats = child.end(seconds + 240)
        growth = growth_of(seen["samples"])
        note = (
            f"a call gains {growth['bytes'] / growth['calls']:.0f} B; "
            f"threads {growth['threads']:+.0f}, descriptors {growth['descriptors']:+.0f}, files {growth['files']:+.0f}"
        )
        faults = [*_unless(seen["flushed"]), *what_grows(growth)]
        yield bench.audit(place, said=[stats], note=note, faults=faults)


def growth_of(samples):
    """By how much each grew over the samples, along the line that fits them best."""
    calls = [sample[0] for sample in samples]
    span = calls[-1] - calls[0]
    names = ("bytes", "threads", "descriptors", "files")
    return {"calls": span} | {
        name: statistics.linear_regression(calls, [sample[number] for sample in samples]).slope * span
        for number, name in enumerate(names, 1)
    }


def what_grows(growth):
    """What is beyond the bounds, in words."""
    bound = SOAK_SHORT_SLACK + SOAK_BYTES_PER_CALL * growth["calls"]
    found = []
    if growth["bytes"] > bound:
        found.append(f"memory grew by {growth['bytes'] / 2**20:.1f} MiB, bound {bound / 2**20:.1f} MiB")
    names = ("threads", "descriptors", "files")
    return found + [f"{growth[name]:.1f} more {name}" for name in names if growth[name] > SOAK_COUNT]


@case
def clocks(bench):
    """The clock jumps by seconds, a day and twenty years, both ways, between calls and inside of them."""
    for mode in ("thread", "process"):
        place = bench.sqlite(f"clock jumps, {mode}")
        options = {"export": mode, "durable": True}
        child = bench.start(place, "programs.at_all_times", sets_clock=True, options=options, calls=3)
        is_flushed, stats = child.end()
        yield bench.audit(place, said=[stats], faults=_unless(is_flushed))


@case
def uvloop(bench):
    """Tasks and threads under uvloop."""
    yield _on(bench, "uvloop", "on_uvloop", "uvloop")


@case
def trio(bench):
    """Sync calls in trio's threads, and async ones in its tasks, by trio-asyncio."""
    yield _on(bench, "trio", "on_trio", "trio_asyncio")


@case
def nest_asyncio(bench):
    """Event loops inside of running event loops, by nest_asyncio."""
    yield _on(bench, "nest_asyncio", "on_nested_loops", "nest_asyncio")


def _on(bench, name, program, module):
    needs(module)
    place = bench.sqlite(name)
    is_flushed, stats = bench.start(place, f"programs.{program}", calls=bench.size(5, 50), tasks=10).end(240)
    return bench.audit(place, said=[stats], faults=_unless(is_flushed))


def _unless(is_flushed):
    return [] if is_flushed else ["flush() returned False"]
