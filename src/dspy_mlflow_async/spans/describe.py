"""Turns what DSPy tells its callbacks into the name, type, inputs and attributes that MLflow records.

The reference is ``mlflow.dspy.callback.MlflowCallback``. Nothing here changes what it is given: DSPy hands one
``inputs`` dict to every callback.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import dspy
import pydantic

from dspy_mlflow_async.seams.mlflow_spans import EXCLUDE_LM_PARAMS, SpanAttributeKey, SpanType
from dspy_mlflow_async.spans.safe_inspection import behind, contain
from dspy_mlflow_async.spans.serialize import without_addresses
from dspy_mlflow_async.spans.signatures import texts_of

_HASHED = 32_768  # characters of the beginning, and of the end, of a demo's field by which a program is named
_SCALARS = frozenset({str, int, float, bool, type(None)})
_NO_CLASSES = _SCALARS | {dict, list, tuple}
FINISH_TOOL = "finish"  # DSPy's sign that an agent is done, not a tool of the user's


class Description(NamedTuple):
    """Description of a call when it begins: the name, type, inputs and attributes of its span.

    Attributes:
        name: The span's name.
        span_type: One of ``mlflow.entities.SpanType``.
        inputs: Arguments by name.
        attributes: Further attributes by key.
        has_secrets: Whether arguments and attributes may hold credentials by key.
    """

    name: str
    span_type: str
    inputs: dict[str, Any]
    attributes: dict[str, Any]
    has_secrets: bool = False


def describe_module(instance: Any, inputs: Mapping[str, Any]) -> Description:
    """Describe a call of a ``dspy.Module``, retriever or embedder."""
    # Built-in modules take keywords only; an empty "args" says nothing.
    if "args" in inputs and not inputs["args"]:
        inputs = {key: value for key, value in inputs.items() if key != "args"}
    return Description(
        f"{type(instance).__name__}.forward",
        _module_type(instance),
        _unpack(inputs),
        _module_attributes(instance),
    )


def describe_lm(instance: Any, inputs: Mapping[str, Any]) -> Description:
    """Describe a call of a ``dspy.LM`` or of anything that DSPy reports like one."""
    model = getattr(instance, "model", None)
    model_type = getattr(instance, "model_type", None)
    attributes = {
        key: value for key, value in (getattr(instance, "kwargs", None) or {}).items() if key not in EXCLUDE_LM_PARAMS
    }
    attributes |= {
        "model": model,
        "model_type": model_type,
        "cache": getattr(instance, "cache", None),
        SpanAttributeKey.MESSAGE_FORMAT: "dspy",
    }
    if isinstance(model, str):
        attributes[SpanAttributeKey.MODEL] = model
        provider, slash, _ = model.partition("/")
        if slash and provider:
            attributes[SpanAttributeKey.MODEL_PROVIDER] = provider
    return Description(
        f"{type(instance).__name__}.__call__",
        SpanType.CHAT_MODEL if model_type == "chat" else SpanType.LLM,
        _unpack(inputs),
        attributes,
        has_secrets=True,
    )


def describe_adapter(instance: Any, inputs: Mapping[str, Any], step: str) -> Description:
    """Describe a call of an adapter's ``format`` or ``parse``."""
    return Description(f"{type(instance).__name__}.{step}", SpanType.PARSER, _unpack(inputs), {})


def describe_tool(instance: Any, inputs: Mapping[str, Any]) -> Description:
    """Describe a call of a ``dspy.Tool``."""
    arguments = _unpack(inputs)
    arguments.pop("args", None)  # tools take keywords only
    attributes = {"name": instance.name, "description": instance.desc, "args": instance.args}
    return Description(f"Tool.{instance.name}", SpanType.TOOL, arguments, attributes, has_secrets=True)


def describe_interpreter(instance: Any, inputs: Mapping[str, Any], operation: str) -> Description:
    """Describe an operation of a code interpreter: ``execute``, ``tool_call``, ``startup`` or ``shutdown``."""
    span_type = SpanType.TOOL if operation in {"execute", "tool_call"} else SpanType.UNKNOWN
    return Description(f"{type(instance).__name__}.{operation}", span_type, _unpack(inputs), {}, has_secrets=True)


def describe_outputs(instance: Any, outputs: Any) -> Any:
    """Convert a module's result to the form that MLflow shows: predictions as dicts, documents as documents."""
    if not issubclass(type(outputs), dspy.Prediction):
        return outputs
    kind = type(instance)
    if f"{kind.__module__}.{kind.__qualname__.rpartition('.')[2]}" == "dspy.retrieve.databricks_rm.DatabricksRM":
        return _documents(outputs)
    try:
        return _as_dict(outputs)
    except BaseException as error:  # noqa: BLE001 - it runs through whatever the program has put there, circles too
        contain(error)
        return dict(dspy.Example.items(outputs))


