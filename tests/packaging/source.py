"""Reads the package's own source: who imports what, and which names of DSPy and MLflow are touched."""

import ast
import functools
import importlib.util
from pathlib import Path

import dspy_mlflow_async

PACKAGE = "dspy_mlflow_async"
# The installed files, so that what is read is what is tested: in tox the wheel, not the tree.
ROOT = Path(dspy_mlflow_async.__file__).parent
# What DSPy and MLflow document for users.
PUBLIC = (
    "dspy",
    "dspy.utils.callback",
    "mlflow",
    "mlflow.artifacts",
    "mlflow.dspy",
    "mlflow.entities",
    "mlflow.environment_variables",
    "mlflow.exceptions",
    "mlflow.protos.databricks_pb2",
    "mlflow.pyfunc",
    "mlflow.tracing",
    "mlflow.tracing.constant",
    "mlflow.tracking",
)


@functools.cache
def modules():
    """All modules of the package: dotted name and file, in order."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join((PACKAGE, *parts)).removesuffix(".__init__")] = path
    return found


def is_public(module):
    """Whether a module of DSPy or MLflow is one that they document."""
    return module in PUBLIC or module.startswith("mlflow.entities.")


def is_foreign(module):
    return module.partition(".")[0] in {"dspy", "mlflow"}


@functools.cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path, name):
    """The modules that a file imports anywhere in it, functions included, as dotted names."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in modules() else node.module)
    return found


def touched_names(path):
    """The names of DSPy and MLflow that a file touches and that no documentation of theirs has: ``module:name``."""
    tree = parse(path)
    imported = dict(_imported_names(tree))
    names = {dotted: tuple(dotted.rsplit(".", 1)) for dotted in imported.values() if "." in dotted}
    for owner, attribute in _attributes(tree):
        if _is_module(imported.get(owner)):
            names[f"{imported[owner]}.{attribute}"] = (imported[owner], attribute)
    return {
        f"{module}:{name}"
        for dotted, (module, name) in names.items()
        if not (is_public(dotted) or (is_public(module) and not name.startswith("_")))
    }


def _imported_names(tree):
    """What a file imports of DSPy and MLflow: the name it gets here, and its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            # ``import a.b`` binds ``a``, but code says ``a.b``.
            yield from ((alias.asname or alias.name, alias.name) for alias in node.names if is_foreign(alias.name))
        elif isinstance(node, ast.ImportFrom) and is_foreign(node.module):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _attributes(tree):
    """Each attribute that a file asks for, by dot or by ``getattr``: the text before the dot, and the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr", "setattr"}:
            owner, name = node.args[:2]
            yield from [(ast.unparse(owner), str(name.value))] if isinstance(name, ast.Constant) else ()


@functools.cache
def _is_module(name):
    try:
        return name is not None and importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def private_attributes(path):
    """The attributes with a leading underscore that a file reads or sets on anything but ``self`` and ``cls``."""
    return {name for owner, name in _attributes(parse(path)) if _is_private(name) and owner not in {"self", "cls"}}


@functools.cache
def own_private_names():
    """The private names that the package itself defines anywhere."""
    found = set()
    for path in modules().values():
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.update({node.attr} if ast.unparse(node.value) in {"self", "cls"} else ())
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return {name for name in found if _is_private(name)}


def _is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in {"_replace", "_asdict"}  # NamedTuple's
