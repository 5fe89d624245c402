"""Fingerprints of examples, functions, LMs and settings: short texts that are the same in every process."""

from __future__ import annotations

import dis
import functools
import hashlib
import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import dspy
import pydantic

from dspy_mlflow_async.runs import artifacts
from dspy_mlflow_async.runs.feedback import metric_name
from dspy_mlflow_async.spans.serialize import Plain, without_addresses

MAX_VALUE_BYTES = 64 * 1024 * 1024
_MAX_DEPTH = 100
_SCALARS = (str, bytes, int, float, bool, type(None))


def digest(value: Any) -> str:
    """Return a short text that is the same for equal values, in every process."""
    text = json.dumps(_canonical(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(example: Any) -> str:
    """Return a short text that is the same for equal examples, in every process."""
    return digest(example)


def text_of_function(function: Any) -> str:
    """Return the name of a metric or a program, and the digest of what it does: its code, what is bound to it."""
    return f"{metric_name(function)}-{digest(_function(function))}"


def text_of_program(program: Any) -> str:
    """Describe a module by its class, instructions, fields and demos; another callable by its code."""
    if not isinstance(program, dspy.Module):
        return text_of_function(program)
    return f"{type(program).__name__}-{digest(artifacts.program_params(program))}"


def text_of_lm(lm: Any, program: Any) -> str:
    """Describe the LM in force, and those that the program's predictors have of their own. Secrets do not count."""
    own = [] if not isinstance(program, dspy.Module) else [p.lm for _, p in program.named_predictors() if _has_lm(p)]
    names = dict.fromkeys(_lm_name(each) for each in [lm, *own])
    return f"{', '.join(names)}-{digest([_lm(each) for each in [lm, *own]])}"


def arguments_of_lm(lm: Any) -> dict[str, str]:
    """Return a digest of each argument of an LM, by name; of a secret one nothing that differs."""
    kwargs = getattr(lm, "kwargs", None)
    masked = _masked(kwargs if isinstance(kwargs, Mapping) else {})
    return {key: digest(value)[:8] for key, value in masked.items()} if isinstance(masked, dict) else {}


def text_of_adapter(adapter: Any) -> str:
    """Describe an adapter's class and how it was made."""
    if adapter is None:
        return "default"
    return f"{type(adapter).__name__}-{digest(_without(getattr(adapter, '__dict__', {}), {'callbacks'}))}"


def text_of_settings(settings: Mapping[str, Any]) -> str:
    """Describe a case's other settings, less callbacks, which watch and change nothing."""
    settings = _without(settings, {"lm", "adapter", "callbacks"})
    return f"{', '.join(sorted(settings))}-{digest(_masked(settings))}" if settings else "none"


def _without(values: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def _masked(values: Mapping[str, Any]) -> Any:
    return Plain(MAX_VALUE_BYTES, secrets=True)(dict(values))


def _has_lm(predictor: Any) -> bool:
    return getattr(predictor, "lm", None) is not None


def _lm_name(lm: Any) -> str:
    return "none" if lm is None else f"{type(lm).__name__} {getattr(lm, 'model', '')}".strip()


def _lm(lm: Any) -> Any:
    kwargs = getattr(lm, "kwargs", None)
    return [_lm_name(lm), getattr(lm, "model_type", None), _masked(kwargs if isinstance(kwargs, Mapping) else {})]


def _function(function: Any, path: frozenset[int] = frozenset()) -> Any:
    if id(function) in path:
        return "itself"
    path |= {id(function)}
    if isinstance(function, functools.partial):
        return [_function(function.func, path), function.args, function.keywords]
    if isinstance(function, types.MethodType):
        return [type(function.__self__).__qualname__, _function(function.__func__, path)]
    if isinstance(function, types.FunctionType):
        bound = [function.__defaults__, function.__kwdefaults__, _closure(function, path)]
        return [function.__qualname__, _code(function.__code__), bound]
    if isinstance(function, dspy.Module):
        return [type(function).__qualname__, artifacts.program_params(function)]
    call = getattr(type(function), "__call__", None)  # noqa: B004 - its code is wanted
    return [type(function).__qualname__, _function(call, path) if isinstance(call, types.FunctionType) else None]


def _closure(function: types.FunctionType, path: frozenset[int]) -> dict[str, Any]:
    """Return the simple values and functions of a closure; not what the function changes itself, such as a counter."""
    changed = {step.argval for step in dis.get_instructions(function.__code__) if step.opname == "STORE_DEREF"}
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if isinstance(value, types.FunctionType):
            found[name] = _function(value, path)
        elif isinstance(value, _SCALARS) and name not in changed:
            found[name] = value
    return found


def _code(code: types.CodeType) -> Any:
    """Describe the code of a function; not its place in a file."""
    constants = [_code(each) if isinstance(each, types.CodeType) else each for each in code.co_consts]
    return [code.co_code, constants, code.co_names, code.co_varnames]


def _canonical(value: Any, path: frozenset[int] = frozenset()) -> Any:
    """Return a value as JSON, the same for equal values: keys in order, sets in order, no addresses."""
    if id(value) in path or len(path) >= _MAX_DEPTH:
        return _text(type(value))  # a circle
    try:
        return _shown(value, path | {id(value)})
    except Exception:  # noqa: BLE001 - the user's object may refuse to be looked at
        return _text(value)


def _shown(value: Any, path: frozenset[int]) -> Any:
    inner = functools.partial(_canonical, path=path)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if value is None or isinstance(value, (str, bool, int, float)):
        return Plain(MAX_VALUE_BYTES, contents=False)(value)  # of a secret, too, a digest is all that is stored
    if isinstance(value, (set, frozenset)):
        return {"set": sorted(json.dumps(inner(item), sort_keys=True) for item in value)}
    if isinstance(value, (dict, dspy.Example)):
        return {str(key): inner(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [inner(item) for item in value]
    if isinstance(value, pydantic.BaseModel):
        return inner(value.model_dump())
    if is_dataclass(value) and not isinstance(value, type):
        return inner({field.name: getattr(value, field.name) for field in fields(value)})
    if hasattr(value, "dtype") and hasattr(value, "tobytes"):  # an array's text leaves out most of it
        content = value.tolist() if value.dtype.hasobject else value.tobytes()
        return {"array": [str(value.dtype), list(value.shape), inner(content)]}
    return _text(value)


def _text(value: Any) -> Any:
    return without_addresses(Plain(MAX_VALUE_BYTES, contents=False).dumps(value))
