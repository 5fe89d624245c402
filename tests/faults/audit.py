"""What became of each call: a ledger that outlives any kill, and the row that compares it with store and spool."""

import dataclasses
import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import sqlalchemy

from dspy_mlflow_async import export
from dspy_mlflow_async.export.queue import replay
from dspy_mlflow_async.export.spool.paths import segments_of

PLACES = ("stored", "spooled", "dead", "dropped", "sampled_out")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        case: Its name.
        made: Calls whose callers were told that they had ended, and those that were killed on the way back but are
            found whole.
        stored: Traces that are whole in the store.
        spooled: Traces that are whole in the spool and not in the store.
        dead: Traces that are whole in the dead letters alone.
        dropped: Traces that the library has counted as dropped.
        sampled_out: Traces that it has counted as left out on purpose.
        doubled: Traces with spans, feedback or tokens twice, and those that nobody has begun.
        lost: Calls that are in no place and that nobody has counted.
        faults: Whatever else went wrong.
        note: What a reader wants to know, such as the number of kills.
        skipped: Why it could not be tried; None if it was.
        seconds: How long it took.
    """

    case: str
    made: int = 0
    stored: int = 0
    spooled: int = 0
    dead: int = 0
    dropped: int = 0
    sampled_out: int = 0
    doubled: int = 0
    lost: int = 0
    faults: tuple[str, ...] = ()
    note: str = ""
    skipped: str | None = None
    seconds: float = 0.0

    @property
    def problems(self):
        """What is wrong with it, in words; empty where it is balanced."""
        found = [f"{self.lost} lost"] if self.lost else []
        found += [f"{self.doubled} doubled"] if self.doubled else []
        total = sum(getattr(self, place) for place in PLACES) + self.lost
        found += [f"{self.made} made, and {total} in all places"] if total != self.made else []
        found += ["nothing was made"] if not self.made and self.skipped is None else []
        return [*found, *self.faults]

    @property
    def is_balanced(self):
        """Whether every call is in one place, once, and nothing else went wrong."""
        return not self.problems


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """What a whole trace has: spans, and tokens in all."""

    spans: int
    tokens: int


class Ledger:
    """Notes the calls of any number of threads and processes, each line in one system call: a kill tears none."""

    def __init__(self, path):
        self.path = Path(path)
        self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def begin(self, trace_id, whole):
        os.write(self._handle, f"+ {trace_id} {whole.spans} {whole.tokens}\n".encode())

    def end(self, trace_id):
        os.write(self._handle, f"= {trace_id}\n".encode())

    def read(self):
        """What each call that was begun makes, by trace id; and those whose callers were told that they had ended."""
        begun, ended = {}, set()
        for line in self.path.read_text().splitlines():
            mark, trace_id, *counts = line.split()
            if mark == "=":
                ended.add(trace_id)
                continue
            assert trace_id not in begun, "two calls have the same trace id"
            begun[trace_id] = Whole(*map(int, counts))
        return begun, ended

    def close(self):
        os.close(self._handle)


@dataclasses.dataclass(slots=True)
class Found:
    """One trace as the tables of the store have it."""

    state: str
    spans: int = 0
    orphans: int = 0  # spans whose parents are not there
    tokens: int = 0
    feedback: Counter = dataclasses.field(default_factory=Counter)  # by name

    def is_whole(self, whole):
        """Whether nothing is missing; what is too much is doubled, not lost."""
        is_complete = self.spans >= whole.spans and self.tokens >= whole.tokens and not self.orphans
        return is_complete and self.state != "IN_PROGRESS"

    def is_doubled(self, whole):
        return self.spans > whole.spans or self.tokens > whole.tokens or max(self.feedback.values(), default=1) > 1


_TRACES = "SELECT request_id, status FROM trace_info WHERE experiment_id = :id"
_SPANS = """
SELECT s.trace_id, COUNT(*), SUM(CASE WHEN s.parent_span_id IS NOT NULL AND p.span_id IS NULL THEN 1 ELSE 0 END)
FROM spans s LEFT JOIN spans p ON p.trace_id = s.trace_id AND p.span_id = s.parent_span_id
WHERE s.experiment_id = :id GROUP BY s.trace_id"""
_TOKENS = """
SELECT m.request_id, m.value FROM trace_request_metadata m JOIN trace_info t ON t.request_id = m.request_id
WHERE t.experiment_id = :id AND m.key = 'mlflow.trace.tokenUsage'"""
_TOKENS_OF_COLUMN = "SELECT request_id, total_tokens FROM trace_info WHERE experiment_id = :id AND total_tokens > 0"
_FEEDBACK = """
SELECT a.trace_id, a.name, COUNT(*) FROM assessments a JOIN trace_info t ON t.request_id = a.trace_id
WHERE t.experiment_id = :id GROUP BY a.trace_id, a.name"""


def read_tables(database, experiment_id):
    """What has arrived, by trace id, from the tables themselves: neither MLflow nor this package has a say."""
    with connect(database) as connection:

        def ask(query):
            return connection.execute(sqlalchemy.text(query), {"id": int(experiment_id)}).all()

        found = {trace_id: Found(state) for trace_id, state in ask(_TRACES)}
        for trace_id, spans, orphans in ask(_SPANS):
            found[trace_id].spans, found[trace_id].orphans = spans, orphans
        for trace_id, usage in ask(_TOKENS):
            found[trace_id].tokens = json.loads(usage)["total_tokens"]
        if any(column["name"] == "total_tokens" for column in sqlalchemy.inspect(connection).get_columns("trace_info")):
            for trace_id, tokens in ask(_TOKENS_OF_COLUMN):  # MLflow 3.17 keeps them there alone
                found[trace_id].tokens = tokens
        for trace_id, name, count in ask(_FEEDBACK):
            found[trace_id].feedback[name] = count
    return found


def connect(database):
    """A connection to a database for one block, in a transaction of its own."""
    return sqlalchemy.create_engine(database, poolclass=sqlalchemy.NullPool).begin()


def spooled_spans(root):
    """The ids of the spans of each trace that lies in a spool and is not done with, in state whole or late."""
    spans = defaultdict(set)
    for info in export.spools(root):
        for segment in segments_of(info.folder):
            for _, payload in replay.pending(segment):
                _add(spans, payload)
    return spans


def dead_spans(root):
    """The same of the dead letters."""
    spans = defaultdict(set)
    for letter in export.letters(folder=root):
        _add(spans, letter.record)
    return spans


def _add(spans, payload):
    record = {} if payload is None else json.loads(payload)
    if record.get("kind") == "trace" and record["stage"] != "partial":
        spans[record["key"]] |= {span["span_id"] for span in record["spans"]}


def audit(case, database, experiment_id, ledger, spool_root, *, said=(), may=("stored",), feedback=()):
    """Look for each call of a ledger in the store, the spool and the dead letters.

    Args:
        case: The row's name.
        database: The URI of the database whose tables the store keeps.
        experiment_id: The experiment in it.
        ledger: What was called.
        spool_root: The folder of the spools.
        said: What `stats()` has said at the end of each program that came to its end, as a dict.
        may: Places in which traces may be; what is elsewhere is a fault.
        feedback: Names of the feedback that each stored trace must have.
    """
    begun, ended = ledger.read()
    found = read_tables(database, experiment_id)
    stored = {key for key, trace in found.items() if key in begun and trace.is_whole(begun[key])}
    doubled = [key for key, trace in found.items() if key not in begun or trace.is_doubled(begun[key])]

    def whole_in(spans):
        return {key for key, ids in spans.items() if key in begun and len(ids) >= begun[key].spans}

    spooled = whole_in(spooled_spans(spool_root)) - stored
    dead = whole_in(dead_spans(spool_root)) - stored - spooled
    missing = ended - stored - spooled - dead
    dropped, sampled_out = (sum(stats[place] for stats in said) for place in ("dropped", "sampled_out"))
    row = Row(
        case,
        made=len(ended | stored | spooled | dead),
        stored=len(stored),
        spooled=len(spooled),
        dead=len(dead),
        dropped=dropped,
        sampled_out=sampled_out,
        doubled=len(doubled),
        lost=max(0, len(missing) - dropped - sampled_out),
    )
    faults = [f"{getattr(row, place)} {place}" for place in PLACES if place not in may and getattr(row, place)]
    faults += [f"{key}: {found[key]} is not {begun[key]}" for key in sorted(missing & found.keys())[: row.lost]]  # torn
    without = [key for key in stored if any(name not in found[key].feedback for name in feedback)]
    faults += [f"{len(without)} stored without their feedback"] if without else []
    faults += [fault for stats in said for fault in _faults_of(stats)]
    if said:
        faults += _differences(said, row, ended)
    return dataclasses.replace(row, faults=tuple(faults))


def _faults_of(stats):
    total = sum(stats[place] for place in (*PLACES, "waiting", "open"))
    if stats["started"] != total:
        yield f"stats(): {stats['started']} started, and {total} in all places"
    if stats["internal_errors"]:
        yield f"stats(): {stats['internal_errors']} internal errors"


def _differences(said, row, ended):
    """Where the programs' own counters differ from what is found. All programs of the row must have come to an end."""
    expected = {"started": row.made, **{place: getattr(row, place) for place in ("stored", "spooled", "dead")}}
    for place, count in expected.items():
        counted = sum(stats[place] for stats in said)
        if counted != count:
            yield f"stats(): {counted} {place}, and {count} are found"
    if row.made != len(ended):
        yield f"{row.made - len(ended)} calls are found that did not end"
