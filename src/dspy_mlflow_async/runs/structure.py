"""The structure of a program: its modules, predictors, signatures and tools, as rows of a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dspy

from dspy_mlflow_async.runs.drawing import Row
from dspy_mlflow_async.spans.door import Door
from dspy_mlflow_async.spans.safe_inspection import contain
from dspy_mlflow_async.spans.signatures import texts_of

_MAX_PARTS = 200
_MAX_DEPTH = 20
_MAX_ITEMS = 50  # of a list or dict of modules
_MAX_TEXT = 400  # characters
_PREDICTOR, _TOOL = "#ddf4ff", "#fff8c5"


def structure(program: Any, door: Door) -> list[Row]:
    """Return the parts of a program, parents first; nothing for what is no module.

    Args:
        program: The program, of which nothing is called.
        door: Names and signatures pass it.
    """
    if not isinstance(program, dspy.Module):
        return []
    rows: list[Row] = []
    try:
        for row in _walk(type(program).__name__, program, 0, {id(program)}, door):
            if len(rows) == _MAX_PARTS:
                return [*rows, Row(1, "…", "more")]
            rows.append(row)
    except BaseException as error:  # noqa: BLE001 - a signature may be the user's
        contain(error)
    return rows


def _walk(name: str, part: Any, depth: int, seen: set[int], door: Door) -> Iterator[Row]:
    yield _row(name, part, depth, door)
    if depth >= _MAX_DEPTH or not isinstance(part, dspy.Module):
        return
    # Of the object itself: an attribute that is computed is somebody's code.
    for key, value in object.__getattribute__(part, "__dict__").items():
        for below, each in _parts(str(key), value):
            if id(each) not in seen:
                seen.add(id(each))
                yield from _walk(below, each, depth + 1, seen, door)


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    if issubclass(kind, (dspy.Module, dspy.Retrieve, dspy.Tool)):
        yield name, value
    elif issubclass(kind, (list, tuple)):
        items = list.__iter__(value) if issubclass(kind, list) else tuple.__iter__(value)
        for index, item in zip(range(_MAX_ITEMS), items, strict=False):
            yield from _part(f"{name}[{index}]", item)
    elif issubclass(kind, dict):
        for _, (key, item) in zip(range(_MAX_ITEMS), list(dict.items(value)), strict=False):
            if type(key) in {str, int}:
                yield from _part(f"{name}[{key!r}]", item)


def _part(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if issubclass(type(value), (dspy.Module, dspy.Retrieve, dspy.Tool)):
        yield name, value


def _row(name: str, part: Any, depth: int, door: Door) -> Row:
    title, note = door.text(name, _MAX_TEXT), "" if depth == 0 else type(part).__name__
    if isinstance(part, dspy.Tool):
        return Row(depth, title, note, fill=_TOOL)
    if isinstance(part, dspy.Predict):
        return Row(depth, title, note, door.text(texts_of(part.signature).short, _MAX_TEXT), fill=_PREDICTOR)
    return Row(depth, title, note)
