"""Check of the undocumented names of DSPy and MLflow that this package touches, each with its reason.

``dspy-mlflow-async doctor`` shows which of them the installed versions have. It imports the standard library alone,
so that it can still speak where a name has gone.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import CodeType
from typing import Any

from dspy_mlflow_async.seams.check_samples import instance_of


@dataclass(frozen=True, slots=True)
class Seam:
    """Name that is not ours, with the reason we need it.

    Attributes:
        path: ``module:name`` or ``module:Class.attribute``.
        reason: What it is used for.
        is_optional: Whether everything works without it, because some supported version lacks it.
        shape: What we do with it, as ``(a, b, key=) .attribute``: how we call it, and which attributes it must have.
            With ``?`` before it, it may also be None; ``|`` stands between the shapes of different versions.
        is_feature: Whether only what it is for is lost without it. Of the others, that are not optional either,
            nothing can be traced without any.
    """

    path: str
    reason: str
    is_optional: bool = False
    shape: str = ""
    is_feature: bool = False

    @property
    def module(self) -> str:
        """Module that it is in."""
        return self.path.partition(":")[0]

    @property
    def is_present(self) -> bool:
        """Return whether the installed version has it."""
        return _exists(self.path)

    def value_or(self, otherwise: Any) -> Any:
        """Return the object at the path, or ``otherwise`` where it is not as we know it."""
        value = _find(self.path)
        return value if value is not _ABSENT and fits(value, self.shape) else otherwise

    @property
    def fault(self) -> str | None:
        """Say in two words what is wrong with it; None where it is as we know it, or where nobody can say."""
        value = _find(self.path, on_instance=not self.shape.startswith("("))
        if value is _ABSENT:
            return "has gone" if not self.is_present and self.needs is None else None
        return None if fits(value, self.shape) else "has changed"

    @property
    def needs(self) -> str | None:
        """Return the package whose absence keeps the module from being imported, so that nobody can say what is in it.

        MLflow imports some packages only for what they are for, such as psutil. None where the module can be imported,
        or is itself what is missing.
        """
        module, _, names = self.path.partition(":")
        return _needed_by(module) or _needed_by(f"{module}.{names}", may_be_no_module=True)


def _needed_by(module: str, *, may_be_no_module: bool = False) -> str | None:
    """Return what a module cannot be imported without."""
    root = module.partition(".")[0]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if may_be_no_module and module.startswith(error.name or ""):
            return None
        missing_root = (error.name or "").partition(".")[0]
        return missing_root if missing_root != root else _whole_of(root)
    except ImportError:
        return _whole_of(root)
    return None


def _whole_of(root: str) -> str | None:
    """Return the distribution that brings all of a package, where only a part of it is installed."""
    if root != "mlflow":
        return None
    try:
        version(root)
    except PackageNotFoundError:
        return root
    return None


@dataclass(frozen=True, slots=True)
class Fault:
    """Name that is not as we know it.

    Attributes:
        seam: The name.
        text: "has gone" or "has changed".
    """

    seam: Seam
    text: str

    @property
    def matters(self) -> bool:
        """Return whether anything is lost. What may be absent is not missed; if it is other than we know, it is off."""
        return not self.seam.is_optional or self.text != "has gone"

    def __str__(self) -> str:
        """Say what has happened to which name, and what it was for."""
        return f"{self.seam.path} {self.text} (it {self.seam.reason})"


def faults(seams: Iterable[Seam]) -> list[Fault]:
    """Return those of the seams that are not as we know them, and that are missed."""
    found = (Fault(seam, text) for seam in seams if (text := seam.fault) is not None)
    return [fault for fault in found if fault.matters]


def fits(value: Any, shape: str) -> bool:
    """Return whether a value can be used as a shape says, see ``Seam``."""
    if "|" in shape:
        return any(fits(value, each.strip()) for each in shape.split("|"))
    if shape.startswith("?") and value is None:
        return True
    call, has_call, names = shape.removeprefix("?").rpartition(")")
    if any(not hasattr(value, name) for name in names.replace(".", " ").split()):
        return False
    if not has_call:
        return True
    if not callable(value):
        return False
    arguments = call.removeprefix("(").replace(",", " ").split()
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # of C's making, and of no signature
        return True
    try:
        signature.bind(
            *(None for each in arguments if not each.endswith("=")),
            **{each.removesuffix("="): None for each in arguments if each.endswith("=")},
        )
    except TypeError:
        return False
    return True


_ABSENT = object()


def _find(path: str, *, on_instance: bool = False) -> Any:
    """Find the object at a path, on a class or on an instance of it, as far as one can be had."""
    module, _, names = path.partition(":")
    owner_names, _, last = names.rpartition(".")
    try:
        value = importlib.import_module(module)
        for name in owner_names.split(".") if owner_names else ():
            value = getattr(value, name)
        if on_instance and inspect.isclass(value):
            instance = instance_of(f"{module}:{owner_names}")
            value = value if instance is None else instance
        return getattr(value, last)
    except ImportError:
        return _ABSENT
    except AttributeError:
        return _submodule(f"{module}.{names}")


def _submodule(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return _ABSENT


def missing(seams: Iterable[Seam]) -> list[Seam]:
    """Return those of the seams that the installed DSPy and MLflow do not have."""
    return [seam for seam in seams if not seam.is_present and seam.needs is None]


def _exists(path: str) -> bool:
    module, _, names = path.partition(":")
    try:
        owner = importlib.import_module(module)
    except ImportError:
        return False
    *above, last = names.split(".")
    for name in above:
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return has_attribute(owner, last) or _is_module(f"{module}.{names}")


def has_attribute(owner: Any, name: str) -> bool:
    """Return whether a module, a class or the instances of a class have an attribute."""
    return hasattr(owner, name) or (inspect.isclass(owner) and _uses(owner, name))


def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _uses(owner: type, name: str) -> bool:
    """Return whether the methods of a class or of its bases speak of an attribute that only its instances have."""
    functions = (value for base in owner.__mro__ for value in vars(base).values())
    return any(name in _names(code) for code in map(_code, functions) if code is not None)


def _code(value: Any) -> CodeType | None:
    return getattr(inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value))), "__code__", None)


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))
