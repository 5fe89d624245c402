"""Params, tables and documents of programs, LMs and data sets, as values instead of calls on the active run."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import dspy

from dspy_mlflow_async.guard import guarded
from dspy_mlflow_async.seams import mlflow_runs
from dspy_mlflow_async.spans.door import MAX_DOCUMENT_BYTES, Door
from dspy_mlflow_async.spans.safe_inspection import contain
from dspy_mlflow_async.spans.serialize import dump, with_floats_replaced

logger = logging.getLogger("dspy_mlflow_async")

MAX_LM_PARAMS_BYTES = 64 * 1024


def program_state(program: Any) -> bytes | None:
    """A program as ``Module.save`` writes it to JSON, or None where it cannot be saved."""
    if not isinstance(program, dspy.Module):
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "program.json"
            program.save(path)
            return path.read_bytes()
    except Exception as error:  # noqa: BLE001 - a program need not be JSON
        logger.warning("Could not save the state of %s: %s", type(program).__name__, error)
        return None


def program_params(program: Any) -> dict[str, Any]:
    """A program's instructions, fields and demos as flat params."""
    if not isinstance(program, dspy.Module):
        return {}
    try:
        return mlflow_runs.program_params(program)
    except Exception as error:  # noqa: BLE001 - dump_state runs the user's code
        logger.warning("Could not read the params of %s: %s", type(program).__name__, error)
        return {}


def lm_params(door: Door) -> dict[str, str]:
    """The LM of ``dspy.settings`` as one JSON param. Source: ``mlflow.dspy.util.log_dspy_lm_state``."""
    lm = dspy.settings.lm
    if lm is None:
        return {}
    attributes = dict(mlflow_runs.sanitize_params(getattr(lm, "kwargs", None) or {}))
    for name in ("model", "model_type", "cache", "temperature", "max_tokens"):
        value = getattr(lm, name, None)
        if value is not None:
            attributes[name] = value
    if not attributes:
        return {}
    plain = door.plain(MAX_LM_PARAMS_BYTES, secrets=True)(attributes)
    return {"lm_params": json.dumps(plain, sort_keys=True)}


def scalar_params(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an optimizer that a param can hold. Source: ``mlflow.dspy.autolog._patched_compile``."""
    flat = {key: value for key, value in values.items() if key != "kwargs"}
    flat.update(values.get("kwargs") or {})
    return {key: value for key, value in flat.items() if issubclass(type(value), (int, float, str, bool))}


def dataset_columns(dataset: Iterable[Any]) -> dict[str, list[Any]]:
    """A data set as columns; an example without a key has None there."""
    return columns_of([fields_of(example) for example in dataset])


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns of equal length, in order of first appearance."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def fields_of(record: Any, *, prefix: str = "") -> dict[str, Any]:
    """The fields of an example or prediction; anything else is one field."""
    if callable(getattr(type(record), "items", None)):  # of the class: to ask a lazy object is to evaluate it
        try:
            return {f"{prefix}{key}": value for key, value in record.items()}
        except BaseException as error:  # noqa: BLE001 - somebody's own items()
            contain(error)
    return {f"{prefix.rstrip('_') or 'value'}": record}


def table_json(columns: Mapping[str, list[Any]], door: Door, earlier: Mapping[str, Any] | None = None) -> bytes:
    """A table in the form of ``mlflow.log_table``: ``{"columns": [...], "data": [[...], ...]}``."""
    names = list(dict.fromkeys([*(earlier["columns"] if earlier else ()), *columns]))
    rows: list[list[Any]] = []
    if earlier:
        place = {name: index for index, name in enumerate(earlier["columns"])}
        rows += [[row[place[name]] if name in place else None for name in names] for row in earlier["data"]]
    length = max((len(values) for values in columns.values()), default=0)
    plain = door.plain(MAX_DOCUMENT_BYTES)
    rows += [[plain(columns[name][index]) if name in columns else None for name in names] for index in range(length)]
    content = {"columns": names, "data": rows}
    # pandas writes what is not a finite number as null, and reads nothing else.
    return dump(with_floats_replaced(content, lambda _: None) if plain.has_unusual_floats else content).encode()


def fonts_are_known() -> bool:
    """Return whether Matplotlib can draw at once: the first time on a machine it looks for fonts for some 20 s.

    Raises:
        ImportError: Where it is not installed.
    """
    import matplotlib as mpl

    return any(Path(mpl.get_cachedir()).glob("fontlist-*.json"))


def look_for_fonts() -> None:
    """Let Matplotlib look for fonts now, in a thread of its own, if it has to."""
    with contextlib.suppress(ImportError):
        if not fonts_are_known():
            in_background(lambda: importlib.import_module("matplotlib.font_manager"))


def in_background(draw: Callable[[], Any]) -> None:
    """Draw in a thread that nobody waits for."""
    threading.Thread(target=guarded(draw), name="dspy-mlflow-async-fonts", daemon=True).start()


def plot_of_series(series: Mapping[str, Iterable[tuple[int, float]]]) -> bytes:
    """A PNG of score series, one line per metric key."""
    from matplotlib.figure import Figure  # no pyplot: its state is global

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, points in sorted(series.items()):
        ordered = sorted(points)
        axes.plot([step for step, _ in ordered], [score for _, score in ordered], marker="o", label=key)
    axes.set_xlabel("step")
    axes.set_ylabel("score")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
