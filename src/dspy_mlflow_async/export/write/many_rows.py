"""Insertion of many rows into SQLite by few statements.

For each row of an `executemany`, Python's driver lets go of the interpreter, and then waits until the program's threads
let go of it: up to 5 ms a row where they are busy. One statement with many rows does so once.
"""

from __future__ import annotations

import functools
import itertools
import operator
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import sqlalchemy

# Rows of one statement; SQLite may be built to take no more than so many parameters.
_MOST_ROWS = 128
_MOST_PARAMETERS = 32_000 if sqlite3.sqlite_version_info >= (3, 32) else 990


class _Shape(NamedTuple):
    """Insertion of rows with the same columns.

    Attributes:
        begin: The statement up to the first row.
        row: The text of a row.
        names: The columns.
        values: Returns the values of a row, in the order of the columns.
        converters: What makes a parameter of a value, by its place, where something must.
    """

    begin: str
    row: str
    names: tuple[str, ...]
    values: Callable[[dict[str, Any]], tuple[Any, ...]]
    converters: tuple[tuple[int, Callable[[Any], Any]], ...]

    def parameters(self, rows: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
        """Return the parameters of rows, one after the other."""
        parameters = tuple(itertools.chain.from_iterable(map(self.values, rows)))
        return self._converted(parameters) if self.converters else parameters

    def _converted(self, parameters: tuple[Any, ...]) -> tuple[Any, ...]:
        converted, width = list(parameters), len(self.names)
        for place, convert in self.converters:
            converted[place::width] = map(convert, converted[place::width])
        return tuple(converted)


def insert_rows(connection: Any, table: sqlalchemy.Table, rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows that have the same columns, in the connection's transaction.

    Args:
        connection: SQLAlchemy's.
        table: Where.
        rows: By the names of the columns.
    """
    shape = _shape(table, tuple(rows[0]), connection.dialect) if len(rows) > 1 else None
    if shape is None:
        connection.execute(sqlalchemy.insert(table), rows)
        return
    most = min(_MOST_ROWS, _MOST_PARAMETERS // len(shape.names))
    begun, end = 0, len(rows)
    while begun < end:
        count = min(most, 1 << (end - begun).bit_length() - 1)  # few different statements, which the driver keeps
        parameters = shape.parameters(rows[begun : begun + count])
        connection.exec_driver_sql(shape.begin + ", ".join([shape.row] * count), parameters)
        begun += count


@functools.lru_cache(maxsize=64)
def _shape(table: sqlalchemy.Table, names: tuple[str, ...], dialect: Any) -> _Shape | None:
    """Return how rows with these columns are inserted; None where that is for SQLAlchemy."""
    if dialect.name != "sqlite" or dialect.paramstyle != "qmark":
        return None
    if len(names) == 1 or any(column.default is not None for column in table.columns if column.name not in names):
        return None
    quote = dialect.identifier_preparer
    columns = [table.c[name] for name in names]
    found = [(place, column.type.dialect_impl(dialect).bind_processor(dialect)) for place, column in enumerate(columns)]
    return _Shape(
        f"INSERT INTO {quote.format_table(table)} ({', '.join(map(quote.format_column, columns))}) VALUES ",  # noqa: S608 - names of tables
        f"({', '.join('?' * len(names))})",
        names,
        operator.itemgetter(*names),
        tuple((place, convert) for place, convert in found if convert is not None),
    )
