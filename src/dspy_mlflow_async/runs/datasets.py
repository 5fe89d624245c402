"""MLflow's record of a data set: what was evaluated or compiled on, by a digest of its content, and its columns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from dspy_mlflow_async.runs import artifacts
from dspy_mlflow_async.spans.bounds import json_text
from dspy_mlflow_async.spans.door import MAX_DOCUMENT_BYTES, Door
from dspy_mlflow_async.spans.serialize import without_addresses

EVALUATION, TRAINING, VALIDATION = "eval", "training", "validation"  # MLflow's words for what a run uses it for
_MAX_COLUMNS = 200
_MAX_NAME = 250  # characters of a column's name
_TYPES = {str: "string", bool: "boolean", int: "long", float: "double"}
# What MLflow keeps as the source of data that some code has made.
_SOURCE_TAGS = ("mlflow.user", "mlflow.source.name", "mlflow.source.type", "mlflow.source.git.commit")


def is_at_hand(examples: Any) -> bool:
    """Return whether going through the examples once more runs no code of the user's, as a class of theirs may."""
    return type(examples) in {list, tuple}


def dataset_input(name: str, context: str, examples: Iterable[Any], run: Any, door: Door) -> Any:
    """Describe a data set as an input of a run, as ``mlflow.log_input`` does.

    Args:
        name: What it is called: ``devset``, ``trainset``, ``valset``.
        context: What the run uses it for.
        examples: The examples.
        run: MLflow's run, whose tags tell which code has made them.
        door: They pass it: the digest is that of what may be stored.

    Returns:
        MLflow's ``DatasetInput``. Equal examples in the same order have the same digest, in every process.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    content, columns, count = hashlib.sha256(), dict[str, str](), 0
    for example in examples:
        shown = door.plain(MAX_DOCUMENT_BYTES)(artifacts.fields_of(example))
        fields = shown if isinstance(shown, dict) else {"value": shown}
        content.update(_canonical(fields))
        count += 1
        for key, value in fields.items():
            if columns.get(key) in {None, "any"} and value is not None and len(columns) < _MAX_COLUMNS:
                columns[key] = _TYPES.get(type(value), "any")
            elif key not in columns and len(columns) < _MAX_COLUMNS:
                columns[key] = "any"
    schema = [{"type": kind, "name": key[:_MAX_NAME], "required": True} for key, kind in columns.items()]
    dataset = Dataset(
        name,
        content.hexdigest()[:8],
        "code",
        json.dumps({"tags": _source(run)}),
        json.dumps({"mlflow_colspec": schema}),
        json.dumps({"num_rows": count, "num_elements": count * len(columns)}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _source(run: Any) -> dict[str, str]:
    tags: Mapping[str, str] = run.data.tags
    return {key: tags[key] for key in _SOURCE_TAGS if key in tags}


def _canonical(fields: dict[str, Any]) -> bytes:
    try:
        text = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)
    except (TypeError, ValueError):  # an integer beyond 64 bits, or a lone surrogate
        text = json_text(dict(sorted(fields.items()))).encode()
    return without_addresses(text.decode()).encode() if b" at 0x" in text else text
