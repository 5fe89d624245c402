"""Reads the package's own source: who imports what, and which names of DSPy and MLflow are touched."""

import ast
import functools
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import dspy_mlflow_async
from dspy_mlflow_async.seams import check
from dspy_mlflow_async.seams.listed import SEAMS

PACKAGE = "dspy_mlflow_async"
# The installed files, so that what is read is what is tested: in tox the wheel, not the tree.
ROOT = Path(dspy_mlflow_async.__file__).parent
TREE = Path(__file__).parents[2]
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

NAMED_TUPLE = ("_asdict", "_fields", "_replace")  # documented, for all their underscores


@functools.cache
def pyproject():
    return tomllib.loads((TREE / "pyproject.toml").read_text(encoding="utf-8"))


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


def attributes_of_instances(node):
    """The attributes that a class gives its instances: fields, slots, and whatever is assigned to on ``self``."""
    fields = {
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign)
        and isinstance(each.target, ast.Name)
        and "ClassVar" not in ast.unparse(each.annotation)
    }
    slots = {
        text.value
        for each in node.body
        if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "__slots__"
        for text in ast.walk(each.value)
        if isinstance(text, ast.Constant)
    }
    assigned = {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and ast.unparse(each.value) == "self"
    }
    return fields | slots | assigned


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
    """The private names of others that a file reads, sets or passes as keywords, on anything but ``self`` and ``cls``.

    A name is ours where the same file defines it, or where it is asked of a module of ours.
    """
    tree = parse(path)
    own = set(_defined_names(tree))
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == PACKAGE
        for alias in node.names
    }
    asked = {name for owner, name in _attributes(tree) if owner not in {"self", "cls", *ours}}
    passed = {word.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords if word.arg}
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] not in {PACKAGE, "__future__"}
        for alias in node.names
    }
    return {name for name in asked | passed | imported if _is_private(name)} - own


def taken_private_names(path):
    """The private names of other files of ours that a file imports, or asks of the modules and classes it imports."""
    tree = parse(path)
    imports = [
        alias
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == PACKAGE
        for alias in node.names
    ]
    ours = {alias.asname or alias.name for alias in imports}
    asked = {f"{owner}.{name}" for owner, name in _attributes(tree) if owner in ours and _is_private(name)}
    return asked | {alias.name for alias in imports if _is_private(alias.name)}


@functools.cache
def private_names():
    """Every name with an underscore that the package defines, by itself: not one that it has of DSPy or MLflow."""
    theirs = {seam.path.replace(":", ".").rpartition(".")[2] for seam in SEAMS}
    return {name for path in modules().values() for name in _defined_names(parse(path)) if _is_private(name)} - theirs


def reached_inside(path):
    """The private names of ours that a test reads, sets or patches, and that it does not define itself."""
    tree = parse(path)
    asked = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in private_names():
            owner = ast.unparse(node.value)
            asked |= {node.attr} if owner not in {"self", "cls"} and not owner.startswith("dspy.") else set()
        elif isinstance(node, ast.Call):  # `monkeypatch.setattr(owner, "_name", ...)`
            asked |= {each.value for each in node.args[1:2] if isinstance(each, ast.Constant)}
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == PACKAGE:
            asked |= {alias.name for alias in node.names}
    return sorted(asked & private_names() - set(_defined_names(tree)))


@functools.cache
def used_names():
    """Every name that the package's source reads anywhere, also as a text that is one (`__getattr__`, `getattr`)."""
    found = set()
    for path in modules().values():
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                found.add(node.value)
            elif isinstance(node, ast.alias) and node.asname:  # it goes on under another name
                found.add(node.name)
    return found


def functions_and_classes(path):
    """The names of all functions, methods and classes that a file defines, and of the constants of the module."""
    tree = parse(path)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])  # of an assignment, with a type or without
        yield from (each.id for target in targets if target for each in ast.walk(target) if isinstance(each, ast.Name))


def private_modules(path):
    """The modules of others with a private part in their dotted name that a file imports."""
    modules_ = imported_modules(path, str(path))
    return {name for name in modules_ if any(map(_is_private, name.split("."))) and _is_of_others(name)}


@functools.cache
def inherited_names():
    """Private names that a class of ours has from a class of theirs: ``Base._name``, and the file that uses them.

    Methods that are overridden, attributes that are set over theirs, and whatever ``self`` is asked for.
    """
    found = set()
    for name, path in modules().items():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef) and node.bases:
                cls = getattr(importlib.import_module(name), node.name, None)
                if inspect.isclass(cls):
                    found.update((f"{base.__qualname__}.{used}", name) for used, base in _inherited(cls, node))
    return found


def _inherited(cls, node):
    theirs = [base for base in cls.__mro__ if _is_of_others(base.__module__)]
    used = {name for owner, name in _attributes(node) if owner in {"self", "cls", "super()"}} | set(
        _defined_names(node)
    )
    for name in sorted(filter(_is_private, used)):
        # The class nearest to ours that has it: what it inherits itself is its own affair.
        base = next((base for base in theirs if check.has_attribute(base, name)), None)
        if base is not None:
            yield name, base


def _is_of_others(module):
    root = module.partition(".")[0]
    return root != PACKAGE and root not in sys.stdlib_module_names


def _defined_names(tree):
    """The names that a piece of source defines: functions, classes, variables, and attributes of ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) in {"self", "cls"} else ()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def _is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in {"_", *NAMED_TUPLE}
