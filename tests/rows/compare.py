"""One set of traces in two stores, by MLflow alone and by rows, and where the stores differ."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import sqlalchemy

from dspy_mlflow_async.export.write import prepare
from dspy_mlflow_async.export.write.row_writer import row_writer
from dspy_mlflow_async.export.write.writer import Writer
from rows.corpus import twin

_BATCH = 32  # as the queue's
_ROUNDS = 8
_LEFT_OUT = {"alembic_version", "experiments"}  # made with each store, at its time


@dataclass
class Comparison:
    """What came of one.

    Attributes:
        traces: How many traces there were.
        as_rows: How many of them were written as rows.
        proved: The kinds whose rows are MLflow's, as the writer has found.
        refused: The others that it has tried, with its reasons.
        reason: Why no rows were written at all, if none were.
        differences: What is not the same in both stores.
    """

    traces: int
    as_rows: int = 0
    proved: list = field(default_factory=list)
    refused: dict = field(default_factory=dict)
    reason: str | None = None
    differences: list = field(default_factory=list)


def compare(items, by_mlflow, by_rows):
    """Write operations to two stores that are alike and have none of them.

    Args:
        items: The operations.
        by_mlflow: The URI of the store that MLflow writes.
        by_rows: The URI of the other.
    """
    result = Comparison(len({item.key for item in items}))
    _write(Writer(by_mlflow, may_try_rows=False), items)
    rows = row_writer(by_rows)
    original = rows.write

    def counted(*arguments, **options):
        places = original(*arguments, **options)
        result.as_rows += len(places)
        return places

    rows.write = counted
    writer = Writer(by_rows)
    prepared = []
    for item in map(twin, items):
        with contextlib.suppress(Exception):  # what MLflow cannot add up its store refuses
            prepare.prepare(item)
            prepared.append(item)
    try:
        for _ in range(_ROUNDS):  # a batch makes few trials
            rows.try_out(writer.client.store, prepared)
        _write(writer, items)
    finally:
        del rows.write
    result.proved, result.refused, result.reason = sorted(rows.proved), dict(rows.refused), rows.reason
    result.differences = differences(_tables(by_mlflow), _tables(by_rows))
    return result


def _write(writer, items):
    for start in range(0, len(items), _BATCH):
        outcomes = writer.write([twin(item) for item in items[start : start + _BATCH]])
        bad = [outcome for outcome in outcomes if outcome.verdict.name != "STORED"]
        # What one store refuses the other must refuse as well: the tables show it.
        assert not any(outcome.verdict.name == "AWAY" for outcome in bad), bad


def _tables(uri):
    """Every row of every table, sorted."""
    engine = sqlalchemy.create_engine(uri)
    metadata = sqlalchemy.MetaData()
    with engine.connect() as connection:
        metadata.reflect(connection)
        found = {
            name: sorted(
                (
                    {column: str(value) for column, value in row._mapping.items()}
                    for row in connection.execute(table.select())
                ),
                key=lambda row, keys=[column.name for column in table.primary_key]: [row[key] for key in keys],
            )
            for name, table in metadata.tables.items()
            if name not in _LEFT_OUT
        }
    engine.dispose()
    return found


def differences(expected, found):
    """What is not the same, a line for each row."""
    lines = [f"{name} is in one of the stores alone" for name in sorted(expected.keys() ^ found.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if len(expected[name]) != len(found[name]):
            lines.append(f"{name} has {len(found[name])} rows in place of {len(expected[name])}")
        for theirs, ours in zip(expected[name], found[name], strict=False):
            lines += [
                f"{name}.{column}: {ours[column][:200]!r} in place of {theirs[column][:200]!r}"
                for column in theirs
                if theirs[column] != ours[column]
            ]
    return lines


def two_files(empty, folder):
    """Two sqlite stores that are copies of one, whose experiments have their artifacts in the same place."""
    paths = [Path(folder) / "by-mlflow.db", Path(folder) / "by-rows.db"]
    for path in paths:
        path.write_bytes(Path(empty).read_bytes())
    return [f"sqlite:///{path}" for path in paths]


def make_empty(folder):
    """A sqlite store with MLflow's tables and an experiment for the traces; gives its path."""
    path = Path(folder) / "empty.db"
    client = mlflow.MlflowClient(f"sqlite:///{path}")
    client.create_experiment("rows", artifact_location=str(folder))
    return path