def _as_dict(value: Any) -> Any:
    """Stand-in for ``dspy.Example.toDict``, which asks every value for a method, and so evaluates lazy ones."""
    kind = type(value)
    if kind in _SCALARS or behind(value)[1]:
        return value
    if getattr(kind, "toDict", None) is dspy.Example.toDict:
        return {key: _as_dict(item) for key, item in dspy.Example.items(value)}
    if hasattr(kind, "toDict"):
        return value.toDict()
    if issubclass(kind, pydantic.BaseModel):
        return value.model_dump()
    if issubclass(kind, list):
        return [_as_dict(item) for item in list.__iter__(value)]
    return {key: _as_dict(item) for key, item in value.items()} if issubclass(kind, dict) else value


def program_hash(predictor: Any) -> str:
    """Twelve hexadecimal digits that name a predictor's instructions and demos, so that a trace names its candidate."""
    instructions, demos = str(predictor.signature.instructions), getattr(predictor, "demos", None)
    if not demos:
        return _hash_of_instructions(instructions)
    texts = [without_addresses(text) for demo in demos for text in _texts_of_demo(demo)]
    return _hash_of(instructions, *texts)


def hash_of_whole(hashes: Iterable[str]) -> str | None:
    """Return what names a whole program: the hash of its only predictor, or one of those of all.

    It is known of a trace, too, in which all of them were called.

    Args:
        hashes: ``program_hash`` of each predictor, in any order.

    Returns:
        Twelve hexadecimal digits, or None for a program without predictors.
    """
    distinct = sorted(set(hashes))
    return _hash_of(*distinct) if len(distinct) > 1 else next(iter(distinct), None)


def demo_hash(demo: Any) -> str:
    """Twelve hexadecimal digits that name a demo by what is in it."""
    return _hash_of(*(without_addresses(text) for text in _texts_of_demo(demo)))


@functools.lru_cache(maxsize=256)
def _hash_of_instructions(instructions: str) -> str:
    return _hash_of(instructions)


def _hash_of(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:12]


def _texts_of_demo(demo: Any) -> list[str]:
    try:
        fields = [(_text(key), _text(value)) for key, value in demo.items()]
    except BaseException as error:  # noqa: BLE001 - no mapping, or one that fails
        contain(error)
        return [_text(demo)]
    return [text for field in sorted(fields) for text in field]


def _text(value: Any) -> str:
    if type(value) in {str, bytes} and len(value) > _HASHED:  # not all of an image, at each call
        return f"{len(value)} {value[:_HASHED]!r} {value[-_HASHED:]!r}"
    if behind(value)[1]:
        return type(value).__name__
    try:
        return repr(value)
    except BaseException as error:  # noqa: BLE001 - somebody's own __repr__
        contain(error)
        return type(value).__name__


def _module_type(instance: Any) -> str:
    if isinstance(instance, dspy.Retrieve):
        return SpanType.RETRIEVER
    if isinstance(instance, dspy.ReAct):
        return SpanType.AGENT
    if isinstance(instance, dspy.Predict):
        return SpanType.LLM
    if isinstance(instance, dspy.Adapter):
        return SpanType.PARSER
    if isinstance(instance, dspy.Embedder):
        return SpanType.EMBEDDING
    return SpanType.CHAIN


def _module_attributes(instance: Any) -> dict[str, Any]:
    if isinstance(instance, dspy.Predict):
        return {"signature": texts_of(instance.signature).short, "program_hash": program_hash(instance)}
    if isinstance(instance, dspy.ChainOfThought):
        signature = instance.signature if hasattr(instance, "signature") else instance.predict.signature
        attributes = {"signature": texts_of(signature).short}
        if hasattr(instance, "extended_signature"):
            attributes["extended_signature"] = texts_of(instance.extended_signature).short
        return attributes
    return {}


def _unpack(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with those of ``**kwargs`` beside them; signatures as text, which is their readable form."""
    merged = dict(inputs)
    others = merged.pop("kwargs", None)
    if others:
        merged.update(others)
    for key, value in merged.items():
        if type(value) not in _NO_CLASSES and issubclass(type(value), type) and issubclass(value, dspy.Signature):
            merged[key] = texts_of(value).full
    return merged


def _documents(outputs: dspy.Prediction) -> list[dict[str, Any]]:
    from mlflow.entities.document import Document

    uris = outputs.doc_uris if outputs.doc_uris is not None else [None] * len(outputs.doc_ids)
    return [
        Document(page_content=content, metadata={"doc_id": doc_id, "doc_uri": uri} | extra, id=doc_id).to_dict()
        for content, doc_id, uri, extra in zip(outputs.docs, outputs.doc_ids, uris, outputs.extra_columns, strict=False)
    ]
